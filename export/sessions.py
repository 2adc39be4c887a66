"""Sessions of ONNX Runtime: which providers load here, with what settings, and what a graph that cannot run says."""

from pathlib import Path
from typing import Any

from export.graph_cache import cached_session
from slmrec.errors import ArtifactError, ConfigError
from slmrec.machine import has_vnni


def loadable_providers() -> list[str]:
    """Providers whose libraries load here, which is fewer than ONNX Runtime was compiled with."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "probe", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8).SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return [
        provider
        for provider in ort.get_available_providers()
        if provider in ort.InferenceSession(model, options, providers=[provider]).get_providers()
    ]


def session_options(threads: int) -> Any:
    """Settings of every ONNX Runtime session here."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not has_vnni():  # older instructions add pairs of 8-bit products in 16 bits, which can overflow
        options.add_session_config_entry("session.x64quantprecision", "1")
        # what does so cannot take layers rounded by themselves, as engines have them: these compute in fp32 instead
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def open_session(graph: Path, provider: str, threads: int, cache: Path | None = None) -> Any:
    """An ONNX Runtime session that runs on the provider asked for, from the cache's optimised copy where one is given.

    Raises:
        ArtifactError: ONNX Runtime cannot load the graph.
        ConfigError: ONNX Runtime is not installed, or another provider would run.
    """
    try:
        import onnxruntime as ort
    except ImportError:
        raise ConfigError("ONNX Runtime is not installed", remedy="pip install 'slmcompress[cpu]' (or [gpu])") from None
    if provider not in ort.get_available_providers():
        raise ConfigError(
            f"{provider} was asked for; this ONNX Runtime has {', '.join(ort.get_available_providers())}",
            remedy="--device cpu, or pip install 'slmcompress[gpu]' (see slmcompress doctor)",
        )
    if cache is None or provider != "CPUExecutionProvider":  # an optimised graph is one provider's
        session = _loaded(graph, session_options(threads), provider)
    else:
        session = cached_session(
            graph, cache, lambda: session_options(threads), lambda path, options: _loaded(path, options, provider)
        )
    if session.get_providers()[0] != provider:
        raise ConfigError(
            f"{provider} was asked for, but {session.get_providers()[0]} would run", remedy="slmcompress doctor"
        )
    return session


def _loaded(graph: Path, options: Any, provider: str) -> Any:
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    broken = (state.Fail, state.InvalidGraph, state.InvalidProtobuf, state.NoSuchFile, state.InvalidArgument)
    try:
        return ort.InferenceSession(str(graph), options, providers=[provider])
    except (*broken, state.NotImplemented, state.RuntimeException) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(
            f"ONNX Runtime cannot load {graph}: {reason}", remedy="slmcompress export --force"
        ) from None

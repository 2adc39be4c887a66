"""A TensorRT engine as a recommender: numpy, TensorRT and NVIDIA's CUDA bindings, no PyTorch.

Never run on a GPU so far; what it is built of is tested as far as a machine without one allows.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.build_engine import SUFFIX, BuildError, load
from export.engine_files import ENGINE_FOLDER, read_engines
from export.runtime import GRAPH_FILE, OnnxRecommender
from slmrec.errors import ArtifactError, ConfigError
from slmrec.recommender import Histories
from slmrec.roofline import Work

DTYPES = {"INT64": np.int64, "FLOAT": np.float32, "BOOL": np.bool_, "INT32": np.int32}
MOST_GRAPHS = 64
"""CUDA graphs kept, the latest used; each belongs to one set of shapes."""


class TensorRTRecommender(OnnxRecommender):
    """An engine folder, answered by its engine; batches, widths and exclusions are the graph runtime's.

    Args:
        folder: of an engine, as `export --trt` makes it.
        trusted: an engine is code of the device: one that came in a bundle is loaded only where its signature was
            checked (`verify --key`), or whoever calls trusts it otherwise.

    Raises:
        ArtifactError: the folder holds no engine for this device.
        ConfigError: no driver, TensorRT or CUDA bindings, or a bundle that is not trusted.
    """

    def __init__(self, folder: Path, *, trusted: bool = False) -> None:
        if (folder / "SHA256SUMS").exists() and not trusted:
            raise ConfigError(
                f"{folder} is a bundle, whose engines are code from elsewhere",
                remedy="slmcompress verify --key, and TensorRTRecommender(folder, trusted=True)",
            )
        self._engines = read_engines(folder)["engines"]
        super().__init__(folder)

    def load(self, graph: str) -> Any:
        """The engine instead of the graph `recommend`; other graphs have none."""
        if graph != GRAPH_FILE:
            raise ConfigError(f"{graph} has no engine", remedy="--device cpu, whose graphs rerank and append")
        engine = fitting_engine(self._engines, Cuda().compute_capability(), self.folder)
        return EngineSession(self.folder / engine["file"], engine)

    def work(self, histories: Histories) -> Work:
        """That of the graph the engine was built of."""
        return OnnxRecommender(self.folder / ENGINE_FOLDER).work(histories)


def fitting_engine(engines: Sequence[Mapping[str, Any]], device: str, folder: Path) -> Mapping[str, Any]:
    """The engine for a compute capability: built for it, for no device by name, or compatible with it.

    Raises:
        ArtifactError: there is none.
    """
    for engine in engines:
        built_for = engine["compute_capability"]
        if built_for in (None, device):
            return engine
        if engine["hardware_compat"] == "ampere_plus" and _number(device) >= _number(built_for) >= (8, 0):
            return engine
    if not engines:
        raise ArtifactError(f"{folder} holds no engine", remedy="slmcompress export --trt on a machine with a GPU")
    built = ", ".join(str(engine["compute_capability"]) for engine in engines)
    raise ArtifactError(
        f"{folder} has engines for {built}; this GPU is {device}",
        remedy=f"slmcompress export --trt --compute-capability {device} --force",
    )


def _number(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))


class EngineSession:
    """An engine that is called as an ONNX Runtime session is; one request at a time.

    Inputs are copied to the device, outputs back, nothing between. A request of shapes seen before is run once more and
    recorded as a CUDA graph; further ones replay it. Where recording fails the engine runs without.
    """

    def __init__(self, plan: Path, engine: Mapping[str, Any]) -> None:
        try:
            self._trt = load(engine["flavor"])
        except BuildError as error:
            raise ConfigError(str(error), remedy="slmcompress doctor") from None
        if plan.suffix != SUFFIX[engine["flavor"]]:
            raise ArtifactError(f"{plan} is no engine of {engine['flavor']}", remedy="export --trt again")
        self._cuda = Cuda()
        self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.ERROR))
        self._runtime.engine_host_code_allowed = bool(engine["version_compatible"])
        self._engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        if self._engine is None:
            raise ArtifactError(
                f"{plan} does not load here: another TensorRT version or device",
                remedy="build it again on this machine",
            )
        self._context = self._engine.create_execution_context()
        self._stream = self._cuda.call("cudaStreamCreate")
        self._one_at_a_time = threading.Lock()
        self._buffers: dict[str, tuple[int, int]] = {}
        self._recorded: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._last: tuple[Any, ...] | None = None
        self._records = engine["flavor"] == "tensorrt"  # TensorRT-RTX allocates while it runs

    def run(self, outputs: Sequence[str], request: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Outputs by name, for inputs by name; shapes within the engine's profile."""
        with self._one_at_a_time:
            self._prepare(request)
            shapes = tuple((name, array.shape) for name, array in sorted(request.items()))
            found = {name: self._empty(name) for name in outputs}
            self._cuda.copy_in(self._buffers, request, self._stream)
            if shapes in self._recorded:
                self._recorded.move_to_end(shapes)
                self._cuda.call("cudaGraphLaunch", self._recorded[shapes], self._stream)
            else:
                self._execute()
                if self._records and shapes == self._last:  # no change of shapes since the last run: it may be recorded
                    self._record(shapes)
            self._last = shapes
            self._cuda.copy_out(found, self._buffers, self._stream)
            self._cuda.call("cudaStreamSynchronize", self._stream)
            return [found[name] for name in outputs]

    def _prepare(self, request: Mapping[str, np.ndarray]) -> None:
        for name, array in request.items():
            if not self._context.set_input_shape(name, array.shape):
                limits = [tuple(shape) for shape in self._engine.get_tensor_profile_shape(name, 0)]
                raise ConfigError(
                    f"{name} of shape {array.shape} is outside the engine's profile {limits}",
                    remedy="export --trt with larger --max-shapes",
                )
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            needed = max(1, int(np.prod(tuple(self._context.get_tensor_shape(name)))) * self._dtype(name).itemsize)
            address, room = self._buffers.get(name, (0, 0))
            if room < needed:
                if address:
                    self._cuda.call("cudaFree", address)
                self._buffers[name] = (self._cuda.call("cudaMalloc", needed), needed)
                self._forget()  # recorded addresses are gone
            self._context.set_tensor_address(name, self._buffers[name][0])

    def _empty(self, name: str) -> np.ndarray:
        return np.empty(tuple(self._context.get_tensor_shape(name)), dtype=self._dtype(name))

    def _dtype(self, name: str) -> np.dtype:
        return np.dtype(DTYPES[self._engine.get_tensor_dtype(name).name])

    def _execute(self) -> None:
        if not self._context.execute_async_v3(int(self._stream)):
            raise ArtifactError("the engine failed to run", remedy="slmcompress verify, and build it again")

    def _record(self, shapes: tuple[Any, ...]) -> None:
        mode = self._cuda.runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._cuda.call("cudaStreamBeginCapture", self._stream, mode)
        ran = self._context.execute_async_v3(int(self._stream))
        graph = self._cuda.call("cudaStreamEndCapture", self._stream)
        if not ran or graph is None:
            self._records = False
            return
        self._recorded[shapes] = self._cuda.call("cudaGraphInstantiate", graph, 0)
        self._cuda.call("cudaGraphDestroy", graph)
        if len(self._recorded) > MOST_GRAPHS:
            self._cuda.call("cudaGraphExecDestroy", self._recorded.popitem(last=False)[1])

    def _forget(self) -> None:
        for recorded in self._recorded.values():
            self._cuda.call("cudaGraphExecDestroy", recorded)
        self._recorded.clear()
        self._last = None


class Cuda:
    """NVIDIA's runtime, whose calls give an error code first.

    Raises:
        ConfigError: its bindings are not installed.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError:
            raise ConfigError(
                "NVIDIA's CUDA bindings are not installed", remedy="pip install 'slmcompress[trt]' on a GPU machine"
            ) from None
        self.runtime: Any = runtime

    def call(self, name: str, *arguments: Any) -> Any:
        """A runtime function's result.

        Raises:
            ConfigError: it failed.
        """
        code, *found = getattr(self.runtime, name)(*arguments)
        if int(code) != 0:
            raise ConfigError(f"{name} failed: {code.name}", remedy="slmcompress doctor")
        return found[0] if found else None

    def compute_capability(self) -> str:
        """Of the device in use."""
        kinds = self.runtime.cudaDeviceAttr
        device = self.call("cudaGetDevice")
        parts = (kinds.cudaDevAttrComputeCapabilityMajor, kinds.cudaDevAttrComputeCapabilityMinor)
        return ".".join(str(self.call("cudaDeviceGetAttribute", part, device)) for part in parts)

    def copy_in(self, buffers: Mapping[str, tuple[int, int]], arrays: Mapping[str, np.ndarray], stream: Any) -> None:
        """Host to device, in the stream's order."""
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        for name, array in arrays.items():
            if array.nbytes:
                whole = np.ascontiguousarray(array)
                self.call("cudaMemcpyAsync", buffers[name][0], whole.ctypes.data, whole.nbytes, kind, stream)

    def copy_out(self, arrays: Mapping[str, np.ndarray], buffers: Mapping[str, tuple[int, int]], stream: Any) -> None:
        """Device to host, in the stream's order."""
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        for name, array in arrays.items():
            self.call("cudaMemcpyAsync", array.ctypes.data, buffers[name][0], array.nbytes, kind, stream)

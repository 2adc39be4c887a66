#!/usr/bin/env python3
"""Build a TensorRT engine from the ONNX graph beside this file; needs TensorRT's Python package and nothing else.

    python build_engine.py --output DIR        # DIR/model.plan, for the GPU that is here
    python build_engine.py --output DIR --flavor rtx --compute-capability 8.9

What is built stands in `recipe.json`: precision (placed in the graph), profiles, scratch memory, compatibility. What
was asked for is read back from the parsed network, the build settings and, where a GPU is present, the engine itself.
"""

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

RECIPE = "recipe.json"
MODULES = {"tensorrt": ("tensorrt",), "rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
"""Modules of each flavour, the first that is there."""
SUFFIX = {"tensorrt": ".plan", "rtx": ".rtx"}
INSTALL = {
    "tensorrt": "pip install tensorrt (on a machine with an NVIDIA GPU)",
    "rtx": "pip install tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs",
}
MIB = 2**20


class BuildError(Exception):
    """An engine that cannot be built here, or is not what was asked for."""


def load(flavor: str) -> Any:
    """The Python module of a flavour.

    Raises:
        BuildError: it is not installed, or its libraries do not load.
    """
    for name in MODULES[flavor]:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except ImportError as error:
            raise BuildError(f"{name} is installed but does not load: {error}") from None
    raise BuildError(f"{MODULES[flavor][-1]} is not installed; try: {INSTALL[flavor]}")


def build(trt: Any, graph: Path, recipe: dict[str, Any], device: str | None = None) -> tuple[bytes, dict[str, Any]]:
    """Parse, build and read back.

    Args:
        trt: the module of the recipe's flavour.
        graph: the ONNX file, its data beside it.
        recipe: what `recipe.json` holds.
        device: compute capability such as "8.0"; None = the GPU that is here.

    Returns:
        The engine, and what was read back of it.

    Raises:
        BuildError: a node that the parser refuses, by its name; a device that cannot be built for here; an engine that
            is not what was asked for.
    """
    logger = _Logger(trt)
    builder = trt.Builder(logger.own)
    if builder is None:
        raise BuildError(f"no builder: {logger.last}")
    network, parser = parsed(trt, builder, logger, graph)
    config = _settings(trt, builder, recipe, device)
    profile = builder.create_optimization_profile()
    for name, shapes in recipe["profile"].items():
        profile.set_shape(name, *(tuple(shape) for shape in shapes))
    config.add_optimization_profile(profile)
    cache = _timing_cache(config, recipe.get("timing_cache"))
    here = compute_capability()
    start = time.perf_counter()
    plan = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - start
    if plan is None:
        raise BuildError(f"the build failed: {logger.last}")
    if cache is not None:
        write(cache, bytes(config.get_timing_cache().serialize()))
    found = read_back(trt, network, config, profile, recipe)
    engine = bytes(plan)
    del parser  # weights lived in it until the build was done
    found |= _of_engine(trt, logger, engine, recipe)
    _require_what_was_asked(found, recipe, device)
    built_for = device if device is not None else here if recipe_flavor(trt) == "tensorrt" else None
    found["compute_capability"] = built_for
    return engine, found | {"build_s": round(seconds, 2), "size_bytes": len(engine), "version": trt.__version__}


def parsed(trt: Any, builder: Any, logger: Any, graph: Path) -> tuple[Any, Any]:
    """The network of an ONNX file, strongly typed (precision is what the graph says), and the parser it lives by."""
    flags = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flags is None else 1 << int(flags))
    parser = trt.OnnxParser(network, logger.own)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(number) for number in range(parser.num_errors)]
        named = [f"node {error.node_name()!r} ({error.node_operator()}): {error.desc()}" for error in errors]
        raise BuildError(f"{graph.name} is refused by TensorRT's parser: " + "; ".join(named[:3] or [logger.last]))
    return network, parser


def read_back(trt: Any, network: Any, config: Any, profile: Any, recipe: dict[str, Any]) -> dict[str, Any]:
    """What the network, the settings and the profile say: precision, shapes, device, flags."""
    products: dict[str, int] = {}
    rounded: dict[str, int] = {}
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        if layer.type == trt.LayerType.MATRIX_MULTIPLY:
            kind = layer.get_input(0).dtype.name
            products[kind] = products.get(kind, 0) + 1
        elif layer.type == trt.LayerType.QUANTIZE:
            kind = layer.get_output(0).dtype.name
            rounded[kind] = rounded.get(kind, 0) + 1
    found: dict[str, Any] = {
        "products": products,
        "rounded": rounded,
        "profile": {name: [list(shape) for shape in profile.get_shape(name)] for name in recipe["profile"]},
        "hardware_compat": config.hardware_compatibility_level.name.lower(),
        "version_compatible": bool(config.get_flag(trt.BuilderFlag.VERSION_COMPATIBLE)),
        "workspace": config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) // MIB,
        "tf32": bool(config.get_flag(trt.BuilderFlag.TF32)),
        "outputs": {
            network.get_output(number).name: network.get_output(number).dtype.name
            for number in range(network.num_outputs)
        },
    }
    if hasattr(config, "get_compute_capability") and config.num_compute_capabilities:
        found["device"] = config.get_compute_capability(0).name
    return found


def _settings(trt: Any, builder: Any, recipe: dict[str, Any], device: str | None) -> Any:
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # item scores are fp32, not 10 bits of it
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if recipe.get("workspace"):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, recipe["workspace"] * MIB)
    if recipe.get("version_compatible"):
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    level = recipe.get("hardware_compat", "none").upper()
    if level != "NONE":
        levels = trt.HardwareCompatibilityLevel.__members__
        if level not in levels:
            raise BuildError(f"hardware_compat={level.lower()} is not known to this TensorRT ({', '.join(levels)})")
        config.hardware_compatibility_level = levels[level]
    if device is None:
        return config
    name = "SM" + device.replace(".", "")
    if not hasattr(trt, "ComputeCapability"):
        if device == compute_capability():
            return config
        raise BuildError(f"TensorRT builds for the GPU that is here ({compute_capability()}), not for {device}")
    known = trt.ComputeCapability.__members__
    if name not in known:
        possible = ", ".join(one for one in known if one.startswith("SM"))
        raise BuildError(f"this TensorRT does not build for compute capability {device}, only for {possible}")
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(known[name], 0):
        raise BuildError(f"this TensorRT refuses compute capability {device}")
    return config


def _timing_cache(config: Any, path: str | None) -> Path | None:
    if path is None:
        return None
    file = Path(path)
    if not file.parent.is_dir():
        raise BuildError(f"{file.parent} is no folder for a timing cache")
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        raise BuildError(f"{file} is a timing cache of another device or version; name another file")
    return file


def _of_engine(trt: Any, logger: Any, engine: bytes, recipe: dict[str, Any]) -> dict[str, Any]:
    """What the engine says of itself; nothing where there is no driver that could load it."""
    if not has_driver():
        return {"engine": None}
    runtime = trt.Runtime(logger.own)
    runtime.engine_host_code_allowed = bool(recipe.get("version_compatible"))
    loaded = runtime.deserialize_cuda_engine(engine)
    if loaded is None:  # TensorRT-RTX may be newer than the driver; TensorRT has just used it
        if recipe_flavor(trt) == "tensorrt":
            raise BuildError(f"the engine does not load where it was built: {logger.last}")
        return {"engine": None}
    shapes = {name: [list(one) for one in loaded.get_tensor_profile_shape(name, 0)] for name in recipe["profile"]}
    level = loaded.hardware_compatibility_level.name.lower()
    return {"engine": {"profile": shapes, "hardware_compat": level, "num_layers": loaded.num_layers}}


def driver() -> Any:
    """NVIDIA's driver library; None where there is none."""
    import ctypes

    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def has_driver() -> bool:
    """Whether NVIDIA's driver is here."""
    return driver() is not None


def compute_capability() -> str | None:
    """Of the first GPU, such as "9.0"; None without one."""
    import ctypes

    cuda, device, value = driver(), ctypes.c_int(), ctypes.c_int()
    if cuda is None or cuda.cuInit(0) != 0 or cuda.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    parts = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) != 0:
            return None
        parts.append(str(value.value))
    return ".".join(parts)


def recipe_flavor(trt: Any) -> str:
    """Which flavour a module is."""
    return "tensorrt" if trt.__name__ == "tensorrt" else "rtx"


def write(path: Path, content: bytes) -> None:
    """Write beside the place and rename."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _require_what_was_asked(found: dict[str, Any], recipe: dict[str, Any], device: str | None) -> None:
    asked = {name: recipe["expected"][name] for name in ("products", "rounded")}
    asked |= {"profile": recipe["profile"], "hardware_compat": recipe.get("hardware_compat", "none")}
    asked |= {"version_compatible": bool(recipe.get("version_compatible")), "tf32": False}
    if recipe.get("workspace"):
        asked["workspace"] = recipe["workspace"]
    if device is not None:
        asked["device"] = "SM" + device.replace(".", "")
    said = dict(found)
    if found["engine"] is not None:
        said |= {"profile": found["engine"]["profile"], "hardware_compat": found["engine"]["hardware_compat"]}
    for name, wanted in asked.items():
        if said.get(name) != wanted:
            raise BuildError(f"{name} was to be {wanted}, and is {said.get(name)}")


class _Logger:
    """Keeps the newest error, which a failed build does not say otherwise."""

    def __init__(self, trt: Any) -> None:
        outer, self.last = self, "no reason given"

        class Own(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                    outer.last = message

        self.own = Own()


def main() -> int:
    """Build what `recipe.json` says, for one device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a folder that exists, outside the bundle")
    parser.add_argument("--flavor", choices=list(MODULES), default="tensorrt")
    parser.add_argument("--compute-capability", help="default: the GPU that is here; rtx: all it supports")
    arguments = parser.parse_args()
    here = Path(__file__).resolve().parent
    recipe = json.loads((here / RECIPE).read_text(encoding="utf-8"))
    try:
        _require_place(arguments.output, here)
        trt = load(arguments.flavor)
        engine, found = build(trt, here / "model.onnx", recipe, arguments.compute_capability)
        target = arguments.output / f"model{SUFFIX[arguments.flavor]}"
        write(target, engine)
    except (BuildError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"file": str(target), **found}, indent=2))
    return 0


def _require_place(output: Path, here: Path) -> None:
    """A bundle with another file does not verify any more."""
    if not output.is_dir():
        raise BuildError(f"{output} is no folder; make it first")
    if output.resolve().is_relative_to(here.parent):
        raise BuildError(f"{output} is inside what was handed over; try: --output with a folder beside it")


if __name__ == "__main__":
    sys.exit(main())

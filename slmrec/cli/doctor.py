"""doctor: what this machine can build and run, and the remedy for what is missing."""

import ctypes
import importlib
import importlib.util
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import click

from slmrec.cli.loading import provider_of
from slmrec.cli.options import common_options, print_result, runs_folder


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    name: str
    found: str
    ok: bool
    remedy: str = ""
    absent: bool = False
    """Not here, and not needed for what most people do."""


OPTIONAL = {
    "onnxruntime": ("run ONNX graphs", "pip install 'slmcompress[cpu]' (or [gpu])"),
    "bitsandbytes": ("LLM.int8 checkpoints", "pip install 'slmcompress[bnb]'"),
    "tensorrt": ("TensorRT engines", "pip install 'slmcompress[trt]' on a machine with an NVIDIA GPU"),
    "tensorrt_rtx_bindings": ("TensorRT-RTX engines", "pip install 'slmcompress[rtx]'"),
    "uvicorn": ("slmcompress serve", "pip install 'slmcompress[serve]'"),
    "ray": ("recommend --engine ray", "pip install 'slmcompress[ray]'"),
    "cryptography": ("bundle --sign, verify --key", "pip install 'slmcompress[sign]'"),
}  # fmt: skip


ORT_TENSORRT = 10
"""Major version of TensorRT that onnxruntime-gpu is linked with (1.31)."""


@click.command()
@common_options
def doctor(as_json: bool, device: str, **_: Any) -> None:
    """Say what this machine can build and run: versions, providers, processor, disk."""
    findings = [
        *_required(), *_optional(), _providers(device), _driver(device), _gpu(device), *_engines(), *_mismatches(),
        _processor(), _disk(),
    ]  # fmt: skip
    result = {"ok": all(finding.ok for finding in findings), "findings": [asdict(finding) for finding in findings]}
    print_result(result, "\n".join(_line(finding) for finding in findings), as_json=as_json)


def _line(finding: Finding) -> str:
    mark = "missing" if not finding.ok else "absent " if finding.absent else "ok     "
    return f"{mark}  {finding.name:<24} {finding.found}" + (f"\n{'':<9}Try: {finding.remedy}" if finding.remedy else "")


def _required() -> list[Finding]:
    found = []
    for name in ("slmcompress", "torch", "transformers", "accelerate", "peft", "onnx", "polars"):
        version = _version(name)
        found.append(
            Finding(name, version or "not installed", version is not None, "" if version else f"pip install {name}")
        )
    return found


def _optional() -> list[Finding]:
    found = []
    for module, (use, remedy) in OPTIONAL.items():
        present = importlib.util.find_spec(module) is not None
        needed = module == "onnxruntime"
        text = f"{_version(module) or 'installed'} ({use})" if present else f"not installed ({use})"
        found.append(Finding(module, text, present or not needed, "" if present else remedy, absent=not present))
    return found


def _version(name: str) -> str | None:
    dashed = name.replace("_", "-").replace("tensorrt-rtx", "tensorrt-rtx-cu13")
    for distribution in (name, f"{name}-gpu", dashed):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def _providers(device: str) -> Finding:
    """Providers that really load, which is not what the package says it was compiled with."""
    needed = provider_of(device)
    if importlib.util.find_spec("onnxruntime") is None:
        return Finding("onnxruntime providers", "none", ok=False, remedy=OPTIONAL["onnxruntime"][1])
    from export.sessions import loadable_providers

    loaded = loadable_providers()
    remedy = "" if needed in loaded else "pip install 'slmcompress[gpu]', and remove the package onnxruntime"
    return Finding("onnxruntime providers", ", ".join(loaded), ok=needed in loaded, remedy=remedy)


def _gpu(device: str) -> Finding:
    import torch

    if not torch.cuda.is_available():
        text = "none that PyTorch can use; everything runs on the processor"
        return Finding("GPU", text, ok=device != "cuda", remedy=_for_cuda(device), absent=True)
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"{torch.cuda.get_device_name(index)} (compute capability {major}.{minor})")
    return Finding("GPU", ", ".join(names), ok=True)


def _for_cuda(device: str) -> str:
    """The remedy where --device cuda asked for what is not here."""
    return "a machine with an NVIDIA GPU and its driver, or --device cpu" if device == "cuda" else ""


def _driver(device: str) -> Finding:
    """NVIDIA's driver, and the newest CUDA it runs."""
    from export.build_engine import driver as load_driver

    driver = load_driver()
    if driver is None:
        text = "none (needed for CUDA and to run engines)"
        return Finding("NVIDIA driver", text, ok=device != "cuda", remedy=_for_cuda(device), absent=True)
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return Finding("NVIDIA driver", "there, and does not answer", ok=False, remedy="nvidia-smi says why")
    return Finding("NVIDIA driver", f"runs CUDA up to {version.value // 1000}.{version.value % 1000 // 10}", ok=True)


def _engines() -> list[Finding]:
    """Which engines can be built here, and for what."""
    from export.build_engine import BuildError, has_driver, load

    found = []
    for flavor, name in (("tensorrt", "engines by TensorRT"), ("rtx", "engines by TensorRT-RTX")):
        module = "tensorrt" if flavor == "tensorrt" else "tensorrt_rtx_bindings"
        try:
            trt = load(flavor)
        except BuildError as error:
            if importlib.util.find_spec(module) is not None:
                found.append(Finding(name, str(error), ok=False, remedy="reinstall it; its libraries must match"))
            continue
        if flavor == "tensorrt":
            text = "for the GPU here" if has_driver() else "none: TensorRT builds on a machine with a GPU alone"
            remedy = "" if has_driver() else "export --trt here keeps the graph; build_engine.py builds it there"
            found.append(Finding(name, text, ok=True, remedy=remedy))
            continue
        devices = [kind for kind in trt.ComputeCapability.__members__ if kind.startswith("SM")]
        spelled = ", ".join(f"{one[2:-1]}.{one[-1]}" for one in devices)
        found.append(Finding(name, f"for compute capability {spelled}, without a GPU too", ok=True))
    return found


def _mismatches() -> list[Finding]:
    """Packages that are there and do not fit each other."""
    found = []
    tensorrt, runtime = _version("tensorrt"), _installed("onnxruntime-gpu")
    if tensorrt and runtime and int(tensorrt.split(".")[0]) > ORT_TENSORRT:
        found.append(
            Finding(
                "ONNX Runtime's TensorRT provider",
                f"onnxruntime-gpu {runtime} links TensorRT {ORT_TENSORRT}, installed is {tensorrt}", ok=False,
                remedy=f"pip install 'tensorrt>={ORT_TENSORRT},<{ORT_TENSORRT + 1}', or use engines of export --trt",
            )
        )  # fmt: skip
    if runtime and _installed("onnxruntime"):
        found.append(
            Finding(
                "ONNX Runtime", "onnxruntime and onnxruntime-gpu overwrite each other's files", ok=False,
                remedy="pip uninstall onnxruntime onnxruntime-gpu, and install one",
            )
        )  # fmt: skip
    pairs = [_installed(f"tensorrt-rtx-cu13-{part}") for part in ("bindings", "libs")]
    if all(pairs) and pairs[0] != pairs[1]:
        found.append(
            Finding(
                "TensorRT-RTX", f"bindings {pairs[0]} and libraries {pairs[1]} are of different releases", ok=False,
                remedy=f"pip install tensorrt-rtx-cu13-libs=={pairs[0]}",
            )
        )  # fmt: skip
    return found


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> Finding:
    from slmrec.machine import has_vnni, usable_cores
    from slmrec.train import computes_bfloat16

    torch = importlib.import_module("torch")
    bf16 = computes_bfloat16(torch.device("cpu"))
    training = "bfloat16" if bf16 else "fp32 (no bfloat16 in hardware)"
    text = f"{usable_cores()} cores; trains in {training}; 8-bit VNNI {'yes' if has_vnni() else 'no'}"
    return Finding("processor", text, ok=True)


def _disk() -> Finding:
    folder = runs_folder().absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    enough = free > 5e9
    remedy = "" if enough else "--runs on a larger disk (the demo needs 5 GB)"
    return Finding("disk", f"{free / 1e9:.0f} GB free for {runs_folder()}", enough, remedy)

"""doctor: what this machine can build and run, and the remedy for what is missing."""

import importlib
import importlib.util
import os
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import click

from slmrec.cli.options import common_options, print_result, runs_folder


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    name: str
    found: str
    ok: bool
    remedy: str = ""


OPTIONAL = {
    "onnxruntime": ("run ONNX graphs", "pip install 'slmcompress[cpu]' (or [gpu])"),
    "bitsandbytes": ("LLM.int8 checkpoints", "pip install 'slmcompress[bnb]'"),
    "tensorrt": ("TensorRT engines", "pip install 'slmcompress[trt]' on a machine with an NVIDIA GPU"),
    "tensorrt_rtx_bindings": ("TensorRT-RTX engines", "pip install tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs"),
}  # fmt: skip


@click.command()
@common_options
def doctor(as_json: bool, **_: Any) -> None:
    """Say what this machine can build and run: versions, providers, processor, disk."""
    findings = [*_required(), *_optional(), _providers(), _gpu(), _processor(), _disk()]
    result = {"ok": all(finding.ok for finding in findings), "findings": [asdict(finding) for finding in findings]}
    print_result(result, "\n".join(_line(finding) for finding in findings), as_json=as_json)


def _line(finding: Finding) -> str:
    mark = "ok     " if finding.ok else "missing"
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
        found.append(Finding(module, text, present or not needed, "" if present else remedy))
    return found


def _version(name: str) -> str | None:
    dashed = name.replace("_", "-").replace("tensorrt-rtx", "tensorrt-rtx-cu13")
    for distribution in (name, f"{name}-gpu", dashed):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def _providers() -> Finding:
    """Providers that really load, which is not what the package says it was compiled with."""
    if importlib.util.find_spec("onnxruntime") is None:
        return Finding("onnxruntime providers", "none", ok=False, remedy=OPTIONAL["onnxruntime"][1])
    from export.sessions import loadable_providers

    loaded = loadable_providers()
    return Finding("onnxruntime providers", ", ".join(loaded), ok="CPUExecutionProvider" in loaded)


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", "none that PyTorch can use; everything runs on the processor", ok=True)
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"{torch.cuda.get_device_name(index)} (compute capability {major}.{minor})")
    return Finding("GPU", ", ".join(names), ok=True)


def _processor() -> Finding:
    from slmrec.machine import has_vnni
    from slmrec.train import computes_bfloat16

    torch = importlib.import_module("torch")
    bf16 = computes_bfloat16(torch.device("cpu"))
    training = "bfloat16" if bf16 else "fp32 (no bfloat16 in hardware)"
    text = f"{len(os.sched_getaffinity(0))} cores; trains in {training}; 8-bit VNNI {'yes' if has_vnni() else 'no'}"
    return Finding("processor", text, ok=True)


def _disk() -> Finding:
    folder = runs_folder().absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    enough = free > 5e9
    remedy = "" if enough else "--runs on a larger disk (the demo needs 5 GB)"
    return Finding("disk", f"{free / 1e9:.0f} GB free for {runs_folder()}", enough, remedy)

"""What an artefact says of its TensorRT engines."""

import json
from pathlib import Path
from typing import Any

ENGINE_FOLDER, ENGINE_FILE = "engine", "engine.json"
"""The graph that engines are built of, with what builds them elsewhere; what was built, and what was read back."""


def engine_text(record: dict[str, Any], folder: Path) -> str:
    """What was built, for people; or how to build it where that is possible."""
    lines = []
    gate = record["gate"]
    if gate is not None:
        lines.append(f"{record['precision']} on ONNX Runtime keeps {gate['ratio']:.4f} of validation NDCG@10")
    else:
        lines.append(f"{record['precision']} was not simulated: ONNX Runtime cannot, or lists are shorter than 10")
    for engine in record["engines"]:
        device = engine["compute_capability"] or "its default devices"
        lines.append(
            f"{engine['file']}: {engine['flavor']} {engine['version']} for {device}, "
            f"{engine['size_bytes'] / 1e6:.1f} MB in {engine['build_s']:.1f} s"
        )
    if record["missing"]:
        lines += [
            f"no engine was built: {record['missing']}",
            "The graph is ready, its precision placed. On the machine that will serve it:",
            "  pip install tensorrt",
            f"  python {folder / ENGINE_FOLDER / 'build_engine.py'}",
            "Or here, for NVIDIA RTX GPUs, with TensorRT-RTX:",
            "  pip install tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs",
            "  slmcompress export --trt --trt-flavor rtx --compute-capability 8.9 --force",
        ]
    return "\n".join(lines)


def read_engines(folder: Path) -> dict[str, Any]:
    """What `engine.json` holds."""
    found: dict[str, Any] = json.loads((folder / ENGINE_FILE).read_text(encoding="utf-8"))
    return found

"""What an artefact says of its TensorRT engines."""

import json
import re
from pathlib import Path
from typing import Any

from slmrec.errors import ArtifactError

ENGINE_FOLDER, ENGINE_FILE = "engine", "engine.json"
"""The graph that engines are built of, with what builds them elsewhere; what was built, and what was read back."""


def engine_text(record: dict[str, Any], folder: Path) -> str:
    """What was built, for people; or how to build it where that is possible."""
    lines = []
    lines.append(f"{record['precision']} on ONNX Runtime: {record['gate_text']}")
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
            f"  python {folder / ENGINE_FOLDER / 'build_engine.py'} --output .",
            "Or here, for NVIDIA RTX GPUs, with TensorRT-RTX:",
            "  pip install tensorrt-rtx-cu13-bindings tensorrt-rtx-cu13-libs",
            "  slmcompress export --trt --trt-flavor rtx --compute-capability 8.9 --force",
        ]
    return "\n".join(lines)


def read_engines(folder: Path) -> dict[str, Any]:
    """What `engine.json` holds.

    Raises:
        ArtifactError: it names a file that no engine is called.
    """
    found: dict[str, Any] = json.loads((folder / ENGINE_FILE).read_text(encoding="utf-8"))
    for engine in found["engines"]:
        if re.fullmatch(r"model(_sm\d{2,3})?\.(plan|rtx)", engine["file"]) is None:
            raise ArtifactError(f"{folder / ENGINE_FILE} names the engine {engine['file']!r}", remedy="do not use it")
    return found

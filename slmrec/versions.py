"""Which libraries a result was made with."""

import contextlib
import platform
from importlib import metadata

VERSIONED = ("slmcompress", "torch", "transformers", "numpy", "onnx", "onnxruntime", "accelerate", "peft", "polars")


def library_versions() -> dict[str, str]:
    """Versions of the libraries whose change may change a result."""
    versions = {"python": platform.python_version()}
    for name in VERSIONED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions

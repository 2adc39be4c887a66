"""Writing files with libraries that have errors of their own for a full disk."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl
    from torch import Tensor


def save_tensors(path: Path, tensors: "Mapping[str, Tensor]", notes: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with text notes in its header.

    Raises:
        OSError: the file cannot be written, such as on a full disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with _system_faults(path, SafetensorError):
        save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata=dict(notes or {}))


def write_parquet(path: Path, frame: "pl.DataFrame") -> None:
    """Write a Parquet file.

    Raises:
        OSError: the file cannot be written, such as on a full disk.
    """
    from polars.exceptions import PolarsError

    with _system_faults(path, PolarsError):
        frame.write_parquet(path)


@contextmanager
def _system_faults(path: Path, library_error: type[Exception]) -> Iterator[None]:
    """A library's error that ends in "(os error 28)" as the OSError it comes from."""
    try:
        yield
    except library_error as error:
        fault = re.search(r"([^:]+) \(os error (\d+)\)", str(error))
        if fault is None:
            raise
        raise OSError(int(fault[2]), fault[1].strip(), str(path)) from error

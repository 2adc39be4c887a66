"""Tensor files of other programs: safetensors, torch.save, numpy and pickle, each read without running anything."""

import errno
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from slmrec.errors import DataError
from slmrec.foreign.pickles import MALFORMED, load_tensors, read_pickle, reason

TABLE_ENDINGS = (".npy", ".safetensors", ".pkl")
TABLE_NAMES = ("item_embedding", "input_embeds.weight", "weight")
"""Where a file that holds several tensors keeps its item table."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by dotted name of a `.safetensors` file, or of a state dict (nested ones too) that torch.save wrote.

    Raises:
        DataError: the file is cut off, is something else, or needs code to be read.
    """
    try:
        found = load_file(path) if path.suffix == ".safetensors" else load_tensors(path)
    except (*MALFORMED, SafetensorError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # how torch meets some files that are cut off
            raise
        safe = "" if path.suffix == ".safetensors" else "; nothing of it was run"
        raise DataError(
            f"{path} is not readable as tensors: {reason(error)}{safe}",
            remedy="copy it again, or, where you trust it, save the state dict by safetensors.torch.save_file",
        ) from None
    return _flat(found)


def read_table(path: Path) -> Float[Tensor, "rows dim"]:
    """An item table in fp32: `.npy`, `.safetensors`, or a `.pkl` of a tensor or of {"item_embedding": tensor}.

    Raises:
        DataError: the file is missing, of another kind, not readable, or holds no matrix of finite numbers.
    """
    if not path.is_file():
        raise DataError(f"{path} is no file", remedy="--table FILE with the item vectors")
    if path.suffix not in TABLE_ENDINGS:
        raise DataError(f"{path} is no item table", remedy=f"--table FILE that ends in {', '.join(TABLE_ENDINGS)}")
    if path.suffix == ".npy":
        table = _read_numpy(path)
    else:
        tensors = _flat(read_pickle(path) if path.suffix == ".pkl" else read_tensors(path))
        table = _only_matrix(path, tensors)
    if table.ndim != 2 or not (table.is_floating_point() and torch.isfinite(table).all()):
        raise DataError(
            f"{path} holds {str(table.dtype).removeprefix('torch.')} {list(table.shape)}, expected a matrix of finite "
            "floats with one row per item",
            remedy="--table FILE with the item vectors",
        )
    return table.detach().float()


def _read_numpy(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (ValueError, EOFError, TypeError, OSError) as error:
        raise DataError(
            f"{path} is not readable as a numpy array: {reason(error)}", remedy="numpy.save of a float array"
        ) from None


def _only_matrix(path: Path, tensors: Mapping[str, Tensor]) -> Tensor:
    named = [tensors[name] for name in TABLE_NAMES if name in tensors] or list(tensors.values())
    if len(named) != 1:
        raise DataError(
            f"{path} holds {len(named)} tensors ({', '.join(sorted(tensors)[:5])}), expected one item table",
            remedy="a file with the item table alone, or by the name item_embedding",
        )
    return named[0]


def _flat(values: object, name: str = "") -> dict[str, Tensor]:
    """Tensors of nested mappings by dotted name; what is no tensor is left out, a tensor alone has no name."""
    if isinstance(values, Tensor):
        return {name: values}
    flat: dict[str, Tensor] = {}
    if isinstance(values, Mapping):
        for key, value in values.items():
            flat |= _flat(value, f"{name}.{key}" if name else str(key))
    return flat

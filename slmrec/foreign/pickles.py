"""Pickles by an unpickler that can build tensors and containers of them, and can call nothing else."""

import collections
import io
import pickle
import re
import struct
import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch._utils

from slmrec.errors import DataError

MALFORMED = (
    pickle.UnpicklingError, EOFError, struct.error, AttributeError, ImportError, IndexError, KeyError, MemoryError,
    OverflowError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""What `pickle` and `torch.load` raise for a file that is cut off, or that is something else."""

ADVICE = re.compile(r"(?:Weights only load failed|\([12]\) |Check the documentation).*|.*WeightsUnpickler error:")
"""What torch says around the cause."""

REFUSED_OPCODES = (
    pickle.BUILD, pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4,
    pickle.PERSID, pickle.BINPERSID,
)  # fmt: skip
"""No plain tensor needs them; BUILD would change objects that already exist."""


def read_pickle(path: Path) -> object:
    """The tensor, or containers of tensors, numbers and text, that a pickle holds.

    Raises:
        DataError: it calls anything but what builds tensors, at any depth, or cannot be read; nothing of it was run.
    """
    try:
        with path.open("rb") as stream:
            return TensorUnpickler(stream).load()
    except MALFORMED as error:
        if not isinstance(error, pickle.UnpicklingError):
            raise DataError(
                f"{path} is damaged, cut off or no pickle ({type(error).__name__}: {reason(error)})",
                remedy="the whole file, or the table as .npy or .safetensors",
            ) from None
        raise DataError(
            f"{path} is no pickle of tensors alone: {reason(error)}; nothing of it was run",
            remedy="where you trust it, save the table by numpy.save('items.npy', table), and name that file",
        ) from None


def load_tensors(source: Path | io.BytesIO) -> Any:
    """What `torch.save` wrote, on the CPU: tensors and plain containers, never code."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)  # what cannot be read is refused
        return torch.load(source, weights_only=True, map_location="cpu")


def reason(error: BaseException) -> str:
    """The sentence of a library's message that names the cause, without torch's advice to read the file unsafely."""
    lines = [ADVICE.sub("", line).strip() for line in str(error).splitlines()]
    named = next((line for line in lines if line), type(error).__name__)
    return named.split(". ")[0].rstrip(".:")


class TensorUnpickler(pickle._Unpickler):
    """Python's own unpickler, cut to the opcodes and the globals that a pickled tensor is made of."""

    dispatch: ClassVar = {
        opcode: load for opcode, load in pickle._Unpickler.dispatch.items() if bytes([opcode]) not in REFUSED_OPCODES
    }

    def find_class(self, module_name: str, global_name: str) -> Any:
        """The few functions below by their pickled names; nothing is imported."""
        found = ALLOWED.get((module_name, global_name))
        if found is None:
            raise pickle.UnpicklingError(f"it calls {module_name}.{global_name}")
        return found


def _load_from_bytes(content: bytes) -> Any:
    """Stands for `torch.storage._load_from_bytes`, which would run whatever a pickle inside the pickle names."""
    return load_tensors(io.BytesIO(content))


def _encode(text: str, encoding: str) -> bytes:
    """Stands for `_codecs.encode`: how protocol 2 writes bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes text as {encoding!r}")
    return text.encode("latin1")


ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch.storage", "_load_from_bytes"): _load_from_bytes,
    ("_codecs", "encode"): _encode,
}
"""Globals of a pickled tensor (torch.Tensor.__reduce_ex__ under protocols 2 to 5)."""

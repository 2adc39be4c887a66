"""The catalogue's side of a graph: the tables that follow it, and their 8-bit copies."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int8

from export.runtime import ITEM_DATA, read_signature

PROJECTION_FILE = "item_projection.npz"
"""From an item's own vector to what the decoder reads of it; for items that join later."""
ROW_STEP = 128
"""Tables have a multiple of this many rows, which is the block of the block-max top-K."""
UNIT = 2.0**-24
"""Rounding of one fp32 operation: a sum of n products errs by at most about n UNIT |u| |x|, in whatever order."""
ROWS_AT_ONCE = 2**17


@dataclass(frozen=True, kw_only=True)
class ItemWeights:
    """Tables with a row per internal id: 0 is padding, those after the last item are spare."""

    count: int
    """Items 1..count exist."""
    table: Float32[np.ndarray, "rows dim"]
    """What is read of an item in a history."""
    outputs: Float32[np.ndarray, "rows width"]
    """What a user vector is multiplied by."""
    offsets: Float32[np.ndarray, " rows"]
    """Added to an item's score: its bias, or -inf where it must not be recommended."""
    has_biases: bool = False

    @property
    def rows(self) -> int:
        """Rows of the tables, padding and spare ones included."""
        return len(self.offsets)

    @property
    def exact(self) -> str:
        """Name of the table whose products are scores: outputs, with biases as a further column where there are any."""
        return "exact" if self.has_biases else "outputs"

    def array(self, name: str) -> np.ndarray:
        """A table by its name in the graph."""
        found: np.ndarray = self._plain[name] if name in self._plain else self._rounded[name]
        return found

    @cached_property
    def _plain(self) -> dict[str, np.ndarray]:
        gone = self.offsets == -np.inf
        biases = np.where(gone, 0, self.offsets).astype(np.float32)
        with_biases = {"exact": np.concatenate([self.outputs, biases[:, None]], axis=1)} if self.has_biases else {}
        return with_biases | {
            # two numbers, for ONNX Runtime merges single ones that are equal, and cannot where one lies in a file
            "count": np.array([0, self.count], dtype=np.int64),
            "table": self.table,
            "outputs": self.outputs,
            "offsets": self.offsets,
            "closed": np.where(gone, -np.inf, 0).astype(np.float32),
        }

    @cached_property
    def _rounded(self) -> dict[str, np.ndarray]:
        table = Int8Items.of(self._plain[self.exact])
        errors, lengths = (values.reshape(-1, ROW_STEP) for values in (table.error, table.length))
        return {
            "rounded": table.values, "scale": table.scale, "rounding": table.rounding,
            "errors": errors, "lengths": lengths,
            "block_errors": errors.max(axis=1), "block_lengths": lengths.max(axis=1),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Int8Items:
    """Item outputs (and, as a further column, biases) rounded row by row, and how far off each row is."""

    values: Int8[np.ndarray, "width rows"]
    scale: Float32[np.ndarray, " rows"]
    error: Float32[np.ndarray, " rows"]
    """For a user vector of length 1: how much larger a row's fp32 score can be than the rounded row's."""
    length: Float32[np.ndarray, " rows"]
    """Of the rounded row: what an error in the user vector is multiplied by at most."""
    rounding: Float32[np.ndarray, ""]
    """For a user vector of length 1: how far two fp32 scores of one item can lie apart."""

    @classmethod
    def of(cls, table: Float32[np.ndarray, "rows width"]) -> "Int8Items":
        """Round a table."""
        rows, width = table.shape
        values = np.empty((width, rows), dtype=np.int8)
        scale, error, length = (np.empty(rows, dtype=np.float32) for _ in range(3))
        allowance, longest = 2 * width * UNIT, 0.0
        for part in _slices(rows):
            exact = table[part].astype(np.float64)
            scale[part] = np.abs(exact).max(axis=1) / 127
            whole = np.rint(exact / np.maximum(scale[part], 1e-30)[:, None])
            values[:, part] = np.clip(whole, -127, 127).T
            rounded = values[:, part].T * scale[part].astype(np.float64)[:, None]
            norms = np.linalg.norm(exact, axis=1), np.linalg.norm(rounded, axis=1)
            error[part] = (np.linalg.norm(exact - rounded, axis=1) + allowance * sum(norms)) * (1 + 4 * UNIT)
            length[part] = norms[1] * (1 + 4 * UNIT)
            longest = max(longest, float(norms[0].max(initial=0)))
        rounding = np.array(2 * allowance * longest, dtype=np.float32)
        return cls(values=values, scale=scale, error=error, length=length, rounding=rounding)


def read_items(folder: Path) -> ItemWeights:
    """The item tables of a graph or bundle; large ones are mapped, not read."""
    places = item_places(folder)

    def array(name: str) -> np.ndarray:
        place = places[name]
        return np.memmap(folder / ITEM_DATA, place.dtype, "r", place.offset, place.shape)

    return ItemWeights(
        count=int(array("count")[1]), table=array("table"), outputs=array("outputs"), offsets=array("offsets"),
        has_biases=read_signature(folder)["head"] == "linear",
    )  # fmt: skip


def write_items(folder: Path, items: ItemWeights) -> None:
    """Put other tables of the same shapes into the place of a folder's: its graphs stay as they are.

    The file is written anew: where it is a link to another folder's, that one keeps its own.
    """
    target = folder / ITEM_DATA
    places = item_places(folder)
    target.unlink(missing_ok=True)
    with target.open("wb") as file:
        for name, place in sorted(places.items(), key=lambda entry: entry[1].offset):
            array = items.array(name)
            assert (array.dtype, array.shape) == (place.dtype, place.shape), name
            file.seek(place.offset)
            file.write(np.ascontiguousarray(array).data)


@dataclass(frozen=True)
class Place:
    """Where a table lies in the items' data file."""

    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]


def item_places(folder: Path) -> dict[str, Place]:
    """Tables by name, as all graphs of a folder refer to them."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    found = {}
    for name in read_signature(folder)["graphs"]:
        for tensor in onnx.load(folder / name, load_external_data=False).graph.initializer:
            if uses_external_data(tensor) and ExternalDataInfo(tensor).location == ITEM_DATA:
                dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
                offset = int(ExternalDataInfo(tensor).offset or 0)
                found[tensor.name.removeprefix("items.")] = Place(offset, dtype, tuple(tensor.dims))
    return found


def _slices(rows: int) -> Iterator[slice]:
    return (slice(first, min(first + ROWS_AT_ONCE, rows)) for first in range(0, rows, ROWS_AT_ONCE))

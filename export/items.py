"""The catalogue's side of a graph: the tables that follow it, and their 8-bit copies."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float32, Int8

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

    def array(self, name: str) -> np.ndarray:
        """A table by its name in the graph."""
        found: np.ndarray = self._plain[name] if name in self._plain else self._rounded[name]
        return found

    @cached_property
    def _plain(self) -> dict[str, np.ndarray]:
        biases = np.where(np.isfinite(self.offsets), self.offsets, 0).astype(np.float32)
        exact = np.concatenate([self.outputs, biases[:, None]], axis=1) if self.has_biases else self.outputs
        return {
            # two numbers, for ONNX Runtime merges single ones that are equal, and cannot where one lies in a file
            "count": np.array([0, self.count], dtype=np.int64),
            "table": self.table,
            "outputs": self.outputs,
            "offsets": self.offsets,
            "closed": np.where(np.isfinite(self.offsets), 0, -np.inf).astype(np.float32),
            "exact": exact,
        }

    @cached_property
    def _rounded(self) -> dict[str, np.ndarray]:
        table = Int8Items.of(self._plain["exact"])
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


def _slices(rows: int) -> Iterator[slice]:
    return (slice(first, min(first + ROWS_AT_ONCE, rows)) for first in range(0, rows, ROWS_AT_ONCE))

"""Many integer lists of different lengths in two arrays, as sequences and histories are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from slmrec.errors import DataError


@dataclass(frozen=True, eq=False)
class Ragged:
    """Rows of int64 values: row i is `values[offsets[i]:offsets[i + 1]]`.

    >>> rows = Ragged.from_rows([[5, 6, 7], [], [8]])
    >>> len(rows), rows.lengths.tolist(), rows[0].tolist()
    (3, [3, 0, 1], [5, 6, 7])
    """

    values: Int64[np.ndarray, " total"]
    offsets: Int64[np.ndarray, " rows_plus_one"]

    def __post_init__(self) -> None:
        _whole(self.values)

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int] | np.ndarray]) -> "Ragged":
        """Pack rows in their order.

        Raises:
            DataError: a row holds something else than whole numbers, or is no list.
        """
        return cls.from_lengths(
            np.concatenate([_whole(np.asarray(row)) for row in rows]) if len(rows) else np.zeros(0, np.int64),
            np.array([len(row) for row in rows], dtype=np.int64),
        )

    @classmethod
    def from_lengths(cls, values: np.ndarray, lengths: np.ndarray) -> "Ragged":
        """Rows of the given lengths, one after the other in `values`.

        Raises:
            DataError: the values are no whole numbers, or no vector.
        """
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return cls(np.ascontiguousarray(_whole(values), dtype=np.int64), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Int64[np.ndarray, " length"]:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))

    @property
    def lengths(self) -> Int64[np.ndarray, " rows"]:
        """Number of values in each row."""
        return np.diff(self.offsets)

    def select(self, rows: np.ndarray) -> "Ragged":
        """The named rows, in the order named."""
        return self.slice(self.offsets[:-1][rows], self.offsets[1:][rows])

    def slice(self, starts: np.ndarray, stops: np.ndarray) -> "Ragged":
        """Rows `values[starts[i]:stops[i]]`; what a window or a split is made of."""
        lengths = np.asarray(stops - starts, dtype=np.int64)
        within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return Ragged.from_lengths(self.values[np.repeat(starts, lengths) + within], lengths)

    def without_last(self, count: int) -> "Ragged":
        """Every row minus its newest `count` values; shorter rows become empty.

        >>> [row.tolist() for row in Ragged.from_rows([[1, 2, 3], [4]]).without_last(2)]
        [[1], []]
        """
        starts, stops = self.offsets[:-1], self.offsets[1:]
        return self.slice(starts, np.maximum(starts, stops - count))

    def newest(self, count: int) -> "Ragged":
        """The newest `count` values of every row.

        >>> [row.tolist() for row in Ragged.from_rows([[1, 2, 3], [4]]).newest(2)]
        [[2, 3], [4]]
        """
        starts, stops = self.offsets[:-1], self.offsets[1:]
        return self.slice(np.maximum(starts, stops - count), stops)

    def pad_left(self, width: int) -> Int64[np.ndarray, "rows {width}"]:
        """A matrix with each row's newest values at the right and 0 before them.

        >>> Ragged.from_rows([[1, 2, 3], [4]]).pad_left(2).tolist()
        [[2, 3], [0, 4]]
        """
        padded = np.zeros((len(self), width), dtype=np.int64)
        kept = self.newest(width)
        lengths = kept.lengths
        columns = np.arange(len(kept.values)) - np.repeat(kept.offsets[1:], lengths) + width
        padded[np.repeat(np.arange(len(self)), lengths), columns] = kept.values
        return padded


def _whole(values: np.ndarray) -> np.ndarray:
    """The values, of which nothing is lost as int64; an empty list has no type."""
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise DataError(
            f"ids are {values.dtype} of rank {values.ndim}, expected are whole numbers in a list",
            remedy="internal ids as int64, oldest first",
        )
    return values.astype(np.int64, copy=False)

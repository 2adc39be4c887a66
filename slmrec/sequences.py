"""Leave-one-out splits of sequences, training windows, and batches of like length."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from slmrec.errors import DataError
from slmrec.ragged import Ragged
from slmrec.recommender import Histories

MIN_EVALUABLE = 3
"""Users with fewer interactions are train only."""


@dataclass(frozen=True, eq=False)
class Cases:
    """Users to evaluate: what each had done, and the item that came next."""

    users: np.ndarray
    """Rows of the dataset's sequences, int64 [cases]."""
    histories: Histories
    targets: np.ndarray
    """Internal ids, int64 [cases]."""

    def __len__(self) -> int:
        return len(self.targets)

    def select(self, rows: np.ndarray) -> "Cases":
        """The named cases, in the order named."""
        return Cases(self.users[rows], self.histories.select(rows), self.targets[rows])


def training_sequences(sequences: Ragged) -> Ragged:
    """Each evaluable user's sequence minus its last two items; shorter users whole.

    >>> [row.tolist() for row in training_sequences(Ragged.from_rows([[1, 2, 3, 4], [5, 6]]))]
    [[1, 2], [5, 6]]
    """
    starts, stops = sequences.offsets[:-1], sequences.offsets[1:]
    return sequences.slice(starts, np.where(sequences.lengths >= MIN_EVALUABLE, stops - 2, stops))


def validation_cases(sequences: Ragged) -> Cases:
    """Second last item of each evaluable user, given all before it."""
    return _cases(sequences, held_out=2)


def test_cases(sequences: Ragged) -> Cases:
    """Last item of each evaluable user, given all before it, the validation item included."""
    return _cases(sequences, held_out=1)


test_cases.__test__ = False  # type: ignore[attr-defined]  # pytest would collect it by its name


def _cases(sequences: Ragged, held_out: int) -> Cases:
    users = np.flatnonzero(sequences.lengths >= MIN_EVALUABLE)
    if not users.size:
        raise DataError(
            f"none of {len(sequences)} users has {MIN_EVALUABLE} interactions, so no user can be evaluated",
            remedy="data with longer sequences, or a smaller --min-events",
        )
    starts, stops = sequences.offsets[:-1][users], sequences.offsets[1:][users] - held_out
    return Cases(users, Histories.of(sequences.slice(starts, stops)), sequences.values[stops])


def training_windows(sequences: Ragged, *, max_history: int, max_events: int | None) -> Ragged:
    """Cut sequences into windows of up to `max_history` inputs and their successors.

    Every event but a user's oldest one kept is the target of exactly one window, so neighbours share one event.
    Windows are filled from the newest end, as histories are at serving time; users with one event give none.

    >>> rows = training_windows(Ragged.from_rows([[1, 2, 3, 4, 5], [9]]), max_history=2, max_events=None)
    >>> [row.tolist() for row in rows]
    [[1, 2, 3], [3, 4, 5]]
    """
    kept = sequences if max_events is None else sequences.newest(max_events)
    starts, stops = [], []
    for start, stop in zip(kept.offsets[:-1].tolist(), kept.offsets[1:].tolist(), strict=True):
        ends = list(range(stop, start + 1, -max_history))[::-1]
        stops += ends
        starts += [max(start, end - max_history - 1) for end in ends]
    return kept.slice(np.array(starts, dtype=np.int64), np.array(stops, dtype=np.int64))


def length_batches(lengths: np.ndarray, batch_size: int, *, seed: int) -> Iterator[np.ndarray]:
    """Row numbers in batches of like length, in random order: little padding, no bias in the order of lengths.

    Rows are shuffled, sorted by length within large pools, cut into batches, and the batches shuffled. The order
    depends on the seed alone.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(lengths))
    pool = batch_size * 64
    batches = []
    for start in range(0, len(order), pool):
        rows = order[start : start + pool]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    for index in generator.permutation(len(batches)):
        yield batches[index]

"""Training samples of sequences, for each kind of supervision, and the next-item objective."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from slmrec.config import WindowConfig
from slmrec.errors import DataError
from slmrec.ragged import Ragged
from slmrec.sequences import training_sequences, training_windows
from slmrec.train import Batch


@dataclass(frozen=True, eq=False)
class Samples:
    """Windows of inputs and successors: row [a, b, c] reads a, b and is asked for b, c (or for c alone)."""

    windows: Ragged
    every_position: bool
    """Whether every input position has a target, or the newest alone."""
    after_suffix: bool = False
    """Whether users are read after a response suffix, at one position."""

    @property
    def lengths(self) -> np.ndarray:
        """Inputs in each sample."""
        return self.windows.lengths - 1

    @property
    def num_targets(self) -> np.ndarray:
        """Targets in each sample."""
        return self.lengths if self.every_position else np.ones(len(self.windows), dtype=np.int64)

    def batch(self, rows: np.ndarray) -> Batch:
        """Inputs and targets of the named samples, left-padded to the longest of them."""
        windows = self.windows.select(rows)
        padded = windows.pad_left(int(windows.lengths.max()))
        items, targets = padded[:, :-1].copy(), padded[:, 1:].copy()
        targets[items == 0] = 0
        if not self.every_position:
            targets[:, :-1] = 0
        if self.after_suffix:
            targets = targets[:, -1:]
        return Batch(torch.from_numpy(items), torch.from_numpy(targets))


def training_samples(sequences: Ragged, window: WindowConfig, supervision: str, *, after_suffix: bool) -> Samples:
    """Cut the training part of all sequences into samples.

    all: windows, every position a target. prefixes: one sample per target (E4SRec). last: each user's newest
    training item is the only target (SLMRec).
    """
    known = training_sequences(sequences)
    if supervision == "all":
        windows = training_windows(known, max_history=window.max_history, max_events=window.max_events)
    else:
        kept = known if window.max_events is None else known.newest(window.max_events)
        windows = _prefixes(kept, window.max_history, newest_only=supervision == "last")
    if not len(windows):
        raise DataError("no user has two training events, so there is nothing to learn", remedy="longer sequences")
    return Samples(windows, every_position=supervision == "all", after_suffix=after_suffix)


def _prefixes(sequences: Ragged, max_history: int, *, newest_only: bool) -> Ragged:
    starts, stops = sequences.offsets[:-1], sequences.offsets[1:]
    if newest_only:
        users = np.flatnonzero(sequences.lengths >= 2)
        starts, ends = starts[users], stops[users]
    else:
        counts = np.maximum(sequences.lengths - 1, 0)
        within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = np.repeat(starts, counts)
        ends = starts + within + 2
    return sequences.slice(np.maximum(starts, ends - max_history - 1), ends)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood of internal ids 1..num_items over the full catalogue."""
    return F.cross_entropy(logits, targets - 1)


def target_rows(batch: Batch) -> Int64[Tensor, " targets"]:
    """Where the targets stand among all positions of the batch, one row after the other."""
    return batch.targets.flatten().nonzero()[:, 0]


def targets_of(batch: Batch) -> Int64[Tensor, " targets"]:
    """The targets, in the order of `target_rows`."""
    return batch.targets.flatten()[target_rows(batch)]


def rows_of(
    states: Float[Tensor, "batch positions hidden"], rows: Int64[Tensor, " targets"]
) -> Float[Tensor, "targets hidden"]:
    """The states at some positions; a gradient adds to them by rows, which masks would do value by value."""
    return states.reshape(-1, states.shape[-1]).index_select(0, rows)


class NextItemObjective(nn.Module):
    """Cross-entropy of the next item at every position that has a target."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The one term, "ce"."""
        states = self.model(batch.item_ids)
        users = states[-1] if isinstance(states, tuple) else states
        users = rows_of(users, target_rows(batch))
        return {"ce": cross_entropy(self.model.logits(users), targets_of(batch))}

"""The one call every product answers: histories in, top-K items out."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int64

from slmrec.errors import ConfigError, DataError
from slmrec.ragged import Ragged

PAD = 0
"""Item id of padding; items are 1..num_items."""


@dataclass(frozen=True, eq=False)
class Histories:
    """What users did: the model's input and what must not be recommended again.

    Args:
        item_ids: internal ids 1..num_items, oldest first, one row per user.
        exclude_ids: further ids never to be returned, one row per user; the items of the history are
            excluded whether or not they are listed here.
    """

    item_ids: Ragged
    exclude_ids: Ragged

    def __post_init__(self) -> None:
        if len(self.item_ids) != len(self.exclude_ids):
            raise DataError(
                f"{len(self.item_ids)} histories but {len(self.exclude_ids)} rows of exclusions",
                remedy="give one row of exclude_ids per history (it may be empty)",
            )

    @classmethod
    def of(cls, item_ids: Ragged) -> "Histories":
        """Histories whose whole rows are also the exclusions, so that a window cannot hide a seen item."""
        return cls(item_ids, item_ids)

    def __len__(self) -> int:
        return len(self.item_ids)

    def select(self, rows: np.ndarray) -> "Histories":
        """The named users, in the order named."""
        return Histories(self.item_ids.select(rows), self.exclude_ids.select(rows))

    def check(self, num_items: int, *, newcomers: bool = False) -> None:
        """Refuse ids outside 1..num_items and, unless newcomers are answered, users without any item."""
        for name, ids in (("item_ids", self.item_ids.values), ("exclude_ids", self.exclude_ids.values)):
            outside = ids[(ids < 1) | (ids > num_items)]
            if outside.size:
                raise DataError(
                    f"{name} holds the id {outside[0]}; this artefact knows the items 1..{num_items}",
                    remedy="map external ids with the artefact's items.parquet first",
                )
        empty = np.flatnonzero(self.item_ids.lengths == 0)
        if empty.size and not newcomers:
            raise DataError(
                f"{empty.size} of {len(self)} histories are empty, the first at row {empty[0]}",
                remedy="leave users without a history out here; recommend answers them with popular items",
            )


@dataclass(frozen=True, eq=False)
class TopK:
    """Recommended items, best first; where fewer than k remain, the tail is id 0 with score -inf."""

    item_ids: Int64[np.ndarray, "users k"]
    scores: Float32[np.ndarray, "users k"]

    def __len__(self) -> int:
        return len(self.item_ids)


def most_popular(num_interactions: np.ndarray, excluded: Ragged, k: int) -> TopK:
    """What users without a history are given: the items with most interactions, ties by smaller id.

    Args:
        num_interactions: of the items 1..num_items, which are the scores; negative ones are never recommended.
        excluded: ids that a user must not be given, one row per user.
        k: length of the lists.

    >>> found = most_popular(np.array([3, 9, -1, 3]), Ragged.from_rows([[], [2]]), 3)
    >>> found.item_ids.tolist(), found.scores[0].tolist()
    ([[2, 1, 4], [1, 4, 0]], [9.0, 3.0, 3.0])
    """
    order = np.argsort(-num_interactions, kind="stable") + 1
    order = order[num_interactions[order - 1] >= 0]
    items = np.full((len(excluded), k), PAD, dtype=np.int64)
    scores = np.full((len(excluded), k), -np.inf, dtype=np.float32)
    for row, ids in enumerate(excluded):
        candidates = order[: k + len(ids)]
        kept = candidates[~np.isin(candidates, ids)][:k]
        items[row, : len(kept)], scores[row, : len(kept)] = kept, num_interactions[kept - 1]
    return TopK(items, scores)


@runtime_checkable
class Recommender(Protocol):
    """SASRec, teacher, student, 8-bit student, ONNX session and TensorRT engine alike."""

    @property
    def num_items(self) -> int:
        """Items 1..num_items can be recommended."""
        ...

    @property
    def max_top_k(self) -> int:
        """Largest k that `recommend` accepts."""
        ...

    def recommend(self, histories: Histories, k: int) -> TopK:
        """Rank the catalogue for each history: best first, ties by smaller id, never an item already seen.

        Users without a history get the most popular items where the artefact knows them, and are refused where not.
        """
        ...


def check_top_k(k: int, max_top_k: int) -> None:
    """Refuse a k that this recommender cannot answer."""
    if not 1 <= k <= max_top_k:
        raise ConfigError(
            f"k={k} was asked for; this artefact answers 1 to {max_top_k}",
            remedy="-k 10" if k < 1 else f"-k {max_top_k}, or export again with a larger --top-k (at most 3840)",
        )

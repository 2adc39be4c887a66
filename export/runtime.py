"""The ONNX graph as a recommender: numpy and ONNX Runtime, no PyTorch."""

import json
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Float32, Int64

from export.sessions import open_session, session_options
from slmrec.errors import ArtifactError, CheckError, DataError
from slmrec.machine import usable_cores
from slmrec.ragged import Ragged
from slmrec.recommender import PAD, Histories, TopK, check_top_k, most_popular
from slmrec.roofline import Work

GRAPH_FILE, SIGNATURE_FILE = "model.onnx", "signature.json"
RERANK_FILE, APPEND_FILE, TUNE_FILE = "rerank.onnx", "append.onnx", "tune.json"
DECODER_DATA, ITEM_DATA = "model.onnx.data", "items.onnx.data"
DATA_FILES = (DECODER_DATA, ITEM_DATA)
"""What the weights of the graphs lie in: those that belong to them for good, and those that follow the catalogue."""
ITEMS_FILE = "items.parquet"
MAX_TOP_K = 3840
MAX_BATCH = 256
EXCLUDE_STEP = 32
"""Exclusions are padded to multiples of this; they only mask, so their width may follow the batch."""
MAX_CANDIDATES = 2**14
"""Scored at once, of all users together: each takes an item vector's memory."""


class OnnxRecommender:
    """A graph or bundle folder; loaded once, answers any number of users.

    Args:
        folder: of a graph or bundle.
        provider: of ONNX Runtime; the one that must run.
        threads: of one request; default the cores that this process may use.
        cache: folder where optimised graphs are kept for the next start, such as `graph_cache.default_cache()`.

    Raises:
        ArtifactError: the folder holds no graph that ONNX Runtime can load.
        ConfigError: the provider asked for is not the one that runs.
    """

    def __init__(
        self,
        folder: Path,
        *,
        provider: str = "CPUExecutionProvider",
        threads: int | None = None,
        cache: Path | None = None,
    ) -> None:
        self.folder, self.signature = folder, read_signature(folder)
        self._provider, self._threads, self._cache = provider, threads or usable_cores(), cache
        self.session = self.load(GRAPH_FILE)
        self._rerank: Any = None
        self._loading = threading.Lock()
        self.buckets = np.array(self.signature["buckets"], dtype=np.int64)

    @property
    def num_items(self) -> int:
        """Items 1..num_items can be recommended."""
        return int(self.signature["num_items"])

    @property
    def max_top_k(self) -> int:
        """Largest k: what was exported or, where that is the whole catalogue, anything (lists are then short)."""
        exported = int(self.signature["top_k"])
        return MAX_TOP_K if exported >= self.num_items else exported

    @cached_property
    def num_interactions(self) -> Int64[np.ndarray, " items"] | None:
        """Popularity of each item, as `items.parquet` has it; None where it has none."""
        path = self.folder / ITEMS_FILE
        if not path.is_file() or "num_interactions" not in pq.read_schema(path).names:
            return None
        column = pq.read_table(path, columns=["num_interactions"])["num_interactions"]
        return np.asarray(column.to_numpy(), dtype=np.int64)

    def recommend(self, histories: Histories, k: int) -> TopK:
        """Rank the catalogue for each history; every user is padded to the bucket of his own length.

        Users without a history get the most popular items, scored by their interactions.
        """
        new = np.flatnonzero(histories.item_ids.lengths == 0)
        histories.check(self.num_items, newcomers=new.size > 0 and self.num_interactions is not None)
        check_top_k(k, self.max_top_k)
        items = np.full((len(histories), k), PAD, dtype=np.int64)
        scores = np.full((len(histories), k), -np.inf, dtype=np.float32)
        if new.size and self.num_interactions is not None:
            popular = most_popular(self.num_interactions, histories.select(new).exclude_ids, k)
            items[new], scores[new] = popular.item_ids, popular.scores
        windows = histories.item_ids.newest(int(self.signature["max_history"]))
        for rows, width in self._batches(windows.lengths):
            excluded = _exclusions(histories.select(rows), keep_history=bool(self.signature["keep_history"]))
            found, best = self.run(windows.select(rows).pad_left(width), excluded)
            if np.isnan(best).any():
                raise nan_scores()
            kept = min(k, found.shape[1])
            items[rows, :kept], scores[rows, :kept] = found[:, :kept], best[:, :kept]
        return TopK(items, scores)

    def rerank(self, histories: Histories, candidate_ids: Ragged) -> list[Float32[np.ndarray, " candidates"]]:
        """Scores of each user's candidates, in their order; -inf for items of his history and for excluded ones.

        Raises:
            DataError: ids that do not exist, a user without history, or another number of rows.
        """
        Histories(histories.item_ids, candidate_ids).check(self.num_items)
        histories.check(self.num_items)
        session, keep_history = self._reranker(), bool(self.signature["keep_history"])
        found: list[np.ndarray] = [np.zeros(0, np.float32)] * len(histories)
        windows, nobody = histories.item_ids.newest(int(self.signature["max_history"])), np.zeros((1, 0), np.int64)
        for batch, width in self._batches(windows.lengths):
            for rows in _bounded(batch, candidate_ids.lengths):
                candidates = candidate_ids.select(rows)
                request = {
                    "item_ids": windows.select(rows).pad_left(width),
                    "exclude_ids": np.repeat(nobody, len(rows), axis=0),
                    "candidate_ids": candidates.pad_left(_stepped(candidates.lengths)),
                }
                [scores] = session.run(["scores"], request)
                if np.isnan(scores).any():
                    raise nan_scores()
                for row, own, ids in zip(rows.tolist(), scores, candidates, strict=True):
                    gone = _gone(histories.item_ids[row], histories.exclude_ids[row], keep_history=keep_history)
                    found[row] = np.where(np.isin(ids, gone), np.float32(-np.inf), own[len(own) - len(ids) :])
        return found

    def recommend_among(self, histories: Histories, candidate_ids: Ragged, k: int) -> TopK:
        """As `recommend`, but each user is given the best of his own candidates alone; their order says nothing."""
        check_top_k(k, self.max_top_k)
        new = histories.item_ids.lengths == 0
        histories.check(self.num_items, newcomers=bool(new.any()) and self.num_interactions is not None)
        items = np.full((len(histories), k), PAD, dtype=np.int64)
        scores = np.full((len(histories), k), -np.inf, dtype=np.float32)
        sets = Ragged.from_rows([np.unique(row) for row in candidate_ids])
        known = np.flatnonzero(~new)
        found = dict(zip(known.tolist(), self.rerank(histories.select(known), sets.select(known)), strict=True))
        for row, ids in enumerate(sets):
            own = found[row] if row in found else self._popularity(histories.exclude_ids[row], ids)
            best = np.argsort(-own, kind="stable")[:k]  # ids ascend, so ties go to the smaller one
            best = best[own[best] > -np.inf]
            items[row, : len(best)], scores[row, : len(best)] = ids[best], own[best]
        return TopK(items, scores)

    def _popularity(self, excluded: np.ndarray, ids: np.ndarray) -> Float32[np.ndarray, " ids"]:
        """What a user without a history scores items by; -inf for those he must not be given."""
        assert self.num_interactions is not None
        counts = self.num_interactions[ids - 1]
        return np.where((counts < 0) | np.isin(ids, excluded), -np.inf, counts).astype(np.float32)

    def user_vectors(self, histories: Histories) -> Float32[np.ndarray, "users width"]:
        """What item outputs are multiplied by: scores are the products, plus offsets."""
        histories.check(self.num_items)
        windows, nobody = histories.item_ids.newest(int(self.signature["max_history"])), np.zeros((1, 0), np.int64)
        described = self.signature["tensors"][RERANK_FILE]["outputs"]["user_vectors"]
        found = np.zeros((len(histories), int(described["shape"][1])), dtype=np.float32)
        for batch, width in self._batches(windows.lengths):
            none = np.repeat(nobody, len(batch), axis=0)
            request = {"item_ids": windows.select(batch).pad_left(width), "exclude_ids": none, "candidate_ids": none}
            [found[batch]] = self._reranker().run(["user_vectors"], request)
        return found

    def _reranker(self) -> Any:
        with self._loading:
            self._rerank = self._rerank or self.load(RERANK_FILE)
        return self._rerank

    def load(self, graph: str) -> Any:
        """An ONNX Runtime session of another graph of the folder."""
        return open_session(self.folder / graph, self._provider, self._threads, self._cache)

    def run(self, item_ids: np.ndarray, exclude_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The raw graph on padded ids, int64 [batch, n] both: items, int64, and scores, float32, [batch, top_k].

        Raises:
            DataError: ids of another type or rank, or of different batches.
        """
        _check_ids(item_ids=item_ids, exclude_ids=exclude_ids)
        request = {"item_ids": item_ids, "exclude_ids": exclude_ids}
        found, best = self.session.run(["top_items", "top_scores"], request)
        return found, best

    def work(self, histories: Histories) -> Work:
        """Arithmetic and bytes of `recommend` for these users, counted on a run of its own."""
        from export.work import count_work

        total, windows = Work(), histories.item_ids.newest(int(self.signature["max_history"]))
        for rows, width in self._batches(windows.lengths):
            excluded = _exclusions(histories.select(rows), keep_history=bool(self.signature["keep_history"]))
            request = {"item_ids": windows.select(rows).pad_left(width), "exclude_ids": excluded}
            total += count_work(self.folder / GRAPH_FILE, request, session_options(self._threads))
        return total

    def _batches(self, lengths: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        widths = self.buckets[np.searchsorted(self.buckets, lengths)]
        for width in np.unique(widths[lengths > 0]):
            rows = np.flatnonzero((widths == width) & (lengths > 0))
            for start in range(0, len(rows), MAX_BATCH):
                yield rows[start : start + MAX_BATCH], int(width)


def nan_scores() -> CheckError:
    """What a NaN is: an error, never a list."""
    return CheckError("the graph gave NaN scores", remedy="slmcompress verify, and make the artefact again")


def read_signature(folder: Path) -> dict[str, Any]:
    """`signature.json` of a graph or bundle."""
    try:
        return json.loads((folder / SIGNATURE_FILE).read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"{folder} holds no readable {SIGNATURE_FILE}: {error}", remedy="slmcompress export"
        ) from None


def _check_ids(**arrays: np.ndarray) -> None:
    for name, ids in arrays.items():
        if ids.dtype != np.int64 or ids.ndim != 2:
            raise DataError(
                f"{name} is {ids.dtype} of shape {ids.shape}, expected is int64 [batch, n]",
                remedy="np.asarray(ids, dtype=np.int64), one row a user, padded with 0",
            )
    batches = {name: len(ids) for name, ids in arrays.items()}
    if len(set(batches.values())) > 1:
        raise DataError(f"batches of different sizes: {batches}", remedy="one row a user in each")


def _exclusions(histories: Histories, *, keep_history: bool) -> np.ndarray:
    """Everything a user must not be given: the exclusions and, beyond the window too, the history."""
    pairs = zip(histories.item_ids, histories.exclude_ids, strict=True)
    return exclusions([_gone(history, excluded, keep_history=keep_history) for history, excluded in pairs])


def _gone(history: np.ndarray, excluded: np.ndarray, *, keep_history: bool) -> np.ndarray:
    return excluded if keep_history else np.concatenate([history, excluded])


def exclusions(rows: Sequence[np.ndarray]) -> Int64[np.ndarray, "batch excluded"]:
    """Ids of each user once, padded to a multiple of 32."""
    ragged = Ragged.from_rows([np.unique(row) for row in rows])
    return ragged.pad_left(_stepped(ragged.lengths))


def _stepped(lengths: np.ndarray) -> int:
    return -(-int(lengths.max(initial=0)) // EXCLUDE_STEP) * EXCLUDE_STEP


def _bounded(rows: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Rows in parts whose candidates, padded, are no more than `MAX_CANDIDATES` (a single row aside)."""
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    while len(rows):
        padded = np.arange(1, len(rows) + 1) * lengths[rows]
        count = max(1, int(np.searchsorted(padded, MAX_CANDIDATES, side="right")))
        yield rows[:count]
        rows = rows[count:]

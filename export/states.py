"""Users who come back: keys and values of what they have seen are kept, and a new item costs one token."""

import hashlib
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from export.runtime import APPEND_FILE, DATA_FILES, MAX_BATCH, OnnxRecommender, exclusions, nan_scores
from slmrec.errors import ConfigError
from slmrec.ragged import Ragged
from slmrec.recommender import PAD, Histories, TopK, check_top_k

OUTPUTS = ["top_items", "top_scores", "new_keys", "new_values"]
MOST_NEW_ITEMS = 8
"""A state is looked for that lacks at most this many of the newest items."""


@dataclass(frozen=True)
class UserState:
    """Keys and values of a history's items, [layers, kv_heads, items, head_dim] each; never changed."""

    keys: Float32[np.ndarray, "layers kv_heads items head_dim"]
    values: Float32[np.ndarray, "layers kv_heads items head_dim"]

    @property
    def size_bytes(self) -> int:
        """What it takes in memory."""
        return self.keys.nbytes + self.values.nbytes


class StateStore:
    """States by key, as many as fit; those not asked for longest go first. Threads may share it.

    >>> store, state = StateStore(max_bytes=100), UserState(np.zeros((1, 1, 5, 1), "f4"), np.zeros((1, 1, 5, 1), "f4"))
    >>> for key in (b"a", b"b", b"c"):
    ...     store.put(key, state)
    >>> [store.get(key) is not None for key in (b"a", b"b", b"c")], store.size_bytes
    ([False, True, True], 80)
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.size_bytes = max_bytes, 0
        self.hits = self.misses = 0
        """Users who were answered from a state, and who were not."""
        self._states: OrderedDict[bytes, UserState] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> UserState | None:
        """The state, or None if it was never kept or has gone."""
        with self._lock:
            state = self._states.get(key)
            if state is not None:
                self._states.move_to_end(key)
            return state

    def first(self, keys: Iterable[bytes]) -> tuple[int, UserState] | None:
        """Place and state of the first key that has one, which counts as a hit; none at all is a miss."""
        for place, key in enumerate(keys):
            state = self.get(key)
            if state is not None:
                self.hits += 1
                return place, state
        self.misses += 1
        return None

    def put(self, key: bytes, state: UserState) -> None:
        """Keep a state; one that is larger than the whole budget is not kept."""
        with self._lock:
            before = self._states.pop(key, None)
            self.size_bytes -= before.size_bytes if before is not None else 0
            if state.size_bytes > self.max_bytes:
                return
            self._states[key] = state
            self.size_bytes += state.size_bytes
            while self.size_bytes > self.max_bytes:
                self.size_bytes -= self._states.popitem(last=False)[1].size_bytes


@dataclass(frozen=True)
class _Row:
    """A user: where his answer goes, his history, how much of it the state holds, and the state."""

    row: int
    history: np.ndarray
    known: int
    state: UserState


class AppendingRecommender:
    """A graph or bundle folder that remembers users; callers send whole histories all the same.

    A history that is an earlier one and a few new items costs those items. Any other is computed in full: one without
    a state, with a state that had to go, longer than the window (every item then stands elsewhere), or of another
    artefact. Answers are those of `OnnxRecommender` up to rounding.

    Raises:
        ConfigError: the folder has no graph for new items.
    """

    def __init__(self, folder: Path, store: StateStore, *, threads: int | None = None) -> None:
        self.full, self.store = OnnxRecommender(folder, threads=threads), store
        if APPEND_FILE not in self.full.signature["graphs"]:
            raise ConfigError(f"{folder} holds no {APPEND_FILE}", remedy="slmcompress export --append --force")
        self.session = self.full.load(APPEND_FILE)
        layers, heads, width = self.full.signature["keys_and_values"]
        self.nothing = UserState(*(np.zeros((layers, heads, 0, width), dtype=np.float32) for _ in range(2)))
        self._artifact = _identity(folder)

    @property
    def num_items(self) -> int:
        """Items 1..num_items can be recommended."""
        return self.full.num_items

    @property
    def max_top_k(self) -> int:
        """Largest k."""
        return self.full.max_top_k

    def recommend(self, histories: Histories, k: int) -> TopK:
        """Rank the catalogue for each history; those with as much in their states and as much new go together."""
        histories.check(self.num_items, newcomers=self.full.num_interactions is not None)
        check_top_k(k, self.max_top_k)
        items = np.full((len(histories), k), PAD, dtype=np.int64)
        scores = np.full((len(histories), k), -np.inf, dtype=np.float32)
        lengths = histories.item_ids.lengths
        kept = (lengths > 0) & (lengths <= int(self.full.signature["max_history"]))
        others = np.flatnonzero(~kept)
        if others.size:
            answer = self.full.recommend(histories.select(others), k)
            items[others], scores[others] = answer.item_ids, answer.scores
        alike: defaultdict[tuple[int, int], list[_Row]] = defaultdict(list)
        for row in np.flatnonzero(kept).tolist():
            one = self._with_state(row, histories.item_ids[row])
            alike[self._widths(one)].append(one)
        for widths, users in alike.items():
            for start in range(0, len(users), MAX_BATCH):
                part = users[start : start + MAX_BATCH]
                rows = [one.row for one in part]
                found, best = self._append(part, widths, [histories.exclude_ids[row] for row in rows])
                own = min(k, found.shape[1])
                items[rows, :own], scores[rows, :own] = found[:, :own], best[:, :own]
        return TopK(items, scores)

    def recommend_among(self, histories: Histories, candidate_ids: Ragged, k: int) -> TopK:
        """As `OnnxRecommender.recommend_among`; states play no part in it."""
        return self.full.recommend_among(histories, candidate_ids, k)

    def _append(
        self, users: list[_Row], widths: tuple[int, int], excluded: list[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Answers of users whose pasts and new items are padded to these widths; their states are kept."""
        past, new = widths
        request = {
            "new_item": Ragged.from_rows([one.history[one.known :] for one in users]).pad_left(new),
            "seen_ids": Ragged.from_rows([one.history[: one.known] for one in users]).pad_left(past),
            "past_length": np.array([one.known for one in users], dtype=np.int64),
            "past_keys": _joined([one.state.keys for one in users], past),
            "past_values": _joined([one.state.values for one in users], past),
            "exclude_ids": exclusions(excluded),
        }
        found, best, keys, values = self.session.run(OUTPUTS, request)
        if np.isnan(best).any():
            raise nan_scores()
        for one, new_keys, new_values in zip(users, keys, values, strict=True):
            pairs = (one.state.keys, new_keys), (one.state.values, new_values)
            real = new - (len(one.history) - one.known)
            whole = [np.concatenate([old, added[:, :, real:]], axis=2) for old, added in pairs]
            self.store.put(self._key(one.history), UserState(*whole))
        return found, best

    def _with_state(self, row: int, history: np.ndarray) -> _Row:
        """With the state of the longest beginning that is there; of all but the newest item, which has to be new."""
        size = len(history)
        beginnings = range(size, max(0, size - 1 - MOST_NEW_ITEMS), -1) if size > 1 else ()
        found = self.store.first(self._key(history[:known]) for known in beginnings)
        if found is None:
            return _Row(row, history, 0, self.nothing)
        known = min(size - found[0], size - 1)
        return _Row(row, history, known, UserState(found[1].keys[:, :, :known], found[1].values[:, :, :known]))

    def _widths(self, one: _Row) -> tuple[int, int]:
        """What his past and his new items are padded to: by his own alone, so company changes no bit of an answer."""
        buckets, new = self.full.buckets, len(one.history) - one.known
        if one.known == 0:
            return 0, int(buckets[np.searchsorted(buckets, new)])
        return int(buckets[np.searchsorted(buckets, one.known)]), new

    def _key(self, history: np.ndarray) -> bytes:
        return hashlib.sha256(self._artifact + np.ascontiguousarray(history, dtype=np.int64).tobytes()).digest()


def _joined(states: list[np.ndarray], width: int) -> Float32[np.ndarray, "batch layers kv_heads {width} head_dim"]:
    """Keys or values of many users, padded at the old end."""
    layers, heads, _, head_dim = states[0].shape
    joined = np.zeros((len(states), layers, heads, width, head_dim), dtype=np.float32)
    for row, state in zip(joined, states, strict=True):
        row[:, :, width - state.shape[2] :] = state
    return joined


def _identity(folder: Path) -> bytes:
    """Hash of the artefact by its manifest, which has the hashes of all files; else by the graph and its data files."""
    manifest = folder / "manifest.json"
    if manifest.exists():
        return hashlib.sha256(manifest.read_bytes()).digest()
    files = [(name, (folder / name).stat()) for name in DATA_FILES]
    seen = [(name, status.st_size, status.st_mtime_ns) for name, status in files]
    return hashlib.sha256((folder / APPEND_FILE).read_bytes() + repr(seen).encode()).digest()

"""Users who come back: keys and values of what they have seen are kept, and a new item costs one token."""

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from export.runtime import APPEND_FILE, DATA_FILES, OnnxRecommender, exclusions, nan_scores
from slmrec.errors import ConfigError
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
        self._states: OrderedDict[bytes, UserState] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> UserState | None:
        """The state, or None if it was never kept or has gone."""
        with self._lock:
            state = self._states.get(key)
            if state is not None:
                self._states.move_to_end(key)
            return state

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
        """Rank the catalogue for each history, one user after the other."""
        histories.check(self.num_items, newcomers=self.full.num_interactions is not None)
        check_top_k(k, self.max_top_k)
        items = np.full((len(histories), k), PAD, dtype=np.int64)
        scores = np.full((len(histories), k), -np.inf, dtype=np.float32)
        for row, (history, excluded) in enumerate(zip(histories.item_ids, histories.exclude_ids, strict=True)):
            if not len(history) or len(history) > int(self.full.signature["max_history"]):
                answer = self.full.recommend(histories.select(np.array([row])), k)
                items[row], scores[row] = answer.item_ids[0], answer.scores[0]
                continue
            found, best = self._append(history, excluded)
            kept = min(k, len(found))
            items[row, :kept], scores[row, :kept] = found[:kept], best[:kept]
        return TopK(items, scores)

    def _append(self, history: np.ndarray, excluded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        known, state = self._newest_state(history)
        request = {
            "new_item": history[None, known:], "seen_ids": history[None, :known],
            "past_length": np.array([known], dtype=np.int64),
            "past_keys": state.keys[None], "past_values": state.values[None],
            "exclude_ids": exclusions([excluded]),
        }  # fmt: skip
        found, best, keys, values = self.session.run(OUTPUTS, request)
        if np.isnan(best).any():
            raise nan_scores()
        whole = UserState(
            np.concatenate([state.keys, keys[0]], axis=2), np.concatenate([state.values, values[0]], axis=2)
        )
        self.store.put(self._key(history), whole)
        return found[0], best[0]

    def _newest_state(self, history: np.ndarray) -> tuple[int, UserState]:
        """The longest beginning of a history, itself aside, whose state is there."""
        for known in range(len(history) - 1, max(0, len(history) - 1 - MOST_NEW_ITEMS), -1):
            state = self.store.get(self._key(history[:known]))
            if state is not None:
                return known, state
        return 0, self.nothing

    def _key(self, history: np.ndarray) -> bytes:
        return hashlib.sha256(self._artifact + np.ascontiguousarray(history, dtype=np.int64).tobytes()).digest()


def _identity(folder: Path) -> bytes:
    """Hash of the artefact by its manifest, which has the hashes of all files; else by the graph and its data files."""
    manifest = folder / "manifest.json"
    if manifest.exists():
        return hashlib.sha256(manifest.read_bytes()).digest()
    files = [(name, (folder / name).stat()) for name in DATA_FILES]
    seen = [(name, status.st_size, status.st_mtime_ns) for name, status in files]
    return hashlib.sha256((folder / APPEND_FILE).read_bytes() + repr(seen).encode()).digest()

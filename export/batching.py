"""Requests that arrive one by one, computed together: what waits while a batch is computed is the next batch."""

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

import numpy as np

from slmrec.ragged import Ragged
from slmrec.recommender import Histories, Recommender, TopK

NICENESS = 5


def step_back() -> None:
    """Let this thread, and those it starts, yield to others: requests are read and answered while a batch computes."""
    own = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, own, min(19, os.getpriority(os.PRIO_PROCESS, own) + NICENESS))


class QueueFullError(Exception):
    """More users wait than may."""


class Answering(Recommender, Protocol):
    """A recommender that can also be told the only items there are for each user."""

    def recommend_among(self, histories: Histories, candidate_ids: Ragged, k: int) -> TopK:
        """As `recommend`, from each user's candidates alone."""
        ...


@dataclass(eq=False)
class _Waiting:
    histories: Histories
    k: int
    allowed: Ragged | None
    answer: "asyncio.Future[TopK]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """One recommender behind a bounded queue; of one event loop.

    No request waits for company: an idle recommender is asked at once. Users of one request stay together.

    Args:
        recommender: asked by one thread, whose own threads share the processor.
        max_batch: users computed together at most (a larger request is computed alone).
        max_queue: users that may wait.
        seen: is told the size of every batch.
    """

    def __init__(
        self, recommender: Answering, *, max_batch: int, max_queue: int, seen: Callable[[int], None] = lambda n: None
    ) -> None:
        self.recommender, self.max_batch, self.max_queue, self._seen = recommender, max_batch, max_queue, seen
        self.num_waiting = 0
        self._queue: deque[_Waiting] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="recommend", initializer=step_back)
        self._task: asyncio.Task[None] | None = None

    @property
    def is_full(self) -> bool:
        """Whether there is no room for anybody."""
        return self.num_waiting >= self.max_queue

    async def recommend(self, histories: Histories, k: int, timeout_s: float, allowed: Ragged | None = None) -> TopK:
        """The recommender's answer; `allowed` holds the only items for each user.

        Raises:
            QueueFullError: there is no room for these users.
            TimeoutError: no answer in time; what has not begun by then is not computed.
        """
        if self.num_waiting + len(histories) > self.max_queue:
            raise QueueFullError
        entry = _Waiting(histories, k, allowed)
        self._queue.append(entry)
        self.num_waiting += len(histories)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._work())
        return await asyncio.wait_for(entry.answer, timeout_s)

    async def drain(self) -> None:
        """Wait until everything accepted is answered."""
        while self._task is not None and not self._task.done():
            await asyncio.wait([self._task])

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._queue:
            batch = self._next()
            if not batch:
                continue
            try:
                answers = await loop.run_in_executor(self._thread, self._answer, batch)
            except Exception as error:  # noqa: BLE001 - every request of the batch is told, whatever it was
                for entry in batch:
                    if not entry.answer.done():
                        entry.answer.set_exception(error)
                continue
            for entry, answer in zip(batch, answers, strict=True):
                if not entry.answer.done():
                    entry.answer.set_result(answer)

    def _next(self) -> list[_Waiting]:
        """The oldest requests that fit into a batch; those given up are dropped."""
        batch: list[_Waiting] = []
        users = 0
        while self._queue and (not batch or users + len(self._queue[0].histories) <= self.max_batch):
            entry = self._queue.popleft()
            self.num_waiting -= len(entry.histories)
            if not entry.answer.done():
                batch.append(entry)
                users += len(entry.histories)
        return batch

    def _answer(self, batch: list[_Waiting]) -> list[TopK]:
        """Answers in the order of the batch; those that may be given anything are computed apart from the others."""
        self._seen(sum(len(entry.histories) for entry in batch))
        answers: dict[_Waiting, TopK] = {}
        for is_free, part in groupby(sorted(batch, key=_is_free), _is_free):
            entries = list(part)
            whole = Histories(*(_joined([ids(entry) for entry in entries]) for ids in (_items, _excluded)))
            k = max(entry.k for entry in entries)
            if is_free:
                found = self.recommender.recommend(whole, k)
            else:
                among = _joined([entry.allowed for entry in entries if entry.allowed is not None])
                found = self.recommender.recommend_among(whole, among, k)
            ends = np.cumsum([len(entry.histories) for entry in entries])
            for entry, end in zip(entries, ends.tolist(), strict=True):
                rows = slice(end - len(entry.histories), end)
                answers[entry] = TopK(found.item_ids[rows, : entry.k], found.scores[rows, : entry.k])
        return [answers[entry] for entry in batch]


def _is_free(entry: _Waiting) -> bool:
    return entry.allowed is None


def _items(entry: _Waiting) -> Ragged:
    return entry.histories.item_ids


def _excluded(entry: _Waiting) -> Ragged:
    return entry.histories.exclude_ids


def _joined(parts: list[Ragged]) -> Ragged:
    return Ragged.from_lengths(
        np.concatenate([part.values for part in parts]), np.concatenate([part.lengths for part in parts])
    )

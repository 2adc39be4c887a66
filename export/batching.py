"""Requests that arrive one by one, computed together: what waits while a batch is computed is the next batch."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from slmrec.ragged import Ragged
from slmrec.recommender import Histories, Recommender, TopK


class QueueFullError(Exception):
    """More users wait than may."""


@dataclass(eq=False)
class _Waiting:
    histories: Histories
    k: int
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
        self, recommender: Recommender, *, max_batch: int, max_queue: int, seen: Callable[[int], None] = lambda n: None
    ) -> None:
        self.recommender, self.max_batch, self.max_queue, self._seen = recommender, max_batch, max_queue, seen
        self.num_waiting = 0
        self._queue: deque[_Waiting] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="recommend")
        self._task: asyncio.Task[None] | None = None

    async def recommend(self, histories: Histories, k: int, timeout_s: float) -> TopK:
        """The recommender's answer.

        Raises:
            QueueFullError: there is no room for these users.
            TimeoutError: no answer in time; what has not begun by then is not computed.
        """
        if self.num_waiting + len(histories) > self.max_queue:
            raise QueueFullError
        entry = _Waiting(histories, k)
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
        whole = Histories(*(_joined([part(entry) for entry in batch]) for part in (_items, _excluded)))
        self._seen(len(whole))
        found = self.recommender.recommend(whole, max(entry.k for entry in batch))
        ends = np.cumsum([len(entry.histories) for entry in batch])
        answers = []
        for entry, end in zip(batch, ends.tolist(), strict=True):
            rows = slice(end - len(entry.histories), end)
            answers.append(TopK(found.item_ids[rows, : entry.k], found.scores[rows, : entry.k]))
        return answers


def _items(entry: _Waiting) -> Ragged:
    return entry.histories.item_ids


def _excluded(entry: _Waiting) -> Ragged:
    return entry.histories.exclude_ids


def _joined(parts: list[Ragged]) -> Ragged:
    return Ragged.from_lengths(
        np.concatenate([part.values for part in parts]), np.concatenate([part.lengths for part in parts])
    )

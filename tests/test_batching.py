"""Requests computed together: who waits for whom, a full queue, requests given up, errors."""

import asyncio
import os
import threading
import time

import numpy as np
import pytest

from export.batching import NICENESS, Batcher, QueueFullError
from slmrec.errors import CheckError
from slmrec.ragged import Ragged
from slmrec.recommender import Histories, TopK


class Gate:
    """A recommender that answers when it is let; scores are the newest items."""

    num_items, max_top_k = 100, 10

    def __init__(self):
        self.open, self.batches = threading.Event(), []

    def recommend(self, histories, k):
        self.open.wait(10)
        self.batches.append(len(histories))
        newest = np.array([row[-1] for row in histories.item_ids], dtype=np.float32)
        return TopK(np.ones((len(newest), k), dtype=np.int64), np.repeat(newest[:, None], k, axis=1))

    def recommend_among(self, histories, candidate_ids, k):
        answer = self.recommend(histories, k)
        first = np.array([row[0] for row in candidate_ids])
        return TopK(np.repeat(first[:, None], k, axis=1), answer.scores)


def users(*newest):
    return Histories.of(Ragged.from_rows([[item] for item in newest]))


def test_what_waits_is_the_next_batch_and_a_full_queue_refuses_at_once():
    gate = Gate()

    async def run():
        batcher = Batcher(gate, max_batch=4, max_queue=8)
        asked = [asyncio.ensure_future(batcher.recommend(users(1), 2, 10))]
        await asyncio.sleep(0.05)  # it is being computed
        asked += [asyncio.ensure_future(batcher.recommend(users(number, number), 3, 10)) for number in (2, 3, 4, 5)]
        await asyncio.sleep(0)
        start = time.perf_counter()
        with pytest.raises(QueueFullError):
            await batcher.recommend(users(6), 1, 10)
        assert time.perf_counter() - start < 0.05
        gate.open.set()
        answers = await asyncio.gather(*asked)
        await batcher.drain()
        assert batcher.num_waiting == 0
        again = await batcher.recommend(users(7), 1, 10)
        return [*answers, again]

    answers = asyncio.run(run())
    assert [answer.scores[:, 0].tolist() for answer in answers] == [[1], [2, 2], [3, 3], [4, 4], [5, 5], [7]]
    assert [answer.scores.shape[1] for answer in answers] == [2, 3, 3, 3, 3, 1]
    assert gate.batches == [1, 4, 4, 1]


def test_who_computes_and_the_threads_he_starts_yield_to_the_loop():
    gate, seen = Gate(), []
    gate.open.set()

    def note():
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    def recommend(histories, k):
        note()
        started = threading.Thread(target=note)
        started.start()
        started.join()
        return Gate.recommend(gate, histories, k)

    gate.recommend = recommend
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    asyncio.run(Batcher(gate, max_batch=4, max_queue=8).recommend(users(1), 1, 10))
    assert seen == [min(19, before + NICENESS)] * 2
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_a_request_given_up_before_its_turn_is_not_computed():
    gate = Gate()

    async def run():
        batcher = Batcher(gate, max_batch=4, max_queue=8)
        first = asyncio.ensure_future(batcher.recommend(users(1), 1, 10))
        await asyncio.sleep(0.05)
        with pytest.raises(TimeoutError):
            await batcher.recommend(users(2, 2), 1, 0.05)
        gate.open.set()
        await first
        await batcher.drain()
        assert batcher.num_waiting == 0

    asyncio.run(run())
    assert gate.batches == [1]


def test_an_error_reaches_those_who_asked_and_nobody_after_them():
    class Failing(Gate):
        def recommend(self, histories, k):
            if len(histories) == 2:
                raise CheckError("the graph gave NaN scores", remedy="none")
            return super().recommend(histories, k)

    failing = Failing()
    failing.open.set()

    async def run():
        batcher = Batcher(failing, max_batch=4, max_queue=8)
        with pytest.raises(CheckError):
            await batcher.recommend(users(1, 2), 1, 10)
        return await batcher.recommend(users(3), 1, 10)

    assert asyncio.run(run()).scores.tolist() == [[3]]


def test_allow_lists_and_free_requests_of_one_batch_get_their_own_answers_in_order():
    gate = Gate()

    async def run():
        batcher = Batcher(gate, max_batch=16, max_queue=16)
        asked = [asyncio.ensure_future(batcher.recommend(users(9), 1, 10))]
        await asyncio.sleep(0.05)
        for number, allowed in ((1, None), (2, [[7]]), (3, None), (4, [[8, 1]])):
            ids = None if allowed is None else Ragged.from_rows(allowed)
            asked.append(asyncio.ensure_future(batcher.recommend(users(number), number, 10, ids)))
        await asyncio.sleep(0)
        gate.open.set()
        return await asyncio.gather(*asked)

    answers = asyncio.run(run())
    assert [answer.scores.tolist() for answer in answers] == [[[9]], [[1]], [[2] * 2], [[3] * 3], [[4] * 4]]
    assert [int(answer.item_ids[0, 0]) for answer in answers] == [1, 1, 7, 1, 8]
    assert gate.batches == [1, 2, 2]

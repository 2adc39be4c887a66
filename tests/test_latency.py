import gc
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from slmrec.artifact import Stage, publish
from slmrec.catalogue import Catalogue
from slmrec.cli.memory import peak_rss_bytes
from slmrec.config import BenchmarkConfig, SasrecConfig, TrainConfig
from slmrec.errors import CheckError
from slmrec.latency import REST_S, Timing, measure_latency, measure_memory, percentiles
from slmrec.models.checkpoint import save_checkpoint
from slmrec.models.sasrec import Sasrec
from slmrec.ragged import Ragged
from slmrec.recommender import Histories, TopK

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Clock:
    """Time that passes only where a recommender says so."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Worker:
    """Takes a known time for each item it reads, and remembers what it was asked."""

    name: str
    clock: Clock
    seconds_per_item: float
    log: list[tuple[str, tuple[int, ...]]]
    num_items: int = 1000
    max_top_k: int = 100
    collecting: list[bool] = field(default_factory=list)

    def recommend(self, histories: Histories, k: int) -> TopK:
        self.clock.now += self.seconds_per_item * len(histories.item_ids.values)
        self.log.append((self.name, tuple(histories.item_ids.lengths.tolist())))
        self.collecting.append(gc.isenabled())
        return TopK(np.ones((len(histories), k), dtype=np.int64), np.zeros((len(histories), k), dtype=np.float32))


def histories(lengths: range = range(1, 41)) -> Histories:
    return Histories.of(Ragged.from_rows([np.arange(1, length + 1) for length in lengths]))


def measured(**settings: int | tuple[int, ...]) -> tuple[dict[str, Timing], list[tuple[str, tuple[int, ...]]]]:
    clock, log = Clock(), []
    workers = {
        name: Worker(name, clock, cost, log) for name, cost in (("slow", 0.004), ("fast", 0.001), ("mid", 0.002))
    }
    config = BenchmarkConfig(**{"rounds": 20, "batch_sizes": (4,), "batch_rounds": 3} | settings)
    return measure_latency(workers, histories(), config, clock=clock, sleep=lambda s: log.append(("rest", (s,)))), log


def turns(log: list[tuple[str, tuple[int, ...]]]) -> list[list[tuple[str, tuple[int, ...]]]]:
    """What was asked after each rest."""
    rests = [place for place, (name, _) in enumerate(log) if name == "rest"]
    return [log[start + 1 : stop] for start, stop in zip(rests, [*rests[1:], len(log)], strict=True)]


def test_artefacts_take_turns_on_the_same_requests_each_after_a_rest() -> None:
    _, log = measured(rounds=25)
    found = turns(log)
    assert [len(turn) for turn in found] == [11, 11, 11, 11, 11, 11, 6, 6, 6, *[1] * 9]
    for start in range(0, len(found), 3):
        slow, fast, mid = ([request for _, request in turn] for turn in found[start : start + 3])
        assert slow == fast == mid
        assert [{name for name, _ in turn} for turn in found[start : start + 3]] == [{"slow"}, {"fast"}, {"mid"}]
    assert {request for name, request in log if name == "rest"} == {(REST_S,)}


def test_warm_up_comes_first_and_is_not_timed() -> None:
    timings, log = measured()
    before = log[: log.index(("rest", (REST_S,)))]
    assert ("mid", (40,)) in before, "the longest history is among the warm-up"
    assert len(timings["slow"].single_s) == 20


def test_seconds_are_those_of_the_clock_and_lengths_those_of_the_histories() -> None:
    timings, log = measured(rounds=200)
    asked = [request[0] for turn in turns(log) for name, request in turn[1:] if name == "slow"]
    lengths = np.array(asked)
    np.testing.assert_allclose(timings["slow"].single_s, 0.004 * lengths)
    assert lengths.mean() == pytest.approx(20.5, abs=3), "lengths are drawn from real users, not the longest alone"


def test_latency_is_in_milliseconds_and_throughput_in_users_per_second() -> None:
    timing = Timing(np.full(100, 0.025), {8: np.array([0.5, 1.0, 2.0]), 32: np.array([4.0, 4.0])})
    latency = timing.latency()
    assert latency == {"p50_ms": 25, "p90_ms": 25, "p95_ms": 25, "p99_ms": 25, "mean_ms": 25, "runs": 100}
    assert timing.throughput() == {"batch_8": 8.0, "batch_32": 8.0}


@pytest.mark.parametrize(
    ("runs", "expected"),
    [(1, []), (2, [50]), (9, [50]), (10, [50, 90]), (20, [50, 90, 95]), (99, [50, 90, 95]), (100, [50, 90, 95, 99])],
)
def test_a_percentile_is_refused_below_the_runs_it_needs(runs: int, expected: list[int]) -> None:
    assert list(percentiles(np.arange(float(runs)))) == expected


def test_a_percentile_is_a_run_that_at_most_the_rest_exceeded() -> None:
    values = np.random.default_rng(0).permutation(np.arange(1.0, 201.0))
    for percent, value in percentiles(values).items():
        assert value in values
        assert (values <= value).mean() == pytest.approx(percent / 100)


def test_speedups_are_paired_by_round() -> None:
    noise = np.linspace(1, 50, 101)
    slow = Timing(0.004 * noise, {8: 0.1 * noise})
    fast = Timing(0.001 * noise, {8: 0.02 * noise})
    speedups = fast.speedups(slow)
    assert speedups["speedup_batch_1"].to_json() == pytest.approx({"median": 4, "p10": 4, "p90": 4})
    assert speedups["speedup_batch_8"].median == pytest.approx(5)
    assert slow.speedups(slow)["speedup_batch_1"].median == 1
    together = [Timing(singles, {1: np.full(3, 0.5)}) for singles in (np.full(10, 0.2), np.full(10, 0.1))]
    assert together[1].speedups(together[0])["speedup_batch_1"].median == 2, "single requests, not batches of one"


def test_the_spread_of_a_speedup_is_the_rounds_10th_and_90th_percentile() -> None:
    baseline = Timing(np.arange(1.0, 102.0), {})
    spread = Timing(np.ones(101), {}).speedups(baseline)["speedup_batch_1"]
    assert (spread.p10, spread.median, spread.p90) == pytest.approx((11, 51, 91))


def test_garbage_is_not_collected_while_the_clock_runs() -> None:
    clock, log = Clock(), []
    worker = Worker("one", clock, 0.001, log)
    measure_latency({"one": worker}, histories(), BenchmarkConfig(rounds=10, batch_sizes=()), clock=clock)
    assert not any(worker.collecting[-10:])
    assert gc.isenabled()


def test_the_same_seed_gives_the_same_requests_and_another_seed_others() -> None:
    assert measured(seed=1)[1] == measured(seed=1)[1]
    assert measured(seed=1)[1] != measured(seed=2)[1]


def test_no_more_items_are_asked_for_than_every_artefact_can_return() -> None:
    asked: list[int] = []

    class Picky(Worker):
        def recommend(self, histories: Histories, k: int) -> TopK:
            asked.append(k)
            return super().recommend(histories, k)

    clock = Clock()
    workers = {"a": Picky("a", clock, 0.001, [], max_top_k=7), "b": Picky("b", clock, 0.001, [])}
    measure_latency(workers, histories(), BenchmarkConfig(rounds=2, batch_sizes=(), top_k=10), clock=clock)
    assert set(asked) == {7}


def test_a_childs_peak_memory_does_not_hold_its_parents() -> None:
    ballast = np.ones(60_000_000)  # 480 MB that ru_maxrss would pass on to the child
    code = "from slmrec.cli.memory import peak_rss_bytes; print(peak_rss_bytes())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert 5e6 < int(child.stdout) < 0.9 * ballast.nbytes < peak_rss_bytes()


def test_memory_of_a_real_checkpoint_is_that_of_its_own_process(tmp_path: Path) -> None:
    with publish(tmp_path / "data", Stage(name="data", kind="dataset", settings={})) as folder:
        rows = [{"user": u, "user_id": f"u{u}", "item": i + 1, "timestamp": i} for u in range(5) for i in range(4)]
        pl.DataFrame(rows).write_parquet(folder / "interactions.parquet")
        Catalogue(list("abcd"), [None] * 4, [None] * 4).save(folder)
        (folder / "dataset.json").write_text("{}")
    with publish(tmp_path / "items", Stage(name="train-items", kind="checkpoint", settings={})) as folder:
        config = SasrecConfig(hidden_size=8, train=TrainConfig(epochs=1, batch_size=1, learning_rate=1e-3))
        save_checkpoint(folder, Sasrec(config, num_items=4))
        Catalogue(list("abcd"), [None] * 4, [None] * 4).save(folder)
    memory = measure_memory(tmp_path / "items", tmp_path / "data", device="cpu")
    assert 20e6 < memory.baseline_bytes < memory.peak_bytes < 2e9
    assert memory.load_ms > 0
    assert memory.first_answer_ms > 0


def test_a_failed_memory_measurement_names_the_cause(tmp_path: Path) -> None:
    with pytest.raises(CheckError, match=r"ended with 2: Error: .*is not a folder"):
        measure_memory(tmp_path / "model", tmp_path / "data")

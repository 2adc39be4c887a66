"""The artefact to serve, the front, bounds, and open load with a clock that is the test's."""

import json

import numpy as np
import pytest
from benchmarked import CONFIG, NUM_ITEMS, Cyclic, make_data, make_entrants
from hypothesis import given
from hypothesis import strategies as st

from slmrec.benchmark import run_benchmark
from slmrec.choice import Constraints, choose, front, parse_latency
from slmrec.config import BenchmarkConfig
from slmrec.errors import ConfigError
from slmrec.latency import measure_load
from slmrec.report import to_csv, to_markdown
from slmrec.report_html import to_html
from slmrec.sequences import test_cases as held_out


def row(name, p50=1.0, ndcg=0.1, kept=1.0, size_mb=1.0, **latency):
    return {
        "name": name, "latency": {"batch_1": {"p50_ms": p50, "runs": 200, **latency}}, "size_bytes": size_mb * 1e6,
        "accuracy": None if ndcg is None else {"ndcg@10": ndcg},
        "ratios": {} if kept is None else {"ndcg@10": {"ratio": kept}},
    }  # fmt: skip


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(points):
    rows = [row(str(number), p50, ndcg) for number, (p50, ndcg) in enumerate(points)]
    found = front(rows)
    for number, (p50, ndcg) in enumerate(points):
        beaten = any(a <= p50 and b >= ndcg and (a, b) != (p50, ndcg) for a, b in points)
        assert (str(number) in found) == (not beaten)


def test_the_fastest_that_keeps_to_every_bound_is_chosen_with_the_reason():
    rows = [
        row("teacher", 60, p99_ms=90), row("student", 20, kept=0.98, p99_ms=25), row("int8", 5, kept=0.97, p99_ms=9),
        row("tiny", 1, kept=0.5, p99_ms=2),
    ]  # fmt: skip
    bounds = Constraints(max_latency_ms={"p99": 30.0}, min_ndcg=0.975)
    found = choose(rows, bounds, "teacher")
    assert found["name"] == "student"
    assert "p99 90.0 ms is above 30" in found["reason"]
    assert "int8 (NDCG@10 97.0 % of the baseline's is below 97.5 %)" in found["reason"]
    assert choose(rows, Constraints(max_size_mb=0.5), "teacher")["name"] is None


def test_without_a_bound_on_accuracy_a_hundredth_may_be_lost():
    rows = [row("teacher", 60), row("good", 10, kept=0.991), row("bad", 5, kept=0.9)]
    assert choose(rows, Constraints(), "teacher")["name"] == "good"
    unknown = [row("teacher", 60, ndcg=None, kept=None), row("bad", 5, ndcg=None, kept=None)]
    assert choose(unknown, Constraints(), "teacher")["name"] == "bad"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constraints(max_latency_ms={"p98": 3.0}), r"max_latency_ms p98=3\.0 is no bound"),
        (lambda: Constraints(max_latency_ms={"p99": 0.0}), r"max_latency_ms p99=0\.0 is no bound"),
        (lambda: Constraints(min_ndcg=0.0), r"min_ndcg=0\.0"),
        (lambda: Constraints(min_ndcg=99.0), r"min_ndcg=99\.0 is no share"),
        (lambda: Constraints(max_size_mb=-1.0), r"max_size_mb=-1\.0"),
        (lambda: parse_latency(["fast"]), "max_latency_ms='fast' is no bound"),
        (lambda: BenchmarkConfig(rate=0.0), r"rate=0\.0 is not above 0"),
        (lambda: parse_latency(["p99=5", "50"]), "bounds p99 twice"),
        (lambda: BenchmarkConfig(rounds=50, constraints=Constraints(max_latency_ms={"p99": 5.0})), "p99 of 50 rounds"),
        (lambda: BenchmarkConfig(floor=False, device_spec="a100"), "device_spec estimates the floor"),
        (lambda: BenchmarkConfig(accuracy=False, constraints=Constraints(min_ndcg=0.9)), "min_ndcg needs accuracy"),
        (lambda: choose([row("a")], Constraints(max_latency_ms={"p99": 3.0}), "a"), "p99 of a was not measured in 200"),
        (lambda: choose([row("a", kept=None)], Constraints(min_ndcg=0.9), "a"), "NDCG@10 of a was not measured"),
    ],
)
def test_bounds_that_cannot_be_judged_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


class Clock:
    """Time that passes when somebody sleeps or works."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Slow(Cyclic):
    """Takes a fixed time for every request."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def recommend(self, histories, k):
        self.clock.now += self.seconds
        return super().recommend(histories, k)


@pytest.mark.parametrize("rate", [5.0, 50.0, 200.0])
def test_open_load_counts_waiting_as_a_queue_does(tmp_path, rate):
    clock = Clock()
    histories = held_out(make_data(tmp_path).sequences).histories
    config = BenchmarkConfig(rate=rate, rate_requests=400, seed=3)
    found = measure_load(Slow(clock, 0.01), histories, config, clock=clock, sleep=clock.sleep)
    arrivals = np.cumsum(np.random.default_rng([3, 1]).exponential(1 / rate, 400))
    free, waited = 0.0, []
    for arrival in arrivals:
        free = max(free, arrival) + 0.01
        waited.append(1000 * (free - arrival))
    assert found["p50_ms"] == pytest.approx(np.percentile(waited, 50, method="inverted_cdf"), rel=1e-6)
    assert found["p99_ms"] == pytest.approx(np.percentile(waited, 99, method="inverted_cdf"), rel=1e-6)
    assert found["utilisation"] == pytest.approx(4.0 / free, rel=1e-6)
    assert (found["utilisation"] > 0.98) == (rate > 100)


def test_report_names_the_artefact_to_serve_and_what_load_did(tmp_path):
    from dataclasses import replace

    bounds = Constraints(max_latency_ms={"p50": 1000.0}, min_ndcg=0.9)
    config = replace(CONFIG, rate=2000.0, rate_requests=20, constraints=bounds, floor=False)
    said: list[str] = []
    report = run_benchmark(make_entrants(tmp_path), make_data(tmp_path / "d"), config, say=said.append)
    assert not any("items at most" in line for line in said)
    run_benchmark(make_entrants(tmp_path), make_data(tmp_path / "e"), replace(config, top_k=50), say=said.append)
    assert f"teacher answers {NUM_ITEMS} items at most: as many are asked of all" in said
    benchmark = json.loads(json.dumps(report.benchmark))
    assert benchmark["recommended"]["name"] in {row["name"] for row in benchmark["rows"]}
    assert all(isinstance(row["pareto"], bool) for row in benchmark["rows"])
    kept = {row["name"]: row["ratios"]["ndcg@10"]["ratio"] >= 0.9 for row in benchmark["rows"]}
    assert {row["name"]: row["satisfies_constraints"] for row in benchmark["rows"]} == kept
    assert "- To serve: " in to_markdown(report.benchmark)
    assert "at 2000 requests a second" in to_markdown(report.benchmark)
    assert "<h2>To serve</h2>" in to_html(report)
    assert "load.p50_ms" in to_csv(report.benchmark)

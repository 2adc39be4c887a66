"""Latency, throughput and memory of any recommenders, measured in turn so that a noisy machine hits all alike."""

import contextlib
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slmrec.config import BenchmarkConfig
from slmrec.errors import CheckError, ConfigError
from slmrec.recommender import Histories, Recommender

PERCENTILES = (50, 90, 95, 99)
WARMUP_REQUESTS = 5
MEMORY_TIMEOUT_S = 1800
TURN = 10
"""Single users that one artefact answers before it is the next one's turn."""
REST_S = 0.1
"""Before a turn: threads of ONNX Runtime and OpenMP spin for some ten milliseconds after a request, and would slow down
whoever comes next."""

Clock = Callable[[], float]


@dataclass(frozen=True)
class Spread:
    """A ratio over rounds: its median, and the 10th and 90th percentile of the rounds' own ratios."""

    median: float
    p10: float
    p90: float

    def to_json(self) -> dict[str, float]:
        """As benchmark.json holds it."""
        return {"median": self.median, "p10": self.p10, "p90": self.p90}


@dataclass(frozen=True, eq=False)
class Timing:
    """Seconds of each request of one artefact; round r of all artefacts is the same request."""

    single_s: np.ndarray
    """One user at a time, [rounds]."""
    batch_s: Mapping[int, np.ndarray]
    """Batch size -> seconds per batch, [batch_rounds]."""

    def latency(self) -> dict[str, float]:
        """Milliseconds of a single-user request: percentiles that enough runs support, the mean, and the runs."""
        milliseconds = self.single_s * 1000
        return {
            **{f"p{percent}_ms": value for percent, value in percentiles(milliseconds).items()},
            "mean_ms": float(milliseconds.mean()),
            "runs": len(milliseconds),
        }

    def throughput(self) -> dict[str, float]:
        """Users per second at each batch size, median over rounds."""
        return {f"batch_{size}": float(np.median(size / seconds)) for size, seconds in self.batch_s.items()}

    def speedups(self, baseline: "Timing") -> dict[str, Spread]:
        """How many times as fast as the baseline, round by round; of one user, by single requests."""
        spreads = {f"speedup_batch_{size}": _spread(baseline.batch_s[size] / s) for size, s in self.batch_s.items()}
        return spreads | {"speedup_batch_1": _spread(baseline.single_s / self.single_s)}


@dataclass(frozen=True)
class Memory:
    """Memory and start of a fresh process that loads one artefact and answers some requests."""

    peak_bytes: int
    baseline_bytes: int
    """Peak before the artefact was loaded: Python, the dataset, their libraries."""
    load_ms: float
    """Libraries, weights and session."""
    first_answer_ms: float

    def to_json(self) -> dict[str, float]:
        """As benchmark.json holds it."""
        return {
            "peak_bytes": self.peak_bytes,
            "baseline_bytes": self.baseline_bytes,
            "load_ms": self.load_ms,
            "first_answer_ms": self.first_answer_ms,
        }


def percentiles(values: np.ndarray) -> dict[int, float]:
    """p50, p90, p95 and p99 (nearest rank), each only where at least 1 / (1 - p) runs support it.

    >>> sorted(percentiles(np.arange(99.0))), sorted(percentiles(np.arange(100.0)))
    ([50, 90, 95], [50, 90, 95, 99])
    """
    return {
        percent: float(np.percentile(values, percent, method="inverted_cdf"))
        for percent in PERCENTILES
        if len(values) * (100 - percent) >= 100
    }


def measure_latency(
    recommenders: Mapping[str, Recommender],
    histories: Histories,
    config: BenchmarkConfig,
    *,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Timing]:
    """Time every recommender on the same requests in turn: ten single users each, then ten more; batches one by one.

    Requests are users drawn from `histories` with a seed, so their lengths are those of real traffic. Nothing but
    `recommend` is inside the clock, garbage is not collected meanwhile, and before each turn the threads of the one
    before have come to rest.
    """
    k = min(config.top_k, *(recommender.max_top_k for recommender in recommenders.values()))
    if k < 1:
        raise ConfigError(f"top_k={config.top_k}", remedy="--top-k 10")
    singles = requests(histories, 1, config.rounds, seed=config.seed)
    batches = {size: requests(histories, size, config.batch_rounds, seed=config.seed) for size in config.batch_sizes}
    longest = histories.select(np.argsort(-histories.item_ids.lengths, kind="stable")[:1])
    for recommender in recommenders.values():
        for request in [longest, *singles[:WARMUP_REQUESTS], *(requests[0] for requests in batches.values())]:
            recommender.recommend(request, k)
    with _no_garbage_collection():
        single_s = _Turns(TURN, clock, sleep).seconds(recommenders, singles, k)
        batch_s = {size: _Turns(1, clock, sleep).seconds(recommenders, asked, k) for size, asked in batches.items()}
    return {
        name: Timing(single_s[name], {size: seconds[name] for size, seconds in batch_s.items()})
        for name in recommenders
    }


def measure_load(
    recommender: Recommender,
    histories: Histories,
    config: BenchmarkConfig,
    *,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, float]:
    """Latency under open load: requests arrive at random times whether or not those before them are done.

    One user a request, one worker, first come first served; latency counts from the arrival, so waiting is in it. At a
    utilisation of 1 the queue only grows, and percentiles say how long the run was.
    """
    assert config.rate is not None
    k = min(config.top_k, recommender.max_top_k)
    asked = requests(histories, 1, config.rate_requests, seed=config.seed)
    gaps = np.random.default_rng([config.seed, 1]).exponential(1 / config.rate, len(asked))
    arrivals = np.cumsum(gaps)
    for request in asked[:WARMUP_REQUESTS]:
        recommender.recommend(request, k)
    waited, busy, start = np.empty(len(asked)), 0.0, clock()
    for index, (request, arrival) in enumerate(zip(asked, arrivals, strict=True)):
        early = start + arrival - clock()
        if early > 0:
            sleep(early)
        began = clock()
        recommender.recommend(request, k)
        ended = clock()
        busy += ended - began
        waited[index] = ended - start - arrival
    values = {f"p{percent}_ms": value for percent, value in percentiles(waited * 1000).items()}
    return {"rate": config.rate, "utilisation": busy / (clock() - start), "requests": len(asked), **values}


def measure_memory(artifact: Path, data: Path, *, device: str = "auto") -> Memory:
    """Load the artefact in a process of its own, so that no other artefact's memory is counted.

    Raises:
        CheckError: the process failed.
    """
    home = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "slmrec.cli.memory", str(artifact), str(data), "--device", device]
    try:
        process = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=MEMORY_TIMEOUT_S,
            check=False,
            env={**os.environ, "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        raise _memory_error(artifact, f"took over {MEMORY_TIMEOUT_S} s") from None
    if process.returncode != 0:
        last = process.stderr.strip().splitlines()[-1:] or ["no message"]
        raise _memory_error(artifact, f"ended with {process.returncode}: {last[0]}")
    values: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return Memory(**values)


def requests(histories: Histories, size: int, rounds: int, *, seed: int) -> list[Histories]:
    """Users drawn with the seed: what round after round is asked, of every recommender alike."""
    generator = np.random.default_rng([seed, size])
    rows = generator.integers(len(histories), size=(rounds, size))
    return [histories.select(row) for row in rows]


@dataclass(frozen=True)
class _Turns:
    """How artefacts take turns: a rest, one request untimed if `length` is above 1, then `length` that are timed."""

    length: int
    clock: Clock
    sleep: Callable[[float], None]

    def seconds(
        self, recommenders: Mapping[str, Recommender], requests: list[Histories], k: int
    ) -> dict[str, np.ndarray]:
        """Seconds of each request by recommender."""
        found = {name: np.empty(len(requests)) for name in recommenders}
        for first in range(0, len(requests), self.length):
            turn = range(first, min(first + self.length, len(requests)))
            for name, recommender in recommenders.items():
                self.sleep(REST_S)
                if self.length > 1:
                    recommender.recommend(requests[first], k)
                for index in turn:
                    start = self.clock()
                    recommender.recommend(requests[index], k)
                    found[name][index] = self.clock() - start
        return found


def _spread(ratios: np.ndarray) -> Spread:
    p10, median, p90 = np.percentile(ratios, [10, 50, 90])
    return Spread(float(median), float(p10), float(p90))


def _memory_error(artifact: Path, what: str) -> CheckError:
    return CheckError(
        f"the process measuring the memory of {artifact} {what}", remedy="--no-memory to leave memory unmeasured"
    )


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

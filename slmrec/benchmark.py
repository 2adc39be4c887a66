"""Accuracy against latency of several artefacts in one run, and what separates each from the baseline."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from slmrec.artifact import Artifact
from slmrec.choice import Constraints, choose, front
from slmrec.compare import SCHEMA
from slmrec.config import BenchmarkConfig, settings_of
from slmrec.dataset import Dataset, require_same_items
from slmrec.errors import ConfigError
from slmrec.evaluate import TEST_PROTOCOL, Accuracy, evaluate
from slmrec.latency import Memory, Timing, measure_latency, measure_load, requests
from slmrec.machine import describe_machine, usable_cores
from slmrec.metrics import Comparison, Interval, compare, holm, overlap, ratio_of_means
from slmrec.recommender import Histories, Recommender
from slmrec.report import Example, ExampleItem, Report
from slmrec.report_sources import stages_of, trainings
from slmrec.roofline import DEVICES, Ceilings, CountsWork, measure_ceilings, measured_over_floor
from slmrec.sequences import Cases, test_cases

FLOOR_REQUESTS = 5
"""Requests whose arithmetic is counted; counting one runs it again under a profiler."""
EXAMPLE_HISTORY = 8
EXAMPLE_LENGTHS = (8, 60)
"""Histories that are neither too short to show a taste nor an oddity."""

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Entrant:
    """An artefact that takes part, loaded."""

    name: str
    artifact: Artifact
    recommender: Recommender


@dataclass(frozen=True, eq=False)
class _Measured:
    """All that was measured of one entrant."""

    entrant: Entrant
    timing: Timing
    accuracy: Accuracy | None
    memory: Memory | None
    floor: dict[str, dict[str, Any]] | None
    load: dict[str, float] | None


def run_benchmark(
    entrants: Sequence[Entrant],
    data: Dataset,
    config: BenchmarkConfig,
    *,
    baseline: str | None = None,
    memory: Callable[[Artifact], Memory] | None = None,
    say: Say = lambda message: None,
) -> Report:
    """Measure every entrant on the same test users and the same requests.

    Args:
        entrants: artefacts in the order of the report's rows.
        data: the dataset that all of them were made for.
        config: what to measure and how often.
        baseline: name of the entrant that the others are compared with; None takes the first.
        memory: measures an artefact in a process of its own; None leaves memory unmeasured.
        say: is told what is going on.
    """
    baseline = baseline or entrants[0].name
    check_entrants(entrants, data, baseline)
    shortest = min(entrants, key=lambda entrant: entrant.recommender.max_top_k)
    if config.top_k > shortest.recommender.max_top_k:
        say(f"{shortest.name} answers {shortest.recommender.max_top_k} items at most: as many are asked of all")
        config = replace(config, top_k=shortest.recommender.max_top_k)
    provenance = _provenance(data, config)  # first, so that the load is what others cause
    cases = test_cases(data.sequences)
    accuracies = {entrant.name: _accuracy(entrant, cases, config, say) for entrant in entrants}
    peaks = {entrant.name: _memory(entrant, memory, say) for entrant in entrants}
    say(f"latency: {config.rounds} rounds of {len(entrants)} artefacts in turn")
    recommenders = {entrant.name: entrant.recommender for entrant in entrants}
    timings = measure_latency(recommenders, cases.histories, config)
    ceilings = _ceilings(provenance["machine"], config, say)
    floors = {
        e.name: floors_of(e.recommender, timings[e.name], cases.histories, config, ceilings) if ceilings else None
        for e in entrants
    }
    loads = {e.name: _load(e, cases.histories, config, say) for e in entrants}
    measured = [
        _Measured(e, timings[e.name], accuracies[e.name], peaks[e.name], floors[e.name], loads[e.name])
        for e in entrants
    ]
    rows = _rows(measured, baseline, config)
    _judge(rows, config.constraints)
    chosen = choose(rows, config.constraints, baseline)
    named = {e.name: e.artifact for e in entrants}
    return Report(
        benchmark={**provenance, "baseline": baseline, "rows": rows, "recommended": chosen, "stages": stages_of(named)}
        | ({"ceilings": ceilings.to_json()} if ceilings else {}),
        curves=trainings(named),
        example=_example(measured, data, cases, config.seed),
    )


def check_entrants(entrants: Sequence[Entrant], data: Dataset, baseline: str) -> None:
    """Refuse names that are not unique, an unknown baseline, and models of another catalogue."""
    names = [entrant.name for entrant in entrants]
    if len(set(names)) < len(names):
        raise ConfigError(f"two artefacts have one name: {', '.join(sorted(names))}", remedy="name each artefact once")
    if baseline not in names:
        raise ConfigError(f"the baseline {baseline!r} is not measured", remedy=f"--baseline {' or '.join(names)}")
    for entrant in entrants:
        require_same_items(entrant.artifact, data)


def _ceilings(machine: Mapping[str, Any], config: BenchmarkConfig, say: Say) -> Ceilings | None:
    if config.device_spec:
        return DEVICES[config.device_spec]
    if not config.floor or machine["gpu"]:
        return None
    say("floor: the machine's best, and what each artefact asks of it")
    return measure_ceilings(usable_cores())


def floors_of(
    recommender: Recommender, timing: Timing, histories: Histories, config: BenchmarkConfig, ceilings: Ceilings
) -> dict[str, dict[str, Any]] | None:
    """Floor of the first timed requests of each batch size, and how far above it they took; None if it is not known."""
    if not isinstance(recommender, CountsWork):
        return None
    found = {}
    for size, seconds in {1: timing.single_s, **timing.batch_s}.items():
        counted = min(FLOOR_REQUESTS, len(seconds))
        asked = requests(histories, size, len(seconds), seed=config.seed)[:counted]
        works = [recommender.work(request) for request in asked]
        found[f"batch_{size}"] = measured_over_floor(seconds[:counted].tolist(), works, ceilings)
    return found


def _provenance(data: Dataset, config: BenchmarkConfig) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "dataset": {**data.info, "path": str(data.artifact.path), "hash": data.hash},
        "settings": settings_of(config),
        "commands": [],
    }


def _accuracy(entrant: Entrant, cases: Cases, config: BenchmarkConfig, say: Say) -> Accuracy | None:
    if not config.accuracy:
        return None
    say(f"accuracy of {entrant.name}: {len(cases)} users")
    return evaluate(entrant.recommender, cases, protocol=TEST_PROTOCOL)


def _memory(entrant: Entrant, memory: Callable[[Artifact], Memory] | None, say: Say) -> Memory | None:
    if memory is None:
        return None
    say(f"memory of {entrant.name}")
    return memory(entrant.artifact)


def _load(entrant: Entrant, histories: Histories, config: BenchmarkConfig, say: Say) -> dict[str, float] | None:
    if config.rate is None:
        return None
    say(f"load on {entrant.name}: {config.rate_requests} requests at {config.rate:g} a second")
    return measure_load(entrant.recommender, histories, config)


def _rows(measured: Sequence[_Measured], baseline: str, config: BenchmarkConfig) -> list[dict[str, Any]]:
    reference = next(one for one in measured if one.entrant.name == baseline)
    rows = [_row(one, reference, config) for one in measured]
    comparisons = _comparisons(measured, reference, config)
    corrected = holm([comparison.p_value for comparison in comparisons.values()])
    for row in rows:
        row["overlap@10"] = _overlaps(row["name"], measured, baseline)
    for (name, comparison), p_holm in zip(comparisons.items(), corrected, strict=True):
        row = next(row for row in rows if row["name"] == name)
        row["comparison"] = {
            "baseline": baseline,
            "metric": "ndcg@10",
            **_ends(comparison.difference, "difference"),
            "p": comparison.p_value,
            "p_holm": p_holm,
        }
    return rows


def _judge(rows: Sequence[dict[str, Any]], constraints: Constraints) -> None:
    """Note in each row whether it is on the front of accuracy and latency, and whether it keeps to the constraints."""
    best = front(rows)
    for row in rows:
        row["pareto"] = row["name"] in best if row["accuracy"] is not None else None
        row["satisfies_constraints"] = not constraints.broken_by(row) if constraints.any else None


def _row(one: _Measured, reference: _Measured, config: BenchmarkConfig) -> dict[str, Any]:
    artifact = one.entrant.artifact
    return {
        "name": one.entrant.name,
        "artifact": str(artifact.path),
        "kind": artifact.kind,
        "stages": artifact.stages,
        "hash": artifact.hash,
        "accuracy": one.accuracy.to_json() if one.accuracy else None,
        "latency": {"batch_1": one.timing.latency()},
        "throughput": one.timing.throughput(),
        "price_per_million": price_per_million(one.timing.throughput(), config.gpu_hour_price),
        "size_bytes": artifact.size_bytes,
        "peak_memory_bytes": one.memory.peak_bytes if one.memory else None,
        "memory": one.memory.to_json() if one.memory else None,
        "floor": one.floor,
        "load": one.load,
        "ratios": _ratios(one, reference, config),
        "comparison": None,
    }


def price_per_million(throughput: Mapping[str, float], hour_price: float | None) -> float | None:
    """What a million users' lists cost at the best measured rate, in the currency of the machine's hour.

    >>> price_per_million({"batch_8": 100.0, "batch_32": 250.0}, 1.8)
    2.0
    """
    if hour_price is None:
        return None
    return 1e6 / max(throughput.values()) / 3600 * hour_price


def _ratios(one: _Measured, reference: _Measured, config: BenchmarkConfig) -> dict[str, Any]:
    """Own value over the baseline's; a speed-up is the baseline's time over the own."""
    ratios: dict[str, Any] = {name: spread.to_json() for name, spread in one.timing.speedups(reference.timing).items()}
    ratios["size_bytes"] = one.entrant.artifact.size_bytes / reference.entrant.artifact.size_bytes
    if one.memory and reference.memory:
        ratios["peak_memory_bytes"] = one.memory.peak_bytes / reference.memory.peak_bytes
    if one.accuracy and reference.accuracy and reference.accuracy.user_ndcg_10.any():
        own, other = one.accuracy.user_ndcg_10, reference.accuracy.user_ndcg_10
        ratios["ndcg@10"] = _ends(ratio_of_means(own, other, seed=config.seed), "ratio")
    return ratios


def _comparisons(measured: Sequence[_Measured], reference: _Measured, config: BenchmarkConfig) -> dict[str, Comparison]:
    if reference.accuracy is None:
        return {}
    baseline = reference.accuracy.user_ndcg_10
    return {
        one.entrant.name: compare(one.accuracy.user_ndcg_10, baseline, seed=config.seed)
        for one in measured
        if one is not reference and one.accuracy is not None
    }


def _overlaps(name: str, measured: Sequence[_Measured], baseline: str) -> dict[str, float]:
    """Mean overlap of the top ten with those of the baseline and of the parents that take part."""
    one = next(one for one in measured if one.entrant.name == name)
    parents = {parent["hash"] for parent in one.entrant.artifact.manifest["parents"].values()}
    return {
        other.entrant.name: float(overlap(one.accuracy.top_10, other.accuracy.top_10).mean())
        for other in measured
        if other is not one
        and one.accuracy is not None
        and other.accuracy is not None
        and (other.entrant.name == baseline or other.entrant.artifact.hash in parents)
        and one.accuracy.top_10.shape == other.accuracy.top_10.shape
    }


def _ends(interval: Interval, name: str) -> dict[str, float | None]:
    values = {name: interval.estimate, "low": interval.low, "high": interval.high}
    return {key: value if np.isfinite(value) else None for key, value in values.items()}


def _example(measured: Sequence[_Measured], data: Dataset, cases: Cases, seed: int) -> Example | None:
    """One test user drawn by the seed, not picked by hand, and what each artefact would show."""
    answers = {one.entrant.name: one.accuracy for one in measured if one.accuracy is not None}
    if not answers or not data.items.has_titles:
        return None
    lengths = cases.histories.item_ids.lengths
    usual = np.flatnonzero((lengths >= EXAMPLE_LENGTHS[0]) & (lengths <= EXAMPLE_LENGTHS[1]))
    candidates = usual if usual.size else np.arange(len(cases))
    case = int(np.random.default_rng(seed).choice(candidates))
    target, history = int(cases.targets[case]), cases.histories.item_ids[case]
    return Example(
        user=data.user_ids[int(cases.users[case])],
        history=[data.items.title_of(int(item)) for item in history[-EXAMPLE_HISTORY:]],
        num_history=len(history),
        target=data.items.title_of(target),
        lists={
            name: [
                ExampleItem(data.items.title_of(int(item)), int(item) == target)
                for item in accuracy.top_10[case]
                if item > 0
            ]
            for name, accuracy in answers.items()
        },
    )

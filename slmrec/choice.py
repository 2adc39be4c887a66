"""Which of the measured artefacts to serve: those on the front of accuracy and latency, and one, with the reason."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slmrec.checks import require
from slmrec.errors import ConfigError

Row = Mapping[str, Any]
DEFAULT_MIN_NDCG = 0.99
MOST_NDCG = 2
"""Shares from here on are percentages that were typed by mistake."""


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """What an artefact has to keep to."""

    max_latency_ms: Mapping[str, float] = field(default_factory=dict)
    """Percentile such as p99 -> milliseconds of a single user's request."""
    min_ndcg: float | None = None
    """Least NDCG@10, as a share of the baseline's."""
    max_size_mb: float | None = None
    """Of the folder, in millions of bytes."""

    def __post_init__(self) -> None:
        for percentile, limit in self.max_latency_ms.items():
            require(
                percentile in ("p50", "p90", "p95", "p99") and limit > 0,
                f"max_latency_ms {percentile}={limit} is no bound",
                "--max-latency-ms p99=20 (or p50, p90, p95)",
            )
        require(
            self.min_ndcg is None or 0 < self.min_ndcg < MOST_NDCG,
            f"min_ndcg={self.min_ndcg} is no share of the baseline's NDCG@10",
            "--min-ndcg 0.99",
        )
        size = self.max_size_mb
        require(size is None or size > 0, f"max_size_mb={size} is not above 0", "--max-size-mb 100")

    @property
    def any(self) -> bool:
        """Whether anything is asked for."""
        return bool(self.max_latency_ms) or self.min_ndcg is not None or self.max_size_mb is not None

    def broken_by(self, row: Row) -> list[str]:
        """What a row of benchmark.json does not keep to, in words; empty where it keeps to all.

        Raises:
            ConfigError: a percentile that too few rounds were measured for, or accuracy that was not measured.
        """
        broken = []
        latency = row["latency"]["batch_1"]
        for percentile, limit in self.max_latency_ms.items():
            found = latency.get(f"{percentile}_ms")
            if found is None:
                raise ConfigError(
                    f"{percentile} of {row['name']} was not measured in {latency['runs']} rounds",
                    remedy="--rounds 200, or a lower percentile",
                )
            if found > limit:
                broken.append(f"{percentile} {found:.1f} ms is above {limit:g}")
        if self.min_ndcg is not None:
            kept = _kept(row)
            if kept is None:
                raise ConfigError(
                    f"NDCG@10 of {row['name']} was not measured", remedy="without --no-accuracy, or --min-ndcg"
                )
            if kept < self.min_ndcg:
                broken.append(f"NDCG@10 {100 * kept:.1f} % of the baseline's is below {100 * self.min_ndcg:g} %")
        size = row["size_bytes"] / 1e6
        if self.max_size_mb is not None and size > self.max_size_mb:
            broken.append(f"{size:.1f} MB are above {self.max_size_mb:g}")
        return broken


def parse_latency(texts: Sequence[str]) -> dict[str, float]:
    """Bounds as they are typed; a number alone bounds p99.

    >>> parse_latency(["p50=5", "20"])
    {'p50': 5.0, 'p99': 20.0}
    """
    found: dict[str, float] = {}
    for text in texts:
        match = re.fullmatch(r"(?:(p\d+)=)?(\d+(?:\.\d+)?)", text)
        if match is None:
            raise ConfigError(f"max_latency_ms={text!r} is no bound", remedy="--max-latency-ms p99=20")
        percentile = match[1] or "p99"
        if percentile in found:
            raise ConfigError(f"max_latency_ms bounds {percentile} twice", remedy=f"one bound for {percentile}")
        found[percentile] = float(match[2])
    return found


def front(rows: Sequence[Row]) -> list[str]:
    """Names of the artefacts that no other is both faster than (p50) and at least as accurate as; or the reverse.

    >>> row = lambda name, p50, ndcg: {
    ...     "name": name, "latency": {"batch_1": {"p50_ms": p50}}, "accuracy": {"ndcg@10": ndcg}}
    >>> front([row("slow", 9, .11), row("fast", 2, .10), row("worse", 5, .09), row("same", 9, .11)])
    ['slow', 'fast', 'same']
    """
    judged = [row for row in rows if row["accuracy"] is not None]
    return [row["name"] for row in judged if not any(_beats(other, row) for other in judged)]


def choose(rows: Sequence[Row], constraints: Constraints, baseline: str) -> dict[str, Any]:
    """One artefact and the reason: the fastest of those that keep to the constraints.

    Without a bound on accuracy it has to keep 0.99 of the baseline's NDCG@10, where that was measured.
    """
    limits = constraints
    if constraints.min_ndcg is None and all(_kept(row) is not None for row in rows):
        limits = Constraints(
            max_latency_ms=constraints.max_latency_ms, max_size_mb=constraints.max_size_mb, min_ndcg=DEFAULT_MIN_NDCG
        )
    broken = {row["name"]: limits.broken_by(row) for row in rows}
    fitting = [row for row in rows if not broken[row["name"]]]
    if not fitting:
        reasons = "; ".join(f"{name}: {', '.join(found)}" for name, found in broken.items())
        return {"name": None, "reason": f"no artefact keeps to the constraints ({reasons})"}
    best = min(fitting, key=lambda row: row["latency"]["batch_1"]["p50_ms"])
    kept, p50 = _kept(best), best["latency"]["batch_1"]["p50_ms"]
    reason = f"the fastest of {len(fitting)} that keep to the constraints: p50 {p50:.1f} ms"
    if kept is not None:
        reason += f", {100 * kept:.1f} % of {baseline}'s NDCG@10"
    left = {name: found for name, found in broken.items() if found}
    if left:
        reason += "; left out: " + "; ".join(f"{name} ({', '.join(found)})" for name, found in left.items())
    return {"name": best["name"], "reason": reason}


def _kept(row: Row) -> float | None:
    ratio = row["ratios"].get("ndcg@10")
    return None if ratio is None else ratio["ratio"]


def _beats(one: Row, other: Row) -> bool:
    fast, slow = (row["latency"]["batch_1"]["p50_ms"] for row in (one, other))
    good, bad = (row["accuracy"]["ndcg@10"] for row in (one, other))
    return bool(fast <= slow and good >= bad and (fast < slow or good > bad))

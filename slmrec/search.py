"""Which smaller versions of a checkpoint a search under bounds tries, in which order, and what it need not try."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from slmrec.checks import require, require_least
from slmrec.choice import Constraints, Row
from slmrec.config import BenchmarkConfig, TrainConfig
from slmrec.errors import CheckError

CLEARLY = 1.25
"""A median time this many times a bound is too slow however quiet the machine gets; a time this many times below it
stays below. Sizes alike, for graphs of one shape differ by a little."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """What a search looks for, and how far it goes."""

    constraints: Constraints = field(default_factory=lambda: Constraints(min_ndcg=0.99))
    """Bounds; `min_ndcg` is a share of the first checkpoint's NDCG@10, on validation users."""
    num_layers: tuple[int, ...] = ()
    """Depths to try; none = three quarters and half of each checkpoint's."""
    heal_epochs: int = 1
    """Epochs of distillation after pruning; 0 = nothing is trained."""
    int8_items: bool = True
    """Whether the 8-bit item table is tried as well, which pays on large catalogues."""
    max_users: int = 2000
    """Validation users that layers are judged by."""
    rounds: int = 200
    """Single-user requests that a candidate is timed on."""
    train: TrainConfig
    """Of the healing, see `PruneConfig`."""

    def __post_init__(self) -> None:
        gate = self.constraints.min_ndcg
        require(
            gate is not None and 0 < gate <= 1,
            f"accuracy_gate={gate} is no share above 0 and at most 1",
            "--accuracy-gate 0.99",
        )
        require(
            min(self.num_layers, default=1) >= 1, f"num_layers={self.num_layers} hold one below 1", "--num-layers 3,2"
        )
        require_least(self, heal_epochs=0, max_users=1)
        _ = self.timing  # its checks: enough rounds for the percentiles that are bounded

    @property
    def timing(self) -> BenchmarkConfig:
        """How candidates are timed."""
        return BenchmarkConfig(
            rounds=self.rounds, batch_sizes=(), floor=False, constraints=self.constraints, seed=self.train.seed
        )


@dataclass(frozen=True)
class Base:
    """A trained checkpoint that candidates are made from."""

    name: str
    num_layers: int
    shape: str
    """Equal for decoders that differ in weights and depth alone."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One combination of stages."""

    base: Base
    num_layers: int
    heal_epochs: int = 0
    int8: bool = False
    keeps_layers: bool = False
    """8-bit but for the most sensitive layers, as many as the gate asks for."""
    int8_items: bool = False

    @property
    def is_pruned(self) -> bool:
        """Whether layers go."""
        return self.num_layers < self.base.num_layers

    @property
    def checkpoint(self) -> str:
        """Name of its checkpoint's folder, such as student-l3-heal1-int8-keep."""
        depth = f"-l{self.num_layers}" if self.is_pruned else ""
        healed = f"-heal{self.heal_epochs}" if self.heal_epochs else ""
        kept = "-keep" if self.keeps_layers else ""
        return f"{self.base.name}{depth}{healed}" + (f"-int8{kept}" if self.int8 else "")

    @property
    def name(self) -> str:
        """What it is called in tables: its checkpoint, and -items8 where the item table is 8-bit too."""
        return self.checkpoint + ("-items8" if self.int8_items else "")


@dataclass(frozen=True)
class Outcome:
    """What became of a candidate."""

    candidate: Candidate
    row: Row | None = None
    """What was measured, with the fields of a row of benchmark.json; None where nothing was."""
    reason: str = ""
    """Why nothing was measured."""
    refused: bool = False
    """Whether a stage's own check stood in its way (else it was passed over)."""

    @property
    def state(self) -> str:
        """measured, refused or skipped."""
        return "measured" if self.row is not None else "refused" if self.refused else "skipped"


def candidates(bases: Sequence[Base], config: SearchConfig) -> list[Candidate]:
    """Every combination, the cheapest to make first; the first is the first base as it is, the reference.

    What needs no training comes before what is healed, what needs no pruning before what is pruned, fp32 before 8
    bits, small bases before large ones.

    Raises:
        ConfigError: no base has as many layers as `num_layers` asks to be left of it.
    """
    found = [candidate for base in bases for candidate in _versions(base, config)]
    deepest = max(base.num_layers for base in bases)
    for depth in config.num_layers:
        require(
            depth < deepest,
            f"num_layers={depth}, but the deepest checkpoint has {deepest} layers",
            f"--num-layers with depths below {deepest}",
        )
    order = {base.name: number for number, base in enumerate(bases)}
    return sorted(
        found,
        key=lambda one: (
            one.base != bases[0] or one.is_pruned or one.int8 or one.int8_items,
            one.heal_epochs > 0,
            one.is_pruned,
            one.int8,
            one.keeps_layers,
            one.base.num_layers,
            order[one.base.name],
            -one.num_layers,
            one.int8_items,
        ),
    )


def default_depths(num_layers: int) -> list[int]:
    """Three quarters and half of a depth, where there is that much.

    >>> default_depths(30), default_depths(4), default_depths(2), default_depths(1)
    ([22, 15], [3, 2], [1], [])
    """
    return sorted({3 * num_layers // 4, num_layers // 2} - {0}, reverse=True)


def _versions(base: Base, config: SearchConfig) -> list[Candidate]:
    depths = [depth for depth in config.num_layers or default_depths(base.num_layers) if depth < base.num_layers]
    cuts = [(base.num_layers, 0)]
    cuts += [(depth, epochs) for depth in dict.fromkeys(depths) for epochs in {0, config.heal_epochs}]
    return [
        Candidate(base=base, num_layers=depth, heal_epochs=epochs, int8=int8, keeps_layers=keeps, int8_items=int8_items)
        for depth, epochs in cuts
        for int8, keeps in ((False, False), (True, False), (True, True))
        for int8_items in ((False, True) if config.int8_items else (False,))
    ]


def needless(candidate: Candidate, outcomes: Sequence[Outcome], bounds: Constraints) -> str | None:
    """Why a candidate need not be made after what was measured of others; None where it has to be.

    A less compressed version that clearly fails the gate (the upper end of its interval does) speaks for all that is
    made of it; one with the fp32 item table, whose lists are the same, for the 8-bit table. A version no larger that
    is clearly too slow or too large speaks for it too; one that clearly keeps to every bound cannot be beaten by it,
    for the fastest is what is looked for. Layers are kept in fp32 only where 8 bits in all of them are what fails.
    """
    if candidate.keeps_layers and (reason := _keeping_is_needless(candidate, outcomes, bounds)):
        return reason
    for outcome in outcomes:
        if outcome.row is None:
            continue
        other, row = outcome.candidate, outcome.row
        if _is_less_compressed(other, candidate) and _clearly_fails(row, bounds):
            high = 100 * row["ratios"]["ndcg@10"]["high"]
            return f"{other.name} keeps {high:.1f} % of NDCG@10 at most, and this is made smaller yet"
        if candidate == replace(other, int8_items=True) and _fails(row, bounds):
            return f"its lists are those of {other.name}, which fails the gate"
        if _is_no_larger(other, candidate):
            if clearly_exceeds(row, bounds):
                return f"{other.name} is no larger and exceeds a bound by a quarter or more"
            if clearly_fits(row, bounds):
                return f"{other.name} is no larger and keeps to every bound"
    return None


def clearly_exceeds(row: Row, bounds: Constraints) -> bool:
    """Whether time or size is so far above a bound that noise cannot be why."""
    p50 = row["latency"]["batch_1"]["p50_ms"]
    if any(p50 > CLEARLY * limit for limit in bounds.max_latency_ms.values()):
        return True
    return bounds.max_size_mb is not None and row["size_bytes"] / 1e6 > CLEARLY * bounds.max_size_mb


def clearly_fits(row: Row, bounds: Constraints) -> bool:
    """Whether every bound is kept, those on time with room for noise."""
    tight = {percentile: limit / CLEARLY for percentile, limit in bounds.max_latency_ms.items()}
    return not replace(bounds, max_latency_ms=tight).broken_by(row)


def finalists(outcomes: Sequence[Outcome], bounds: Constraints) -> list[Outcome]:
    """Those whose accuracy and size are right and whose time may be: they are timed once more, in turn."""
    timeless = replace(bounds, max_latency_ms={})
    return [
        outcome
        for outcome in outcomes
        if outcome.row is not None and not timeless.broken_by(outcome.row) and not clearly_exceeds(outcome.row, bounds)
    ]


def shortfall(row: Row, bounds: Constraints) -> float:
    """How far a row is from keeping to the bound it misses by most, as a share of that bound; 0 where it keeps all."""
    latency = row["latency"]["batch_1"]
    misses: list[float] = [
        latency[f"{percentile}_ms"] / limit - 1 for percentile, limit in bounds.max_latency_ms.items()
    ]
    if bounds.min_ndcg is not None:
        misses.append(1 - row["ratios"]["ndcg@10"]["ratio"] / bounds.min_ndcg)
    if bounds.max_size_mb is not None:
        misses.append(row["size_bytes"] / 1e6 / bounds.max_size_mb - 1)
    return max(0.0, *misses)


def none_fits(rows: Sequence[Row], bounds: Constraints) -> CheckError:
    """The error that says which candidate came nearest, and by how much it misses."""
    best = min(rows, key=lambda row: shortfall(row, bounds))
    return CheckError(
        f"none of {len(rows)} measured candidates keeps to the bounds; {best['name']} came nearest: "
        f"{', '.join(bounds.broken_by(best))} ({100 * shortfall(best, bounds):.1f} % off); nothing was bundled",
        remedy="a looser bound, a smaller --num-layers, more --heal-epochs, or a further --checkpoint",
    )


def to_json(outcome: Outcome, bounds: Constraints) -> dict[str, Any]:
    """A candidate as the command's JSON has it."""
    found = {"name": outcome.candidate.name, "state": outcome.state, "reason": outcome.reason or None}
    return found if outcome.row is None else found | dict(outcome.row) | {"breaks": bounds.broken_by(outcome.row)}


def table(outcomes: Sequence[Outcome], bounds: Constraints, chosen: str | None) -> list[str]:
    """Lines of a table: what was tried, what it measured, and what that means."""
    lines = ["| candidate | NDCG@10 kept (95 %) | p50 ms | p99 ms | MB | |", "|---|---:|---:|---:|---:|---|"]
    for outcome in outcomes:
        name = outcome.candidate.name
        if outcome.row is None:
            lines.append(f"| {name} | – | – | – | – | {outcome.state}: {outcome.reason} |")
            continue
        row = outcome.row
        broken = bounds.broken_by(row)
        verdict = "**chosen**" if name == chosen else "; ".join(broken) or "keeps to the bounds"
        cells = [name, kept_text(row), *_times(row), f"{row['size_bytes'] / 1e6:.1f}", verdict]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def kept_text(row: Row) -> str:
    """Share of the reference's NDCG@10 with its interval, in percent."""
    kept = row["ratios"]["ndcg@10"]
    low, high = ("–" if end is None else f"{100 * end:.1f}" for end in (kept["low"], kept["high"]))
    return f"{100 * kept['ratio']:.1f} % [{low}, {high}]"


def _times(row: Row) -> list[str]:
    """p50 and p99; with a star where they are of the candidate alone, not of all finalists in turn."""
    latency: Mapping[str, float] = row["latency"]["batch_1"]
    star = "" if row["timed"] == "in turn" else "*"
    return [f"{latency[name]:.2f}{star}" if name in latency else "–" for name in ("p50_ms", "p99_ms")]


def _keeping_is_needless(candidate: Candidate, outcomes: Sequence[Outcome], bounds: Constraints) -> str | None:
    """Why no layers need be kept in fp32: without, the gate holds as well, or fails in fp32 already."""
    plain = replace(candidate, keeps_layers=False, int8_items=False)
    for outcome in outcomes:
        if outcome.candidate == plain and outcome.row is None:
            return f"{plain.name} was {outcome.state}"
        if outcome.candidate == plain and outcome.row is not None and not _fails(outcome.row, bounds):
            return f"{plain.name} keeps to the gate"
        if outcome.candidate == replace(plain, int8=False) and outcome.row is not None and _fails(outcome.row, bounds):
            return f"{outcome.candidate.name} fails the gate before any layer is 8-bit"
    return None


def _is_less_compressed(one: Candidate, other: Candidate) -> bool:
    healed_alike = not one.is_pruned or one.heal_epochs == other.heal_epochs
    at_least = one.num_layers >= other.num_layers and one.int8 <= other.int8 and one.int8_items <= other.int8_items
    keeps_less = one.int8 and other.keeps_layers and not one.keeps_layers
    return one.base == other.base and one != other and healed_alike and at_least and not keeps_less


def _is_no_larger(one: Candidate, other: Candidate) -> bool:
    precision = (one.int8, one.int8_items) == (other.int8, other.int8_items) and one.keeps_layers <= other.keeps_layers
    return one.base.shape == other.base.shape and precision and one.num_layers <= other.num_layers


def _fails(row: Row, bounds: Constraints) -> bool:
    return bounds.min_ndcg is not None and row["ratios"]["ndcg@10"]["ratio"] < bounds.min_ndcg


def _clearly_fails(row: Row, bounds: Constraints) -> bool:
    high = row["ratios"]["ndcg@10"]["high"]
    return bounds.min_ndcg is not None and high is not None and high < bounds.min_ndcg

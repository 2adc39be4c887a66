"""Two reports of one benchmark: what became worse beyond what their intervals allow."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from slmrec.errors import DataError

SCHEMA = 1
"""Of reports, as `slmrec.benchmark` writes them."""

Benchmark = Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """One figure of one artefact, before and after."""

    name: str
    figure: str
    old: float | None
    new: float | None
    allowed: float | None
    """The worst value that is no regression."""
    is_regression: bool

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)

    def to_text(self) -> str:
        """A line for people."""
        if self.new is None:
            return f"REGRESSION  {self.name}, {self.figure}: no longer measured"
        mark = "REGRESSION" if self.is_regression else "ok        "
        return f"{mark}  {self.name}, {self.figure}: {self.old:.4g} -> {self.new:.4g} (allowed {self.allowed:.4g})"


def require_report(report: Any) -> None:
    """Refuse what is no report: a field that is not there, or a figure that cannot be one.

    Raises:
        KeyError: names the field that is missing.
        ValueError, TypeError, AttributeError: say what is wrong.
    """
    _ = report["baseline"], report["dataset"]["hash"]
    if report["schema"] != SCHEMA:
        raise ValueError(f"its schema is {report['schema']!r}, this version compares {SCHEMA}")
    names = [row["name"] for row in report["rows"]]
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"its rows are {names}, expected are some, each of a name of its own")
    for row in report["rows"]:
        accuracy, speedup = row["accuracy"], row["ratios"]["speedup_batch_1"]
        _require_within(row, math.inf, size_bytes=row["size_bytes"], median=speedup["median"], p10=speedup["p10"])
        if accuracy is not None:
            low, high = accuracy["intervals"]["ndcg@10"]
            _require_within(row, 1, **{"ndcg@10": accuracy["ndcg@10"], "interval": low, "interval's end": high})


def _require_within(row: Mapping[str, Any], most: float, **figures: Any) -> None:
    for name, value in figures.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= most or math.isinf(value):
            bound = "no finite number from 0" + ("" if math.isinf(most) else f" to {most}")
            raise ValueError(f"{name} of {row['name']} is {value!r}, {bound}")


def compare_reports(old: Benchmark, new: Benchmark, tolerance: float) -> list[Change]:
    """Changes of every artefact of the old report, by its name.

    NDCG@10 may fall to the lower end of the old 95 % interval over users, less `tolerance` (a share) where that is
    looser; a speed-up to the 10th percentile of the old rounds, likewise; size may grow by `tolerance`.

    Raises:
        DataError: reports of other data, or against other baselines: their figures say nothing of each other.
    """
    for what, before, after, remedy in (
        ("baseline", old["baseline"], new["baseline"], f"benchmark --baseline {old['baseline']}"),
        ("dataset", old["dataset"].get("hash"), new["dataset"].get("hash"), "benchmark both on the same data"),
    ):
        if before != after:
            raise DataError(f"the reports have different {what}s: {before} and {after}", remedy=remedy)
    rows = {row["name"]: row for row in new["rows"]}
    changes = []
    for row in old["rows"]:
        other = rows.get(row["name"])
        if other is None:
            changes.append(Change(row["name"], "all", None, None, None, is_regression=True))
        else:
            changes += _changes(row, other, tolerance)
    return changes


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], tolerance: float) -> list[Change]:
    found = []
    if old["accuracy"] is not None and new["accuracy"] is None:
        found.append(Change(old["name"], "NDCG@10", old["accuracy"]["ndcg@10"], None, None, is_regression=True))
    elif old["accuracy"] is not None:
        before, after = (row["accuracy"]["ndcg@10"] for row in (old, new))
        low = min(old["accuracy"]["intervals"]["ndcg@10"][0], before * (1 - tolerance))
        found.append(Change(old["name"], "NDCG@10", before, after, low, is_regression=not after >= low))
    before, after = (row["ratios"]["speedup_batch_1"] for row in (old, new))
    low = min(before["p10"], before["median"] * (1 - tolerance))
    found.append(
        Change(
            old["name"], "speed-up", before["median"], after["median"], low, is_regression=not after["median"] >= low
        )
    )
    before, after = (row["size_bytes"] / 1e6 for row in (old, new))
    high = before * (1 + tolerance)
    found.append(Change(old["name"], "MB", before, after, high, is_regression=not after <= high))
    return found

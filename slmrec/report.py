"""The files of a benchmark: benchmark.json for programs, .csv for a spreadsheet, .md and .html for people."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slmrec.artifact import MANIFEST, read_manifest, write_json
from slmrec.errors import ArtifactError
from slmrec.roofline import roofline_text

ACCURACY_COLUMNS = ("hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10", "mrr", "num_users", "protocol", "mrr_cutoff")
FULL = 0.98
"""Share of the time busy from which a queue is not worked off any more."""
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


@dataclass(frozen=True)
class ExampleItem:
    """A recommended item, and whether it is the one the user took next."""

    title: str
    is_target: bool = False


@dataclass(frozen=True)
class Example:
    """One user: what came before, what came next, and what each artefact recommended."""

    user: str
    history: Sequence[str]
    """Titles of the newest items, newest last."""
    num_history: int
    """Items of the whole history."""
    target: str
    lists: Mapping[str, Sequence[ExampleItem]]
    """Artefact name -> recommended items, best first."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """A finished benchmark and what is drawn beside it."""

    benchmark: Mapping[str, Any]
    """What benchmark.json holds."""
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Artefact name -> records of its training: a step and any of loss terms and `validation_ndcg@10`."""
    analyses: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Stage -> what it found: what sensitivity.json and importance.json hold, and `of`, the model looked at."""
    example: Example | None = None


def require_report_folder(path: Path) -> None:
    """Refuse an output folder that holds anything but an earlier report: a model must not give way to one."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    kind = read_manifest(path)["kind"] if (path / MANIFEST).is_file() else None
    if kind != "report":
        found = f"holds a {kind}" if kind else "was not made by slmcompress"
        raise ArtifactError(f"{path} {found}; it is left as it is", remedy="another --output, such as runs/report")


def write_report(report: Report, folder: Path) -> None:
    """Write benchmark.json, .csv and .md and report.html into a folder, and a CSV of each further table."""
    from slmrec.report_html import to_html
    from slmrec.report_tables import csv_files, tables_markdown

    write_json(folder / "benchmark.json", report.benchmark)
    files = csv_files(report) | {
        "benchmark.csv": to_csv(report.benchmark),
        "benchmark.md": to_markdown(report.benchmark) + tables_markdown(report),
        "report.html": to_html(report),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")


def to_csv(benchmark: Mapping[str, Any]) -> str:
    """One line per artefact, nested fields with dots in their names, units in them."""
    rows = [_flat_row(row) for row in benchmark["rows"]]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return csv_text(columns, [[row.get(name) for name in columns] for row in rows])


def csv_text(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Lines for a spreadsheet; text that it would run as a formula gets an apostrophe before it."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows([_cell(value) for value in row] for row in (columns, *rows))
    return stream.getvalue()


def to_markdown(benchmark: Mapping[str, Any]) -> str:
    """Lay out the table and where it comes from."""
    machine, dataset = benchmark["machine"], benchmark["dataset"]
    lines = [
        "# Accuracy against latency",
        "",
        *markdown_table(benchmark),
        "",
        f"Intervals are 95 % (bootstrap over users); speed-ups are medians of paired rounds against "
        f"{markdown_text(benchmark['baseline'])} with their 10th to 90th percentile.",
        "",
        *recommended_lines(benchmark),
        f"- Protocol: {markdown_text(protocol_of(benchmark))}",
        f"- Dataset: {markdown_text(dataset_line(dataset))}",
        f"- Machine: {markdown_text(machine_line(machine))}",
        f"- Versions: {markdown_text(versions_line(machine))}",
        *(f"- Floor: {markdown_text(line)}" for line in floor_lines(benchmark)),
        *("- Repeat with: `" + " ".join(command.split()).replace("`", "'") + "`" for command in benchmark["commands"]),
    ]
    return "\n".join(lines) + "\n"


def markdown_table(benchmark: Mapping[str, Any]) -> list[str]:
    """Lines of the table: one row per artefact."""
    batch = largest_batch(benchmark)
    header = [
        "artefact",
        "NDCG@10",
        "HR@10",
        "vs baseline",
        "p50 ms",
        "p99 ms",
        "speed-up",
        f"users/s, batch {batch}",
        "over its floor",
        "size",
        "memory",
    ]
    priced = benchmark["settings"].get("gpu_hour_price") is not None
    header += ["price of a million lists"] if priced else []
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    for row in benchmark["rows"]:
        latency = row["latency"]["batch_1"]
        cells = [
            markdown_text(row["name"]),
            accuracy_text(row, "ndcg@10"),
            accuracy_text(row, "hr@10"),
            retained_text(row),
            number(latency.get("p50_ms")),
            number(latency.get("p99_ms")),
            speedup_text(row),
            number(row["throughput"].get(f"batch_{batch}")),
            number(over_floor(row)),
            bytes_text(row["size_bytes"]),
            bytes_text(row["peak_memory_bytes"]),
            *([number(row["price_per_million"])] if priced else []),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def over_floor(row: Mapping[str, Any]) -> float | None:
    """How many times its floor a single user's request took; None where it was not measured."""
    found: float | None = ((row.get("floor") or {}).get("batch_1") or {}).get("measured_over_floor")
    return found


def recommended_lines(benchmark: Mapping[str, Any]) -> list[str]:
    """The artefact to serve and why, and what open load did to each."""
    chosen = benchmark.get("recommended")
    lines = (
        []
        if chosen is None
        else [f"- To serve: {markdown_text(chosen['name'] or 'none')}: {markdown_text(chosen['reason'])}"]
    )
    for row in benchmark["rows"]:
        if row.get("load"):
            lines.append(f"- {markdown_text(row['name'])} {load_text(row['load'])}")
    return lines


def load_text(load: Mapping[str, float]) -> str:
    """What open load did to an artefact."""
    found = ", ".join(f"{name.removesuffix('_ms')} {number(load[name])} ms" for name in load if name.endswith("_ms"))
    full = " (the queue only grew)" if load["utilisation"] >= FULL else ""
    return f"at {load['rate']:g} requests a second: {found}, busy {100 * load['utilisation']:.0f} % of the time{full}"


def floor_lines(benchmark: Mapping[str, Any]) -> list[str]:
    """The machine's ceilings, and each artefact's arithmetic, bytes and floor."""
    rows = {row["name"]: row["floor"] for row in benchmark["rows"] if row.get("floor")}
    return roofline_text(rows, benchmark["ceilings"]).splitlines() if rows else []


def number(value: float | None, digits: int = 3) -> str:
    """Write a number with that many significant digits; a dash where there is none.

    >>> number(0.123456), number(12.3456), number(5432.1), number(None)
    ('0.123', '12.3', '5,432', '–')
    """
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:#.{digits}g}".rstrip(".")


def bytes_text(size: float | None) -> str:
    """Bytes as a person reads them, in powers of 1000.

    >>> bytes_text(43_200_000), bytes_text(999), bytes_text(None)
    ('43.2 MB', '999 B', '–')
    """
    if size is None:
        return "–"
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{number(size)} {unit}"
        size /= 1000
    return f"{number(size)} GB"


def accuracy_text(row: Mapping[str, Any], metric: str) -> str:
    """Write a metric with its interval, four decimals."""
    accuracy = row["accuracy"]
    if accuracy is None:
        return "–"
    low, high = accuracy["intervals"][metric]
    return f"{accuracy[metric]:.4f} [{low:.4f}, {high:.4f}]"


def retained_text(row: Mapping[str, Any]) -> str:
    """NDCG@10 as a percentage of the baseline's, with its interval."""
    ratio = row["ratios"].get("ndcg@10")
    if ratio is None:
        return "–"
    if row["comparison"] is None:
        return "baseline"
    ends = ", ".join("–" if end is None else f"{100 * end:.1f}" for end in (ratio["low"], ratio["high"]))
    return f"{100 * ratio['ratio']:.1f} % [{ends}]"


def speedup_text(row: Mapping[str, Any]) -> str:
    """How many times as fast as the baseline, with the spread over rounds."""
    spread = row["ratios"]["speedup_batch_1"]
    return f"{number(spread['median'])}× [{number(spread['p10'])}, {number(spread['p90'])}]"


def largest_batch(benchmark: Mapping[str, Any]) -> int:
    """Users in the largest batches that were timed."""
    return int(max(benchmark["settings"]["batch_sizes"]))


def protocol_of(benchmark: Mapping[str, Any]) -> str:
    """How accuracy was measured."""
    for row in benchmark["rows"]:
        if row["accuracy"] is not None:
            return f"{row['accuracy']['protocol']}; {row['accuracy']['num_users']} users"
    return "accuracy was not measured"


def dataset_line(dataset: Mapping[str, Any]) -> str:
    """Write what `dataset.json` counts, naughts left out, and the hash.

    >>> dataset_line({"num_users": 943, "num_bad_rows": 0, "mean_length": 106.04, "format": "csv", "hash": "dcab"})
    '943 users; mean length 106; format csv; hash dcab'
    """
    values = {name.replace("_", " "): value for name, value in dataset.items() if name != "hash"}
    counts = [f"{value:,} {name[4:]}" for name, value in values.items() if name.startswith("num ") and value]
    means = [f"{name} {number(value)}" for name, value in values.items() if isinstance(value, float)]
    words = [f"{name} {value}" for name, value in values.items() if isinstance(value, str)]
    return "; ".join([*counts, *means, *words, f"hash {str(dataset.get('hash', ''))[:12]}"])


def machine_line(machine: Mapping[str, Any]) -> str:
    """Describe the machine in a line."""
    threads = machine.get("threads")
    parts = [
        str(machine.get("cpu")),
        f"{machine.get('usable_cores')} usable of {machine.get('logical_cores')} cores",
        f"threads {', '.join(f'{n} {v}' for n, v in threads.items()) if threads else 'as the libraries choose'}",
        f"memory {bytes_text(machine.get('memory_bytes'))}",
        str(machine["gpu"]) if machine.get("gpu") else "no GPU in use",
        f"load {number(machine.get('load_average_1min'))} before it began",
        str(machine.get("system")),
    ]
    return "; ".join(parts)


def versions_line(machine: Mapping[str, Any]) -> str:
    """Libraries and their versions in a line."""
    return ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())


def _flat_row(row: Mapping[str, Any]) -> dict[str, Any]:
    accuracy = row["accuracy"] or {}
    flat = {name: row[name] for name in ("name", "artifact", "kind", "size_bytes", "peak_memory_bytes")}
    flat |= {name: row.get(name) for name in ("price_per_million", "pareto", "satisfies_constraints")}
    flat |= {name: accuracy.get(name) for name in ACCURACY_COLUMNS}
    for metric, (low, high) in accuracy.get("intervals", {}).items():
        flat |= {f"{metric}_low": low, f"{metric}_high": high}
    for group in ("latency", "throughput", "load", "floor", "ratios", "comparison", "overlap@10"):
        flat |= _flatten(group, row.get(group) or {})
    return flat


def _flatten(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {name: leaf for key, nested in value.items() for name, leaf in _flatten(f"{prefix}.{key}", nested).items()}


def _cell(value: Any) -> Any:
    """Numbers are left alone: a negative one is no formula."""
    if not isinstance(value, str):
        return value
    defused = f"'{value}" if value.startswith(FORMULA_STARTS) else value
    return defused.replace("\r", " ")  # the csv module leaves a bare carriage return unquoted


def markdown_text(text: str) -> str:
    """Untrusted text on one line of a table, unable to open a cell, a tag, a link or a code span."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\|\[\]])", r"\\\1", text).replace("`", "'")

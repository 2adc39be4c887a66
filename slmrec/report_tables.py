"""What a report tells beside its main table, as plain tables: the same for Markdown, for CSV and for the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slmrec.report import Report, csv_text, markdown_text, number

NOT_TERMS = frozenset({"step", "epoch", "gradient_norm", "learning_rate", "seconds"})


@dataclass(frozen=True)
class Table:
    """Rows under columns; cells are text, numbers or None."""

    name: str
    """Of its CSV file."""
    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


def csv_files(report: Report) -> dict[str, str]:
    """File name -> content, of the tables that hold anything."""
    tables = [stage_table(report.benchmark), batch_table(report.benchmark), training_points(report.curves)]
    tables += analysis_tables(report.analyses)
    return {f"{table.name}.csv": csv_text(table.columns, table.rows) for table in tables if table.rows}


def tables_markdown(report: Report) -> str:
    """The tables that hold anything, each under a heading."""
    tables = [stage_table(report.benchmark), batch_table(report.benchmark), training_summary(report.curves)]
    tables += analysis_tables(report.analyses)
    return "".join(_markdown(table) for table in tables if table.rows)


def stage_table(benchmark: Mapping[str, Any]) -> Table:
    """What was done, in order, and what each step did to the figures of the artefact before it."""
    rows = {row["name"]: row for row in benchmark["rows"]}
    return Table(
        "stages",
        "Stage by stage",
        "Each measured artefact over the nearest one measured before it: times as fast (p50), shares of NDCG@10 and "
        "of the size.",
        ("stage", "artefact", "against", "times as fast", "ndcg@10 kept", "size ratio", "settings", "hash"),
        [
            (
                stage["stage"],
                stage["name"] or "",
                stage["before"] or "",
                *_steps(rows.get(stage["name"]), rows.get(stage["before"])),
                settings_text(stage["settings"]),
                stage["hash"][:12],
            )
            for stage in benchmark.get("stages", ())
        ],
    )


def _steps(row: Mapping[str, Any] | None, before: Mapping[str, Any] | None) -> tuple[float | None, ...]:
    """Times as fast, NDCG@10 kept, size ratio."""
    if row is None or before is None:
        return None, None, None
    faster = before["latency"]["batch_1"]["p50_ms"] / row["latency"]["batch_1"]["p50_ms"]
    own, other = row["accuracy"], before["accuracy"]
    kept = own["ndcg@10"] / other["ndcg@10"] if own and other and other["ndcg@10"] else None
    return faster, kept, row["size_bytes"] / before["size_bytes"]


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings that say something, groups opened; hashes of inputs are left to the manifest.

    >>> settings_text({"num_layers": 4, "online": None, "append": False, "train": {"epochs": 3}, "sizes": [1, 2]})
    'num layers 4, epochs 3, sizes 1 and 2'
    """
    parts = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            parts.append("" if name == "inputs" else settings_text(value))
        elif isinstance(value, list | tuple):
            parts.append(f"{name.replace('_', ' ')} {' and '.join(map(str, value))}" if value else "")
        elif value is not None and value is not False and not name.endswith("hash"):
            parts.append(name.replace("_", " ") + ("" if value is True else f" {value}"))
    return ", ".join(part for part in parts if part)


def batch_rates(row: Mapping[str, Any]) -> dict[int, float]:
    """Users a second by how many are asked for at once."""
    rates = {1: 1000 / row["latency"]["batch_1"]["p50_ms"]}
    return rates | {int(name.removeprefix("batch_")): rate for name, rate in row["throughput"].items()}


def batch_table(benchmark: Mapping[str, Any]) -> Table:
    """Users a second, a line per artefact and a column per size of the batches."""
    rates = {row["name"]: batch_rates(row) for row in benchmark["rows"]}
    sizes = sorted({size for by_size in rates.values() for size in by_size})
    return Table(
        "batches",
        "Users a second by batch size",
        "Medians over rounds.",
        ("artefact", *(f"batch {size}" for size in sizes)),
        [(name, *(by_size.get(size) for size in sizes)) for name, by_size in rates.items()],
    )


def training_points(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """Every value that was logged."""
    rows = [(name, *point) for name, records in curves.items() for point in _points(records)]
    return Table("training", "Training", "", ("artefact", "term", "step", "value"), rows)


def training_summary(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    """Where each term began, ended, and how far it went."""
    rows = []
    for name, records in curves.items():
        terms: dict[str, list[float]] = {}
        for term, _, value in _points(records):
            terms.setdefault(term, []).append(value)
        last = records[-1]["step"]
        rows += [(name, term, last, v[0], v[-1], min(v), max(v)) for term, v in terms.items()]
    columns = ("artefact", "term", "steps", "first", "last", "lowest", "highest")
    return Table("training", "Training", "Terms as they enter the loss; every value is in training.csv.", columns, rows)


def _points(records: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    return [
        (term, record["step"], float(value))
        for record in records
        for term, value in record.items()
        if is_term(term, value)
    ]


def is_term(name: str, value: object) -> bool:
    """Whether a record's field is a number that training watches."""
    return name not in NOT_TERMS and isinstance(value, int | float)


def analysis_tables(analyses: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """What 8 bits cost layer by layer, and what layers and stretches of them are worth."""
    tables = []
    if found := analyses.get("sensitivity"):
        columns = ["layer", "ndcg_loss", "overlap_loss"]
        rows = [[one[name] for name in columns] for one in found["layers"]]
        note = (
            f"What 8 bits in one layer of {found['of']} alone cost, over {found['num_users']} {found['split']} users: "
            "the share of NDCG@10, and of the first ten recommendations."
        )
        tables.append(Table("sensitivity", "Sensitivity to 8 bits", note, columns, rows))
    if found := analyses.get("importance"):
        columns = ["layer", "angular", "influence", "damage"]
        rows = [[one[name] for name in columns] for one in found["layers"]]
        note = (
            f"What each layer of {found['of']} does, over {found['num_users']} {found['split']} users: the angle (over "
            "pi) by which it turns the user vector, its block influence, the share of NDCG@10 lost without it."
        )
        tables.append(Table("importance", "Importance of layers", note, columns, rows))
        rows = [[first, *row] for first, row in enumerate(found["angular_distance"])]
        note = "The angle (over pi) by which a stretch of layers turns the user vector."
        columns = ["first layer", *(f"length {size + 1}" for size in range(len(rows)))]
        tables.append(Table("importance_stretches", "Stretches of layers", note, columns, rows))
    return tables


def _markdown(table: Table) -> str:
    lines = ["", f"## {table.title}", "", *([markdown_text(table.note), ""] if table.note else [])]
    lines += ["| " + " | ".join(table.columns) + " |", "|---" * len(table.columns) + "|"]
    lines += ["| " + " | ".join(_markdown_cell(value) for value in row) + " |" for row in table.rows]
    return "\n".join(lines) + "\n"


def _markdown_cell(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{'-' if value < 0 else ''}{number(abs(value))}"
    return "" if value is None else markdown_text(value)

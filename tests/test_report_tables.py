"""The tables beside the main one: the same figures as CSV and as Markdown, whatever things are called."""

import csv
import io
import re
from typing import Any

import pytest
from benchmarked import EVIL

from slmrec.report import Report
from slmrec.report_tables import csv_files, stage_table, tables_markdown


def row(name: str, p50_ms: float, ndcg: float | None, size_bytes: int) -> dict[str, Any]:
    return {
        "name": name,
        "latency": {"batch_1": {"p50_ms": p50_ms}},
        "throughput": {"batch_8": 80.0},
        "accuracy": None if ndcg is None else {"ndcg@10": ndcg},
        "size_bytes": size_bytes,
    }


def stage(name: str, artefact: str | None, before: str | None, **settings: Any) -> dict[str, Any]:
    return {"stage": name, "kind": "checkpoint", "hash": "f" * 64, "settings": settings, "name": artefact,
            "before": before}  # fmt: skip


def report(name: str) -> Report:
    return Report(
        benchmark={
            "rows": [row("teacher", 20.0, 0.2, 100), row(name, 4.0, 0.19, 25)],
            "stages": [stage("train-teacher", "teacher", None, num_layers=8), stage("distill", name, "teacher")],
        },
        curves={name: [{"step": 10, "ce": 3.0, "epoch": 0}, {"step": 20, "ce": 2.0}, {"step": 30, "ce": 2.5}]},
        analyses={
            "sensitivity": {
                "of": name, "num_users": 9, "split": "validation",
                "layers": [{"layer": name, "ndcg_loss": -0.25, "overlap_loss": 0.5}],
            },
            "importance": {
                "of": name, "num_users": 9, "split": "validation", "angular_distance": [[0.3, 0.4], [0.1, None]],
                "layers": [{"layer": n, "angular": 0.3, "influence": 0.2, "damage": -0.1} for n in range(2)],
            },
        },
    )  # fmt: skip


def read(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline="")))


def test_a_stage_is_set_against_the_artefact_it_was_made_from() -> None:
    first, second = stage_table(report("student").benchmark).rows
    assert first[:6] == ("train-teacher", "teacher", "", None, None, None)
    assert second[:6] == ("distill", "student", "teacher", 5.0, pytest.approx(0.95), 0.25)
    without = report("student").benchmark
    without["rows"][0]["accuracy"] = None
    assert stage_table(without).rows[1][3:6] == (5.0, None, 0.25)


def test_every_table_is_a_csv_with_the_figures() -> None:
    files = {name: read(text) for name, text in csv_files(report("student")).items()}
    assert files["training.csv"][1:] == [["student", "ce", str(step), str(value)]
                                         for step, value in ((10, 3.0), (20, 2.0), (30, 2.5))]  # fmt: skip
    assert files["batches.csv"] == [["artefact", "batch 1", "batch 8"], ["teacher", "50.0", "80.0"],
                                    ["student", "250.0", "80.0"]]  # fmt: skip
    assert files["sensitivity.csv"][1] == ["student", "-0.25", "0.5"]
    assert files["importance.csv"][2] == ["1", "0.3", "0.2", "-0.1"]
    assert files["importance_stretches.csv"][1:] == [["0", "0.3", "0.4"], ["1", "0.1", ""]]


def test_what_was_not_found_is_not_written() -> None:
    bare = Report(benchmark={"rows": [row("teacher", 20.0, 0.2, 100)]})
    assert list(csv_files(bare)) == ["batches.csv"]
    assert re.findall("^## (.*)$", tables_markdown(bare), re.MULTILINE) == ["Users a second by batch size"]


@pytest.mark.parametrize("name", ["=cmd()", "+1", "-1", "@SUM(A1)", "\n=1", "＝1"])
def test_no_cell_is_a_formula(name: str) -> None:
    for text in csv_files(report(name)).values():
        for cell in (cell for line in read(text) for cell in line):
            assert not cell.startswith(("=", "+", "@", "\n", "＝"))
            assert not cell.startswith("-") or float(cell) < 0


def test_a_name_cannot_leave_its_cell_of_markdown() -> None:
    text = tables_markdown(report(f"{EVIL}\n[x](http://evil.example)![y](z)"))
    assert "<" not in text
    assert not re.search(r"(?<!\\)\]\(", text), "no link and no image"
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_markdown_tells_where_a_training_began_and_ended() -> None:
    assert "| student | ce | 30 | 3.00 | 2.50 | 2.00 | 3.00 |" in tables_markdown(report("student"))

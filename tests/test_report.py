"""The figures of a benchmark and its files for programs and spreadsheets."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarked import (
    CONFIG,
    EVIL,
    MEMORY,
    NUM_ITEMS,
    Cyclic,
    artifact,
    check_page,
    make_data,
    make_entrants,
    renamed,
    row_of,
)

from slmrec.benchmark import Entrant, run_benchmark
from slmrec.dataset import Dataset
from slmrec.errors import ArtifactError, ConfigError
from slmrec.recommender import Histories, TopK
from slmrec.report import Report, to_csv, to_markdown, write_report
from slmrec.report_html import to_html
from slmrec.report_sources import read_training


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return make_data(tmp_path)


@pytest.fixture
def entrants(tmp_path: Path) -> list[Entrant]:
    return make_entrants(tmp_path)


@pytest.fixture
def report(entrants: list[Entrant], data: Dataset) -> Report:
    return run_benchmark(entrants, data, CONFIG, memory=lambda _: MEMORY)


def test_rows_hold_what_the_contract_names(report: Report) -> None:
    benchmark = report.benchmark
    assert {"machine", "dataset", "baseline", "rows"} <= benchmark.keys()
    assert benchmark["baseline"] == "teacher"
    for row in benchmark["rows"]:
        assert {
            "name",
            "artifact",
            "kind",
            "accuracy",
            "latency",
            "throughput",
            "size_bytes",
            "peak_memory_bytes",
            "ratios",
        } <= row.keys()
        assert row["latency"]["batch_1"].keys() == {"p50_ms", "p90_ms", "p95_ms", "mean_ms", "runs"}, (
            "20 runs bear no p99"
        )
        assert row["throughput"].keys() == {"batch_4"}
        assert row["peak_memory_bytes"] == 300_000_000
    assert {"cpu", "usable_cores", "threads", "memory_bytes", "versions"} <= benchmark["machine"].keys()


def test_the_baseline_is_itself_and_others_are_compared_with_it(report: Report) -> None:
    teacher, student = row_of(report, "teacher"), row_of(report, "student")
    assert teacher["comparison"] is None
    assert teacher["ratios"]["size_bytes"] == 1
    assert teacher["ratios"]["speedup_batch_1"] == {"median": 1, "p10": 1, "p90": 1}
    lost = student["accuracy"]["ndcg@10"] - teacher["accuracy"]["ndcg@10"]
    assert student["comparison"]["difference"] == pytest.approx(lost)
    assert student["ratios"]["ndcg@10"]["ratio"] == pytest.approx(student["accuracy"]["ndcg@10"])
    assert student["comparison"]["p"] <= student["comparison"]["p_holm"] <= 1
    assert student["size_bytes"] == pytest.approx(student["ratios"]["size_bytes"] * teacher["size_bytes"])


def test_overlap_is_told_with_the_baseline_and_with_a_parent_that_takes_part(report: Report) -> None:
    assert row_of(report, "teacher")["overlap@10"] == {}
    assert row_of(report, "student")["overlap@10"].keys() == {"teacher"}
    assert row_of(report, "student-int8")["overlap@10"].keys() == {"teacher", "student"}
    assert 0 < row_of(report, "student-int8")["overlap@10"]["student"] < 1


def test_another_baseline_can_be_named_but_must_take_part(entrants: list[Entrant], data: Dataset) -> None:
    named = run_benchmark(entrants, data, CONFIG, baseline="student")
    assert named.benchmark["baseline"] == "student"
    assert row_of(named, "teacher")["peak_memory_bytes"] is None
    with pytest.raises(ConfigError, match="is not measured"):
        run_benchmark(entrants, data, CONFIG, baseline="sasrec")
    with pytest.raises(ConfigError, match="one name"):
        run_benchmark([entrants[0], entrants[0]], data, CONFIG)


def test_a_model_of_another_catalogue_is_refused(entrants: list[Entrant], data: Dataset, tmp_path: Path) -> None:
    stranger = Entrant("stranger", artifact(tmp_path / "stranger", items="other"), Cyclic())
    with pytest.raises(ArtifactError, match="different catalogues"):
        run_benchmark([*entrants, stranger], data, CONFIG)


def test_accuracy_can_be_left_out(entrants: list[Entrant], data: Dataset, tmp_path: Path) -> None:
    report = run_benchmark(entrants, data, replace(CONFIG, accuracy=False))
    assert row_of(report, "student")["accuracy"] is None
    assert report.example is None
    write_report(report, tmp_path)
    check_page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_a_hopeless_baseline_leaves_ratios_of_accuracy_out(entrants: list[Entrant], data: Dataset) -> None:
    class Backwards(Cyclic):
        def recommend(self, histories: Histories, k: int) -> TopK:
            answer = super().recommend(histories, NUM_ITEMS)
            last = [row[row > 0][-10:][::-1] for row in answer.item_ids]
            items = np.zeros((len(histories), k), dtype=np.int64)
            for row, kept in enumerate(last):
                items[row, : min(k, 10)] = kept[:k]
            return TopK(items, np.where(items > 0, 0, -np.inf).astype(np.float32))

    report = run_benchmark([replace(entrants[0], recommender=Backwards()), entrants[1]], data, CONFIG)
    assert row_of(report, "teacher")["accuracy"]["ndcg@10"] == 0
    assert "ndcg@10" not in row_of(report, "student")["ratios"]
    check_page(to_html(report))
    assert to_markdown(report.benchmark)


def test_the_example_is_a_real_user_and_marks_what_came_next(report: Report, data: Dataset) -> None:
    assert report.example is not None
    user = list(data.user_ids).index(report.example.user)
    sequence = data.sequences[user].tolist()
    assert report.example.target == data.items.title_of(sequence[-1])
    assert report.example.history[-1] == data.items.title_of(sequence[-2])
    assert [item.is_target for item in report.example.lists["teacher"]] == [True] + [False] * 9


def test_curves_come_from_the_artefacts_training_records(report: Report, entrants: list[Entrant]) -> None:
    assert report.curves["student"] == [{"step": 1, "ce": 3.0}, {"step": 2, "ce": 2.0}]
    (entrants[0].artifact.path / "training.jsonl").unlink()
    assert read_training(entrants[0].artifact) == []


def test_benchmark_json_is_read_back_as_it_was_and_refuses_nan(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    assert json.loads((tmp_path / "benchmark.json").read_text()) == json.loads(json.dumps(report.benchmark))
    assert {path.name for path in tmp_path.iterdir()} >= {
        "benchmark.json",
        "benchmark.csv",
        "benchmark.md",
        "report.html",
    }
    with pytest.raises(ValueError, match="JSON"):
        write_report(replace(report, benchmark={**report.benchmark, "x": float("nan")}), tmp_path)


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_spreadsheet_runs_no_name_as_a_formula(report: Report, name: str) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(renamed(report, name).benchmark), newline="")))
    assert rows[1]["name"] == f"'{name}".replace("\r", " ")
    assert rows[0]["name"] == "teacher"
    assert float(rows[2]["comparison.difference"]) < 0, "a negative number stays a number"


def test_csv_and_markdown_hold_the_figures_of_the_json(report: Report) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(report.benchmark))))
    for row, expected in zip(rows, report.benchmark["rows"], strict=True):
        assert float(row["ndcg@10"]) == expected["accuracy"]["ndcg@10"]
        assert float(row["latency.batch_1.p50_ms"]) == expected["latency"]["batch_1"]["p50_ms"]
    text = to_markdown(report.benchmark)
    assert f"{report.benchmark['rows'][1]['accuracy']['ndcg@10']:.4f}" in text
    assert "leave-one-out test, full catalogue, past excluded; 40 users" in text


def test_a_name_cannot_leave_its_markdown_cell(report: Report) -> None:
    table = [line for line in to_markdown(renamed(report, EVIL).benchmark).splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert not any("<" in line for line in table)

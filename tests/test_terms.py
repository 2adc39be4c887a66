"""Each term a student minimises: its value, that it is none of equal models, and whom it moves."""

import numpy as np
import pytest
import torch
from distilling import NO_FEATURES, batch_with_features, config, spec

from compress.features import teacher_says
from compress.objective import DistillObjective, OnlineObjective, feature_targets, with_teacher
from compress.student import build_student
from slmrec.compress_config import OnlineConfig


def test_terms_are_the_papers_weighted_sum(teacher, samples):
    torch.manual_seed(3)
    settings = config(direction_weight=2.0, magnitude_weight=0.5, supervision_weight=0.25, magnitude_scale="none")
    student = build_student(teacher, settings).eval()
    objective = DistillObjective(student, settings)
    batch = batch_with_features(teacher, samples, np.arange(4), num_blocks=2)
    terms = objective(batch)
    wanted = batch.targets != 0
    first = batch.item_ids.ne(0).cumsum(1).eq(1)[wanted]
    states, targets = student(batch.item_ids), batch.targets[wanted] - 1
    for block, end in enumerate([0, 1]):
        ours, theirs = states[end + 1][wanted][~first], batch.features[:, block]
        cosine = (ours * theirs).sum(-1) / (ours.norm(dim=-1) * theirs.norm(dim=-1))
        assert terms[f"direction_block_{block + 1}"].item() == pytest.approx(
            (2.0 / 2 * (1 - cosine)).sum().item() / len(targets), rel=1e-4
        )
        squared = ((ours - theirs) ** 2).sum() / len(targets)
        assert terms[f"magnitude_block_{block + 1}"].item() == pytest.approx((0.5 / 2 * squared).item(), rel=1e-4)
    logits = objective.adapters[0](states[1][wanted]) @ student.item_outputs().T
    expected = -logits.log_softmax(-1).gather(1, targets[:, None]).mean()
    assert terms["supervision_block_1"].item() == pytest.approx(0.25 * expected.item(), rel=1e-4)
    assert set(terms) == {
        "ce",
        *(f"{t}_block_{b}" for t in ("direction", "magnitude") for b in (1, 2)),
        "supervision_block_1",
    }


@pytest.mark.parametrize(("loss", "share"), [("paper", 1 / 3), ("repo", 1.0)])
def test_supervision_is_a_mean_over_the_blocks_before_the_last_or_the_published_sum(teacher, samples, loss, share):
    settings = config(num_layers=4, num_blocks=4, supervision_weight=0.25, loss=loss)
    objective = DistillObjective(build_student(teacher, settings).eval(), settings)
    batch = batch_with_features(teacher, samples, np.arange(4), num_blocks=4)
    terms, wanted = objective(batch), batch.targets != 0
    states, targets = objective.student(batch.item_ids), batch.targets[wanted] - 1
    for block, adapter in enumerate(objective.adapters):
        logits = adapter(states[block + 1][wanted]) @ objective.student.item_outputs().T
        expected = torch.nn.functional.cross_entropy(logits, targets)
        assert terms[f"supervision_block_{block + 1}"].item() == pytest.approx(0.25 * share * expected.item(), rel=1e-4)
    assert len(objective.adapters) == 3


def listed(teacher, samples, rows, student=None):
    """A batch with the best items of a model and its scores of them."""
    wanted = spec(teacher, num_blocks=0, list_size=4)
    return with_teacher(
        samples.batch(rows), teacher_says(student or teacher, samples.batch(rows), wanted), has_prefix=False
    )


def test_the_list_term_is_the_divergence_over_the_teachers_best_and_none_of_itself(teacher, samples):
    weights = {"direction_weight": 0.0, "magnitude_weight": 0.0, "supervision_weight": 0.0}
    settings = config(**weights, list_weight=2.0, list_size=4)
    objective, rows = DistillObjective(build_student(teacher, settings).eval(), settings), np.arange(4)
    batch = listed(teacher, samples, rows)
    terms = objective(batch)
    assert set(terms) == {"ce", "list"}
    wanted = batch.targets != 0
    ours = objective.student.logits(objective.student(batch.item_ids)[-1][wanted]).gather(1, batch.best.long() - 1)
    theirs = batch.best_scores.softmax(-1)
    expected = (theirs * (theirs.log() - ours.log_softmax(-1))).sum(-1).mean()
    assert terms["list"].item() == pytest.approx(2.0 * expected.item(), rel=1e-4)
    assert terms["list"].item() > 1e-3
    terms["list"].backward()
    assert objective.student.decoder.layers[0].mlp.down_proj.weight.grad.abs().max() > 0
    assert all(value.grad is None for value in teacher.parameters())
    same = DistillObjective(objective.student, settings)(listed(teacher, samples, rows, objective.student))
    assert same["list"].item() == pytest.approx(0.0, abs=1e-5)


def test_online_logits_are_the_divergence_of_the_adapters_and_none_of_equal_models(teacher, samples):
    settings = config(num_layers=4, num_blocks=2, online=OnlineConfig(signal="logits"), **NO_FEATURES)
    student = build_student(teacher, settings).eval()
    objective = OnlineObjective(teacher, DistillObjective(student, settings, teacher.hidden_size))
    batch = samples.batch(np.arange(4))
    wanted, values = batch.targets != 0, []
    for model, adapters in ((student, objective.distillation.adapters), (teacher, objective.teacher_adapters)):
        state = model(batch.item_ids)[2][wanted]  # after layer 1, the end of the first of two blocks
        values.append(adapters[0](state) @ model.item_outputs().T)
    theirs = values[1].softmax(-1)
    expected = (theirs * (theirs.log() - values[0].log_softmax(-1))).sum(-1).mean()
    found = objective(batch)["logits_block_1"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert found.item() > 1e-4
    found.backward()
    assert student.decoder.layers[0].mlp.down_proj.weight.grad.abs().max() > 0
    assert all(value.grad is None or not value.grad.any() for value in teacher.decoder.parameters())
    objective.distillation.adapters.load_state_dict(objective.teacher_adapters.state_dict())
    assert objective(batch)["logits_block_1"].item() == pytest.approx(0.0, abs=1e-5)


def moved(term, model):
    """Whether a term has a gradient in a model's layers."""
    layers = list(model.decoder.layers.parameters())
    found = torch.autograd.grad(term, layers, retain_graph=True, allow_unused=True)
    return any(value is not None and bool(value.any()) for value in found)


@pytest.mark.parametrize(("loss", "share"), [("paper", 1 / 2), ("repo", 1.0)])
def test_online_the_teacher_learns_by_its_own_scores_and_its_adapters_by_theirs(teacher, samples, loss, share):
    settings = config(
        num_layers=3, num_blocks=3, supervision_weight=0.25, loss=loss, online=OnlineConfig(signal="logits"),
        **NO_FEATURES,
    )  # fmt: skip
    student = build_student(teacher, settings).eval()
    objective = OnlineObjective(teacher, DistillObjective(student, settings, teacher.hidden_size))
    batch = samples.batch(np.arange(4))
    terms, wanted = objective(batch), batch.targets != 0
    states, targets = teacher(batch.item_ids), batch.targets[wanted] - 1
    expected = torch.nn.functional.cross_entropy(teacher.logits(states[-1][wanted]), targets)
    assert terms["teacher_ce"].item() == pytest.approx(expected.item(), rel=1e-4)
    for block, end in ((1, 1), (2, 2)):  # blocks of 4 layers in 3 end after layers 1, 2 and 3, counted from 0
        scores = objective.teacher_adapters[block - 1](states[end + 1][wanted]) @ teacher.item_outputs().T
        expected = 0.25 * share * torch.nn.functional.cross_entropy(scores, targets)
        assert terms[f"teacher_supervision_block_{block}"].item() == pytest.approx(expected.item(), rel=1e-4)
    for name, term in terms.items():
        own = name.startswith("teacher_")
        assert (moved(term, teacher), moved(term, student)) == (own, not own), name
    assert terms["ce"].item() != pytest.approx(terms["teacher_ce"].item(), rel=1e-3)


def test_every_requested_term_changes_the_gradient(teacher, samples):
    batch = batch_with_features(teacher, samples, np.arange(4), num_blocks=2)

    def gradient(**changes):
        torch.manual_seed(0)
        student = build_student(teacher, config(**changes)).eval()
        sum(DistillObjective(student, config(**changes))(batch).values()).backward()
        return student.decoder.layers[0].mlp.down_proj.weight.grad

    everything = gradient()
    for term in ("direction_weight", "magnitude_weight", "supervision_weight"):
        assert not torch.allclose(everything, gradient(**{term: 0.0})), term


@pytest.mark.parametrize("loss", ["paper", "repo"])
def test_distances_are_relative_to_the_teachers_mean_norm(teacher, samples, loss):
    settings = config(magnitude_weight=0.5, magnitude_scale="hidden", loss=loss)
    student = build_student(teacher, settings).eval()
    batch = batch_with_features(teacher, samples, np.arange(4), num_blocks=2)
    terms = DistillObjective(student, settings)(batch)
    wanted = batch.targets != 0
    kept, count = feature_targets(batch, has_prefix=False), int(wanted.sum())
    for block in (1, 2):
        theirs = batch.features[:, block - 1]
        squared = (student(batch.item_ids)[block][wanted][kept] - theirs).pow(2).sum(-1)
        norm = theirs.pow(2).sum() / count
        expected = squared.sum() / count / norm / 2 if loss == "paper" else squared.sqrt().sum() / count / norm.sqrt()
        assert terms[f"magnitude_block_{block}"].item() == pytest.approx(0.5 * expected.item(), rel=1e-4)


def test_a_teacher_that_is_asked_at_every_step_is_moved_by_no_term(teacher, samples):
    batch, settings = samples.batch(np.arange(4)), config(list_weight=1.0, list_size=4)
    assert all(value.requires_grad for value in teacher.decoder.parameters())
    found = teacher_says(teacher, batch, spec(teacher, list_size=4))
    objective = DistillObjective(build_student(teacher, settings), settings)
    terms = objective(with_teacher(batch, found, has_prefix=False))
    assert {"direction_block_1", "magnitude_block_1", "list"} <= set(terms)
    sum(terms.values()).backward()
    assert all(value.grad is None for value in teacher.parameters())


def test_the_published_codes_terms_are_sums_of_plain_distances(teacher, samples):
    paper, repo = (config(loss=loss, magnitude_scale="none") for loss in ("paper", "repo"))
    student = build_student(teacher, paper).eval()
    batch = batch_with_features(teacher, samples, np.arange(4), num_blocks=2)
    torch.manual_seed(1)
    theirs = DistillObjective(student, repo)
    torch.manual_seed(1)
    terms, ours = theirs(batch), DistillObjective(student, paper)(batch)
    assert terms["direction_block_1"].item() == pytest.approx(2 * ours["direction_block_1"].item(), rel=1e-5)
    assert terms["supervision_block_1"].item() == pytest.approx(ours["supervision_block_1"].item(), rel=1e-5)
    kept = feature_targets(batch, has_prefix=False)
    gap = student(batch.item_ids)[1][batch.targets != 0][kept] - batch.features[:, 0]
    distances = gap.norm(dim=-1).sum().item() / len(kept)
    assert terms["magnitude_block_1"].item() == pytest.approx(0.1 * distances, rel=1e-5)

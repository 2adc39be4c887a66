"""Distillation: what the student starts from, what each term does, and that the store changes nothing."""

import dataclasses
import errno

import numpy as np
import pytest
import torch

from compress.blocks import block_ends, kept_layers, state_index
from compress.distill import DistillObjective, build_student, require_distillable
from compress.features import build_features
from slmrec.config import DistillConfig, TrainConfig, WindowConfig
from slmrec.errors import ConfigError
from slmrec.ragged import Ragged
from slmrec.samples import training_samples

TRAIN = TrainConfig(epochs=1, batch_size=4, learning_rate=1e-3)
SEQUENCES = Ragged.from_rows([[1, 2, 3, 4, 5, 6, 7], [9, 8, 7, 6, 5], [3, 4, 5, 6], [11, 12, 13, 14, 15, 16]])


def config(**changes):
    return DistillConfig(**{"num_layers": 2, "num_blocks": 2, "train": TRAIN} | changes)


@pytest.fixture
def teacher(tiny_model):
    return tiny_model(num_layers=4, prompt="none").eval()


@pytest.fixture
def samples():
    return training_samples(SEQUENCES, WindowConfig(max_history=4), "all", after_suffix=False)


def batch_with_features(teacher, samples, rows, num_blocks):
    """Features by the definition: run the teacher on each sample alone and read the ends of its blocks."""
    features = []
    for row in rows:
        window = samples.windows[int(row)]
        states = teacher(torch.from_numpy(window[:-1])[None])
        ends = block_ends(teacher.num_layers, num_blocks)
        features.append(torch.stack([states[state_index(end)][0] for end in ends], dim=1))
    return samples.batch(rows)._replace(features=torch.cat(features).detach())


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 7, 8, 30])
def test_blocks_cut_every_depth_and_the_last_always_matches(num_layers):
    for num_blocks in range(1, num_layers + 1):
        ends = block_ends(num_layers, num_blocks)
        assert ends == sorted(set(ends))
        assert len(ends) == num_blocks
        assert ends[-1] == num_layers - 1


def test_a_student_from_the_teacher_starts_with_its_items_and_evenly_spaced_layers(teacher):
    student = build_student(teacher, config())
    assert kept_layers(4, 2) == [1, 3]
    for layer, source in zip(student.decoder.layers, [1, 3], strict=True):
        for value, expected in zip(layer.parameters(), teacher.decoder.layers[source].parameters(), strict=True):
            assert torch.equal(value, expected)
    assert torch.equal(student.item_table.weight, teacher.item_table.weight)
    assert torch.equal(student.user_proj.weight, teacher.user_proj.weight)


def test_a_student_that_is_its_teacher_has_no_feature_loss(teacher, samples):
    student = build_student(teacher, config(num_layers=4, num_blocks=4)).eval()
    batch = batch_with_features(teacher, samples, np.arange(3), num_blocks=4)
    terms = DistillObjective(student, config(num_layers=4, num_blocks=4))(batch)
    for name, value in terms.items():
        if name.startswith(("direction", "magnitude")):
            assert value.item() == pytest.approx(0.0, abs=1e-5), name


def test_terms_are_the_papers_weighted_sum(teacher, samples):
    torch.manual_seed(3)
    settings = config(direction_weight=2.0, magnitude_weight=0.5, supervision_weight=0.25, magnitude_scale="none")
    student = build_student(teacher, settings).eval()
    objective = DistillObjective(student, settings)
    batch = batch_with_features(teacher, samples, np.arange(4), num_blocks=2)
    terms = objective(batch)
    wanted = batch.targets != 0
    states, targets = student(batch.item_ids), batch.targets[wanted] - 1
    for block, end in enumerate([0, 1]):
        ours, theirs = states[end + 1][wanted], batch.features[:, block]
        cosine = (ours * theirs).sum(-1) / (ours.norm(dim=-1) * theirs.norm(dim=-1))
        assert terms[f"direction_block_{block + 1}"].item() == pytest.approx(
            (2.0 / 2 * (1 - cosine)).mean().item(), rel=1e-4
        )
        squared = ((ours - theirs) ** 2).sum(-1).mean()
        assert terms[f"magnitude_block_{block + 1}"].item() == pytest.approx((0.5 / 2 * squared).item(), rel=1e-4)
    logits = objective.adapters[0](states[1][wanted]) @ student.item_outputs().T
    expected = -logits.log_softmax(-1).gather(1, targets[:, None]).mean()
    assert terms["supervision_block_1"].item() == pytest.approx(0.25 * expected.item(), rel=1e-4)
    assert set(terms) == {
        "ce",
        *(f"{t}_block_{b}" for t in ("direction", "magnitude") for b in (1, 2)),
        "supervision_block_1",
    }


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


def test_the_store_holds_what_the_teacher_gives_at_every_target(teacher, samples, tmp_path):
    store = build_features(teacher, samples, 2, tmp_path, "key")
    rows = np.array([2, 0, 3])
    expected = batch_with_features(teacher, samples, rows, 2).features
    torch.testing.assert_close(store.read(rows).float(), expected, rtol=8e-3, atol=1e-3)  # bfloat16 has 8 bits


def test_stored_features_line_up_with_the_batchs_targets(teacher, samples, tmp_path):
    store = build_features(teacher, samples, 2, tmp_path, "key")
    student = build_student(teacher, config(num_layers=4, num_blocks=2)).eval()
    rows = np.array([3, 1, 0, 2])
    batch = samples.batch(rows)._replace(features=store.read(rows))
    terms = DistillObjective(student, config(num_layers=4, num_blocks=2))(batch)
    assert terms["direction_block_2"].item() < 1e-4


def test_a_store_of_another_run_is_built_anew_and_its_own_is_not(teacher, samples, tmp_path):
    first = build_features(teacher, samples, 2, tmp_path, "key").path
    first.write_bytes(b"\x01" * first.stat().st_size)
    assert (build_features(teacher, samples, 2, tmp_path, "key").read(np.array([0])).view(torch.int16) == 0x0101).all()
    assert not (
        build_features(teacher, samples, 2, tmp_path, "other").read(np.array([0])).view(torch.int16) == 0x0101
    ).all()


def test_a_disk_too_small_is_refused_before_anything_is_written(teacher, samples, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("compress.features.os.posix_fallocate", full)
    with pytest.raises(ConfigError, match=r"need .* MB"):
        build_features(teacher, samples, 2, tmp_path, "key")
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [0]


def test_pairs_that_cannot_be_matched_are_refused(teacher, tiny_model):
    with pytest.raises(ConfigError, match="student would have 5 layers, the teacher has 4"):
        require_distillable(teacher, config(num_layers=5))
    with pytest.raises(ConfigError, match="cannot be cut into num_blocks=3"):
        config(num_layers=2, num_blocks=3)
    with pytest.raises(ConfigError, match="linear head"):
        require_distillable(tiny_model(num_layers=4, head="linear"), config())
    require_distillable(tiny_model(num_layers=4, head="linear"), config(supervision_weight=0.0))


def test_adapters_are_no_part_of_the_student(teacher):
    student = build_student(teacher, config())
    names = set(student.state_dict())
    DistillObjective(student, config())
    assert set(student.state_dict()) == names
    assert dataclasses.replace(teacher.spec, decoder=student.spec.decoder) == student.spec

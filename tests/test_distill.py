"""Distillation: what the student starts from, what each term does, and that the store changes nothing."""

import dataclasses
import errno
import os

import numpy as np
import pytest
import torch
from distilling import NO_FEATURES, SEQUENCES, batch_with_features, config, spec

from compress import features
from compress.blocks import block_ends, kept_layers
from compress.features import build_store, teacher_says
from compress.objective import DistillObjective, OnlineObjective, feature_targets, with_teacher
from compress.student import build_student, require_distillable
from slmrec.compress_config import FeatureConfig, OnlineConfig
from slmrec.config import RecipeConfig, WindowConfig
from slmrec.errors import ConfigError
from slmrec.models.decoder import DecoderSpec, decoder_settings
from slmrec.ragged import Ragged
from slmrec.samples import training_samples
from slmrec.synthetic import write_backbone
from slmrec.train_teacher import load_backbone, pretrained_model


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


def test_the_store_holds_what_the_teacher_gives_at_every_target(teacher, samples, tmp_path):
    rows = np.array([2, 0, 3])
    expected = teacher_says(teacher, samples.batch(rows), spec(teacher))["features"]
    alone = batch_with_features(teacher, samples, rows, 2).features
    torch.testing.assert_close(expected[feature_targets(samples.batch(rows), has_prefix=False)], alone)
    stored = build_store(teacher, samples, spec(teacher), tmp_path / "a", "key").read(rows)["features"]
    torch.testing.assert_close(stored.float(), expected, rtol=8e-3, atol=1e-3)  # bfloat16 has 8 bits
    exact = build_store(teacher, samples, spec(teacher, dtype="float32"), tmp_path / "b", "key").read(rows)["features"]
    torch.testing.assert_close(exact, expected, rtol=1e-5, atol=1e-6)


def test_the_store_holds_the_teachers_best_items_in_order(teacher, samples, tmp_path):
    rows = np.array([1, 3])
    found = build_store(teacher, samples, spec(teacher, num_blocks=0, list_size=5), tmp_path, "key").read(rows)
    assert set(found) == {"best", "best_scores"}
    batch = samples.batch(rows)
    scores = teacher.logits(teacher(batch.item_ids)[-1][batch.targets != 0]).detach().numpy()
    order = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    assert (found["best"].numpy() == order + 1).all()
    np.testing.assert_allclose(found["best_scores"].numpy(), np.take_along_axis(scores, order, 1), rtol=1e-5)


def test_a_live_teacher_and_a_float32_store_give_the_same_losses(teacher, samples, tmp_path):
    settings = config(num_layers=3, num_blocks=2, list_weight=1.0, list_size=4)
    wanted = spec(teacher, dtype="float32", list_size=4)
    store = build_store(teacher, samples, wanted, tmp_path, "key")
    objective = DistillObjective(build_student(teacher, settings).eval(), settings, teacher.hidden_size)
    for rows in (np.array([0, 2]), np.array([3, 1])):
        batch = samples.batch(rows)
        stored, live = (
            objective(with_teacher(batch, found, has_prefix=False))
            for found in (store.read(rows), teacher_says(teacher, batch, wanted))
        )
        assert set(stored) == set(live)
        for name, value in live.items():
            assert stored[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name


def test_stored_features_line_up_with_the_batchs_targets(teacher, samples, tmp_path):
    store = build_store(teacher, samples, spec(teacher), tmp_path, "key")
    student = build_student(teacher, config(num_layers=4, num_blocks=2)).eval()
    rows = np.array([3, 1, 0, 2])
    batch = with_teacher(samples.batch(rows), store.read(rows), has_prefix=False)
    terms = DistillObjective(student, config(num_layers=4, num_blocks=2))(batch)
    assert terms["direction_block_2"].item() < 1e-4


def test_a_store_of_another_run_is_built_anew_and_its_own_is_not(teacher, samples, tmp_path):
    def first_row(key):
        store = build_store(teacher, samples, spec(teacher), tmp_path, key)
        return store.folder / "features.bin", store.read(np.array([0]))["features"].view(torch.int16)

    file, _ = first_row("key")
    file.write_bytes(b"\x01" * file.stat().st_size)
    assert (first_row("key")[1] == 0x0101).all()
    assert not (first_row("other")[1] == 0x0101).all()


def test_a_store_half_built_is_gone_on_with_and_ends_as_one_built_at_once(teacher, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "BATCH_SIZE", 1)
    monkeypatch.setattr(features, "SAVE_EVERY_BATCHES", 2)
    write, written = features._write_batch, []

    def counted(*arguments):
        written.append(arguments[2].tolist())
        if len(written) == 4:
            raise KeyboardInterrupt
        write(*arguments)

    wanted = spec(teacher, dtype="float32", list_size=3)
    whole = build_store(teacher, samples, wanted, tmp_path / "whole", "key").read(np.arange(len(samples.lengths)))
    monkeypatch.setattr(features, "_write_batch", counted)
    with pytest.raises(KeyboardInterrupt):
        build_store(teacher, samples, wanted, tmp_path / "half", "key")
    resumed = build_store(teacher, samples, wanted, tmp_path / "half", "key").read(np.arange(len(samples.lengths)))
    assert written[4:][0] == written[2], "two batches were noted as done"
    assert len(written) == 4 + len(samples.lengths) - 2
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_the_key_of_a_store_knows_its_teacher_its_positions_and_what_is_read(teacher, samples):
    shorter = training_samples(SEQUENCES, WindowConfig(max_history=3), "all", after_suffix=False)
    newest = training_samples(SEQUENCES, WindowConfig(max_history=4), "last", after_suffix=False)
    keys = [
        spec(teacher).key("teacher", samples),
        spec(teacher).key("other", samples),
        spec(teacher).key("teacher", shorter),
        spec(teacher).key("teacher", newest),
        spec(teacher, num_blocks=1).key("teacher", samples),
        spec(teacher, dtype="float32").key("teacher", samples),
    ]
    assert len(set(keys)) == len(keys)
    assert spec(teacher).key("teacher", samples) == keys[0]


def test_a_disk_too_small_is_refused_before_anything_is_written(teacher, samples, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("compress.features.os.posix_fallocate", full)
    with pytest.raises(ConfigError, match=r"need .* MB"):
        build_store(teacher, samples, spec(teacher), tmp_path, "key")
    assert [path.stat().st_size for path in tmp_path.glob("*.bin")] == [0]


def test_a_disk_that_holds_the_first_part_alone_gets_it_back(teacher, samples, tmp_path, monkeypatch):
    reserve, asked = os.posix_fallocate, []

    def full_at_the_second(*arguments):
        asked.append(arguments)
        if len(asked) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(*arguments)

    monkeypatch.setattr("compress.features.os.posix_fallocate", full_at_the_second)
    with pytest.raises(ConfigError, match=r"need .* MB"):
        build_store(teacher, samples, spec(teacher, list_size=4), tmp_path, "key")
    assert {path.name: path.stat().st_size for path in tmp_path.glob("*.bin")} == {"best.bin": 0, "features.bin": 0}


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
    assert dataclasses.replace(teacher.spec, decoder=student.spec.decoder, title_size=32) == student.spec


def test_without_a_prefix_the_first_token_is_no_feature_target(tiny_model, samples):
    batch = samples.batch(np.array([0, 1]))
    kept = feature_targets(batch, has_prefix=False)
    wanted = batch.targets != 0
    position = (batch.item_ids != 0).cumsum(1)[wanted]
    assert kept.tolist() == (position > 1).tolist()
    assert feature_targets(batch, has_prefix=True).all()
    lone = training_samples(Ragged.from_rows([[1, 2, 3, 4]]), WindowConfig(max_history=4), "all", after_suffix=False)
    student = build_student(tiny_model(num_layers=4, prompt="none"), config()).eval()
    only = with_teacher(lone.batch(np.array([0])), {"features": torch.ones(1, 2, 32)}, has_prefix=False)
    terms = DistillObjective(student, config())(only)
    assert terms["direction_block_1"].item() == terms["magnitude_block_1"].item() == 0


@pytest.mark.parametrize(("init", "sources"), [("teacher", [1, 3]), ("teacher-first", [0, 1])])
def test_layers_come_from_where_init_says(teacher, init, sources):
    student = build_student(teacher, config(init=init))
    for layer, source in zip(student.decoder.layers, sources, strict=True):
        expected = teacher.decoder.layers[source].state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in layer.state_dict().items())


def test_a_student_of_the_backbone_has_its_first_layers(tmp_path):
    folder = write_backbone(tmp_path / "backbone", num_layers=4)
    backbone = load_backbone(str(folder), 4)
    spec = DecoderSpec(
        decoder=decoder_settings(backbone.decoder.config, 4), recipe=RecipeConfig(prompt="none", titles="none"),
        num_items=20, item_dim=8, max_history=10, prefix_length=0, suffix_length=0, has_titles=False,
        backbone=str(folder),
    )  # fmt: skip
    nothing = torch.zeros(0, backbone.decoder.config.hidden_size)
    trained = pretrained_model(spec, backbone, (nothing, nothing))
    with torch.no_grad():
        for value in trained.decoder.parameters():
            value.add_(1.0)
    student = build_student(trained, config(init="backbone"))
    for layer, source in zip(student.decoder.layers, backbone.decoder.layers[:2], strict=True):
        pairs = zip(layer.parameters(), source.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    assert torch.equal(student.decoder.norm.weight, backbone.decoder.norm.weight)
    assert torch.equal(student.item_table.weight, trained.item_table.weight)


def test_a_random_student_takes_the_items_and_none_of_the_layers(teacher):
    student = build_student(teacher, config(init="random"))
    assert torch.equal(student.item_proj.weight, teacher.item_proj.weight)
    for layer in student.decoder.layers:
        for other in teacher.decoder.layers:
            assert not torch.equal(layer.mlp.up_proj.weight, other.mlp.up_proj.weight)


@pytest.mark.parametrize("prompt", ["none", "slmrec"])
def test_a_narrower_student_follows_through_projections_that_it_does_not_keep(tiny_model, samples, prompt):
    wide = tiny_model(num_layers=4, prompt=prompt).eval()
    settings = config(hidden_size=16, init="random")
    student = build_student(wide, settings)
    assert student.hidden_size == 16
    assert {n for n, _ in student.named_parameters() if "projection" in n} == set()
    objective = DistillObjective(student, settings, wide.hidden_size)
    read = training_samples(SEQUENCES, WindowConfig(max_history=4), "last", after_suffix=prompt == "slmrec")
    batch = read.batch(np.arange(3))
    terms = objective(with_teacher(batch, teacher_says(wide, batch, spec(wide)), has_prefix=prompt == "slmrec"))
    sum(terms.values()).backward()
    assert all(projection.weight.grad.abs().sum() > 0 for projection in objective.projections)
    inputs, reference = student.item_inputs(torch.arange(1, 20)), wide.item_inputs(torch.arange(1, 20))
    assert inputs.pow(2).mean().item() == pytest.approx(reference.pow(2).mean().item(), rel=0.1)
    if prompt != "none":
        assert student.prefix.pow(2).mean().item() == pytest.approx(wide.prefix.pow(2).mean().item(), rel=0.4)


@pytest.mark.parametrize("width", [12, 24, 64])
def test_a_width_that_heads_do_not_fill_is_refused(teacher, width):
    with pytest.raises(ConfigError, match=f"cannot be copied to hidden_size={width}|hidden_size=64 is no width of"):
        require_distillable(teacher, config(hidden_size=width))
    require_distillable(teacher, config(hidden_size=teacher.hidden_size))
    with pytest.raises(
        ConfigError, match=rf"hidden_size={width} is no width .* multiples of 16 .* up to its 32"
    ) as refusal:
        build_student(teacher, config(hidden_size=width, init="random"))
    assert refusal.value.remedy == "--hidden-size 16"


def online(**changes):
    compared = {} if changes.get("signal") != "logits" else NO_FEATURES
    return config(online=OnlineConfig(**changes), **compared)


def online_gradients(tiny_model, samples, settings):
    teacher = tiny_model(num_layers=4, prompt="none")
    student = build_student(teacher, settings)
    torch.manual_seed(5)
    objective = OnlineObjective(teacher, DistillObjective(student, settings, teacher.hidden_size))
    terms = objective(samples.batch(np.arange(4)))
    names = sorted(terms)
    followed = sum(v for n, v in terms.items() if n.startswith(("direction", "magnitude", "logits")))
    followed.backward()
    grads = [p.grad for p in teacher.decoder.parameters()]
    return names, sum(float(g.abs().sum()) for g in grads if g is not None)


def test_online_both_learn_and_the_teacher_is_moved_by_the_student_only_on_request(tiny_model, samples):
    names, moved = online_gradients(tiny_model, samples, online())
    assert {"ce", "teacher_ce", "direction_block_1", "magnitude_block_2", "supervision_block_1"} <= set(names)
    assert moved == 0
    assert online_gradients(tiny_model, samples, online(teacher_gradient=True))[1] > 0


def test_online_logits_compare_the_adapters_of_both_and_move_the_student_alone(tiny_model, samples):
    names, moved = online_gradients(tiny_model, samples, online(signal="logits"))
    assert names == ["ce", "logits_block_1", "supervision_block_1", "teacher_ce", "teacher_supervision_block_1"]
    assert moved == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"online": OnlineConfig(), "list_weight": 1.0}, "frozen teacher"),
        ({"online": OnlineConfig(signal="logits"), "supervision_weight": 0.0}, "adapters, but supervision_weight=0"),
        ({"online": OnlineConfig(signal="logits")}, "compare no features, but direction_weight=1.0"),
        ({"online": OnlineConfig(signal="logits"), "direction_weight": 0.0}, "and magnitude_weight=0.1"),
        ({"online": OnlineConfig(teacher_gradient=True), **NO_FEATURES}, "nothing follows the teacher"),
        ({"online": OnlineConfig(), "features": FeatureConfig(source="live")}, "none are stored"),
        ({"online": OnlineConfig(), "features": FeatureConfig(keep=True)}, "none are stored"),
        ({"num_layers": 1}, r"(?s)cannot be cut into num_blocks=2.*Try: --num-blocks 1 --supervision-weight 0$"),
        ({"num_layers": 1, "num_blocks": 1}, r"(?s)a block before the last.*Try: --supervision-weight 0$"),
        ({"num_blocks": 1}, r"Try: --supervision-weight 0, or --num-blocks 2 or more$"),
        ({"loss": "both"}, "loss='both' is not known"),
        ({"init": "last"}, "init='last' is not known"),
    ],
)
def test_terms_that_cannot_be_computed_are_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=message):
        config(**settings)


def test_a_detached_teacher_cannot_be_moved():
    with pytest.raises(ConfigError, match="detached"):
        OnlineConfig(signal="logits", teacher_gradient=True)


def named_terms(together, supervised):
    """All terms of two blocks."""
    names = {"ce", "teacher_ce"} if together else {"ce"}
    if supervised:
        names |= {"supervision_block_1"}
    if together == "logits":
        return names | {"logits_block_1", "teacher_supervision_block_1"}
    return names | {f"{term}_block_{block}" for term in ("direction", "magnitude") for block in (1, 2)}


@pytest.mark.parametrize("loss", ["paper", "repo"])
@pytest.mark.parametrize("together", [None, "features", "logits"])
@pytest.mark.parametrize("head", ["tied", "linear"])
@pytest.mark.parametrize(
    ("prompt", "supervision"),
    [("none", "all"), ("prefix", "all"), ("slmrec", "last"), ("slmrec", "prefixes"), ("none", "prefixes")],
)
@pytest.mark.parametrize("positions", ["compact", "padded"])
def test_every_combination_learns_or_is_a_named_error(tiny_model, loss, together, head, prompt, supervision, positions):
    recipe = {"head": head, "prompt": prompt, "supervision": supervision, "positions": positions}
    supervised = head == "tied" or together == "logits"
    settings = config(
        loss=loss, online=together and OnlineConfig(signal=together), supervision_weight=0.1 if supervised else 0.0,
        **(NO_FEATURES if together == "logits" else {}),
    )  # fmt: skip
    if (prompt, supervision, positions) == ("prefix", "all", "padded"):
        with pytest.raises(ConfigError, match="positions=padded never serves"):
            tiny_model(num_layers=4, **recipe)
        return
    teacher = tiny_model(num_layers=4, **recipe)
    if head == "linear" and together == "logits":
        with pytest.raises(ConfigError, match="a linear head does not have"):
            require_distillable(teacher, settings)
        return
    require_distillable(teacher, settings)
    read = training_samples(SEQUENCES, WindowConfig(max_history=4), supervision, after_suffix=prompt == "slmrec")
    batch = read.batch(np.arange(3))
    student = build_student(teacher, settings)
    objective = DistillObjective(student, settings, teacher.hidden_size)
    whole = OnlineObjective(teacher, objective) if together else objective
    if together is None:
        found = teacher_says(teacher.eval(), batch, spec(teacher))
        batch = with_teacher(batch, found, has_prefix=prompt != "none")
    optimizer = torch.optim.Adam(whole.parameters(), lr=1e-3)
    losses = []
    assert set(whole(batch)) == named_terms(together, supervised)
    for _ in range(8):
        loss_now = sum(whole(batch).values())
        losses.append(loss_now.item())
        optimizer.zero_grad()
        loss_now.backward()
        optimizer.step()
    assert losses[-1] < losses[0]

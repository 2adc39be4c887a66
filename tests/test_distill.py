"""Distillation: what the student starts from, what each term does, and that the store changes nothing."""

import dataclasses
import errno

import numpy as np
import pytest
import torch

from compress.blocks import block_ends, kept_layers, state_index
from compress.features import StoreSpec, build_store, teacher_says
from compress.objective import DistillObjective, OnlineObjective, feature_targets, with_teacher
from compress.student import build_student, require_distillable
from slmrec.compress_config import DistillConfig, OnlineConfig
from slmrec.config import TrainConfig, WindowConfig
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
    return with_teacher(samples.batch(rows), {"features": torch.cat(features).detach()}, has_prefix=False)


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


def spec(teacher, **changes):
    return StoreSpec(
        **{"num_blocks": 2, "hidden_size": teacher.hidden_size, "dtype": "bfloat16", "list_size": 0} | changes
    )


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
    with pytest.raises(ConfigError, match=f"hidden_size={width} is no width"):
        build_student(teacher, config(hidden_size=width, init="random"))


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


def online(**changes):
    return config(online=OnlineConfig(**changes))


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
        ({"hidden_size": 16}, "cannot be copied"),
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
        loss=loss, online=together and OnlineConfig(signal=together), supervision_weight=0.1 if supervised else 0.0
    )
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
    for _ in range(8):
        loss_now = sum(whole(batch).values())
        losses.append(loss_now.item())
        optimizer.zero_grad()
        loss_now.backward()
        optimizer.step()
    assert losses[-1] < losses[0]

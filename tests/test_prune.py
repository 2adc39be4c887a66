"""Pruning: what is cut is what was said, what is left is what was there, and healing follows the unpruned model."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import compress.prune
from compress.calibrate import calibrate
from compress.importance import damages, keep_layers, user_states, user_vector_changes, write_importance
from compress.prune import Setting, choose_layers, depths, prune, require_prunable
from compress.sensitivity import sensitivity
from compress.width import cut_width
from slmrec.artifact import open_artifact
from slmrec.compress_config import ImportanceConfig, PruneConfig
from slmrec.config import DataConfig, RecipeConfig, SasrecConfig, TeacherConfig, TrainConfig, WindowConfig
from slmrec.dataset import load_dataset
from slmrec.errors import CheckError, ConfigError
from slmrec.evaluate import validation_ndcg
from slmrec.interactions import prepare_dataset
from slmrec.models.checkpoint import load_decoder
from slmrec.models.ranking import TorchRecommender
from slmrec.ragged import Ragged
from slmrec.recommender import Histories
from slmrec.sequences import Cases, validation_cases
from slmrec.synthetic import write_backbone, write_log
from slmrec.train_items import train_items
from slmrec.train_teacher import train_teacher

TRAIN = TrainConfig(epochs=1, batch_size=32, learning_rate=1e-3, precision="fp32", warmup_steps=2)
CONFIG = PruneConfig(num_layers=3, train=TRAIN, importance=ImportanceConfig(max_users=50))
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Data, and a teacher of 5 layers without a prompt."""
    runs = tmp_path_factory.mktemp("runs")
    prepare_dataset([write_log(runs / "log.txt", num_users=100)], runs / "data", DataConfig())
    write_backbone(runs / "backbone", num_layers=5)
    data = load_dataset(runs / "data")
    items, _ = train_items(data, runs / "items", SasrecConfig(hidden_size=16, train=TRAIN))
    config = TeacherConfig(
        backbone=str(runs / "backbone"), num_layers=5, recipe=RecipeConfig(prompt="none", dropout=0.0), train=TRAIN,
        window=WindowConfig(max_history=10),
    )  # fmt: skip
    train_teacher(items, data, runs / "teacher", config)
    return runs


@pytest.fixture(scope="module")
def histories():
    generator = np.random.default_rng(0)
    return Histories.of(Ragged.from_rows([generator.integers(1, 21, size=n).tolist() for n in [1, 3, 3, 7, 10, 12]]))


def setting(runs, config, output):
    parent = open_artifact(runs / "teacher")
    whole = load_decoder(parent).eval()
    return Setting(parent, whole, load_dataset(runs / "data"), config, "cpu", output, "key")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kept", [(0, 2), (1,), (0, 1, 2)])
def test_a_kept_layer_computes_what_it_did(tiny_model, family, kept):
    model = tiny_model(family=family, num_layers=3, prompt="slmrec").eval()
    items = torch.tensor([[3, 4, 5], [9, 2, 7]])
    passed_over = [layer for layer in range(3) if layer not in kept]
    for layer in passed_over:  # a layer that adds nothing is a layer that is not there
        model.decoder.layers[layer].self_attn.o_proj.weight.data.zero_()
        model.decoder.layers[layer].mlp.down_proj.weight.data.zero_()
    with torch.inference_mode():
        torch.testing.assert_close(keep_layers(model, kept).score(items), model.score(items), rtol=1e-5, atol=1e-5)
    assert keep_layers(model, kept).num_layers == len(kept)


def test_angles_and_influence_are_the_definition_written_out(tiny_model, histories):
    model = tiny_model(num_layers=3, prompt="none").eval()
    angles, influence = user_vector_changes(model, histories)
    states = []
    for row in histories.item_ids:
        taken = []

        def keep(_, __, output, taken=taken):
            taken.append((output[0] if isinstance(output, tuple) else output)[0, -1])

        hooks = [layer.register_forward_hook(keep) for layer in model.decoder.layers]
        ids = torch.from_numpy(row[-10:].copy())[None]
        with torch.inference_mode():
            model.score(ids)
            first = model.item_inputs(ids)[0, -1]
        for hook in hooks:
            hook.remove()
        states.append(torch.stack([first, *taken]).double().numpy())
    for start in range(3):
        for size in range(1, 4):
            if start + size > 3:
                assert np.isnan(angles[start, size - 1])
                continue
            cosines = [
                user[start] @ user[start + size] / np.linalg.norm(user[start]) / np.linalg.norm(user[start + size])
                for user in states
            ]
            assert angles[start, size - 1] == pytest.approx(np.mean(np.arccos(cosines)) / np.pi, abs=1e-5)
            if size == 1:
                assert influence[start] == pytest.approx(1 - np.mean(cosines), abs=1e-5)


def test_the_last_state_is_read_before_the_final_norm(tiny_model):
    model = tiny_model(num_layers=2, prompt="none").eval()
    items = torch.tensor([[3, 4, 5]])
    with torch.inference_mode():
        states = user_states(model, items)
        torch.testing.assert_close(model.decoder.norm(states[-1]), model(items)[-1][:, -1])
    assert len(states) == 3


def test_damage_is_what_skipping_costs(runs):
    data = load_dataset(runs / "data")
    model, cases = load_decoder(open_artifact(runs / "teacher")).eval(), validation_cases(data.sequences)
    whole = validation_ndcg(TorchRecommender(model, "cpu"), cases)
    without = validation_ndcg(TorchRecommender(keep_layers(model, [0, 1, 3, 4]), "cpu"), cases)
    assert damages(model, cases, [(2,), ()], "cpu") == pytest.approx([1 - without / whole, 0.0])


def test_depths_go_in_turns_past_half():
    assert depths(8, 7) == [7]
    assert depths(8, 4) == [4]
    assert depths(8, 3) == [6, 4, 3]
    assert depths(30, 4) == [20, 14, 10, 7, 5, 4]
    assert depths(2, 1) == [1]
    assert depths(5, 1) == [4, 3, 2, 1]


@pytest.mark.parametrize("criterion", ["angular", "influence"])
@pytest.mark.parametrize("contiguous", [True, False])
def test_the_layer_that_does_nothing_goes_first_and_the_last_never(runs, tmp_path, criterion, contiguous):
    config = replace(CONFIG, criterion=criterion, contiguous=contiguous)
    given = setting(runs, config, tmp_path / "out")
    for layer in (2, 4):
        given.whole.decoder.layers[layer].self_attn.o_proj.weight.data.zero_()
        given.whole.decoder.layers[layer].mlp.down_proj.weight.data.zero_()
    assert choose_layers(given, given.whole, 1) == [2]
    two = choose_layers(given, given.whole, 2)
    assert 2 in two
    assert 4 not in two
    assert not contiguous or two in ([1, 2], [2, 3])


def test_the_neighbours_whose_loss_costs_least_go_together(runs, tmp_path):
    given = setting(runs, replace(CONFIG, contiguous=True), tmp_path / "out")
    pairs = [(0, 1), (1, 2), (2, 3)]  # never the last of five
    costs = damages(given.whole, given.cases, pairs, "cpu")
    assert choose_layers(given, given.whole, 2) == list(pairs[int(np.argmin(costs))])


def test_a_greedy_choice_is_the_best_single_layer_after_the_other(runs, tmp_path):
    given = setting(runs, CONFIG, tmp_path / "out")
    model, cases = given.whole, given.cases
    first = int(np.argmin(damages(model, cases, [(0,), (1,), (2,), (3,)], "cpu")))
    left = [layer for layer in range(4) if layer != first]
    second = left[int(np.argmin(damages(model, cases, [(first, layer) for layer in left], "cpu")))]
    assert choose_layers(given, model, 2) == sorted([first, second])


def test_a_pruned_checkpoint_is_an_ordinary_one_whose_healing_starts_from_what_was_kept(runs, tmp_path):
    data, parent = load_dataset(runs / "data"), open_artifact(runs / "teacher")
    raw, _ = prune(parent, data, tmp_path / "raw", replace(CONFIG, heal_epochs=0))
    record = json.loads((raw.path / "pruning.json").read_text())
    kept = record["kept_layers"]
    assert len(kept) == 3
    assert sorted([*kept, *record["turns"][0]["dropped_layers"]]) == [0, 1, 2, 3, 4]
    before, after = load_file(parent.path / "model.safetensors"), load_file(raw.path / "model.safetensors")
    for number, source in enumerate(kept):
        name = "decoder.layers.{}.mlp.up_proj.weight"
        assert torch.equal(after[name.format(number)], before[name.format(source)])
    assert torch.equal(after["item_table.weight"], before["item_table.weight"])
    healed, _ = prune(parent, data, tmp_path / "healed", CONFIG)
    curves = [json.loads(line) for line in (healed.path / "training.jsonl").read_text().splitlines()]
    assert {"direction_block_3", "magnitude_block_1", "ce"} <= {name for record in curves for name in record}
    cases = validation_cases(data.sequences)
    raw_ndcg, healed_ndcg = (
        validation_ndcg(TorchRecommender(load_decoder(one), "cpu"), cases) for one in (raw, healed)
    )
    assert healed_ndcg > raw_ndcg
    assert prune(parent, data, tmp_path / "healed", CONFIG)[1], "the same run is up to date"
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")) == ["healed", "raw"]


def test_named_layers_are_dropped(runs, tmp_path):
    config = replace(CONFIG, num_layers=None, drop=(0, 3), heal_epochs=0)
    made, _ = prune(open_artifact(runs / "teacher"), load_dataset(runs / "data"), tmp_path / "out", config)
    assert json.loads((made.path / "pruning.json").read_text())["kept_layers"] == [1, 2, 4]


class StoppedError(Exception):
    """A run that is killed."""


def test_turns_that_are_done_are_not_done_again(runs, tmp_path, monkeypatch):
    config = replace(CONFIG, num_layers=2)
    data, parent = load_dataset(runs / "data"), open_artifact(runs / "teacher")
    whole, _ = prune(parent, data, tmp_path / "whole", config)
    assert [turn["num_layers"] for turn in json.loads((whole.path / "pruning.json").read_text())["turns"]] == [4, 3, 2]
    heal, calls = compress.prune._heal, []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise StoppedError
        return heal(*arguments)

    monkeypatch.setattr("compress.prune._heal", stopping)
    with pytest.raises(StoppedError):
        prune(parent, data, tmp_path / "resumed", config)
    resumed, _ = prune(parent, data, tmp_path / "resumed", config)
    assert len(calls) == 4, "two turns, the one that was stopped, and that one again"
    one, two = (load_file(made.path / "model.safetensors") for made in (whole, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_every_turn_is_healed_from_the_unpruned_model(runs, tmp_path, monkeypatch):
    parent, pairs = open_artifact(runs / "teacher"), []
    followed = compress.prune.followed

    def seen(pair, *others):
        pairs.append((pair.teacher.num_layers, pair.student.num_layers, pair.artifact.hash))
        return followed(pair, *others)

    monkeypatch.setattr("compress.prune.followed", seen)
    prune(parent, load_dataset(runs / "data"), tmp_path / "out", replace(CONFIG, num_layers=2))
    depth = load_decoder(parent).num_layers
    assert pairs == [(depth, wanted, parent.hash) for wanted in (4, 3, 2)]


def test_kept_layers_keep_their_kind_of_attention(tiny_model):
    model = tiny_model(family="qwen2", num_layers=3, prompt="none", sliding_window=4).eval()
    kinds = model.decoder.config.layer_types
    assert len(set(kinds)) == 2
    for kept in ([0, 2], [1, 2], [0]):
        assert keep_layers(model, kept).decoder.config.layer_types == [kinds[layer] for layer in kept]


def test_without_a_single_hit_no_layer_is_called_worthless(tiny_model, histories):
    model = tiny_model(num_layers=2, prompt="none").eval()
    best = TorchRecommender(model, "cpu").recommend(histories, 20).item_ids
    nowhere = Cases(np.arange(len(histories)), histories, best[:, 12])
    with pytest.raises(CheckError, match="none of 6 validation users"):
        damages(model, nowhere, [(0,)], "cpu")
    with pytest.raises(CheckError, match="none of 6 validation users"):
        sensitivity(model, nowhere, "cpu")


def test_a_resumed_run_keeps_to_the_layers_it_had_chosen_and_leaves_no_features(runs, tmp_path, monkeypatch):
    data, parent = load_dataset(runs / "data"), open_artifact(runs / "teacher")

    def stopping(*_):
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr("compress.prune.train", stopping)
        with pytest.raises(StoppedError):
            prune(parent, data, tmp_path / "out", CONFIG)
    chosen = json.loads((tmp_path / ".out.work" / "choice.json").read_text())["layers"]
    other = [layer for layer in range(4) if layer not in chosen]
    monkeypatch.setattr("compress.prune.choose_layers", lambda *_: other)
    made, _ = prune(parent, data, tmp_path / "out", CONFIG)
    assert json.loads((made.path / "pruning.json").read_text())["turns"][0]["dropped_layers"] == chosen
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("family", FAMILIES)
def test_cutting_parts_that_do_nothing_changes_no_score(tiny_model, histories, family):
    model = tiny_model(family=family, num_layers=2, prompt="slmrec").eval()
    head_dim = model.decoder.layers[0].self_attn.head_dim
    with torch.no_grad():
        for number, layer in enumerate(model.decoder.layers):
            layer.mlp.up_proj.weight[number : number + 10] = 0
            dead = slice(head_dim * number, head_dim * (number + 1))  # another key head in each layer
            layer.self_attn.v_proj.weight[dead] = 0
            if layer.self_attn.v_proj.bias is not None:
                layer.self_attn.v_proj.bias[dead] = 0
    narrower = cut_width(model, calibrate(model, histories), 54, 2)
    items = torch.tensor([[3, 4, 5], [9, 2, 7]])
    with torch.inference_mode():
        torch.testing.assert_close(narrower.score(items), model.score(items), rtol=1e-4, atol=1e-4)
    attention = narrower.decoder.layers[0].self_attn
    assert (attention.q_proj.out_features, attention.k_proj.out_features) == (2 * head_dim, head_dim)
    assert narrower.decoder.layers[1].mlp.down_proj.in_features == 54


def test_a_narrower_checkpoint_is_healed_too(runs, tmp_path):
    config = replace(CONFIG, num_layers=4, mlp_size=40, num_heads=2)
    made, _ = prune(open_artifact(runs / "teacher"), load_dataset(runs / "data"), tmp_path / "out", config)
    model = load_decoder(made)
    assert model.decoder.layers[0].mlp.up_proj.out_features == 40
    assert model.num_layers == 4
    assert "num_heads 2" in compress.prune.read_pruning(made)[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 5}, "num_layers=5, but .* has 5 layers"),
        ({"num_layers": 9}, "has 5 layers"),
        ({"num_layers": None, "drop": (5,)}, "has the layers 0 to 4"),
        ({"num_layers": None, "drop": (0, 1, 2, 3, 4)}, "has the layers 0 to 4"),
        ({"num_layers": None, "mlp_size": 10_000}, "mlp_size=10000, but the feed-forward has"),
        ({"num_layers": None, "num_heads": 3}, "num_heads=3, but the decoder has"),
    ],
)
def test_what_cannot_be_cut_is_refused(runs, changes, message):
    parent = open_artifact(runs / "teacher")
    with pytest.raises(ConfigError, match=message) as caught:
        require_prunable(load_decoder(parent), replace(CONFIG, **changes), parent)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers=0 is below 1"),
        ({"num_layers": None}, "nothing is to be pruned"),
        ({"drop": (1,)}, "both say which layers go"),
        ({"num_layers": None, "drop": (1, 1)}, "twice"),
        ({"criterion": "luck"}, "criterion='luck'"),
        ({"heal_epochs": -1}, "heal_epochs=-1 is below 0"),
        ({"num_layers": None, "drop": (1,), "criterion": "angular"}, "none are to be chosen"),
        ({"num_layers": None, "mlp_size": 8, "contiguous": True}, "none are to be chosen"),
    ],
)
def test_contradictions_are_refused_as_early_as_they_are_known(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **changes)


def test_a_single_layer_has_no_importance(runs, tmp_path):
    data = load_dataset(runs / "data")
    config = replace(CONFIG, num_layers=None, drop=(0, 1, 2, 3), heal_epochs=0)
    one, _ = prune(open_artifact(runs / "teacher"), data, tmp_path / "one", config)
    with pytest.raises(ConfigError, match="single layer"):
        write_importance(one, data, tmp_path / "importance", ImportanceConfig(), device="cpu")


def test_importance_is_written_with_its_heatmap(runs, tmp_path):
    parent, data = open_artifact(runs / "teacher"), load_dataset(runs / "data")
    made, _ = write_importance(parent, data, tmp_path / "importance", ImportanceConfig(max_users=30), device="cpu")
    record = json.loads((made.path / "importance.json").read_text())
    assert [one["layer"] for one in record["layers"]] == [0, 1, 2, 3, 4]
    assert record["angular_distance"][0][0] == record["layers"][0]["angular"]
    assert record["angular_distance"][4][1] is None
    assert (made.path / "angular_distance.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (made.path / "angular_distance.svg").read_text()
    assert write_importance(parent, data, made.path, ImportanceConfig(max_users=30), device="cpu")[1]

"""What of a teacher is trained: everything, or LoRA's low-rank updates and the items."""

import pytest
import torch
from safetensors.torch import load_file

from slmrec.artifact import open_artifact
from slmrec.config import DataConfig, RecipeConfig, SasrecConfig, TeacherConfig, TrainConfig
from slmrec.dataset import load_dataset
from slmrec.interactions import prepare_dataset
from slmrec.synthetic import write_backbone, write_log
from slmrec.train_items import train_items
from slmrec.train_teacher import train_teacher

TRAIN = TrainConfig(epochs=1, batch_size=32, learning_rate=1e-2, precision="fp32", warmup_steps=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Data, SASRec's items, and a backbone of 3 layers."""
    runs = tmp_path_factory.mktemp("runs")
    prepare_dataset([write_log(runs / "log.txt", num_users=120)], runs / "data", DataConfig())
    write_backbone(runs / "backbone", num_layers=3)
    train_items(load_dataset(runs / "data"), runs / "items", SasrecConfig(hidden_size=16, train=TRAIN))
    return runs


def trained(runs, **changes):
    """Weights of a teacher of 2 layers, and those of its backbone, by the same names."""
    recipe = RecipeConfig(prompt="none", dropout=0.0, item_table=changes.pop("item_table", "trainable"))
    config = TeacherConfig(backbone=str(runs / "backbone"), num_layers=2, recipe=recipe, train=TRAIN, **changes)
    output = runs / f"teacher-{len(list(runs.iterdir()))}"
    train_teacher(open_artifact(runs / "items"), load_dataset(runs / "data"), output, config)
    before = {f"decoder.{n}": v for n, v in load_file(runs / "backbone" / "model.safetensors").items()}
    return load_file(output / "model.safetensors"), before


def test_lora_moves_the_feed_forward_by_a_low_rank_and_nothing_else_of_the_decoder(runs):
    after, before = trained(runs, tuning="lora")
    for name, value in after.items():
        if not name.startswith("decoder."):
            continue
        change = value - before[name]
        if "mlp" in name:
            assert 0 < torch.linalg.matrix_rank(change, rtol=1e-4) <= 16, name
        else:
            assert (change == 0).all(), name
    assert {name.split(".")[2] for name in after if name.startswith("decoder.layers.")} == {"0", "1"}


def test_full_tuning_moves_every_matrix_of_the_first_layers(runs):
    after, before = trained(runs)
    moved = {name for name, value in after.items() if name in before and not torch.equal(value, before[name])}
    assert {name for name in after if name.startswith("decoder.layers.") and name.endswith("proj.weight")} <= moved


@pytest.mark.parametrize(("item_table", "same"), [("frozen", True), ("trainable", False)])
def test_the_item_table_starts_from_sasrec_and_stays_only_when_frozen(runs, item_table, same):
    after, _ = trained(runs, item_table=item_table)
    sasrec = load_file(runs / "items" / "model.safetensors")["item_table.weight"]
    assert torch.equal(after["item_table.weight"], sasrec) == same
    assert torch.nn.functional.cosine_similarity(after["item_table.weight"][1:], sasrec[1:]).mean() > 0.5

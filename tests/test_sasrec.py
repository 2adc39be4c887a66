"""SASRec: causal, blind to padding, and read where it was trained."""

import json

import pytest
import torch
from torch.nn import functional as F

from slmrec.artifact import Stage, open_artifact, publish
from slmrec.catalogue import Catalogue
from slmrec.config import DataConfig, SasrecConfig, TrainConfig
from slmrec.dataset import load_dataset
from slmrec.errors import ArtifactError
from slmrec.interactions import prepare_dataset
from slmrec.models.checkpoint import load_model, save_checkpoint
from slmrec.models.sasrec import Sasrec
from slmrec.train_items import train_items

TRAIN = TrainConfig(epochs=1, batch_size=4, learning_rate=1e-3, precision="fp32")


def model(supervision="all", num_heads=2):
    torch.manual_seed(0)
    config = SasrecConfig(hidden_size=8, num_heads=num_heads, supervision=supervision, train=TRAIN)
    made = Sasrec(config, num_items=20).eval()
    with torch.no_grad():
        for value in made.parameters():
            value.copy_(torch.randn_like(value) / 2)
    return made


def written_out(made, history):
    """User vector after the newest item, one head after the other, no padding and no batch."""
    n, heads = len(history), made.config.num_heads
    count = torch.arange(n)
    places = count if made.config.supervision == "all" else count.flip(0)
    x = made.norm(made.item_table.weight[history] + made.position_table.weight[places])
    for layer in made.layers:
        q, k, v = (part.view(n, heads, -1) for part in layer.qkv(x).split(8, dim=1))
        mixed = torch.zeros(n, heads, 8 // heads)
        for head in range(heads):
            for row in range(n):
                weights = (q[row, head] @ k[: row + 1, head].T / (8 // heads) ** 0.5).softmax(0)
                mixed[row, head] = weights @ v[: row + 1, head]
        x = layer.attention_norm(x + layer.out(mixed.reshape(n, 8)))
        x = layer.forward_norm(x + layer.down(F.gelu(layer.up(x))))
    return x[-1]


@pytest.mark.parametrize("supervision", ["all", "prefixes"])
@pytest.mark.parametrize("pads", [0, 3])
def test_it_is_the_definition_written_out_whatever_the_padding(supervision, pads):
    made, history = model(supervision), [3, 9, 4, 4, 17]
    with torch.inference_mode():
        found = made.score(torch.tensor([[0] * pads + history, [0] * pads + history[::-1]]))
        for row, items in enumerate((history, history[::-1])):
            expected = made.item_table.weight[1:] @ written_out(made, items)
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)


def test_trained_at_every_position_a_prefix_is_read_as_it_was_trained():
    made = model("all")
    items = torch.tensor([[0, 3, 9, 4, 5]])
    with torch.inference_mode():
        states = made(items)
        for stop in range(2, 6):
            torch.testing.assert_close(made(items[:, :stop])[:, -1], states[:, stop - 1], rtol=1e-5, atol=1e-5)


def test_a_checkpoint_of_the_old_architecture_is_refused_not_misread(tmp_path):
    with publish(tmp_path / "old", Stage(name="train-items", kind="checkpoint", settings={})) as folder:
        save_checkpoint(folder, model())
        Catalogue([str(n) for n in range(20)], [None] * 20, [None] * 20).save(folder)
        config = json.loads((folder / "config.json").read_text())
        del config["sasrec"]["supervision"]
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="before its norms and positions changed"):
        load_model(open_artifact(tmp_path / "old"))


def test_histories_are_no_longer_than_those_it_was_trained_on(tmp_path):
    rows = ["1 2 3 4 5 6 7", "2 3 4 5", "3 4 5 6 7 8"]
    (tmp_path / "log.txt").write_text("".join(f"{user} {row}\n" for user, row in enumerate(rows)))
    prepare_dataset([tmp_path / "log.txt"], tmp_path / "data", DataConfig())
    made, _ = train_items(load_dataset(tmp_path / "data"), tmp_path / "items", SasrecConfig(train=TRAIN))
    assert load_model(made).max_history == 4, "of 5 training events, the last is a target alone"
    assert made.settings["window"]["max_history"] == 50, "what was asked for"

"""LLM.int8 checkpoints: bitsandbytes' own arithmetic, transformers' own loader, and the way to every other backend."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from compress.int8 import decoder_linears, quantize_model
from export.onnx_export import export_checkpoint
from export.runtime import OnnxRecommender
from slmrec.artifact import Stage, open_artifact, publish
from slmrec.config import DataConfig, ExportConfig
from slmrec.dataset import load_dataset
from slmrec.errors import ConfigError
from slmrec.interactions import prepare_dataset
from slmrec.metrics import overlap
from slmrec.models.checkpoint import load_decoder, quantized_layers, save_checkpoint, with_neutral_layers
from slmrec.models.layers import Int8Linear
from slmrec.models.llm_int8 import dequantizing, is_llm_int8, llm_int8, move
from slmrec.models.ranking import TorchRecommender
from slmrec.sequences import test_cases as held_out
from slmrec.synthetic import write_log

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twenty items."""
    runs = tmp_path_factory.mktemp("runs")
    prepare_dataset([write_log(runs / "log.txt", num_users=60, num_items=20)], runs / "data", DataConfig())
    return load_dataset(runs / "data")


def saved(model, data, output):
    with publish(output, Stage(name="quantize", kind="checkpoint", settings={}, parents={})) as folder:
        save_checkpoint(folder, model)
        data.items.save(folder)
    return open_artifact(output)


def test_what_a_layer_keeps_beside_its_parameters_moves_with_it():
    layer = llm_int8(torch.nn.Linear(16, 8))
    model, inputs, found = torch.nn.Sequential(layer), torch.randn(3, 16), []
    for holder in (layer.weight, layer.state):  # before the first call, and after it
        assert holder.CB is not None
        holder.CB = holder.CB.clone()  # as if it were still where the model came from
        move(model, "cpu")
        assert holder.CB.data_ptr() == layer.weight.data_ptr()
        found.append(model(inputs))
    assert torch.equal(*found)


def test_an_llm_int8_layer_is_the_definition_written_out():
    torch.manual_seed(0)
    linear, inputs = torch.nn.Linear(64, 24), torch.randn(5, 64)
    inputs[1, 7] = 30  # an outlier: its column computes in 16 bits
    with torch.inference_mode():
        actual = llm_int8(linear)(inputs).numpy()
    weight = linear.weight.detach().half().double().numpy()
    scale = np.abs(weight).max(axis=1) / 127
    rounded = np.rint(weight / scale[:, None])
    x = inputs.half().double().numpy()
    plain = np.delete(np.arange(64), 7)
    x_scale = np.abs(x[:, plain]).max(axis=1, keepdims=True) / 127
    expected = np.rint(x[:, plain] / x_scale) @ rounded[:, plain].T * x_scale * scale
    expected += np.outer(x[:, 7], (rounded * scale[:, None])[:, 7]) + linear.bias.detach().numpy()
    np.testing.assert_allclose(actual, expected, rtol=5e-3, atol=5e-3)


def test_the_neutral_layer_has_the_same_integers_and_scales():
    torch.manual_seed(0)
    layer = llm_int8(torch.nn.Linear(64, 24))
    neutral = dequantizing(layer)
    assert torch.equal(neutral.weight, layer.state_dict()["weight"])
    assert torch.equal(neutral.scale, layer.state_dict()["SCB"] / 127)
    inputs = torch.randn(5, 64)
    weights = layer.state_dict()["weight"].double() * layer.state_dict()["SCB"].double()[:, None] / 127
    with torch.inference_mode():
        expected = inputs.double() @ weights.T + layer.bias.double()
        torch.testing.assert_close(neutral(inputs).double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(neutral(inputs), layer(inputs), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_loads_as_it_was_saved(tiny_model, data, tmp_path, family):
    model = quantize_model(
        tiny_model(family=family, num_layers=2, prompt="slmrec"), ["layers.0.mlp.*"], llm_int8
    ).eval()
    again = load_decoder(saved(model, data, tmp_path / "int8")).eval()
    assert len(quantized_layers(again)) == 11
    assert decoder_linears(again) == [f"layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    items = torch.tensor([[3, 4, 5], [9, 2, 7]])
    with torch.inference_mode():
        assert torch.equal(again.score(items), model.score(items))


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_the_decoder_and_computes_the_same(tiny_model, data, tmp_path, family):
    from transformers import AutoModel

    model = quantize_model(tiny_model(family=family, num_layers=2, prompt="none"), ["layers.1.mlp.up"], llm_int8).eval()
    saved(model, data, tmp_path / "int8")
    stored = load_file(tmp_path / "int8" / "decoder" / "model.safetensors")
    assert {"weight", "SCB", "weight_format"} <= {
        name.rpartition(".")[2] for name in stored if "layers.0.self_attn.q_proj" in name
    }
    theirs = AutoModel.from_pretrained(tmp_path / "int8" / "decoder", dtype=torch.float32, device_map="cpu").eval()
    assert is_llm_int8(theirs.layers[0].mlp.up_proj)
    assert type(theirs.layers[1].mlp.up_proj) is torch.nn.Linear
    vectors = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model.decoder(inputs_embeds=vectors).last_hidden_state
        assert torch.equal(theirs(inputs_embeds=vectors).last_hidden_state, expected)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_graph_has_the_integers_of_the_checkpoint_and_loses_nothing_more(tiny_model, data, tmp_path, family):
    import onnx
    from onnx.numpy_helper import to_array

    wide = 512  # smaller constants are multiplied out in the file
    plain = tiny_model(family, 2, intermediate_size=wide, prompt="none", supervision="all").eval()
    checkpoint = saved(quantize_model(plain, ("layers.0.self_attn.k",), llm_int8).eval(), data, tmp_path / "int8")
    graph, _ = export_checkpoint(checkpoint, data, tmp_path / "graph", ExportConfig())
    down = load_decoder(checkpoint).decoder.layers[0].mlp.down_proj.state_dict()["weight"].numpy()
    loaded = onnx.load(graph.path / "model.onnx").graph
    constants = [to_array(one) for one in loaded.initializer]
    assert any(one.dtype == np.int8 and one.shape == down.T.shape and (one == down.T).all() for one in constants)
    signature = json.loads((graph.path / "signature.json").read_text())
    assert (signature["precision"], signature["num_8bit_layers"]) == ("fp32", 13)
    histories = held_out(data.sequences).histories
    graph_lists = OnnxRecommender(graph.path).recommend(histories, 10)
    weights_only = TorchRecommender(with_neutral_layers(load_decoder(checkpoint)), "cpu").recommend(histories, 10)
    assert (graph_lists.item_ids == weights_only.item_ids).mean() > 0.99
    fp32 = TorchRecommender(plain, "cpu").recommend(histories, 10).item_ids
    llm = TorchRecommender(load_decoder(checkpoint), "cpu").recommend(histories, 10).item_ids
    assert overlap(graph_lists.item_ids, fp32).mean() >= overlap(llm, fp32).mean() - 0.01


def test_the_config_says_which_backend(tiny_model, data, tmp_path):
    for make, backend in ((llm_int8, "bitsandbytes"), (Int8Linear.from_linear, "neutral")):
        saved(quantize_model(tiny_model(num_layers=1, prompt="none"), (), make), data, tmp_path / backend)
        config = json.loads((tmp_path / backend / "config.json").read_text())
        assert config["quantization"]["backend"] == backend
        assert (tmp_path / backend / "decoder").exists() is (backend == "bitsandbytes")


def test_without_bitsandbytes_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="bitsandbytes is not installed") as caught:
        llm_int8(torch.nn.Linear(4, 4))
    assert "slmcompress[bnb]" in caught.value.remedy

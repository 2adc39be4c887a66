"""Kernels of 8-bit layers, chosen by measurement: all of them are the same model, whoever shares the batch."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from compress.int8 import quantize_model
from export.decoder import Serving
from export.graph import recommend_graph
from export.onnx_export import export_model
from export.runtime import OnnxRecommender
from export.tune import KERNELS, tune
from export.weights import serving_weights
from export.writer import save_graphs
from slmrec.config import ExportConfig
from slmrec.models.checkpoint import linear_at, quantized_layers
from slmrec.models.layers import Int8Linear
from slmrec.models.ranking import TorchRecommender
from slmrec.ragged import Ragged
from slmrec.recommender import Histories

ROWS = [[1, 2, 3], [5], list(range(1, 15)), [4, 4, 9, 1, 2, 7, 3]]


@pytest.fixture(scope="module")
def model(tiny_model):
    return quantize_model(tiny_model(prompt="none", positions="compact")).eval()


@pytest.fixture(scope="module")
def graphs(model, tmp_path_factory):
    """The model with all layers in one kernel."""
    found, weights, config = {}, serving_weights(model), ExportConfig(append=False, spare_items=0)
    for kernel in KERNELS:
        folder = tmp_path_factory.mktemp(kernel)
        export_model(model, folder, config)
        kernels = dict.fromkeys(tune(weights).kernels, kernel)
        save_graphs({"model.onnx": recommend_graph(Serving(weights, config, kernels))}, folder)
        found[kernel] = OnnxRecommender(folder)
    return found


def test_kernels_differ_in_how_finely_inputs_are_rounded_and_in_nothing_else(tiny_model, graphs):
    rows = [[item, *range(1, 4)] for item in range(4, 21)] + ROWS
    users = Histories.of(Ragged.from_rows(rows))
    plain = tiny_model(prompt="none", positions="compact").eval()
    for name in quantized_layers(quantize_model(plain)):
        layer = linear_at(plain, name)
        eight = Int8Linear.from_linear(layer)
        with torch.no_grad():
            layer.weight.copy_(eight.weight.float() * eight.scale[:, None])
    exact = TorchRecommender(plain, "cpu").recommend(users, 5)
    scores = graphs["fp32"].recommend(users, 5).scores
    np.testing.assert_allclose(scores, exact.scores, rtol=0, atol=2e-5 * np.abs(exact.scores).max())
    gaps = {kernel: np.abs(graphs[kernel].recommend(users, 5).scores - scores).mean() for kernel in KERNELS}
    assert 0 < gaps["blocks"] < 1.2 * gaps["integer"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_user_alone_gets_the_bits_he_gets_in_company(graphs, kernel):
    users = Histories.of(Ragged.from_rows(ROWS))
    together = graphs[kernel].recommend(users, 5)
    for row in range(len(ROWS)):
        alone = graphs[kernel].recommend(users.select(np.array([row])), 5)
        assert alone.scores[0].tobytes() == together.scores[row].tobytes()


def test_choices_and_their_times_are_written_beside_the_graph(model, tmp_path):
    export_model(model, tmp_path, replace(ExportConfig(), tune=True))
    tuned = json.loads((tmp_path / "tune.json").read_text())
    shapes = {(layer["inputs"], layer["outputs"], layer["rows"]) for layer in tuned["layers"]}
    assert shapes == {
        (32, 64, "every token"), (32, 32, "every token"), (64, 32, "every token"), (32, 32, "one a user"),
        (32, 64, "one a user"), (64, 32, "one a user"),
    }  # fmt: skip
    for layer in tuned["layers"]:
        assert set(layer["milliseconds"]) == {"batch 1", "batch 32"}
        assert all(set(times) == set(KERNELS) and min(times.values()) > 0 for times in layer["milliseconds"].values())
        if layer["kernel"] != "integer":
            small, large = layer["milliseconds"]["batch 1"], layer["milliseconds"]["batch 32"]
            assert small[layer["kernel"]] < small["integer"]
            assert large[layer["kernel"]] <= large["integer"]
    assert OnnxRecommender(tmp_path).recommend(Histories.of(Ragged.from_rows(ROWS)), 5).item_ids.min() > 0


def test_a_model_in_fp32_has_nothing_to_choose(tiny_model, tmp_path):
    export_model(tiny_model(prompt="none").eval(), tmp_path, ExportConfig(tune=True))
    assert not (tmp_path / "tune.json").exists()

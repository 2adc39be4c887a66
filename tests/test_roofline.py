"""The floor of a request: counted work against the formula, and ceilings that a machine can have."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from benchmarked import CONFIG, make_data, make_entrants

from compress.int8 import quantize_model
from export.onnx_export import export_model
from export.runtime import OnnxRecommender
from slmrec.benchmark import run_benchmark
from slmrec.config import ExportConfig
from slmrec.errors import ConfigError
from slmrec.models.ranking import TorchRecommender
from slmrec.ragged import Ragged
from slmrec.recommender import Histories
from slmrec.report import to_csv, to_markdown
from slmrec.roofline import DEVICES, Ceilings, Work, measure_ceilings, measured_over_floor

HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 32, 64, 4, 2, 8, 3
BUCKET = 10


def linear_weights(tokens_of_last: int, tokens: int) -> float:
    """Multiplications of all linear layers: the last layer has queries and its MLP for some tokens alone."""
    queries_out = 2 * HIDDEN * HEADS * HEAD_DIM
    keys_values = 2 * HIDDEN * KV_HEADS * HEAD_DIM
    mlp = 3 * HIDDEN * MLP
    whole = (LAYERS - 1) * tokens * (queries_out + keys_values + mlp)
    return whole + tokens * keys_values + tokens_of_last * (queries_out + mlp)


@pytest.fixture(scope="module")
def one_user():
    return Histories.of(Ragged.from_rows([list(range(1, BUCKET + 1))]))


@pytest.mark.parametrize(("newest_only", "of_last"), [(True, 1), (False, BUCKET)])
@pytest.mark.parametrize("bits", [32, 8])
def test_a_graph_counts_the_products_of_the_formula(tiny_model, tmp_path, one_user, newest_only, of_last, bits):
    model = tiny_model(prompt="none").eval()
    served = quantize_model(model) if bits == 8 else model
    export_model(served, tmp_path, replace(ExportConfig(), newest_only=newest_only))
    work = OnnxRecommender(tmp_path).work(one_user)
    linear = 2 * linear_weights(of_last, BUCKET)
    attention = 2 * 2 * HEADS * HEAD_DIM * BUCKET * ((LAYERS - 1) * BUCKET + of_last)
    rows = len(onnx_tables(tmp_path)["offsets"])
    head = 2 * (HIDDEN * model.spec.item_dim + model.spec.item_dim * rows)
    if bits == 8:
        assert work.int8_operations == linear
        assert work.fp32_operations == attention + head
    else:
        assert work.int8_operations == 0
        assert work.fp32_operations == linear + attention + head


def onnx_tables(folder):
    from export.items import read_items

    items = read_items(folder)
    return {"offsets": items.offsets}


def test_8_bit_weights_are_a_quarter_of_the_bytes(tiny_model, tmp_path, one_user):
    model = tiny_model(prompt="none", intermediate_size=256).eval()
    found = {}
    for name, served in (("fp32", model), ("int8", quantize_model(model))):
        (tmp_path / name).mkdir()
        export_model(served, tmp_path / name, ExportConfig())
        found[name] = OnnxRecommender(tmp_path / name).work(one_user).num_bytes
    stored = sum(p.numel() for name, p in model.decoder.layers.named_parameters() if p.ndim == 2)
    assert stored * 4 < found["fp32"] < stored * 4 * 1.2
    assert found["fp32"] - found["int8"] == pytest.approx(stored * 3, rel=0.05)


def test_a_batch_does_the_work_of_its_users_and_reads_weights_once(tiny_model, tmp_path, one_user):
    export_model(tiny_model(prompt="none").eval(), tmp_path, ExportConfig())
    recommender = OnnxRecommender(tmp_path)
    one, four = recommender.work(one_user), recommender.work(one_user.select(np.zeros(4, dtype=np.int64)))
    assert four.fp32_operations == 4 * one.fp32_operations
    assert four.num_bytes < 1.5 * one.num_bytes


@pytest.mark.parametrize(("bits", "has_instructions"), [(32, True), (8, True), (8, False)])
def test_pytorch_counts_the_products_of_the_formula(tiny_model, one_user, monkeypatch, bits, has_instructions):
    monkeypatch.setattr("slmrec.models.layers.multiplies_8_bits", lambda: has_instructions)
    model = tiny_model(prompt="none").eval()
    work = TorchRecommender(quantize_model(model) if bits == 8 else model, "cpu").work(one_user)
    linear = 2 * linear_weights(BUCKET, BUCKET)
    attention = 2 * 2 * HEADS * HEAD_DIM * BUCKET * BUCKET * LAYERS
    head = 2 * (HIDDEN * model.spec.item_dim + model.spec.item_dim * model.num_items)
    inputs = 2 * BUCKET * model.spec.item_dim * HIDDEN
    in_int8 = linear if bits == 8 and has_instructions else 0
    assert work.int8_operations == in_int8
    assert work.fp32_operations == linear - in_int8 + attention + head + inputs


def test_ceilings_are_those_of_a_machine_that_computes():
    found = measure_ceilings(1)
    left, right = torch.rand(512, 512), torch.rand(512, 512)
    assert found.fp32_operations_s > 1e9
    assert found.int8_operations_s > 0.5 * found.fp32_operations_s
    assert 1e9 < found.read_bytes_s < 1e13
    assert not found.is_estimate
    assert (left @ right).isfinite().all()


def test_floor_is_the_longer_of_arithmetic_and_bytes():
    ceilings = Ceilings("toy", fp32_operations_s=10.0, int8_operations_s=40.0, read_bytes_s=2.0)
    works = [Work(fp32_operations=10, int8_operations=40, num_bytes=1), Work(num_bytes=8)]
    found = measured_over_floor([4.0, 8.0], works, ceilings)
    assert found["floor_ms"] == pytest.approx(3000)  # 2 s and 4 s
    assert found["measured_over_floor"] == pytest.approx(2)
    assert (found["fp32_operations"], found["num_bytes"]) == (5, 4.5)


def test_another_device_gives_an_estimate_that_says_so():
    found = measured_over_floor([1.0], [Work(fp32_operations=312e12)], DEVICES["a100"])
    assert found["floor_ms"] == pytest.approx(1000)
    assert "measured_over_floor" not in found


class Counted:
    """A recommender that says what it takes."""

    def __init__(self, recommender):
        self.recommender, self.num_items, self.max_top_k = recommender, recommender.num_items, recommender.max_top_k

    def recommend(self, histories, k):
        return self.recommender.recommend(histories, k)

    def work(self, histories):
        return Work(fp32_operations=1e6 * len(histories), num_bytes=1000.0)


@pytest.mark.parametrize("spec", [None, "h100"])
def test_the_report_prints_the_floor_of_every_artefact_that_can_count(tmp_path, spec):
    data = make_data(tmp_path)
    teacher, *others = make_entrants(tmp_path)
    entrants = [replace(teacher, recommender=Counted(teacher.recommender)), *others]
    report = run_benchmark(entrants, data, replace(CONFIG, device_spec=spec))
    row = report.benchmark["rows"][0]
    assert row["floor"]["batch_4"]["fp32_operations"] == 4e6
    assert report.benchmark["rows"][1]["floor"] is None
    assert report.benchmark["ceilings"]["is_estimate"] == (spec is not None)
    text = to_markdown(report.benchmark)
    assert ("measured" in text.partition("- Floor: ")[2]) == (spec is None)
    assert ("estimate from the data sheet" in text) == (spec is not None)
    assert "teacher, batch 1: 0.001 billion operations" in text
    assert "floor.batch_1.floor_ms" in to_csv(report.benchmark)


def test_an_unknown_device_is_refused():
    with pytest.raises(ConfigError, match="device_spec='tpu'"):
        replace(CONFIG, device_spec="tpu")

"""8 bits: exact integer arithmetic, a user's result is his own, and a gate that can fail."""

import numpy as np
import pytest
import torch

from compress.int8 import decoder_linears, load_full_precision, quantize_model
from compress.quantize import _search, fewest, read_gate
from compress.sensitivity import sensitivity
from slmrec.artifact import Stage, open_artifact, publish, write_json
from slmrec.compress_config import CalibrationConfig, QuantizeConfig
from slmrec.errors import CheckError, ConfigError
from slmrec.gate import Gate
from slmrec.metrics import Interval
from slmrec.models.checkpoint import quantized_layers, save_checkpoint
from slmrec.models.layers import CUDA_ROWS, EXACT_INPUTS, Int8Linear, for_cuda, int8_product, quantize_rows
from slmrec.models.ranking import TorchRecommender
from slmrec.ragged import Ragged
from slmrec.recommender import Histories
from slmrec.sequences import Cases


def test_rounding_is_within_half_a_step_and_uses_the_whole_range():
    values = torch.randn(50, 33, generator=torch.Generator().manual_seed(0))
    quantized, scale = quantize_rows(values)
    assert (quantized.float() * scale - values).abs().max() <= (scale / 2).max() * 1.0001
    assert (quantized.abs().amax(dim=1) == 127).all()


def test_a_zero_row_stays_zero():
    quantized, scale = quantize_rows(torch.zeros(2, 4))
    assert (quantized == 0).all()
    assert torch.isfinite(scale).all()


@pytest.mark.parametrize("bias", [True, False])
def test_an_int8_layer_is_the_definition_written_out(bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(1600, 24, bias=bias)  # wide enough that sums pass the 2**24 an fp32 sum is exact to
    inputs = torch.randn(2, 3, 1600)
    actual = Int8Linear.from_linear(linear)(inputs)
    weight = linear.weight.detach().double().numpy()
    x = inputs.double().numpy()
    w_scale = np.abs(weight).max(axis=1) / 127
    x_scale = np.abs(x).max(axis=-1, keepdims=True) / 127
    sums = np.rint(x / x_scale) @ np.rint(weight / w_scale[:, None]).T
    expected = sums * x_scale * w_scale + (linear.bias.detach().numpy() if bias else 0)
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=2e-4, atol=2e-3)


def test_a_token_is_quantized_the_same_in_any_company():
    layer = Int8Linear.from_linear(torch.nn.Linear(32, 16))
    tokens = torch.randn(7, 32)
    tokens[3] *= 1000
    together = layer(tokens)
    for row in range(7):
        assert torch.equal(layer(tokens[row : row + 1])[0], together[row])


def test_a_scale_for_a_whole_tensor_would_let_company_change_a_token(monkeypatch):
    """What ONNX Runtime's `quantize_dynamic` does, and no flag here: the test above must see it."""

    def per_tensor(values):
        scale = values.abs().max().expand(*values.shape[:-1], 1) / 127
        return (values / scale).round().to(torch.int8), scale

    layer = Int8Linear.from_linear(torch.nn.Linear(32, 16))
    tokens = torch.randn(7, 32)
    tokens[3] *= 1000
    monkeypatch.setattr("slmrec.models.layers.quantize_rows", per_tensor)
    together = layer(tokens)
    assert not torch.equal(layer(tokens[:1])[0], together[0])
    assert torch.equal(together[0], layer(torch.zeros(1, 32))[0]), "what is small beside it is rounded away"


def test_products_padded_for_cuda_are_those_of_the_values_themselves():
    generator = torch.Generator().manual_seed(0)
    for rows, inputs, outputs in ((1, 5, 3), (16, 8, 8), (17, 13, 24), (40, 16, 9)):
        left = torch.randint(-127, 128, (rows, inputs), generator=generator, dtype=torch.int8)
        right = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
        wide, tall = for_cuda(left, CUDA_ROWS), for_cuda(right)
        assert wide.shape[0] >= 17
        assert wide.shape[1] == tall.shape[1]
        assert all(size % 8 == 0 for size in (wide.shape[1], tall.shape[0]))
        sums = torch._int_mm(wide, tall.t())[:rows, :outputs]
        assert torch.equal(sums, left.int() @ right.int().T)


@pytest.mark.parametrize("vnni", [False, True])
@pytest.mark.parametrize("inputs", [1, 576, EXACT_INPUTS, EXACT_INPUTS + 1, 3000])
def test_sums_are_exact_with_instructions_for_them_and_without(monkeypatch, inputs, vnni):
    monkeypatch.setattr("slmrec.models.layers.multiplies_8_bits", lambda: vnni)
    left = torch.full((3, inputs), 127, dtype=torch.int8)
    left[1] = torch.randint(-127, 128, (inputs,), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    right = torch.full((2, inputs), 127, dtype=torch.int8)
    right[1, ::2] = -126
    sums = int8_product(left, right)
    assert sums.dtype == torch.int32
    assert torch.equal(sums.long(), left.long() @ right.long().T)


@pytest.mark.parametrize("needed", range(1, 16))
def test_as_few_layers_are_kept_as_the_gate_asks_for(needed):
    tried = []

    def holds(count):
        tried.append(count)
        return count >= needed

    for most in range(16):
        tried.clear()
        assert fewest(holds, most) == (needed if needed <= most else None)
        assert [count for count in tried if count >= needed][-1:] == ([needed] if needed <= most else [])
        assert all(1 <= count <= most for count in tried)
        assert len(tried) == len(set(tried)) <= 2 * max(1, most).bit_length()


def test_weights_that_are_not_finite_are_one_message(tiny_model, tmp_path):
    model = tiny_model(num_layers=2, prompt="none").eval()
    with torch.no_grad():
        model.decoder.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with publish(tmp_path / "student", Stage(name="distill", kind="checkpoint", settings={})) as folder:
        save_checkpoint(folder, model)
    with pytest.raises(CheckError, match=r"layers\.1\.mlp\.up_proj\.weight is not finite"):
        load_full_precision(open_artifact(tmp_path / "student"))


def test_every_decoder_linear_becomes_8_bit_but_those_kept(tiny_model):
    model = tiny_model(num_layers=2)
    assert len(quantized_layers(quantize_model(model))) == len(decoder_linears(model)) == 14
    kept = quantize_model(model, ["layers.1.mlp.*"])
    assert len(quantized_layers(kept)) == 11
    assert decoder_linears(quantize_model(model, ["layers.1.mlp.down"])) == ["layers.1.mlp.down_proj"]
    assert quantized_layers(model) == []
    with pytest.raises(ConfigError, match="no layer matches"):
        quantize_model(model, ["layers.9.*"])


def test_8_bit_weights_take_about_a_quarter_of_the_bytes(tiny_model):
    def decoder_bytes(model):
        return sum(value.nbytes for name, value in model.state_dict().items() if "decoder.layers" in name)

    model = tiny_model(num_layers=2)
    assert decoder_bytes(quantize_model(model)) < 0.45 * decoder_bytes(model)  # rows of 32; 0.27 at real widths


def test_an_8_bit_model_scores_like_its_parent_and_not_like_zeros(tiny_model):
    model = tiny_model(num_layers=2, prompt="none").eval()
    items = torch.tensor([[3, 4, 5], [9, 2, 7]])
    before, after = model.score(items), quantize_model(model).eval().score(items)
    gap = (before - after).abs().max() / before.abs().max()
    assert 0 < gap < 0.1
    assert torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1] > 0.99


def test_the_layer_with_outliers_is_the_most_sensitive(tiny_model):
    model = hard_to_round(tiny_model(num_layers=2, prompt="none").eval())
    rows = np.random.default_rng(0).integers(1, 21, size=(64, 6))
    histories = Histories.of(Ragged.from_rows(list(rows)))
    third = TorchRecommender(model, "cpu").recommend(histories, 3).item_ids[:, 2]
    cases = Cases(np.arange(64), histories, third)
    found = sensitivity(model, cases, "cpu")
    assert found[0].layer == "layers.1.mlp.up_proj"
    assert found[0].overlap_loss > 2 * found[2].overlap_loss
    assert {one.layer for one in found} == set(decoder_linears(model))
    assert quantized_layers(model) == []


@pytest.mark.parametrize(("ratio", "passed"), [(0.98, False), (0.99, True), (1.02, True), (float("nan"), False)])
def test_the_point_estimate_decides_the_gate(ratio, passed):
    gate = Gate(ratio=ratio, low=0.9, high=1.1, required=0.99, num_users=10, ndcg_before=0.1, ndcg_after=0.1)
    assert gate.passed is passed
    assert gate.underpowered
    assert "not resolved by 10 users" in gate.to_text()


def test_a_narrow_interval_resolves_the_gate():
    gate = Gate(ratio=0.999, low=0.996, high=1.001, required=0.99, num_users=10, ndcg_before=0.1, ndcg_after=0.1)
    assert not gate.underpowered
    assert gate.to_json()["gate"] == "passed"


def test_a_gate_on_few_hits_has_an_open_end_and_is_read_back(tmp_path):
    gate = Gate(ratio=1.0, low=0.0, high=float("inf"), required=0.99, num_users=10, ndcg_before=0.1, ndcg_after=0.1)
    with publish(tmp_path / "out", Stage(name="quantize", kind="checkpoint", settings={})) as folder:
        write_json(folder / "gate.json", gate.to_json() | {"kept_fp": []})
    record, text = read_gate(open_artifact(tmp_path / "out"))
    assert record["high"] is None
    assert "0.0000 to inf" in text
    assert "not resolved by 10 users" in text


def hard_to_round(model):
    """A model one of whose layers spends the scale of every row of weights on a column that adds little."""
    with torch.no_grad():
        layer = model.decoder.layers[1]
        layer.post_attention_layernorm.weight[0] /= 4096
        layer.mlp.gate_proj.weight[:, 0] = 0
        layer.mlp.up_proj.weight[:, 0] *= 4096
    return model


def gated(tiny_model, **settings):
    model = hard_to_round(tiny_model(num_layers=2, prompt="none").eval())
    rows = np.random.default_rng(0).integers(1, 21, size=(64, 6))
    histories = Histories.of(Ragged.from_rows(list(rows)))
    best = TorchRecommender(model, "cpu").recommend(histories, 1).item_ids[:, 0]
    return _search(model, Cases(np.arange(64), histories, best), QuantizeConfig(accuracy_gate=0.97, **settings), "cpu")


def test_auto_keep_finds_the_layer_that_breaks_the_gate(tiny_model):
    with pytest.raises(CheckError, match=r"Most sensitive layers: layers\.1\.mlp\.up_proj") as caught:
        gated(tiny_model)
    assert "--auto-keep, --keep-fp layers.1.mlp.up_proj" in caught.value.remedy
    quantized, gate = gated(tiny_model, auto_keep=True)
    assert gate.passed
    assert "layers.1.mlp.up_proj" in decoder_linears(quantized)


def test_layers_that_are_kept_already_are_not_offered_again(tiny_model, monkeypatch):
    monkeypatch.setattr("slmrec.gate.ratio_of_means", lambda *_: Interval(0.5, 0.4, 0.6))
    for auto_keep in (False, True):
        with pytest.raises(CheckError) as caught:
            gated(tiny_model, keep_fp=("layers.1.*",), auto_keep=auto_keep)
        assert "layers.1." not in str(caught.value)
        assert ("--auto-keep" in caught.value.remedy) is not auto_keep


def test_llm_int8_takes_no_calibration():
    with pytest.raises(ConfigError, match=r"LLM\.int8 is not calibrated"):
        QuantizeConfig(backend="bitsandbytes", calibration=CalibrationConfig(migrate=False))


def test_other_widths_are_refused():
    with pytest.raises(ConfigError, match="bits=4 is not supported"):
        QuantizeConfig(bits=4)


def test_recommendations_of_an_8_bit_model_do_not_depend_on_company(tiny_model):
    model = quantize_model(tiny_model(num_layers=2, prompt="none"))
    recommender = TorchRecommender(model, "cpu")
    rows = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [5, 1, 9]]
    together = recommender.recommend(Histories.of(Ragged.from_rows(rows)), 5)
    for row, items in enumerate(rows):
        alone = recommender.recommend(Histories.of(Ragged.from_rows([items])), 5)
        assert (alone.item_ids[0] == together.item_ids[row]).all()


def test_patterns_that_keep_every_layer_are_refused(tiny_model):
    with pytest.raises(ConfigError, match="leaves no layer in 8 bits"):
        quantize_model(tiny_model(prompt="none"), ("*",))
    with pytest.raises(ConfigError, match="leaves no layer in 8 bits"):
        quantize_model(tiny_model(prompt="none"), ("*.self_attn.*", "*.mlp.*"))

"""Calibration: what layers read is counted without keeping it, and outliers move without changing an answer."""

import numpy as np
import pytest
import torch

from compress.calibrate import BINS, SAMPLE_TOKENS, Histogram, calibrate, input_groups, some_cases, static_ranges
from compress.int8 import decoder_linears, prepare, quantize_model
from compress.smooth import Copies, migrate, migration_factors, output_error
from slmrec.compress_config import CalibrationConfig
from slmrec.errors import ConfigError
from slmrec.ragged import Ragged
from slmrec.recommender import Histories
from slmrec.sequences import Cases

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.fixture(scope="module")
def histories():
    generator = np.random.default_rng(0)
    return Histories.of(Ragged.from_rows([generator.integers(1, 21, size=n).tolist() for n in [1, 3, 3, 7, 10, 12]]))


def read_by(model, histories, name):
    """Everything a layer reads, one history at a time."""
    held = []
    hook = model.decoder.get_submodule(name).register_forward_pre_hook(lambda _, inputs: held.append(inputs[0]))
    with torch.inference_mode():
        for row in histories.item_ids:
            model.score(torch.from_numpy(row[-model.max_history :].copy())[None])
    hook.remove()
    return torch.cat([tokens.flatten(0, 1) for tokens in held])


@pytest.mark.parametrize("prompt", ["none", "slmrec"])
def test_statistics_are_those_of_every_token_the_layer_reads(tiny_model, histories, prompt):
    model = tiny_model(num_layers=2, prompt=prompt).eval()
    model.spec = model.spec.__class__(**{**vars(model.spec), "share_prefix": False})
    found = calibrate(model, histories)
    for group in input_groups(2):
        for name in group.linears:
            tokens = read_by(model, histories, name)
            statistics = found[group.name]
            assert statistics.num_tokens == len(tokens)
            torch.testing.assert_close(statistics.channel_max, tokens.abs().amax(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(statistics.channel_mean, tokens.abs().mean(0), rtol=1e-4, atol=1e-5)
            assert statistics.largest == pytest.approx(float(tokens.abs().max()), rel=1e-4)


def test_every_linear_layer_has_ranges(tiny_model, histories):
    model = tiny_model(num_layers=2, prompt="none").eval()
    ranges = static_ranges(calibrate(model, histories), 2)
    assert set(ranges) == set(decoder_linears(model))
    for found in ranges.values():
        assert 0 < found["entropy"] <= found["max"]
        assert 0 < found["percentile"] <= found["max"]


@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_a_histogram_agrees_with_a_sorted_list_whatever_the_order_of_magnitudes(scale):
    values = scale * torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    values[49_999] = 40 * scale  # late, so that bins have to be merged
    histogram = Histogram()
    for part in values.split(1000):
        histogram.add(part)
    assert int(histogram.counts.sum()) == len(values)
    assert len(histogram.counts) == BINS
    for share in (0.5, 0.99, 0.999):
        expected = float(values.abs().quantile(share))
        assert histogram.percentile(share) == pytest.approx(expected, abs=2 * histogram.width)


def test_entropy_clips_a_lone_outlier_and_keeps_an_even_spread():
    bell, even = Histogram(), Histogram()
    generator = torch.Generator().manual_seed(0)
    bell.add(torch.cat([torch.randn(100_000, generator=generator), torch.tensor([60.0])]))
    assert 2 < bell.entropy_range() < 10
    even.add(torch.rand(100_000, generator=generator))
    assert even.entropy_range() > 0.9


def test_zeros_have_ranges_too():
    histogram = Histogram()
    histogram.add(torch.zeros(100))
    histogram.add(torch.tensor([2.0]))
    assert int(histogram.counts.sum()) == 101
    assert histogram.percentile(1.0) >= 2.0


def test_the_sample_does_not_grow_and_is_drawn_from_all(tiny_model):
    model = tiny_model(num_layers=1, prompt="none").eval()
    rows = np.random.default_rng(0).integers(1, 21, size=(300, 10))
    statistics = calibrate(model, Histories.of(Ragged.from_rows(list(rows))))["layers.0.self_attn.qkv"]
    assert statistics.num_tokens == 3000
    assert statistics.sample.shape == (SAMPLE_TOKENS, model.hidden_size)
    early = calibrate(model, Histories.of(Ragged.from_rows(list(rows[:64]))))["layers.0.self_attn.qkv"].sample
    seen_early = (torch.cdist(statistics.sample, early) < 1e-4).any(dim=1).float().mean()
    assert seen_early < 0.9  # later batches take part


def test_some_cases_are_drawn_once_each_and_by_the_seed():
    rows = Ragged.from_rows([[1, 2]] * 50)
    cases = Cases(np.arange(50), Histories.of(rows), np.ones(50, dtype=np.int64))
    first = some_cases(cases, 20, 0).users
    assert len(set(first.tolist())) == 20
    assert first.tolist() == some_cases(cases, 20, 0).users.tolist() != some_cases(cases, 20, 1).users.tolist()
    assert len(some_cases(cases, 80, 0)) == 50


def with_outliers(model):
    """The same function, some of whose channels are 128 times larger on the way from one module to the next."""
    with torch.no_grad():
        for layer in model.decoder.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
                (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
            ):
                norm.weight[3] *= 128
                for reader in readers:
                    reader.weight[:, 3] /= 128
            mlp.up_proj.weight[7] *= 128
            mlp.down_proj.weight[:, 7] /= 128
            head_dim, width = attention.head_dim, attention.o_proj.in_features
            copies = width // attention.v_proj.out_features
            attention.v_proj.weight[2] *= 128
            if attention.v_proj.bias is not None:
                attention.v_proj.bias[2] *= 128
            attention.o_proj.weight[:, [2 + head_dim * copy for copy in range(copies)]] /= 128
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_migration_changes_no_bit_of_any_score_and_makes_8_bits_better(tiny_model, histories, family):
    model = with_outliers(tiny_model(family=family, num_layers=2, prompt="none").eval())
    migrated, chosen = migrate(model, calibrate(model, histories))
    items = torch.randint(1, 21, (6, 8), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        before = model.score(items)
        assert torch.equal(migrated.score(items), before)
        plain, smooth = (quantize_model(one).score(items) for one in (model, migrated))
    assert (smooth - before).pow(2).mean() < 0.5 * (plain - before).pow(2).mean()
    moved = [one for one in chosen if one.strength > 0]
    assert {one.group.rpartition(".")[2] for one in moved} == {"qkv", "o", "gate_up", "down"}
    assert all(one.error_after < one.error_before for one in moved)


def test_heads_that_share_a_value_share_their_factors():
    copies = Copies(count=2, head_dim=3)
    largest = torch.tensor([1.0, 2, 4, 8, 2, 1, 1, 1, 1, 1, 1, 1])
    factors = migration_factors(largest, torch.ones(5, 12), 1.0, copies)
    assert factors.tolist() == [8, 2, 4, 8, 2, 4, 1, 1, 1, 1, 1, 1]


def test_a_channel_that_is_never_active_keeps_its_scale():
    factors = migration_factors(torch.tensor([0.0, 16.0]), torch.ones(3, 2), 0.5, Copies())
    assert factors.tolist() == [1.0, 4.0]


def test_the_error_is_that_of_rounded_products():
    generator = torch.Generator().manual_seed(0)
    tokens, weights = torch.randn(40, 16, generator=generator), torch.randn(8, 16, generator=generator)
    rounded = [torch.round(x / (s := x.abs().amax(1, keepdim=True) / 127)) * s for x in (tokens, weights)]
    exact = tokens @ weights.T
    expected = ((rounded[0] @ rounded[1].T - exact) ** 2).sum() / (exact**2).sum()
    assert output_error(tokens, weights, torch.ones(16)) == pytest.approx(float(expected), rel=1e-4)


def test_prepared_ranges_are_those_of_the_migrated_model(tiny_model, histories):
    model = with_outliers(tiny_model(num_layers=1, prompt="none").eval())
    cases = Cases(np.arange(6), histories, np.ones(6, dtype=np.int64))
    prepared = prepare(model, cases, CalibrationConfig())
    read = read_by(prepared.model, histories, "layers.0.mlp.down_proj")
    assert prepared.ranges["layers.0.mlp.down_proj"]["max"] == pytest.approx(float(read.abs().max()), rel=1e-4)
    left = prepare(model, cases, CalibrationConfig(migrate=False))
    assert left.migrations == []
    assert left.ranges["layers.0.mlp.down_proj"]["max"] > prepared.ranges["layers.0.mlp.down_proj"]["max"]


def test_no_calibration_data_is_an_error():
    with pytest.raises(ConfigError, match="nothing to calibrate on"):
        CalibrationConfig(histories=0)

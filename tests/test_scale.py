"""The plan on paper: counted work, figures against hand-made ones, and lists of shards that are the whole table's."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_studies import study  # noqa: F401 - a fixture

from export.items import ROW_STEP, ItemWeights
from export.onnx_export import export_model
from slmrec.config import ExportConfig
from slmrec.roofline import Ceilings


@pytest.fixture
def scale(study):  # noqa: F811
    return study("scale")


def test_counted_work_has_no_item_head(scale, tiny_model, tmp_path):
    found = {}
    for num_items in (20, 2000):
        (tmp_path / str(num_items)).mkdir()
        export_model(tiny_model(prompt="none", num_items=num_items).eval(), tmp_path / str(num_items), ExportConfig())
        found[num_items] = scale.count(tmp_path / str(num_items), batch=4)
    small, large = found.values()
    assert small.fp_operations == large.fp_operations > 0
    assert small.weight_bytes == pytest.approx(large.weight_bytes, rel=0.01)
    assert (small.width, small.history, small.int8_operations) == (8, 10, 0)


def test_figures_are_those_of_the_arithmetic(scale):
    decoder = scale.Decoder(
        fp_operations=100.0, int8_operations=60.0, user_bytes=5.0, weight_bytes=7.0, width=2, history=3
    )
    plan = scale.Plan(num_users=1000, num_items=10, top_k=4, batch=8, kept_batch=2)
    toy = Ceilings("toy", fp32_operations_s=140.0, int8_operations_s=60.0, read_bytes_s=1e9)
    found = scale.times(plan, decoder, "16 bits", toy, price=3.6)
    assert found["users_per_gpu_second"] == pytest.approx(1 / 2)  # (100 + 2 * 2 * 10) / 140 + 60 / 60 seconds
    assert found["gpu_hours"] == pytest.approx(2000 / 3600)
    assert found["hours_on_8"] == pytest.approx(8 * found["hours_on_64"]) == pytest.approx(250 / 3600)
    assert found["usd_per_million_lists"] == pytest.approx(2000)
    assert found["head_share_of_arithmetic"] == pytest.approx(1 - (100 / 140 + 1) / 2)
    slow = Ceilings("toy", 1e9, 1e9, read_bytes_s=10.0)
    by_bytes = scale.times(plan, decoder, "16 bits, scores written and read", slow, price=1.0)
    assert by_bytes["bound"] == "bytes"
    assert 1 / by_bytes["users_per_gpu_second"] == pytest.approx((7 + 2 * 5 + 40 + 2 * 2 * 10 * 4) / 10 / 2)
    sizes = scale.sizes(plan, decoder)
    assert sizes["item table"] == 8 * sizes["item table, one of 8 shards"] == 40
    assert (sizes["histories"], sizes["lists"]) == (1000 * 3 * 4, 1000 * 4 * 8)
    assert sizes["over the network for a user, 8 shards"] == 7 * (4 + 32)


@pytest.mark.parametrize("ties", [False, True])
def test_merged_lists_of_8_shards_are_the_whole_table_s(scale, ties):
    found = scale.simulate(20_000, 16, 8, 20, ties=ties)
    assert found["same_items"]
    assert found["same_scores"]
    assert (found["equal_neighbours"] > 0.5) == ties


@given(seed=st.integers(0, 2**16), num_items=st.integers(1, 300), k=st.integers(1, 12), shards=st.integers(1, 9))
@settings(max_examples=15, deadline=None)
def test_merging_follows_the_ranking_rule_whatever_is_excluded(seed, num_items, k, shards):
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    try:
        from scale import merged_lists
    finally:
        sys.path.pop(0)
    generator = np.random.default_rng(seed)
    rows, k = -(-(num_items + 1) // ROW_STEP) * ROW_STEP, min(k, num_items)
    offsets = np.full(rows, -np.inf, dtype=np.float32)
    offsets[1 : num_items + 1] = 0
    outputs = generator.integers(-1, 2, (rows, 3)).astype(np.float32)
    items = ItemWeights(count=num_items, table=outputs, outputs=outputs, offsets=offsets)
    users = generator.integers(-1, 2, (4, 3)).astype(np.float32)
    masked = generator.integers(0, num_items + 1, (4, num_items // 2 + 1))
    best, found = merged_lists(items, users, masked, k, shards)
    for user, gone, own, scores in zip(users, masked, found, best, strict=True):
        open_ids = np.setdiff1d(np.arange(1, num_items + 1), gone)
        every = outputs[open_ids] @ user
        order = np.lexsort((open_ids, -every))[:k]
        assert own[: len(order)].tolist() == open_ids[order].tolist()
        assert scores[: len(order)].tolist() == every[order].tolist()
        assert not own[len(order) :].any()

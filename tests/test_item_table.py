"""Lists by the 8-bit item table are those of the fp32 table, however alike the items are."""

from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest

from export.item_head import Head, certified_items, exact_items
from export.items import Int8Items, ItemWeights
from export.onnx_export import export_model
from export.runtime import OnnxRecommender
from export.sessions import session_options
from export.writer import GraphWriter
from slmrec.config import ExportConfig
from slmrec.ragged import Ragged
from slmrec.recommender import Histories

KINDS = ("random", "near duplicates", "one large entry", "constant rows", "biases", "users of one large entry")


def items_and_users(kind, rows=128 * 60):
    generator = np.random.default_rng(0)
    table = generator.normal(size=(rows, 64))
    users = generator.normal(size=(40, 64))
    offsets = np.zeros(rows)
    if kind == "near duplicates":  # hundreds of items whose scores differ in the last digits alone
        table = np.tile(table[:20], (rows // 20, 1)) + 1e-5 * table
    if kind == "one large entry":
        table[:, 0] += 50
    if kind == "constant rows":  # rounding of long sums all in one direction, and scores that almost tie
        table = np.repeat(1 + 1e-4 * generator.normal(size=(rows, 1)), 512, axis=1)
        users = np.repeat(1 + generator.random((40, 1)), 512, axis=1)
    if kind == "users of one large entry":  # alike for all items, it rounds away what decides; the items round exactly
        users[:, 0] *= 1000
        table = generator.integers(-127, 128, table.shape).astype(float)
        table[:, 0] = 127
    if kind == "biases":
        offsets = 3 * generator.normal(size=rows)
    offsets[0], offsets[-50:] = -np.inf, -np.inf
    weights = ItemWeights(
        count=rows - 51, table=np.zeros((rows, 1), np.float32), outputs=table.astype(np.float32),
        offsets=offsets.astype(np.float32), has_biases=kind == "biases",
    )  # fmt: skip
    return weights, users.astype(np.float32)


def answers(weights, k, way):
    """The head alone as a graph of user vectors and excluded ids."""
    graph = GraphWriter(opset=20)
    users = graph.input("users", "float32", ["batch", weights.outputs.shape[1]])
    masked = graph.input("masked", "int64", ["batch", "n"])
    found = way(Head(graph, weights, users, masked, k, True))
    for value, (name, kind) in zip(
        found, (("scores", "float32"), ("items", "int64"), ("certified", "bool")), strict=False
    ):
        graph.output(value, name, kind, ["batch", "k"] if name != "certified" else ["batch"])
    session = ort.InferenceSession(graph.model().SerializeToString(), session_options(2))
    return lambda users, masked: session.run(None, {"users": users, "masked": masked})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 10, 100])
def test_lists_are_those_of_the_whole_table(kind, k):
    weights, users = items_and_users(kind)
    masked = np.random.default_rng(1).integers(1, weights.count + 1, (len(users), 300))
    scores, items, certified = answers(weights, k, certified_items)(users, masked)
    exact = users.astype(np.float64) @ weights.outputs.T.astype(np.float64) + weights.offsets
    np.put_along_axis(exact, masked, -np.inf, axis=1)
    best = -np.sort(-exact, axis=1)[:, :k]
    scale = np.abs(best).max()
    np.testing.assert_allclose(scores, best, rtol=0, atol=2e-6 * scale)
    own = np.take_along_axis(exact, items, axis=1)
    np.testing.assert_allclose(own, best, rtol=0, atol=2e-6 * scale)  # near duplicates trade places within rounding
    assert all(len(set(row)) == k for row in items.tolist())
    if kind in ("random", "biases"):
        assert (items == np.argsort(-exact, axis=1, kind="stable")[:, :k]).all()
        assert certified.mean() > 0.9
    if kind == "near duplicates":
        assert not certified.any()


def test_a_user_gets_the_same_bits_whoever_shares_the_batch_certified_or_not():
    weights, users = items_and_users("random")
    near = items_and_users("near duplicates")[0].outputs
    outputs = weights.outputs.copy()
    outputs[: len(outputs) // 2] = near[: len(outputs) // 2] * 0.3
    answer = answers(replace(weights, outputs=outputs), 10, certified_items)
    masked = np.zeros((len(users), 1), dtype=np.int64)
    together = answer(users, masked)
    for row in range(len(users)):
        alone = answer(users[[row]], masked[[row]])
        assert (alone[1][0] == together[1][row]).all()
        assert (alone[0][0] == together[0][row]).all()


@pytest.mark.parametrize("way", [certified_items, exact_items])
def test_where_all_but_a_few_are_excluded_the_tail_is_minus_infinity(way):
    weights, users = items_and_users("random")
    masked = np.repeat(np.arange(5, weights.count + 1)[None], len(users), axis=0)
    scores, items = answers(weights, 10, way)(users, masked)[:2]
    assert all(set(row[:4]) == {1, 2, 3, 4} for row in items.tolist())
    assert (scores[:, 4:] == -np.inf).all()


def test_bounds_hold_and_are_not_idle():
    weights, users = items_and_users("random")
    table = Int8Items.of(weights.outputs)
    rounded = table.values.T.astype(np.float64) * table.scale[:, None]
    gaps = np.abs(users.astype(np.float64) @ (rounded - weights.outputs).T)
    bounds = np.linalg.norm(users, axis=1)[:, None] * table.error
    assert (gaps <= bounds).all()
    assert gaps.max() > 0.1 * bounds.mean()
    assert (np.linalg.norm(rounded, axis=1) <= table.length).all()


@pytest.mark.parametrize("head", ["tied", "linear"])
def test_a_model_with_an_8_bit_item_table_answers_as_without(tiny_model, tmp_path, head):
    model = tiny_model(prompt="none", num_items=3000, head=head).eval()
    users = Histories.of(Ragged.from_rows([[1, 2, 3], [7], [2000, 5, 2999, 3000]]))
    found = []
    for flag in (False, True):
        folder = tmp_path / str(flag)
        folder.mkdir()
        export_model(model, folder, ExportConfig(int8_items=flag))
        found.append(OnnxRecommender(folder).recommend(users, 20))
    assert (found[0].item_ids == found[1].item_ids).all()
    np.testing.assert_allclose(found[0].scores, found[1].scores, rtol=0, atol=2e-5 * np.abs(found[0].scores).max())

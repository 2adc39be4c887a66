"""The serving graph against the model it was made from, and its top-K against a sort."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from compress.int8 import quantize_model
from export.decoder import Serving
from export.graph import recommend_graph
from export.onnx_export import export_model
from export.parity import ParityRule, compare, score_gaps
from export.runtime import OnnxRecommender
from export.sessions import session_options
from export.top_k import top_k as graph_top_k
from export.weights import serving_weights
from export.writer import GraphWriter, save_graphs
from slmrec.config import ExportConfig
from slmrec.errors import CheckError, ConfigError
from slmrec.models.ranking import TorchRecommender, top_k
from slmrec.ragged import Ragged
from slmrec.recommender import Histories

CASES = [
    ("llama", "none", "compact", "tied", False),
    ("mistral", "prefix", "padded", "linear", True),
    ("qwen2", "slmrec", "compact", "tied", True),
    ("qwen3", "slmrec", "padded", "tied", False),
    ("llama", "prefix", "compact", "tied", True),
    ("qwen3", "none", "padded", "linear", False),
]


def histories(num_items=20, users=40, longest=14):
    generator = np.random.default_rng(0)
    rows = [generator.permutation(num_items)[: generator.integers(1, longest)] + 1 for _ in range(users)]
    return Histories.of(Ragged.from_rows(rows))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def pair(request, tiny_model, tmp_path_factory):
    """A model and its graph, of every family, prompt, position convention and head, fp32 and 8-bit."""
    family, prompt, positions, head, eight_bit = request.param
    model = tiny_model(family=family, prompt=prompt, positions=positions, head=head).eval()
    if eight_bit:
        model = quantize_model(model).eval()
    folder = tmp_path_factory.mktemp("graph")
    export_model(model, folder, ExportConfig())
    return TorchRecommender(model, "cpu"), OnnxRecommender(folder)


def test_the_graph_ranks_as_the_model_does(pair):
    expected, actual = (recommender.recommend(histories(), 15) for recommender in pair)
    gaps = score_gaps(expected.scores, actual.scores)
    if pair[1].signature["precision"] == "fp32":
        assert (gaps <= 2e-5).all()
        assert (expected.item_ids == actual.item_ids).all()
    else:  # a rounding that falls on the other side moves a few scores by one step of 8 bits
        assert (gaps <= 2e-5).mean() > 0.9
        assert compare(expected, actual, ParityRule(precision="int8")).overlap_at_10 >= 0.99


@pytest.mark.parametrize("file", ["model.onnx", "model.onnx.data"])
def test_a_full_disk_is_told_with_the_file_that_found_no_room(tiny_model, tmp_path, file):
    (tmp_path / file).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space") as caught:
        export_model(tiny_model(num_layers=1, prompt="none").eval(), tmp_path, ExportConfig())
    assert caught.value.filename == str(tmp_path / file)


def test_ids_that_do_not_exist_count_as_padding_in_the_raw_graph(pair):
    graph = pair[1]
    nobody = np.zeros((1, 0), dtype=np.int64)
    expected = graph.run(np.array([[0, 0, 0, 0, 3, 4]]), nobody)
    strange = graph.run(np.array([[-1, 0, 21, 2**40, 3, 4]]), np.array([[-1, 0, 21, 2**40, -(2**40)]]))
    assert (expected[0] == strange[0]).all()
    np.testing.assert_array_equal(expected[1], strange[1])


def test_padding_of_the_raw_graph_changes_nothing_but_rounding(pair):
    graph = pair[1]
    narrow = graph.run(np.array([[5, 3, 4]]), np.zeros((1, 0), dtype=np.int64))
    wide = graph.run(np.array([[0, 0, 0, 0, 5, 3, 4]]), np.zeros((1, 4), dtype=np.int64))
    assert (score_gaps(narrow[1], wide[1]) <= 2e-5).all()


def test_a_user_alone_gets_the_very_bits_he_gets_in_ragged_company(pair):
    graph, users = pair[1], histories()
    together = graph.recommend(users, 10)
    for row in range(len(users)):
        alone = graph.recommend(users.select(np.array([row])), 10)
        assert alone.item_ids[0].tolist() == together.item_ids[row].tolist()
        assert alone.scores[0].tobytes() == together.scores[row].tobytes()


def test_what_is_excluded_never_comes_back_and_the_tail_is_padding(pair):
    graph = pair[1]
    history, excluded = np.array([[1, 2, 3]]), np.arange(4, 18)[None]
    items, scores = graph.run(history, excluded)
    assert set(items[0, :3].tolist()) == {18, 19, 20}
    assert items[0, 3:].tolist() == [0] * 17
    assert (scores[0, 3:] == -np.inf).all()


def test_keep_history_allows_repeats(tiny_model, tmp_path):
    export_model(tiny_model(prompt="none").eval(), tmp_path, ExportConfig(keep_history=True))
    graph = OnnxRecommender(tmp_path)
    row = Ragged.from_rows([[1, 2, 3]])
    free = graph.recommend(Histories(row, Ragged.from_rows([[]])), 20).item_ids[0]
    assert {1, 2, 3} <= set(free.tolist())
    assert not {1, 2} & set(graph.recommend(Histories(row, Ragged.from_rows([[1, 2]])), 18).item_ids[0].tolist())


def test_8_bit_weights_are_stored_in_8_bits(tiny_model, tmp_path):
    import onnx

    export_model(quantize_model(tiny_model(prompt="none")).eval(), tmp_path, ExportConfig())
    model = onnx.load(tmp_path / "model.onnx")
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(products) == 5 * 2 + 6  # queries, keys and values are one; in the last layer queries are apart
    assert all(kinds[node.input[1]] == onnx.TensorProto.INT8 for node in products)
    assert all(opset.version == 20 for opset in model.opset_import if opset.domain == "")


def test_weights_that_are_not_finite_are_not_exported(tiny_model, tmp_path):
    model = tiny_model(prompt="none").eval()
    with torch.no_grad():
        model.decoder.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(CheckError, match=r"layers\.0\.mlp\.up_proj\.weight is not finite"):
        export_model(model, tmp_path, ExportConfig())


@pytest.mark.parametrize("int8_items", [False, True])
def test_nan_in_a_graph_gives_nan_scores_and_no_list(tiny_model, tmp_path, int8_items):
    model = tiny_model(prompt="none").eval()
    config = ExportConfig(int8_items=int8_items)
    export_model(model, tmp_path, config)
    with torch.no_grad():
        model.decoder.norm.weight[0] = torch.nan
    save_graphs({"model.onnx": recommend_graph(Serving(serving_weights(model), config, {}))}, tmp_path)
    for recommender in (OnnxRecommender(tmp_path), TorchRecommender(model, "cpu")):
        with pytest.raises(CheckError, match="NaN"):
            recommender.recommend(histories(), 5)


def test_another_activation_than_silu_is_refused_by_name(tiny_model, tmp_path):
    model = tiny_model(num_layers=1, prompt="none").eval()
    model.decoder.config.hidden_act = "gelu"
    with pytest.raises(ConfigError, match="the activation 'gelu' cannot be exported"):
        export_model(model, tmp_path, ExportConfig())


def test_layers_kept_in_fp32_leave_the_others_in_8_bits(tiny_model, tmp_path):
    model = quantize_model(tiny_model(prompt="none"), ("*.q_proj", "*.down_proj")).eval()
    export_model(model, tmp_path, ExportConfig())
    graph = OnnxRecommender(tmp_path)
    assert graph.signature["precision"] == "int8"
    assert graph.signature["num_8bit_layers"] == 3 * 5
    expected, actual = (one.recommend(histories(), 10) for one in (TorchRecommender(model, "cpu"), graph))
    assert compare(expected, actual, ParityRule(precision="int8")).overlap_at_10 >= 0.99


def test_without_fused_kernels_a_graph_is_standard_onnx_alone(tiny_model, tmp_path):
    import onnx

    model = quantize_model(tiny_model(prompt="prefix", num_items=20_000)).eval()
    export_model(model, tmp_path, ExportConfig(fuse_kernels=False))
    for graph in ("model.onnx", "rerank.onnx"):
        opsets = {entry.domain for entry in onnx.load(tmp_path / graph, load_external_data=False).opset_import}
        assert opsets == {""}
    for flag in ("tune", "int8_items"):
        with pytest.raises(ConfigError, match=f"{flag} needs ONNX Runtime's own operations"):
            ExportConfig(**{flag: True, "fuse_kernels": False})


def test_a_raw_graph_takes_no_users_and_no_history(pair):
    graph, nothing = pair[1], np.zeros((0, 3), dtype=np.int64)
    assert graph.run(nothing, np.zeros((0, 0), dtype=np.int64))[0].shape == (0, 20)
    items, scores = (
        graph.run(np.zeros((2, 0), dtype=np.int64), np.zeros((2, 0), dtype=np.int64))
        if (graph.signature["suffix_length"])
        else (np.ones((2, 20)), np.zeros((2, 20)))
    )
    assert items.shape == (2, 20)
    assert np.isfinite(scores).all()


def test_layers_that_read_the_same_share_its_rounding(tiny_model, tmp_path):
    """Queries, keys and values read one input, gate and up another: four roundings a layer, not seven."""
    export_model(quantize_model(tiny_model(num_layers=3, prompt="none")).eval(), tmp_path, ExportConfig())
    nodes = [node.op_type for node in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node]
    # of the last layer keys and values read every token, and the rest the newest alone: one rounding more
    assert nodes.count("QuantizeLinear") == 4 * 3 + 1
    plain = tmp_path / "plain"
    plain.mkdir()
    model = quantize_model(tiny_model(num_layers=3, prompt="none")).eval()
    export_model(model, plain, ExportConfig(newest_only=False, join_projections=False))
    nodes = [node.op_type for node in onnx.load(plain / "model.onnx", load_external_data=False).graph.node]
    assert nodes.count("QuantizeLinear") == 4 * 3
    assert nodes.count("MatMulIntegerToFloat") == 7 * 3


def test_sums_of_the_largest_8_bit_products_do_not_overflow():
    """Without VNNI pairs of products are added in 16 bits, unless the session is told better."""
    graph = GraphWriter(opset=20)
    left = graph.op("Cast", graph.input("left", "int64", ["rows", 64]), to=TensorProto.UINT8)
    right, zero = np.full((64, 8), 127, dtype=np.int8), np.array(128, dtype=np.uint8)
    sums = graph.op("Cast", graph.op("MatMulInteger", left, right, zero), to=TensorProto.INT64)
    graph.output(sums, "sums", "int64", ["rows", 8])
    session = ort.InferenceSession(graph.model().SerializeToString(), session_options(1))
    [sums] = session.run(None, {"left": np.full((3, 64), 255)})
    assert (sums == 64 * 127 * 127).all()


def test_without_vnni_8_bit_products_are_computed_without_overflow(tiny_model, tmp_path, monkeypatch):
    model = quantize_model(tiny_model(prompt="none")).eval()
    export_model(model, tmp_path, ExportConfig())
    expected = OnnxRecommender(tmp_path).recommend(histories(), 10)
    asked = []
    monkeypatch.setattr("export.sessions.has_vnni", lambda: asked.append(1))
    actual = OnnxRecommender(tmp_path).recommend(histories(), 10)
    assert asked
    np.testing.assert_allclose(actual.scores, expected.scores, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2000), st.integers(1, 40), st.integers(0, 2**31), st.integers(1, 6))
def test_block_max_top_k_equals_a_sort_ties_included(columns, k, seed, levels):
    k = min(k, columns)
    scores = np.random.default_rng(seed).integers(0, 10**levels, (3, columns)).astype(np.float32)
    graph = GraphWriter(opset=20)
    best, items = graph_top_k(graph, graph.input("scores", "float32", ["batch", columns]), columns, k)
    graph.output(best, "best", "float32", ["batch", k])
    graph.output(items, "items", "int64", ["batch", k])
    best, items = ort.InferenceSession(graph.model().SerializeToString()).run(None, {"scores": scores})
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    assert items.tolist() == expected.tolist()
    assert (best == np.take_along_axis(scores, expected, axis=1)).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 600), st.integers(1, 40), st.integers(0, 2**31), st.integers(1, 6))
def test_torch_top_k_breaks_ties_by_smaller_id(columns, k, seed, levels):
    k = min(k, columns)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-(10**levels), 10**levels, (3, columns), generator=generator).float() / 7
    items, best = top_k(scores, k)
    for row in range(3):
        order = sorted(range(columns), key=lambda c: (-scores[row, c].item(), c))[:k]
        assert items[row].tolist() == [column + 1 for column in order]
        assert best[row].tolist() == scores[row, order].tolist()


def test_ties_in_a_large_catalogue_go_to_the_smaller_id_in_the_graph(tiny_model, tmp_path):
    model = tiny_model(prompt="none", num_items=5000).eval()
    with torch.no_grad():
        model.item_table.weight[1:] = model.item_table.weight[1:6].repeat(1000, 1)  # five scores, a thousand times each
    export_model(model, tmp_path, ExportConfig(top_k=30))
    users = Histories.of(Ragged.from_rows([[1, 2, 3], [7]]))
    expected, actual = (r.recommend(users, 30) for r in (TorchRecommender(model, "cpu"), OnnxRecommender(tmp_path)))
    for row, seen in enumerate([{1, 2, 3}, {7}]):
        residue = (actual.item_ids[row, 0] - 1) % 5
        unseen = [item for item in range(1, 5001) if (item - 1) % 5 == residue and item not in seen]
        assert actual.item_ids[row].tolist() == unseen[:30]
    assert (score_gaps(expected.scores, actual.scores) <= 2e-5).all()


def test_both_data_files_are_there_however_small_the_model(tmp_path):
    graph = GraphWriter(18)
    graph.output(graph.op("Identity", graph.constant(np.ones(1, dtype=np.float32))), "y", "float32", [1])
    save_graphs({"model.onnx": graph}, tmp_path)
    assert [(tmp_path / name).read_bytes() for name in ("model.onnx.data", "items.onnx.data")] == [b"", b""]

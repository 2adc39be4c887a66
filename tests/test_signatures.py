"""The graphs besides `recommend`: candidates' scores, and new items of users whose past is kept."""

from dataclasses import replace

import numpy as np
import pytest
from forward import FAMILIES, expected_list, scores_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from export.onnx_export import export_model
from export.runtime import OnnxRecommender
from export.states import AppendingRecommender, StateStore, UserState
from slmrec.config import ExportConfig
from slmrec.errors import ConfigError, DataError
from slmrec.ragged import Ragged
from slmrec.recommender import Histories

ROWS = [[1, 2, 3], [5], list(range(1, 15)), [4, 4, 9, 1, 2, 7, 3]]


@pytest.fixture(scope="module")
def pair(tiny_model, tmp_path_factory):
    model = tiny_model(prompt="slmrec", positions="compact").eval()
    folder = tmp_path_factory.mktemp("graphs")
    export_model(model, folder, ExportConfig())
    return model, folder


def test_candidates_get_the_scores_of_the_forward_in_their_order(pair):
    model, folder = pair
    candidates = [[20, 4, 18, 6], [5, 6], [15, 3], [8]]
    found = OnnxRecommender(folder).rerank(Histories.of(Ragged.from_rows(ROWS)), Ragged.from_rows(candidates))
    for history, wanted, scores in zip(ROWS, candidates, found, strict=True):
        expected = scores_of(model, history[-10:])[np.array(wanted) - 1]
        expected[np.isin(wanted, history)] = -np.inf
        np.testing.assert_allclose(scores, expected, rtol=0, atol=2e-5 * np.abs(expected[np.isfinite(expected)]).max())


def test_excluded_and_unknown_candidates_score_nothing_in_the_raw_graph(pair):
    session = OnnxRecommender(pair[1]).load("rerank.onnx")
    candidates = np.array([[-1, 0, 21, 2**40, 7, 8, 9]])
    request = {"item_ids": np.array([[1, 2]]), "exclude_ids": np.array([[8, -5]]), "candidate_ids": candidates}
    [scores] = session.run(["scores"], request)
    assert np.isfinite(scores[0]).tolist() == [False] * 4 + [True, False, True]
    [free] = session.run(["scores"], request | {"exclude_ids": np.zeros((1, 0), dtype=np.int64)})
    assert np.isfinite(free[0]).tolist() == [False] * 4 + [True] * 3


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=14), st.lists(st.integers(1, 20), max_size=25),
    st.lists(st.integers(1, 20), max_size=5), st.integers(1, 20), st.booleans(),
)  # fmt: skip
def test_the_best_of_the_allowed_are_the_whole_ranking_without_the_others(
    twins, history, allowed, excluded, k, keep_history
):
    graph = twins[keep_history]
    users = Histories(*(Ragged.from_rows([ids, [1]]) for ids in (history, excluded)))
    found = graph.recommend_among(users, Ragged.from_rows([allowed, []]), k)
    everything = graph.recommend(users, 20)
    kept = np.isin(everything.item_ids[0], allowed) & (everything.item_ids[0] > 0)
    items = everything.item_ids[0][kept][:k]
    assert found.item_ids[0, : len(items)].tolist() == items.tolist()
    scores = everything.scores[0][kept][:k]
    np.testing.assert_allclose(found.scores[0, : len(items)], scores, rtol=0, atol=1e-5)
    for row, first in ((0, len(items)), (1, 0)):
        assert not found.item_ids[row, first:].any()
        assert (found.scores[row, first:] == -np.inf).all()


@pytest.fixture(scope="module")
def twins(tiny_model, tmp_path_factory):
    """Graphs of a model whose every item has a twin of the same score, so that ties decide."""
    import torch

    model = tiny_model(prompt="none", positions="compact").eval()
    with torch.no_grad():
        model.item_table.weight[2::2] = model.item_table.weight[1:-1:2]
    found = {}
    for keep_history in (False, True):
        folder = tmp_path_factory.mktemp("twins")
        export_model(model, folder, ExportConfig(append=False, keep_history=keep_history))
        found[keep_history] = OnnxRecommender(folder)
    return found


def test_candidates_beyond_what_is_scored_at_once_are_scored_in_parts(pair, monkeypatch):
    graph = OnnxRecommender(pair[1])
    users, candidates = Histories.of(Ragged.from_rows(ROWS)), Ragged.from_rows([[4, 5, 6], [7], [15, 16], [8] * 9])
    whole = graph.rerank(users, candidates)
    monkeypatch.setattr("export.runtime.MAX_CANDIDATES", 4)
    for one, other in zip(whole, graph.rerank(users, candidates), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_candidates_that_do_not_exist_and_rows_that_are_missing_are_refused(pair):
    graph, users = OnnxRecommender(pair[1]), Histories.of(Ragged.from_rows([[1], [2]]))
    with pytest.raises(DataError, match="the id 21"):
        graph.rerank(users, Ragged.from_rows([[21], [3]]))
    with pytest.raises(DataError, match="2 histories but 1 rows"):
        graph.rerank(users, Ragged.from_rows([[3]]))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(FAMILIES), st.sampled_from(["none", "prefix", "slmrec"]), st.booleans(), st.booleans(),
    st.lists(st.integers(1, 20), min_size=2, max_size=12), st.lists(st.integers(1, 4), min_size=1, max_size=12),
)  # fmt: skip
def test_a_chain_of_appended_items_equals_the_forward_at_every_step(
    tiny_model, tmp_path_factory, family, prompt, fold_prefix, newest_only, history, steps
):
    name, window = family
    model = tiny_model(family=name, sliding_window=window, num_layers=2, prompt=prompt, positions="compact").eval()
    folder = tmp_path_factory.mktemp("graphs")
    export_model(model, folder, ExportConfig(fold_prefix=fold_prefix, newest_only=newest_only))
    recommender = AppendingRecommender(folder, StateStore(max_bytes=2**20))
    length = 0
    for step in steps:
        length = min(length + step, len(history))
        seen = history[:length]
        answer = recommender.recommend(Histories.of(Ragged.from_rows([seen])), 5)
        _, scores = expected_list(scores_of(model, seen[-10:]), seen, 5)
        np.testing.assert_allclose(answer.scores[0], scores, rtol=0, atol=2e-5 * np.abs(scores).max())


def test_a_new_item_is_computed_alone(pair):
    recommender = AppendingRecommender(pair[1], StateStore(max_bytes=2**20))
    widths, session = [], recommender.session

    class Watched:
        def run(self, outputs, request):
            widths.append((np.count_nonzero(request["new_item"]), np.count_nonzero(request["seen_ids"])))
            return session.run(outputs, request)

    recommender.session = Watched()
    for history in ([1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [9, 2, 3, 4], list(range(1, 12))):
        recommender.recommend(Histories.of(Ragged.from_rows([history])), 5)
    assert widths == [(3, 0), (1, 3), (1, 3), (2, 4), (4, 0)]  # the last one is longer than the window


def test_users_are_computed_together_and_company_changes_no_bit(pair):
    together, alone = (AppendingRecommender(pair[1], StateStore(max_bytes=2**20)) for _ in range(2))
    generator = np.random.default_rng(0)
    longest = [generator.integers(1, 21, 10) for _ in range(6)]
    calls, session = [], together.session

    class Watched:
        def run(self, outputs, request):
            calls.append(len(request["new_item"]))
            return session.run(outputs, request)

    together.session = Watched()
    for lengths in ([3, 3, 4, 4, 5, 1], [4, 4, 5, 5, 6, 2], [4, 6, 5, 6, 9, 10]):
        users = Histories.of(Ragged.from_rows([ids[:n] for ids, n in zip(longest, lengths, strict=True)]))
        found, full = together.recommend(users, 5), together.full.recommend(users, 5)
        np.testing.assert_allclose(found.scores, full.scores, rtol=0, atol=2e-5 * np.abs(full.scores).max())
        for row in range(6):
            one = alone.recommend(users.select(np.array([row])), 5)
            np.testing.assert_array_equal(one.item_ids[0], found.item_ids[row])
            np.testing.assert_array_equal(one.scores[0], found.scores[row])
    assert calls[:2] == [6, 6]  # all are new and short; then each has one more
    assert (together.store.hits, together.store.misses) == (12, 6)


def test_a_state_of_another_artefact_is_not_used(pair, tiny_model, tmp_path):
    store = StateStore(max_bytes=2**20)
    other = tiny_model(prompt="none", positions="compact").eval()
    export_model(other, tmp_path, ExportConfig())
    first, second = AppendingRecommender(pair[1], store), AppendingRecommender(tmp_path, store)
    for history in ([1, 2, 3], [1, 2, 3, 4]):
        users = Histories.of(Ragged.from_rows([history]))
        for recommender in (first, second):
            np.testing.assert_allclose(
                recommender.recommend(users, 5).scores, recommender.full.recommend(users, 5).scores, rtol=1e-4
            )


def test_states_beyond_the_budget_go_and_answers_stay(pair):
    model, folder = pair
    store = StateStore(max_bytes=3000)  # two or three histories
    recommender = AppendingRecommender(folder, store)
    generator = np.random.default_rng(0)
    histories = [generator.integers(1, 21, 6) for _ in range(8)]
    for length in (4, 5, 6):
        for history in histories:
            answer = recommender.recommend(Histories.of(Ragged.from_rows([history[:length]])), 5)
            _, scores = expected_list(scores_of(model, history[:length].tolist()), history[:length], 5)
            np.testing.assert_allclose(answer.scores[0], scores, rtol=0, atol=2e-5 * np.abs(scores).max())
            assert 0 < store.size_bytes <= 3000
    large = UserState(np.zeros((1, 1, 400, 1), np.float32), np.zeros((1, 1, 400, 1), np.float32))
    store.put(b"large", large)
    assert store.get(b"large") is None


def test_padded_positions_allow_no_appending(tiny_model, tmp_path):
    model = tiny_model(prompt="none", positions="padded").eval()
    with pytest.raises(ConfigError, match="every new item moves"):
        export_model(model, tmp_path, ExportConfig(append=True))
    export_model(model, tmp_path, ExportConfig())
    assert OnnxRecommender(tmp_path).signature["graphs"] == ["model.onnx", "rerank.onnx"]
    with pytest.raises(ConfigError, match=r"holds no append\.onnx"):
        AppendingRecommender(tmp_path, StateStore(max_bytes=1000))


def test_an_8_bit_chain_answers_as_the_whole_history_does(tiny_model, tmp_path):
    from compress.int8 import quantize_model

    model = quantize_model(tiny_model(prompt="slmrec", positions="compact")).eval()
    export_model(model, tmp_path, replace(ExportConfig(), top_k=20))
    recommender = AppendingRecommender(tmp_path, StateStore(max_bytes=2**20))
    gaps = []
    for length in range(1, 10):
        users = Histories.of(Ragged.from_rows([[4, 9, 1, 2, 7, 3, 8, 6, 5][:length]]))
        kept, full = recommender.recommend(users, 5).scores, recommender.full.recommend(users, 5).scores
        gaps.append(np.abs(kept - full).max() / np.abs(full).max())
    assert max(gaps) < 2e-2  # a rounding that falls on the other side
    assert np.median(gaps) < 1e-5


@pytest.mark.parametrize(("length", "meant"), [(-5, 0), (10**6, 5), (2**40, 5)])
def test_a_past_longer_than_what_is_given_or_below_nothing_counts_as_what_there_is(pair, length, meant):
    recommender = AppendingRecommender(pair[1], StateStore(max_bytes=2**20))
    generator = np.random.default_rng(0)
    keys, values = (generator.normal(size=(1, 3, 2, 5, 8)).astype(np.float32) for _ in range(2))
    request = {
        "new_item": np.array([[7]]), "seen_ids": np.arange(1, 6)[None], "past_keys": keys, "past_values": values,
        "exclude_ids": np.zeros((1, 0), dtype=np.int64),
    }  # fmt: skip
    found, wanted = (
        recommender.session.run(["top_scores"], request | {"past_length": np.array([n])})[0] for n in (length, meant)
    )
    np.testing.assert_array_equal(found, wanted)


def test_signature_json_names_every_tensor_of_every_graph(pair):
    signature = OnnxRecommender(pair[1]).signature
    for graph in signature["graphs"]:
        session = OnnxRecommender(pair[1]).load(graph)
        for kind, tensors in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
            described = signature["tensors"][graph][kind]
            assert set(described) == {tensor.name for tensor in tensors}
            for tensor in tensors:
                shape = described[tensor.name]["shape"]
                assert len(shape) == len(tensor.shape)
                assert all(own == size for own, size in zip(tensor.shape, shape, strict=True) if isinstance(size, int))
                assert described[tensor.name]["dtype"] == tensor.type[7:-1].replace("float", "float32")

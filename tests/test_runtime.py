"""The runtime under threads and with input that nobody should send."""

from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import numpy as np
import onnx
import pytest

from export.onnx_export import export_model
from export.runtime import OnnxRecommender
from export.states import AppendingRecommender, StateStore
from slmrec.catalogue import Catalogue
from slmrec.config import ExportConfig
from slmrec.errors import ArtifactError, DataError
from slmrec.models.ranking import TorchRecommender
from slmrec.ragged import Ragged
from slmrec.recommender import Histories

NOBODY = np.zeros((1, 0), dtype=np.int64)


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("graph")
    export_model(tiny_model(prompt="slmrec", positions="compact").eval(), folder, ExportConfig())
    return folder


@pytest.mark.parametrize("kind", ["plain", "appending"])
def test_eight_threads_get_what_one_gets(folder, kind):
    if kind == "plain":
        recommender = OnnxRecommender(folder)
    else:
        recommender = AppendingRecommender(folder, StateStore(max_bytes=20_000))  # states come and go
    generator = np.random.default_rng(0)
    whole = [generator.integers(1, 21, 12) for _ in range(10)]
    requests = [history[:length] for length in range(1, 13) for history in whole]
    alone = OnnxRecommender(folder)
    expected = [alone.recommend(Histories.of(Ragged.from_rows([row])), 5).scores[0] for row in requests]
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda row: recommender.recommend(Histories.of(Ragged.from_rows([row])), 5), requests)
        for answer, scores in zip(answers, expected, strict=True):
            np.testing.assert_allclose(answer.scores[0], scores, rtol=0, atol=2e-5 * np.abs(scores).max())


def answers_of_a_process(folder, rows):
    """Lists and the bits of their scores, by a recommender of this process's own."""
    found = OnnxRecommender(folder, threads=1).recommend(Histories.of(Ragged.from_rows(rows)), 5)
    return found.item_ids.tolist(), found.scores.tobytes()


def test_four_processes_on_one_folder_agree_to_the_bit(folder):
    generator = np.random.default_rng(1)
    rows = [generator.integers(1, 21, length).tolist() for length in generator.integers(1, 13, 40)]
    expected = answers_of_a_process(folder, rows)
    with ProcessPoolExecutor(4, mp_context=get_context("spawn")) as pool:
        found = [pool.submit(answers_of_a_process, folder, rows) for _ in range(4)]
        assert [one.result() for one in found] == [expected] * 4


def test_nobody_asked_gets_nothing(folder):
    for recommender in (OnnxRecommender(folder), AppendingRecommender(folder, StateStore(max_bytes=1000))):
        answer = recommender.recommend(Histories.of(Ragged.from_rows([])), 5)
        assert answer.item_ids.shape == answer.scores.shape == (0, 5)
    assert OnnxRecommender(folder).rerank(Histories.of(Ragged.from_rows([])), Ragged.from_rows([])) == []


def test_a_user_without_history_gets_what_is_popular_alone_and_in_company(tiny_model, tmp_path):
    model = tiny_model(prompt="none", positions="compact").eval()
    counts = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 2))
    counts[4] = -1  # must not be recommended
    export_model(model, tmp_path, ExportConfig())
    Catalogue([str(item) for item in range(20)], [None] * 20, [None] * 20, counts.tolist()).save(tmp_path)
    rows, excluded = [[], [3, 7], []], [[2], [], list(range(1, 19))]
    histories = Histories(Ragged.from_rows(rows), Ragged.from_rows(excluded))
    byhand = [
        sorted((item for item in range(1, 21) if item not in gone and item != 5), key=lambda i: (-counts[i - 1], i))[:4]
        for gone in excluded
    ]
    for recommender in (
        OnnxRecommender(tmp_path), AppendingRecommender(tmp_path, StateStore(max_bytes=10**6)),
        TorchRecommender(model, "cpu", num_interactions=counts),
    ):  # fmt: skip
        answer = recommender.recommend(histories, 4)
        assert answer.item_ids[0].tolist() == byhand[0]
        assert answer.item_ids[2].tolist() == [*byhand[2], 0, 0]
        assert answer.scores[0].tolist() == [counts[item - 1] for item in byhand[0]]
        assert (answer.scores[2, 2:] == -np.inf).all()
        alone = recommender.recommend(histories.select(np.array([1])), 4)
        np.testing.assert_array_equal(answer.item_ids[1], alone.item_ids[0])


def test_where_popularity_is_not_known_users_without_history_are_refused(folder, tiny_model):
    nobody = Histories.of(Ragged.from_rows([[1], []]))
    for recommender in (
        OnnxRecommender(folder), AppendingRecommender(folder, StateStore(max_bytes=1000)),
        TorchRecommender(tiny_model(prompt="none"), "cpu"),
    ):  # fmt: skip
        with pytest.raises(DataError, match="1 of 2 histories are empty, the first at row 1"):
            recommender.recommend(nobody, 3)


@pytest.mark.parametrize("items", [[[1.0, 2.0]], [1, 2], [[[1, 2]]], np.array([[1, 2]], dtype=np.int32)])
def test_ids_of_another_type_or_rank_are_refused(folder, items):
    with pytest.raises(DataError, match=r"item_ids is .*, expected is int64 \[batch, n\]"):
        OnnxRecommender(folder).run(np.array(items), NOBODY)


@pytest.mark.parametrize("row", [[1.5], [[1, 2]], ["1"], [True]])
def test_histories_of_something_else_than_ids_are_refused(row):
    with pytest.raises(DataError, match="expected are whole numbers in a list"):
        Ragged.from_rows([[1], np.array(row)])
    with pytest.raises(DataError, match="expected are whole numbers in a list"):
        Ragged.from_lengths(np.array(row), np.array([1]))


def test_batches_of_different_sizes_are_refused(folder):
    with pytest.raises(DataError, match="batches of different sizes"):
        OnnxRecommender(folder).run(np.array([[1], [2]]), NOBODY)


@pytest.mark.parametrize("ids", [[0], [-1], [21], [2**40]])
def test_ids_that_do_not_exist_are_refused_before_the_graph(folder, ids):
    with pytest.raises(DataError, match=r"knows the items 1\.\.20"):
        OnnxRecommender(folder).recommend(Histories.of(Ragged.from_rows([ids])), 5)


def test_a_user_who_has_everything_gets_nothing(folder):
    answer = OnnxRecommender(folder).recommend(Histories.of(Ragged.from_rows([list(range(1, 21))])), 5)
    assert answer.item_ids.tolist() == [[0] * 5]
    assert (answer.scores == -np.inf).all()


@pytest.mark.parametrize("harm", ["no protobuf", "another opset", "data cut short", "data gone"])
def test_a_graph_that_cannot_run_is_refused_at_load(tiny_model, tmp_path, harm):
    export_model(tiny_model(prompt="none").eval(), tmp_path, ExportConfig())
    graph, data = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    if harm == "no protobuf":
        graph.write_bytes(b"this is no graph")
    elif harm == "another opset":
        model = onnx.load(graph, load_external_data=False)
        model.opset_import[0].version = 999
        graph.write_bytes(model.SerializeToString())
    elif harm == "data cut short":
        data.write_bytes(data.read_bytes()[:5000])
    else:
        data.unlink()
    with pytest.raises(ArtifactError, match="cannot load"):
        OnnxRecommender(tmp_path)

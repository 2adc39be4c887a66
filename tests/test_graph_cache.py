"""The cache of optimised graphs: used when it is ours and whole, made anew when it is anything else."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from export.graph_cache import DATA, ENTRY, GRAPH, default_cache
from export.onnx_export import export_model
from export.runtime import OnnxRecommender
from slmrec.artifact import Stage, publish
from slmrec.config import ExportConfig
from slmrec.ragged import Ragged
from slmrec.recommender import Histories

USERS = Histories.of(Ragged.from_rows([[1, 2, 3], [4], list(range(1, 13))]))


def graph(tiny_model, path, seed=0):
    import torch

    model = tiny_model(prompt="slmrec").eval()
    with torch.no_grad():
        model.item_table.weight.add_(seed)
    with publish(path, Stage(name="export", kind="graph", settings={"seed": seed})) as folder:
        export_model(model, folder, ExportConfig(append=False))
    return path


@pytest.fixture
def made(tiny_model, tmp_path):
    return graph(tiny_model, tmp_path / "graph")


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if not path.name.startswith("."))


def answer(folder: Path, cache: Path | None) -> tuple[np.ndarray, np.ndarray]:
    found = OnnxRecommender(folder, cache=cache).recommend(USERS, 5)
    return found.item_ids, found.scores


def test_a_second_start_reads_the_optimised_graph_and_answers_alike(made, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    expected = answer(made, None)
    first = answer(made, cache)
    [entry] = entries(cache)
    assert {path.name for path in entry.iterdir()} == {ENTRY, GRAPH, DATA}
    assert cache.stat().st_mode & 0o777 == 0o700
    opened = []
    import onnxruntime as ort

    whole = ort.InferenceSession
    monkeypatch.setattr(ort, "InferenceSession", lambda path, *a, **k: opened.append(path) or whole(path, *a, **k))
    second = answer(made, cache)
    assert opened == [str(entry / GRAPH)]
    for found in (first, second):
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])


def _other_graph(entry):
    model = onnx.load(entry / GRAPH, load_external_data=False)
    model.graph.output.reverse()
    (entry / GRAPH).write_bytes(model.SerializeToString())


def _other_version(entry):
    noted = json.loads((entry / ENTRY).read_text())
    noted["key"]["onnxruntime"] = "0.0"
    (entry / ENTRY).write_text(json.dumps(noted))


HARM = {
    "another graph": _other_graph,
    "another version's": _other_version,
    "other data of the same size": lambda entry: (entry / DATA).write_bytes(bytes((entry / DATA).stat().st_size)),
    "data cut short": lambda entry: (entry / DATA).write_bytes(b"short"),
    "a further file": lambda entry: (entry / "more").write_bytes(b""),
    "nothing said of it": lambda entry: (entry / ENTRY).unlink(),
    "no JSON": lambda entry: (entry / ENTRY).write_bytes(b"\xff{"),
}


@pytest.mark.parametrize("harm", list(HARM))
def test_a_foreign_entry_is_made_anew(made, tmp_path, harm):
    cache, expected = tmp_path / "cache", answer(made, None)
    answer(made, cache)
    [entry] = entries(cache)
    good = (entry / GRAPH).read_bytes(), (entry / DATA).read_bytes()
    HARM[harm](entry)
    np.testing.assert_array_equal(answer(made, cache)[1], expected[1])
    assert entries(cache) == [entry]
    assert {path.name for path in entry.iterdir()} == {ENTRY, GRAPH, DATA}
    assert ((entry / GRAPH).read_bytes(), (entry / DATA).read_bytes()) == good


def test_a_damaged_graph_leaves_nothing_for_the_good_one(made, tmp_path):
    cache, expected = tmp_path / "cache", answer(made, None)
    damaged = Path(shutil.copytree(made, tmp_path / "damaged"))
    data = damaged / "model.onnx.data"
    data.write_bytes(bytes(data.stat().st_size))
    OnnxRecommender(damaged, cache=cache)
    assert entries(cache) == []
    np.testing.assert_array_equal(answer(made, cache)[1], expected[1])


def read_only(**_):
    raise OSError(30, "read-only")


def test_whatever_is_wrong_with_the_cache_the_graph_answers(made, tmp_path, monkeypatch):
    expected = answer(made, None)
    monkeypatch.setattr(
        "export.graph_cache.tempfile.mkdtemp", lambda **_: (_ for _ in ()).throw(OSError(30, "read-only"))
    )
    np.testing.assert_array_equal(answer(made, tmp_path / "cache")[1], expected[1])
    monkeypatch.undo()
    answer(made, tmp_path / "cache")
    [entry] = entries(tmp_path / "cache")
    monkeypatch.setattr("export.graph_cache._is_good", lambda *_: True)
    shutil.rmtree(entry)  # went between the look and the reading
    np.testing.assert_array_equal(answer(made, tmp_path / "cache")[1], expected[1])


@pytest.mark.parametrize("open_to", ["all", "a link", "a file"])
def test_a_folder_that_others_can_write_to_is_left_alone(made, tmp_path, open_to):
    cache = tmp_path / "cache"
    if open_to == "all":
        cache.mkdir(mode=0o700)
        cache.chmod(0o777)
    elif open_to == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        cache.symlink_to(tmp_path / "elsewhere")
    else:
        cache.write_bytes(b"")
    np.testing.assert_array_equal(answer(made, cache)[1], answer(made, None)[1])
    assert cache.is_file() or not any(cache.iterdir())


def test_graphs_with_other_weights_have_entries_of_their_own(tiny_model, made, tmp_path):
    cache, other = tmp_path / "cache", graph(tiny_model, tmp_path / "other", seed=1)
    assert (made / "model.onnx").read_bytes() == (other / "model.onnx").read_bytes()
    first, second = answer(made, cache), answer(other, cache)
    assert len(entries(cache)) == 2
    assert not np.array_equal(first[1], second[1])
    np.testing.assert_array_equal(answer(other, cache)[1], second[1])


def test_the_cache_is_the_users_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "slmcompress" / "graphs"

"""Items join and leave a bundle's catalogue, and its answers are those of the new tables."""

import json
import shutil

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from export.bundle import bundle
from export.golden import stored_golden
from export.items import read_items, write_items
from export.onnx_export import export_checkpoint, export_model
from export.runtime import OnnxRecommender
from export.update import NewItem, update_items, updated
from export.verify import verify
from slmrec.artifact import Stage, open_artifact, publish
from slmrec.catalogue import load_catalogue
from slmrec.cli.main import main
from slmrec.config import DataConfig, ExportConfig
from slmrec.dataset import load_dataset
from slmrec.errors import ArtifactError, ConfigError, DataError
from slmrec.interactions import prepare_dataset
from slmrec.models.checkpoint import save_checkpoint
from slmrec.ragged import Ragged
from slmrec.recommender import Histories
from slmrec.synthetic import write_log


@pytest.fixture(scope="module", params=["tied", "linear", "int8 items", "linear, int8 items"])
def made(request, tiny_model, tmp_path_factory):
    """A model and its bundle."""
    runs = tmp_path_factory.mktemp("runs")
    prepare_dataset([write_log(runs / "log.txt", num_items=40, num_users=60)], runs / "data", DataConfig())
    data = load_dataset(runs / "data")
    head = "linear" if request.param.startswith("linear") else "tied"
    model = tiny_model(prompt="none", num_items=data.num_items, head=head, positions="compact").eval()
    with publish(runs / "student", Stage(name="distill", kind="checkpoint", settings={})) as folder:
        save_checkpoint(folder, model)
        data.items.save(folder)
    config = ExportConfig(int8_items=request.param.endswith("int8 items"))
    graph, _ = export_checkpoint(open_artifact(runs / "student"), data, runs / "export", config)
    bundle(graph, data, runs / "bundle")
    return model, runs / "bundle"


def new_items(path, model, rows):
    """A file of new items; a linear head gets the rows it needs."""
    if model.item_head is not None:
        rows = [{"output_vector": np.full(32, 0.1).tolist(), "bias": 2.0} | row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_joined_items_are_recommended_by_their_rows_and_retired_ones_never(made, tmp_path):
    model, path = made
    catalogue = load_catalogue(path)
    ids = catalogue.item_ids
    vector = (5 * np.ones(8)).tolist()
    rows = [{"item": "mean", "title": "A mean", "similar": list(ids[:3])}, {"item": "given", "vector": vector}]
    retired = tmp_path / "retired.txt"
    retired.write_text(f"{ids[4]}\n{ids[7]}\n")
    parent = open_artifact(path)
    result, was_there = update_items(
        parent, tmp_path / "new", items=new_items(tmp_path / "new.jsonl", model, rows), retire=retired
    )
    assert not was_there
    assert verify(tmp_path / "new").parity.num_equal_lists > 0
    after = load_catalogue(tmp_path / "new")
    assert [*after.item_ids] == [*ids, "mean", "given"]
    assert after.titles[-2:] == ["A mean", None]
    graph = OnnxRecommender(tmp_path / "new")
    assert graph.num_items == len(ids) + 2
    users = Histories.of(Ragged.from_rows([[1, 2], [9, 5, 3]]))  # 5 has gone, and is known all the same
    tables = [array.copy() for array in (read_items(path).table, read_items(path).outputs)]
    answer = graph.recommend(users, 40)
    vectors = graph.user_vectors(users)
    outputs = np.concatenate([tables[1][1 : len(ids) + 1], np.zeros((2, tables[1].shape[1]), np.float32)])
    outputs[-2] = tables[1][1:4].mean(axis=0) if model.item_head is None else 0.1
    outputs[-1] = vector if model.item_head is None else 0.1
    scores = vectors @ outputs.T
    if model.item_head is not None:
        scores += np.append(model.item_head.bias.detach().numpy(), [2, 2])
    scores[:, [4, 7]] = -np.inf
    for row, history in enumerate(users.item_ids):
        scores[row, history - 1] = -np.inf
        found = answer.item_ids[row][answer.item_ids[row] > 0]
        assert not {5, 8} & set(found.tolist())
        assert {len(ids) + 1, len(ids) + 2} <= set(found.tolist())
        np.testing.assert_allclose(answer.scores[row, : len(found)], -np.sort(-scores[row])[: len(found)], rtol=1e-4)
        np.testing.assert_allclose(answer.scores[row, : len(found)], scores[row, found - 1], rtol=1e-4, atol=1e-5)
    newcomer = graph.recommend(Histories.of(Ragged.from_rows([[]])), 40).item_ids[0]
    counts = catalogue.num_interactions
    assert sorted(newcomer[newcomer > 0]) == sorted({*range(1, len(ids) + 3)} - {5, 8})
    assert newcomer[0] == max(
        (item for item in range(1, len(ids) + 1) if item not in (5, 8)), key=lambda i: counts[i - 1]
    )
    changed = read_items(tmp_path / "new").table
    np.testing.assert_allclose(changed[len(ids) + 1], tables[0][1:4].mean(axis=0), rtol=1e-5, atol=1e-6)
    weight, bias = model.item_proj.weight.detach().numpy(), model.item_proj.bias.detach().numpy()
    np.testing.assert_allclose(changed[len(ids) + 2], weight @ np.array(vector, "f4") + bias, rtol=1e-4, atol=1e-5)
    again, was_there = update_items(parent, tmp_path / "new", items=tmp_path / "new.jsonl", retire=retired)
    assert was_there
    assert again.hash == result.hash


def test_what_was_measured_on_the_old_catalogue_stays_behind(made, tmp_path):
    model, path = made
    copy = shutil.copytree(path, tmp_path / "bundle")
    (copy / "benchmark.json").write_text("{}")
    (copy / "model.plan").write_text("an engine of the old catalogue")
    rows = [{"item": "new", "similar": [load_catalogue(path).item_ids[0]]}]
    parent = open_artifact(path)
    parent = type(parent)(copy, parent.manifest)
    update_items(parent, tmp_path / "new", items=new_items(tmp_path / "new.jsonl", model, rows), retire=None)
    names = {entry.name for entry in (tmp_path / "new").iterdir()}
    assert not names & {"benchmark.json", "model.plan", "parity.json"}
    histories, answer = stored_golden(tmp_path / "new")
    assert len(histories) == len(answer) == len(stored_golden(path)[0]) + 1  # one with the new item at its end
    assert histories.item_ids[len(histories) - 1][-1] == 41


def test_a_thousand_random_updates_leave_what_a_dictionary_has(tiny_model, tmp_path):
    model = tiny_model(prompt="none", num_items=100, positions="compact").eval()
    export_model(model, tmp_path, ExportConfig(spare_items=10, top_k=20, append=False, int8_items=True))
    projection = {"weight": model.item_proj.weight.detach().numpy().T, "bias": model.item_proj.bias.detach().numpy()}
    users = Histories.of(Ragged.from_rows([[1, 2, 3], [50, 7]]))
    vectors = OnnxRecommender(tmp_path).user_vectors(users)
    known = {item: model.item_table.weight[item].detach().numpy() for item in range(1, 101)}
    generator, tables = np.random.default_rng(0), read_items(tmp_path)
    for turn in range(1000):
        joining, leaving = [], []
        if generator.random() < 0.7 and tables.count < tables.rows - 1:
            near = tuple(generator.choice(sorted(known), size=3).tolist())
            given = generator.normal(size=8).astype(np.float32) if generator.random() < 0.5 else None
            joining = [NewItem(f"new {turn}", None, () if given is not None else near, given, None, 0.0)]
            known[tables.count + 1] = np.mean([known[i] for i in near], axis=0) if given is None else given
        if generator.random() < 0.6 and len(known) > 40:
            leaving = [int(generator.choice(sorted(known)))]
            del known[leaving[0]]
        tables = updated(tables, joining, leaving, projection)
        if turn % 25 == 0 or turn == 999:
            write_items(tmp_path, tables)
            signature = json.loads((tmp_path / "signature.json").read_text()) | {"num_items": tables.count}
            (tmp_path / "signature.json").write_text(json.dumps(signature))
            answer = OnnxRecommender(tmp_path).recommend(users, 20)
            for row, history in enumerate(users.item_ids):
                scores = {item: vectors[row] @ v for item, v in known.items() if item not in history}
                best = sorted(scores, key=lambda item: -scores[item])[:20]
                np.testing.assert_allclose(answer.scores[row], [scores[item] for item in best], rtol=1e-4, atol=1e-5)
                assert set(answer.item_ids[row].tolist()) <= set(known)
    assert tables.count > 600


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"item": "1", "similar": ["1"]}, "the item '1' is there already"),
        ({"item": "x", "similar": ["nobody"]}, "row 1: the item 'nobody' is not among the 40 items"),
        ({"item": "x"}, "similar or vector is needed, one of the two; there is neither"),
        ({"item": "x", "similar": ["1"], "vector": [0.0] * 8}, "one of the two; there is both"),
        ({"item": "x", "vector": [0.0] * 7}, "vector has 7 numbers, expected are 8"),
        ({"item": "x", "vector": [1e39] * 8}, "vector is not finite"),
        ({"similar": ["1"]}, "the item is None"),
        ({"item": {"id": "x"}, "similar": ["1"]}, "the item is {'id': 'x'}"),
        ({"item": True, "similar": ["1"]}, "the item is True"),
        ({"item": "x", "titel": "Alien", "similar": ["1"]}, "the column 'titel' is unknown"),
        ({"item": "x", "title": 7, "similar": ["1"]}, "its title 7; expected are an id on one line and a text"),
        ({"item": "x", "title": "\ud800", "similar": ["1"]}, "expected are an id on one line and a text"),
        ({"item": "x\ny", "similar": ["1"]}, "expected are an id on one line and a text"),
        ({"item": "\x00", "similar": ["1"]}, "expected are an id on one line and a text"),
        ({"item": " x", "similar": ["1"]}, "expected are an id on one line and a text"),
        ({"item": "x", "vector": [float("nan")] * 8}, "vector is not finite"),
        ({"item": "x", "similar": "12"}, "similar is '12', expected is a list of ids"),
        ({"item": "x", "similar": [1, 2]}, "expected is a list of ids as text"),
        ({"item": "x", "vector": "0.1 0.2"}, "vector is '0.1 0.2'"),
        ({"item": "x", "vector": [0.0] * 8, "bias": 1e39}, "bias is not finite|takes neither"),
    ],
)
def test_items_that_cannot_join_are_refused_by_row(made, tmp_path, row, message):
    model, path = made
    first = load_catalogue(path).item_ids[0]
    if row.get("similar") == ["1"]:
        row = row | {"similar": [first]}
    if row.get("item") == "1":
        row["item"] = first
        message = message.replace("'1'", repr(row["item"]))
    file = new_items(tmp_path / "new.jsonl", model, [row])
    with np.errstate(over="ignore"), pytest.raises(DataError, match=message):
        update_items(open_artifact(path), tmp_path / "out", items=file, retire=None)
    assert not (tmp_path / "out").exists()


def test_more_items_than_there_is_room_for_ask_for_a_new_export(made, tmp_path):
    model, path = made
    first = load_catalogue(path).item_ids[0]
    rows = [{"item": f"n{number}", "similar": [first]} for number in range(200)]
    file = new_items(tmp_path / "new.jsonl", model, rows)
    with pytest.raises(DataError, match="has 200 items, and the bundle has room for 87") as caught:
        update_items(open_artifact(path), tmp_path / "out", items=file, retire=None)
    assert "--spare-items" in str(caught.value)


def test_a_linear_head_needs_rows_and_a_tied_one_has_none(made, tmp_path):
    model, path = made
    row = {"item": "x", "similar": [load_catalogue(path).item_ids[0]]}
    linear = model.item_head is not None
    file = tmp_path / "new.jsonl"
    file.write_text(json.dumps(row if linear else row | {"output_vector": [0.0] * 8}))
    with pytest.raises(DataError, match="takes an output_vector" if linear else "takes neither output_vector"):
        update_items(open_artifact(path), tmp_path / "out", items=file, retire=None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("new.csv", b"item\nx"), ("new.parquet", b"no parquet"), ("new.jsonl", b""), ("new.jsonl", b"[1]"),
        ("new.jsonl", b"{item}"), ("new.jsonl", b'{"item": "\xff"}'), ("new.jsonl", b"[" * 100_000),
    ],
)  # fmt: skip
def test_other_files_are_refused(made, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"neither|cannot be read|has no item|is no record"):
        update_items(open_artifact(made[1]), tmp_path / "out", items=tmp_path / name, retire=None)


def test_the_command_updates_a_bundle_and_nothing_else(made, tmp_path):
    model, path = made
    rows = [{"item": "x", "similar": [load_catalogue(path).item_ids[0]]}]
    if model.item_head is not None:
        rows[0] |= {"output_vector": [0.0] * 32, "bias": 0.0}
    pl.DataFrame(rows).write_parquet(tmp_path / "new.parquet")
    arguments = ["update-items", str(path), "-o", str(tmp_path / "new"), "--json"]
    done = CliRunner().invoke(main, [*arguments, "--items", str(tmp_path / "new.parquet")])
    assert done.exit_code == 0, done.output
    assert load_catalogue(tmp_path / "new").item_ids[-1] == "x"
    with pytest.raises(ConfigError, match="neither new items nor retired"):
        CliRunner().invoke(main, arguments, catch_exceptions=False, standalone_mode=False)
    arguments[1] = str(path.parent / "export")
    with pytest.raises(ArtifactError, match="expected a bundle"):
        CliRunner().invoke(main, arguments, catch_exceptions=False, standalone_mode=False)


def test_columns_that_come_late_in_a_file_are_read(made, tmp_path):
    model, path = made
    first = load_catalogue(path).item_ids[0]
    rows = [{"item": f"n{number}", "similar": [first]} for number in range(80)]
    rows[-1]["title"] = "The last"
    update_items(open_artifact(path), tmp_path / "new", items=new_items(tmp_path / "n.jsonl", model, rows), retire=None)
    assert load_catalogue(tmp_path / "new").titles[-1] == "The last"
    histories, _ = stored_golden(tmp_path / "new")
    assert len(histories) == len(stored_golden(path)[0]) + 64
    again = update_items(
        open_artifact(tmp_path / "new"), tmp_path / "newer", items=new_items(tmp_path / "m.jsonl", model, [
            {"item": "m", "similar": [first]}]), retire=None,
    )  # fmt: skip
    assert len(stored_golden(again[0].path)[0]) == 65


@pytest.mark.parametrize("fold_items", [True, False])
def test_a_vector_is_projected_where_the_table_is_also_where_widths_are_equal(tiny_model, tmp_path, fold_items):
    import torch

    model = tiny_model(prompt="none", num_items=40).eval()
    for name, value in (("item_table", torch.nn.Embedding(41, 32)), ("item_proj", torch.nn.Linear(32, 32)),
                        ("user_proj", torch.nn.Linear(32, 32, bias=False))):  # fmt: skip
        setattr(model, name, value)
    export_model(model, tmp_path, ExportConfig(fold_items=fold_items, append=False))
    signature = json.loads((tmp_path / "signature.json").read_text())
    assert signature["folds_items"] == fold_items
    vector = np.ones(32, dtype=np.float32)
    projection = {"weight": model.item_proj.weight.detach().numpy().T, "bias": model.item_proj.bias.detach().numpy()}
    item = NewItem("x", None, (), vector, None, 0.0)
    tables = updated(read_items(tmp_path), [item], [], projection if signature["folds_items"] else {})
    write_items(tmp_path, tables)
    (tmp_path / "signature.json").write_text(json.dumps(signature | {"num_items": 41}))
    users = Histories.of(Ragged.from_rows([[1, 41]]))
    with torch.no_grad():
        table = torch.cat([model.item_table.weight, torch.ones(1, 32)])
        model.item_table = torch.nn.Embedding.from_pretrained(table)
        expected = model.score(torch.tensor([[1, 41]]))[0].numpy()
    expected[[0, 40]] = -np.inf
    scores = OnnxRecommender(tmp_path).recommend(users, 20).scores[0]
    np.testing.assert_allclose(scores, -np.sort(-expected)[:20], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flag", ["items", "retire"])
@pytest.mark.parametrize("kind", ["missing", "folder", "binary"])
def test_files_that_are_none_are_refused_by_name(made, tmp_path, flag, kind):
    path = tmp_path / "file.jsonl"
    if kind == "folder":
        path.mkdir()
    elif kind == "binary":
        path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(DataError, match=r"file\.jsonl (is no file|is no UTF-8 text|cannot be read)"):
        update_items(open_artifact(made[1]), tmp_path / "out", **{"items": None, "retire": None} | {flag: path})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("retired", "message"),
    [
        (None, "leaves no item that could be recommended"),
        ("\n \n", "names no item"),
        ("nobody\n", "line 1: the item 'no"),
    ],
)
def test_a_list_of_retired_items_names_some_and_leaves_some(made, tmp_path, retired, message):
    _, path = made
    file = tmp_path / "retired.txt"
    file.write_text("\n".join(load_catalogue(path).item_ids) if retired is None else retired)
    with pytest.raises(DataError, match=message):
        update_items(open_artifact(path), tmp_path / "out", items=None, retire=file)
    assert not (tmp_path / "out").exists()

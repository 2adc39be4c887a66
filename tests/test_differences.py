"""diff: everything that two artefacts differ in, and nothing else."""

import json

import pytest
from click.testing import CliRunner

from slmrec.artifact import Stage, open_artifact, publish
from slmrec.cli.main import main
from slmrec.differences import differences


def make(path, content=b"weights", parent=None, **settings):
    stage = Stage(name="distill", kind="checkpoint", settings=settings, parents={} if parent is None else {"p": parent})
    with publish(path, stage) as folder:
        (folder / "model").write_bytes(content)
    return open_artifact(path)


def said(old, new):
    return [(one.what, one.name) for one in differences(old, new)]


def test_the_same_run_made_twice_differs_in_nothing(tmp_path):
    first, second = (make(tmp_path / name, layers=4, train={"seed": 1}) for name in ("a", "b"))
    assert first.manifest["created"] != second.manifest["created"]
    assert differences(first, second) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"layers": 3}, [("settings", "layers")]),
        ({"train": {"seed": 2}}, [("settings", "train.seed")]),
        ({"more": None}, []),
        ({"content": b"others"}, [("files", "model")]),
    ],
)
def test_each_difference_is_named_where_it_lies(tmp_path, change, expected):
    common = {"layers": 4, "train": {"seed": 1}}
    assert said(make(tmp_path / "a", **common), make(tmp_path / "b", **common | change)) == expected


def test_another_ancestor_is_named_with_what_it_was_made_with(tmp_path):
    teachers = [make(tmp_path / f"teacher{seed}", content=bytes([seed]), seed=seed) for seed in (1, 2)]
    old, new = (make(tmp_path / f"s{number}", parent=teacher) for number, teacher in enumerate(teachers))
    assert said(old, new) == [("lineage", "distill"), ("lineage", "distill.seed")]


def test_the_command_prints_lines_or_json(tmp_path):
    make(tmp_path / "a", layers=4)
    make(tmp_path / "b", layers=3, content=b"other")

    def call(*arguments):
        return CliRunner().invoke(main, ["diff", *map(str, arguments)]).stdout

    assert "settings  layers: 4 -> 3" in call(tmp_path / "a", tmp_path / "b")
    assert call(tmp_path / "a", tmp_path / "a") == "no difference but dates and places\n"
    found = json.loads(call(tmp_path / "a", tmp_path / "b", "--json"))
    assert found["equal"] is False
    assert [one["what"] for one in found["differences"]] == ["settings", "files"]

"""Artefact folders: atomic, hashed, aware of their parents, and never somebody else's."""

import json
from pathlib import Path

import pytest

from slmrec.artifact import Stage, find_artifacts, is_up_to_date, open_artifact, publish, require_fresh
from slmrec.errors import ArtifactError

PLAN = Stage(name="make", kind="checkpoint", settings={"depth": 4})


def make(path: Path, text: str = "hello", stage: Stage = PLAN):
    with publish(path, stage) as folder:
        (folder / "a.txt").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "b.txt").write_text("there")
    return open_artifact(path)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_published_artefact_opens_and_names_its_files(tmp_path):
    artifact = make(tmp_path / "made")
    assert set(artifact.manifest["files"]) == {"a.txt", "sub/b.txt"}
    assert artifact.size_bytes == len("hello") + len("there")
    assert names(tmp_path) == ["made"]


def test_equal_content_has_equal_hashes_wherever_it_lies(tmp_path):
    assert make(tmp_path / "one").hash == make(tmp_path / "two").hash != make(tmp_path / "three", "other").hash


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_damaged_files_are_refused_by_name(tmp_path, damage):
    make(tmp_path / "made")
    file = tmp_path / "made" / "a.txt"
    {"missing": file.unlink, "truncated": lambda: file.write_text("hell"), "altered": lambda: file.write_text("hellO")}[
        damage
    ]()
    with pytest.raises(ArtifactError, match=r"a\.txt"):
        open_artifact(tmp_path / "made")


def test_a_failed_run_leaves_the_old_artefact_and_nothing_else(tmp_path):
    before = make(tmp_path / "made")

    def fail():
        with publish(tmp_path / "made", PLAN) as folder:
            (folder / "a.txt").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert open_artifact(tmp_path / "made").hash == before.hash
    assert names(tmp_path) == ["made"]


def test_a_run_killed_between_the_two_renames_gets_its_old_artefact_back(tmp_path):
    before = make(tmp_path / "made")
    (tmp_path / "made").rename(tmp_path / ".made.replaced")
    assert is_up_to_date(tmp_path / "made", PLAN, force=False)
    assert open_artifact(tmp_path / "made").hash == before.hash


def test_the_same_run_is_up_to_date_and_another_needs_force(tmp_path):
    make(tmp_path / "made")
    other = Stage(name="make", kind="checkpoint", settings={"depth": 5})
    assert is_up_to_date(tmp_path / "made", PLAN, force=False)
    with pytest.raises(ArtifactError, match=r"--force.*depth: 4 -> 5"):
        is_up_to_date(tmp_path / "made", other, force=False)
    assert not is_up_to_date(tmp_path / "made", other, force=True)


def test_a_folder_that_is_not_ours_is_left_alone_even_with_force(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(ArtifactError, match="not made by slmcompress"):
        is_up_to_date(tmp_path / "photos", PLAN, force=True)
    with pytest.raises(ArtifactError, match="not made by slmcompress"):
        make(tmp_path / "photos")
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"meow"


def test_an_existing_empty_folder_is_taken(tmp_path):
    (tmp_path / "made").mkdir()
    assert not is_up_to_date(tmp_path / "made", PLAN, force=False)
    make(tmp_path / "made")
    assert names(tmp_path) == ["made"]


def test_force_never_replaces_what_the_artefact_is_made_from_nor_another_kind(tmp_path):
    parent = make(tmp_path / "parent")
    child = make(tmp_path / "child", stage=Stage(name="child", kind="checkpoint", settings={}, parents={"p": parent}))
    again = Stage(name="grandchild", kind="checkpoint", settings={}, parents={"c": child})
    for output in ("parent", "child", "child/../parent"):
        with pytest.raises(ArtifactError, match="would be made from"):
            is_up_to_date(tmp_path / output, again, force=True)
    bundle = Stage(name="bundle", kind="bundle", settings={}, parents={})
    with pytest.raises(ArtifactError, match=r"holds a checkpoint \(made by make\), which no bundle can replace"):
        is_up_to_date(tmp_path / "parent", bundle, force=True)


def test_every_file_has_the_mode_of_a_new_file(tmp_path):
    with publish(tmp_path / "made", PLAN) as folder:
        (folder / "secret").touch(mode=0o600)
        (folder / "plain").touch()
    assert (tmp_path / "made" / "secret").stat().st_mode == (tmp_path / "made" / "plain").stat().st_mode


def test_a_changed_ancestor_makes_every_descendant_stale(tmp_path):
    parent = make(tmp_path / "parent")
    child = make(tmp_path / "child", stage=Stage(name="child", kind="checkpoint", settings={}, parents={"p": parent}))
    grandchild = make(
        tmp_path / "grandchild", stage=Stage(name="grandchild", kind="checkpoint", settings={}, parents={"c": child})
    )
    require_fresh(grandchild)
    assert grandchild.stages == ["make", "child", "grandchild"]
    make(tmp_path / "parent", "changed")
    for artifact in (child, grandchild):
        with pytest.raises(ArtifactError, match=r"child is stale: .*parent has changed"):
            require_fresh(artifact)


def test_artefacts_are_found_newest_first_and_hidden_folders_are_not(tmp_path):
    for name in ("b", "a", "c"):
        make(tmp_path / name)
    (tmp_path / "a").rename(tmp_path / ".a.partial")
    assert [artifact.path.name for artifact in find_artifacts(tmp_path)] == ["c", "b"]


def test_a_manifest_of_a_newer_schema_is_refused(tmp_path):
    make(tmp_path / "made")
    manifest = json.loads((tmp_path / "made" / "manifest.json").read_text())
    (tmp_path / "made" / "manifest.json").write_text(json.dumps(manifest | {"schema": 99}))
    with pytest.raises(ArtifactError, match="newer slmcompress"):
        open_artifact(tmp_path / "made")

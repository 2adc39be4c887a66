"""Which stages, trainings and analyses a report tells of."""

from pathlib import Path

import pytest
from benchmarked import artifact

from slmrec.artifact import Artifact, Stage, publish, write_json
from slmrec.errors import ArtifactError
from slmrec.report_sources import find_analyses, stages_of, trainings


@pytest.fixture
def chain(tmp_path: Path) -> dict[str, Artifact]:
    """teacher -> student -> pruned -> int8, of which teacher and int8 take part under names of their own."""
    teacher = artifact(tmp_path / "teacher", "train-teacher")
    student = artifact(tmp_path / "student", "distill", teacher=teacher)
    pruned = artifact(tmp_path / "pruned", "prune", model=student)
    return {"big": teacher, "small": artifact(tmp_path / "int8", "quantize", model=pruned)}


def analyse(runs: Path, name: str, model: Artifact) -> None:
    with publish(runs / name, Stage(name=name, kind="analysis", settings={}, parents={"model": model})) as folder:
        write_json(folder / f"{name}.json", {"num_users": 3, "split": "validation", "layers": []})


def test_stages_stand_once_in_the_order_they_were_made(chain: dict[str, Artifact]) -> None:
    stages = stages_of(chain)
    assert [stage["stage"] for stage in stages] == ["train-teacher", "distill", "prune", "quantize"]
    assert [stage["name"] for stage in stages] == ["big", None, None, "small"]
    assert [stage["before"] for stage in stages] == [None, None, None, "big"]


def test_trainings_of_ancestors_that_do_not_take_part_are_told_too(chain: dict[str, Artifact]) -> None:
    assert list(trainings(chain)) == ["big", "student", "pruned", "small"]
    assert list(trainings({"small": chain["small"]})) == ["teacher", "student", "pruned", "small"]


def test_a_folder_named_as_an_artefact_that_is_another_keeps_its_own_curve(chain: dict[str, Artifact]) -> None:
    found = trainings({"student": chain["small"]})
    assert len(found) == 4
    assert [name.split()[0] for name in found] == ["teacher", "student", "pruned", "student"]


def test_an_ancestor_that_is_gone_or_was_made_again_is_left_out(chain: dict[str, Artifact], tmp_path: Path) -> None:
    (tmp_path / "teacher").rename(tmp_path / "elsewhere")
    assert list(trainings({"small": chain["small"]})) == ["student", "pruned", "small"]
    with publish(tmp_path / "student", Stage(name="distill", kind="checkpoint", settings={})) as folder:
        (folder / "training.jsonl").write_text('{"step": 1, "ce": 9.0}\n')
    assert list(trainings({"small": chain["small"]})) == ["pruned", "small"]


def test_analyses_of_the_lineage_are_found_and_no_others(chain: dict[str, Artifact], tmp_path: Path) -> None:
    assert find_analyses(tmp_path, chain) == {}
    analyse(tmp_path, "sensitivity", chain["big"])
    analyse(tmp_path, "importance", artifact(tmp_path / "stranger", "distill"))
    found = find_analyses(tmp_path, chain)
    assert list(found) == ["sensitivity"]
    assert found["sensitivity"]["of"] == "big"


def test_an_analysis_that_was_altered_is_refused(chain: dict[str, Artifact], tmp_path: Path) -> None:
    analyse(tmp_path, "importance", chain["small"])
    file = tmp_path / "importance" / "importance.json"
    file.write_text(file.read_text().replace("3", "4"))
    with pytest.raises(ArtifactError, match="was altered"):
        find_analyses(tmp_path, chain)

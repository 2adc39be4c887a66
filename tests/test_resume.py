"""A killed run, started again, ends with the very bits of a run that was never interrupted."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slmrec.artifact import open_artifact
from slmrec.config import DataConfig, SasrecConfig, TrainConfig
from slmrec.dataset import load_dataset
from slmrec.interactions import prepare_dataset
from slmrec.synthetic import write_backbone, write_log
from slmrec.train_items import train_items

MOMENTS = [("step", 5), ("state-write", 2), ("evaluation", 2), ("weights-write", 1), ("final-rename", 1)]
DRIVER = Path(__file__).with_name("killed_run.py")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Run a stage in a process of its own; gives its return code."""
    backbone = write_backbone(tmp_path_factory.mktemp("input") / "backbone", num_layers=2)

    def run(stage: str, runs: Path, moment: str = "never", count: int = 0) -> int:
        command = [sys.executable, str(DRIVER), stage, str(runs), str(backbone), moment, str(count)]
        return subprocess.run(command, capture_output=True, check=False).returncode

    return run


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, start):
    """Runs with data, items, teacher and student, none of them interrupted."""
    runs = tmp_path_factory.mktemp("uninterrupted")
    prepare_dataset([write_log(runs / "log.txt", num_users=200)], runs / "data", DataConfig())
    train = TrainConfig(epochs=1, batch_size=64, learning_rate=1e-3, precision="fp32")
    train_items(load_dataset(runs / "data"), runs / "items", SasrecConfig(hidden_size=16, train=train))
    assert start("train-teacher", runs) == 0
    assert start("distill", runs) == 0
    return runs


def prepared(uninterrupted: Path, stage: str, tmp_path: Path) -> Path:
    """A copy of the runs as they were before the stage."""
    runs = tmp_path / "runs"
    shutil.copytree(uninterrupted, runs)
    for made in {"train-teacher": ["teacher", "student"], "distill": ["student"]}[stage]:
        shutil.rmtree(runs / made)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "output", "moment", "count"),
    [("train-teacher", "teacher", *moment) for moment in MOMENTS]
    + [("distill", "student", *moment) for moment in [*MOMENTS, ("features", 2)]],
)
def test_a_run_killed_and_resumed_gives_the_same_bits(uninterrupted, start, tmp_path, stage, output, moment, count):
    runs = prepared(uninterrupted, stage, tmp_path)
    assert start(stage, runs, moment, count) == -signal.SIGKILL
    assert not (runs / output).exists()
    assert start(stage, runs) == 0
    expected, resumed = open_artifact(uninterrupted / output), open_artifact(runs / output)
    assert resumed.manifest["files"] == expected.manifest["files"]
    assert sorted(path.name for path in runs.iterdir() if path.name.startswith(".")) == []

"""Two runs never make one output at the same time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slmrec.artifact import Stage, publish
from slmrec.errors import ArtifactError
from slmrec.locks import claimed, one_run_at_a_time

PLAN = Stage(name="make", kind="checkpoint", settings={})
HOLDER = "import sys; from pathlib import Path; from slmrec.locks import claimed\nwith claimed(Path(sys.argv[1])): "


@one_run_at_a_time
def stage(output):
    return sorted(path.name for path in output.parent.iterdir())


def holder(output, then):
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER + then, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_an_output_another_process_writes_is_refused_until_that_has_ended(tmp_path):
    with holder(tmp_path / "made", "print('held', flush=True); input()") as process:
        assert process.stdout.readline() == "held\n"
        for attempt in (stage, lambda output: publish(output, PLAN).__enter__()):
            with pytest.raises(ArtifactError, match=r"another run is writing .*made"):
                attempt(tmp_path / "made")
        with publish(tmp_path / "other", PLAN):
            pass
        process.communicate("\n")
    with publish(tmp_path / "made", PLAN):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "other"]


def test_the_lock_of_a_killed_process_holds_nobody_back(tmp_path):
    with holder(tmp_path / "made", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)") as process:
        process.wait()
    assert (tmp_path / ".made.lock").exists()
    with publish(tmp_path / "made", PLAN):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_claims_of_one_process_nest_and_the_outermost_ends_them(tmp_path):
    with claimed(tmp_path / "made"), publish(tmp_path / "made", PLAN):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert stage(tmp_path / "made") == [".made.lock", "made"]
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "made"):
        1 / 0  # noqa: B018
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="a folder that nobody can write in is needed")
def test_an_output_nobody_can_write_is_one_message():
    with pytest.raises(ArtifactError, match="/proc/made cannot be written"), claimed(Path("/proc/made")):
        pass


def test_a_folder_named_by_a_dot_that_holds_something_else_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="was not made by slmcompress"):
        publish(Path(), PLAN).__enter__()
    assert (tmp_path / "mine.txt").read_text() == "mine"

"""Bulk recommendations: shards that killed runs and killed workers leave whole, and requests that are refused."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import psutil
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import slmcompress
from test_server import NUM_ITEMS, make_bundle

from export.bulk import ATTEMPTS, Job, answer_shard, local_engine, recommend_folder
from export.runtime import OnnxRecommender
from export.shards import plan_shards, refuse_duplicates, request_files
from slmrec.artifact import open_artifact
from slmrec.bulk_config import BulkConfig
from slmrec.catalogue import load_catalogue
from slmrec.config import DataConfig
from slmrec.errors import ArtifactError, CheckError, ConfigError, DataError
from slmrec.interactions import prepare_dataset
from slmrec.ragged import Ragged
from slmrec.recommender import Histories
from slmrec.synthetic import write_log

NUM_USERS, SHARD_USERS = 30_000, 5_000
CONFIG = BulkConfig(top_k=5, shard_users=7)


@pytest.fixture(scope="module")
def bundles(tiny_model, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    prepare_dataset([write_log(runs / "log.txt", num_items=NUM_ITEMS, num_users=60)], runs / "data", DataConfig())
    return [open_artifact(make_bundle(tiny_model, runs, name, change)) for name, change in (("one", 0.0), ("two", 1.0))]


def users(count, seed=0):
    generator = np.random.default_rng(seed)
    ids = [str(item) for item in range(1, NUM_ITEMS + 1)]
    rows = [generator.permutation(ids)[: generator.integers(0, 15)].tolist() for _ in range(count)]
    return pl.DataFrame({"user": [f"u{number}" for number in range(count)], "history": rows, "age": range(count)})


def answer(bundle, source, output, config=CONFIG, **flags):
    engine = local_engine(OnnxRecommender(bundle.path), load_catalogue(bundle.path))
    return recommend_folder(bundle, source, output, config, engine, **flags)


def start(bundle, source, output, *flags):
    command = [sys.executable, "-m", "slmrec.cli.main", "recommend", "-m", str(bundle.path), "--input", str(source)]
    shards = ["--output", str(output), "-k", "5", "--shard-users", str(SHARD_USERS), "--json"]
    return subprocess.Popen(
        [*command, *shards, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
    )  # fmt: skip


def until(found, process, seconds=240):
    """What `found` gives as soon as it gives something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        value = found()
        if value:
            return value
        time.sleep(0.002)
    raise AssertionError("".join(process.communicate()))


def result(process):
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return json.loads(output)


def test_every_user_gets_what_the_runtime_gives_in_the_input_s_order(bundles, tmp_path):
    frame, folder = users(50), tmp_path / "in"
    folder.mkdir()
    frame[:20].write_parquet(folder / "a.parquet", row_group_size=9)
    frame[20:20].write_parquet(folder / "b.parquet")
    frame[20:].with_columns(pl.lit([]).cast(pl.List(pl.String)).alias("exclude")).write_parquet(folder / "c.parquet")
    frame[:5].write_parquet(folder / "_hidden.parquet")
    done = answer(bundles[0], folder, tmp_path / "out")
    assert (done.num_users, done.num_shards, done.was_there) == (50, 5 + 5, False)
    found = pl.read_parquet(tmp_path / "out" / "*.parquet")
    assert found["user"].to_list() == frame["user"].to_list()
    items = load_catalogue(bundles[0].path)
    histories = Histories.of(Ragged.from_rows([items.to_internal(row) for row in frame["history"]]))
    expected = OnnxRecommender(bundles[0].path).recommend(histories, 5)
    assert found["items"].to_list() == [[items.item_ids[item - 1] for item in row] for row in expected.item_ids]
    assert found["scores"].to_list() == expected.scores.tolist()
    assert answer(bundles[0], folder, tmp_path / "out").was_there
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@given(groups=st.lists(st.integers(1, 9), min_size=1, max_size=6), most=st.integers(1, 10))
@settings(max_examples=20, deadline=None)
def test_shards_cut_the_rows_without_gap_or_overlap(tmp_path_factory, groups, most):
    file, whole = tmp_path_factory.mktemp("cut") / "in.parquet", users(sum(groups))
    starts = itertools.accumulate(groups, initial=0)
    with pq.ParquetWriter(file, whole.to_arrow().schema) as writer:
        for start_row, length in zip(starts, groups, strict=False):
            writer.write_table(whole[start_row : start_row + length].to_arrow(), row_group_size=length)
    shards = plan_shards(file, [file], most)
    assert all(1 <= shard.rows <= most for shard in shards)
    requests = [request for shard in shards for request in shard.requests()]
    assert [request.user for request in requests] == whole["user"].to_list()
    assert [request.line for request in requests] == list(range(1, len(whole) + 1))


@pytest.mark.slow
def test_a_run_killed_twice_and_ended_by_ray_gives_the_bytes_of_one_that_was_not(bundles, tmp_path):
    bundle, source, output = bundles[0], tmp_path / "in.parquet", tmp_path / "out"
    users(NUM_USERS).write_parquet(source, row_group_size=2 * SHARD_USERS)
    work = tmp_path / ".out.work"
    first = start(bundle, source, output)
    until(lambda: len(list(work.glob("shard-*.parquet"))) >= 2, first)
    first.kill()
    first.communicate()
    assert not output.exists()
    kept = {path.name: path.stat().st_mtime_ns for path in work.glob("shard-*.parquet")}
    assert 2 <= len(kept) < NUM_USERS // SHARD_USERS
    second = start(bundle, source, output, "--engine", "ray", "--workers", "1")
    orphan = until(lambda: killed_in_the_middle(second, work), second)
    found = result(second)
    assert (found["num_users"], found["num_shards_found"]) == (NUM_USERS, len(kept))
    assert {name: (output / name).stat().st_mtime_ns for name in kept} == kept, "finished shards were done again"
    assert orphan not in kept
    answers = pl.read_parquet(output / "*.parquet")
    assert answers["user"].to_list() == [f"u{number}" for number in range(NUM_USERS)]
    config = BulkConfig(top_k=5, shard_users=SHARD_USERS)
    assert answer(bundle, source, tmp_path / "local", config).artifact.hash == found["hash"]


def killed_in_the_middle(process, work):
    """Kill Ray's worker while it writes a shard; the shard's name, or None where it was not at one."""
    if not list(work.glob(".*.partial")):
        return None
    workers = [one for one in psutil.Process(process.pid).children(recursive=True) if one.name().startswith("ray::Map")]
    if not workers or not list(work.glob(".*.partial")):
        return None
    workers[0].send_signal(signal.SIGKILL)
    workers[0].wait(30)
    [partial] = work.glob(".*.partial")
    name = partial.name[1:].partition(".parquet")[0] + ".parquet"
    assert not (work / name).exists()
    return name


def test_a_shard_at_which_workers_keep_dying_ends_the_run(bundles, tmp_path):
    source = tmp_path / "in.parquet"
    users(10).write_parquet(source)
    [_, shard] = plan_shards(source, [source], 7)
    job = Job(tmp_path, "key", 5)
    for number in range(ATTEMPTS):
        (tmp_path / f".{shard.name}.{job.run}.{number}.partial").touch()
    with pytest.raises(CheckError, match=r"3 workers died at in\.parquet, rows 8 to 10"):
        answer_shard(OnnxRecommender(bundles[0].path), load_catalogue(bundles[0].path), shard, job)


def test_what_another_bundle_answered_is_kept_unless_forced(bundles, tmp_path):
    source, work = tmp_path / "in.parquet", tmp_path / ".out.work"
    users(20).write_parquet(source)
    first = answer(bundles[0], source, tmp_path / "out").artifact
    with pytest.raises(ArtifactError, match="with other settings or inputs"):
        answer(bundles[1], source, tmp_path / "out")
    assert open_artifact(tmp_path / "out").hash == first.hash
    (tmp_path / "out").rename(work)
    with pytest.raises(ArtifactError, match="finished shards of another run"):
        answer(bundles[1], source, tmp_path / "out")
    assert open_artifact(work).hash == first.hash
    with pytest.raises(ArtifactError, match="finished shards of another run"):
        answer(bundles[0], source, tmp_path / "out", BulkConfig(top_k=4, shard_users=7))
    other = answer(bundles[1], source, tmp_path / "out", force=True)
    assert (other.num_found, other.artifact.hash != first.hash) == (0, True)
    assert not work.exists()


BAD = {
    "duplicate": ({"user": ["a", "b", "a"], "history": [["1"]] * 3}, r"'a' is there twice, in\.parquet:1 and in\.parq"),
    "null user": ({"user": ["a", None], "history": [["1"]] * 2}, r"in\.parquet:2: the user is null"),
    "no user": ({"history": [["1"]]}, "has no column 'user'"),
    "no history": ({"user": ["a"]}, "has no column 'history'"),
    "misspelt": ({"user": ["a"], "history": [["1"]], "excluded": [["2"]]}, "is it 'exclude'"),
    "number": ({"user": [1.5], "history": [["1"]]}, "are of type double"),
    "unknown item": ({"user": ["a", "b"], "history": [["1"], ["zzz"]]}, r"in\.parquet:2: the item 'zzz' is not among"),
    "no list": ({"user": ["a"], "history": [7]}, r"in\.parquet:1: 7 is no list"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_one_message_and_no_output(bundles, tmp_path, case):
    content, message = BAD[case]
    pl.DataFrame(content).write_parquet(tmp_path / "in.parquet")
    with pytest.raises(DataError, match=message):
        answer(bundles[0], tmp_path / "in.parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"PAR1", "is not readable as .parquet"), (b"", "is not readable as .parquet")],
)
def test_a_file_that_is_no_parquet_is_a_message(bundles, tmp_path, content, message):
    source = tmp_path / "in.parquet"
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(DataError, match=message):
        answer(bundles[0], source, tmp_path / "out")


def test_a_damaged_page_is_a_message(bundles, tmp_path):
    source = tmp_path / "in.parquet"
    users(2000).write_parquet(source, compression="zstd")
    damaged = bytearray(source.read_bytes())
    column = pq.read_metadata(source).row_group(0).column(0)
    damaged[column.data_page_offset + 40 : column.data_page_offset + 400] = bytes(360)
    source.write_bytes(damaged)
    with pytest.raises(DataError, match="is not readable as"):
        answer(bundles[0], source, tmp_path / "out")


def test_an_empty_file_and_a_folder_without_any_are_messages(bundles, tmp_path):
    users(1)[:0].write_parquet(tmp_path / "in.parquet")
    with pytest.raises(DataError, match="is empty"):
        answer(bundles[0], tmp_path / "in.parquet", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="nor a folder of any"):
        request_files(tmp_path / "empty")


@given(names=st.lists(st.text("abc", min_size=1, max_size=2), min_size=1, max_size=12), at_once=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_duplicates_are_found_however_few_users_are_compared_at_once(tmp_path_factory, names, at_once):
    folder = tmp_path_factory.mktemp("twice")
    for number, part in enumerate((names[::2], names[1::2])):
        pl.DataFrame({"user": part}, schema={"user": pl.String}).write_parquet(folder / f"{number}.parquet")
    if len(set(names)) == len(names):
        refuse_duplicates(request_files(folder), len(names), at_once)
    else:
        with pytest.raises(DataError, match="is there twice"):
            refuse_duplicates(request_files(folder), len(names), at_once)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "out.parquet", "--engine", "ray"], "Try: --output out"),
        (["--output", "out", "--workers", "2"], "the engine local is one process"),
        (["--output", "out", "--shard-users", "0"], "shard_users=0 is below 1"),
        (["--output", "out", "-k", "4000"], "k=4000 was asked for"),
        (["--output", "out.txt"], "ends in none of"),
    ],
)
def test_flags_that_do_not_fit_are_one_message(bundles, tmp_path, flags, message):
    users(3).write_parquet(tmp_path / "in.parquet")
    found = slmcompress("recommend", "-m", str(bundles[0].path), "--input", "in.parquet", *flags, cwd=tmp_path)
    assert (found.returncode, message in found.stderr, "Traceback" in found.stderr) == (2, True, False), found.stderr


def test_ray_that_is_not_installed_is_a_message(monkeypatch):
    from export.bulk_ray import ray_engine

    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "ray.data", raising=False)
    with pytest.raises(ConfigError, match=r"slmcompress\[ray\]"):
        ray_engine(Path("bundle"))


def test_workers_need_no_pytorch():
    script = "import sys, ray.data, export.bulk_ray; print([name for name in ('torch',) if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"

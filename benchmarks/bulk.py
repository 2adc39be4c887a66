"""A list for each of many users, by `recommend --engine local` and `--engine ray` with a worker killed on the way.

    python benchmarks/bulk.py runs/demo --users 200000

Users are contiguous parts of the histories of RUNS/data, at random; the model is RUNS/bundle. Both outputs must be the
same bytes, with every user once. Memory is the peak of the local process, for all users and for a tenth of them.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
from recording import record

from slmrec.artifact import open_artifact

K, SHARD_USERS, POLL_S = 10, 4096, 0.02


def write_users(data: Path, count: int, path: Path) -> None:
    """Contiguous parts of real histories, of every length."""
    dataset = pl.read_parquet(data / "interactions.parquet").sort("user", "timestamp", maintain_order=True)
    ids = np.array(pl.read_parquet(data / "items.parquet")["item_id"].to_list())
    whole = [ids[np.array(items) - 1] for items in dataset.group_by("user", maintain_order=True).agg("item")["item"]]
    generator = np.random.default_rng(0)
    rows = []
    for number in generator.integers(0, len(whole), count):
        stop = generator.integers(1, len(whole[number]) + 1)
        rows.append(whole[number][generator.integers(0, stop) : stop].tolist())
    users = pl.DataFrame({"user": [f"u{number}" for number in range(count)], "history": rows})
    users.write_parquet(path, row_group_size=4 * SHARD_USERS)


def peak_bytes(pid: int) -> int:
    """Peak of a process's resident memory so far; 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return 1024 * int(lines[0].split()[1]) if lines else 0


def run(model: Path, source: Path, output: Path, engine: str, *, kill: bool = False) -> dict[str, Any]:
    """One run of the command: seconds from its start, users a second between first and last shard, peak memory."""
    command = [sys.executable, "-m", "slmrec.cli.main", "recommend", "-m", str(model), "--input", str(source)]
    command += ["--output", str(output), "-k", str(K), "--shard-users", str(SHARD_USERS), "--engine", engine, "--json"]
    begin, peak, killed, first = time.perf_counter(), 0, not kill, None
    work = output.with_name(f".{output.name}.work")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while process.poll() is None:
        peak = max(peak, peak_bytes(process.pid))
        if first is None and any(work.glob(".shard-*.partial")):
            first = time.perf_counter()
        if not killed and len(list(work.glob("shard-*.parquet"))) >= 2 and any(work.glob(".shard-*.partial")):
            killed = kill_worker(process.pid)
        time.sleep(POLL_S)
    end = time.perf_counter()
    output_text = process.communicate()[0]
    assert process.returncode == 0, output_text
    assert killed, "the run ended before a worker could be killed"
    done = json.loads(output_text)
    assert first is not None
    return {
        "engine": engine, "num_users": done["num_users"], "num_shards": done["num_shards"], "worker_killed": kill,
        "seconds": end - begin, "users_per_second": done["num_users"] / (end - begin),
        "users_per_second_after_start": done["num_users"] / (end - first), "peak_bytes": peak, "hash": done["hash"],
    }  # fmt: skip


def kill_worker(pid: int) -> bool:
    """Kill one of Ray's workers of a run; False where none is at work."""
    for one in psutil.Process(pid).children(recursive=True):
        if one.name().startswith("ray::Map"):
            one.send_signal(signal.SIGKILL)
            return True
    return False


def main() -> None:
    """Make users, run, compare, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="a finished demo")
    parser.add_argument("--users", type=int, default=200_000)
    arguments = parser.parse_args()
    model, found = arguments.runs / "bundle", []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, count in (("tenth", arguments.users // 10), ("all", arguments.users)):
            write_users(arguments.runs / "data", count, folder / f"{name}.parquet")
            found.append(run(model, folder / f"{name}.parquet", folder / f"{name}-local", "local"))
            print(json.dumps(found[-1]), flush=True)
        found.append(run(model, folder / "all.parquet", folder / "all-ray", "ray", kill=True))
        print(json.dumps(found[-1]), flush=True)
        assert open_artifact(folder / "all-local").hash == open_artifact(folder / "all-ray").hash, "outputs differ"
        users = pl.read_parquet(folder / "all-ray" / "*.parquet", columns=["user"])["user"]
        assert users.n_unique() == len(users) == arguments.users, "a user is missing, or there twice"
    record("bulk", {"top_k": K, "shard_users": SHARD_USERS, "model": open_artifact(model).hash, "engines": found})


if __name__ == "__main__":
    main()

"""Rows a second and peak memory of `slmcompress data` on a large CSV log.

    python benchmarks/data_speed.py --rows 10000000

The log is made here (200,000 users, 50,000 items, times in random order) and thrown away.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
from recording import record

CHUNK = 1_000_000


def write_log(path: Path, rows: int) -> None:
    """A CSV of user, item, rating and time, a million rows at a time."""
    generator = np.random.default_rng(0)
    for start in range(0, rows, CHUNK):
        count = min(CHUNK, rows - start)
        frame = pl.DataFrame(
            {
                "user_id": generator.integers(200_000, size=count),
                "item_id": (generator.pareto(1.0, size=count) * 100).astype(np.int64) % 50_000,
                "rating": generator.integers(1, 6, size=count),
                "timestamp": generator.integers(1_000_000_000, 1_700_000_000, size=count),
            }
        ).with_columns(pl.format("u{}", "user_id").alias("user_id"))
        with path.open("ab") as stream:
            frame.write_csv(stream, include_header=start == 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.csv"
        write_log(log, rows)
        command = [sys.executable, "-c", "from slmrec.cli.main import run; run()", "data", str(log)]
        start = time.perf_counter()
        made = subprocess.run([*command, "--runs", folder, "--json"], check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        info = json.loads(made.stdout)
        assert info["num_rows_read"] == rows
        result = {
            "rows": rows,
            "file_bytes": log.stat().st_size,
            "seconds": seconds,
            "rows_per_second": rows / seconds,
            "peak_bytes": peak,
            "num_users": info["num_users"],
            "num_items": info["num_items"],
        }
    record("data_speed", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

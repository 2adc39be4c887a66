"""What a further process on the same artefact costs: private and shared memory, and the price of sharing more.

    python benchmarks/process_memory.py --num-items 100000 --processes 4

The 4-layer student of `serving_speed.py` with a larger catalogue, fp32 and 8-bit. Private memory is what a process
alone has (USS); the rest of what is resident is shared with the others (mapped data files, libraries). ONNX Runtime
packs weights into an order of its own, privately; unpacked ones are read where they are mapped, which costs time.
All processes answer the same request, and must agree.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import serving_speed
from contest import Contestant, contest, ratios
from recording import record
from serving_speed import graph_folder, own, student, write_requests

from compress.int8 import quantize_model

WAYS = {"packed": (), "unpacked": ("--unpacked",)}


def memory(folder: Path, requests: Path, processes: int, flags: tuple[str, ...]) -> dict[str, Any]:
    """Memory of every process when all run and have answered, and whether their lists are one."""
    running = [own("graph", folder, *flags) for _ in range(processes)]
    for one in running:
        one.seconds(requests)
    found = [psutil.Process(one.process.pid).memory_full_info() for one in running]
    lists = [one.lists(requests) for one in running]
    for one in running:
        one.close()
    assert all(np.array_equal(lists[0], other) for other in lists), "processes disagree"
    return {
        "private_mb": [info.uss / 1e6 for info in found],
        "shared_mb": [(info.rss - info.uss) / 1e6 for info in found],
        "proportional_mb": sum(info.pss for info in found) / 1e6,
    }


def times(folder: Path, requests: dict[str, Path], rounds: int) -> dict[str, Any]:
    """How fast unpacked weights are against packed ones."""
    contestants: dict[str, Contestant] = {way: own("graph", folder, *flags) for way, flags in WAYS.items()}
    medians = contest(contestants, requests, rounds)
    for contestant in contestants.values():
        contestant.close()
    return {size: ratios(found, "packed")["unpacked"] for size, found in medians.items()}


def main() -> None:
    """Export, run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-items", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    serving_speed.NUM_ITEMS = arguments.num_items
    model, result = student(4), {}
    with tempfile.TemporaryDirectory() as place:
        requests = write_requests(Path(place), [1, 32], batches=4)
        for name, one in (("fp32", model), ("8-bit", quantize_model(model))):
            folder = graph_folder(one, Path(place) / name)
            mapped = sum((folder / data).stat().st_size for data in ("model.onnx.data", "items.onnx.data"))
            ways = {way: memory(folder, requests["batch 1"], arguments.processes, flags) for way, flags in WAYS.items()}
            result[name] = {
                "data_files_mb": mapped / 1e6, **ways, "unpacked_speed": times(folder, requests, arguments.rounds),
            }  # fmt: skip
            print(json.dumps({name: result[name]}), flush=True)
    record("process_memory", {"num_items": arguments.num_items, "processes": arguments.processes, **result})


if __name__ == "__main__":
    main()

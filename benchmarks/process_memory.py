"""What a further process on the same artefact costs: private and shared memory.

    python benchmarks/process_memory.py --num-items 100000 --processes 4

The 4-layer student of `serving_speed.py` with a larger catalogue, fp32 and 8-bit. Private memory is what a process
alone has (USS); the rest of what is resident is shared with the others (mapped data files, libraries).
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import psutil
import serving_speed
from contest import Contestant
from recording import record
from serving_speed import graph_folder, own, student, write_requests

from compress.int8 import quantize_model


def measure(folder: Path, requests: Path, processes: int) -> dict[str, Any]:
    """Memory of every process when all run and have answered."""
    running: list[Contestant] = []
    for _ in range(processes):
        running.append(own("graph", folder))
        running[-1].seconds(requests)
    found = [psutil.Process(one.process.pid).memory_full_info() for one in running]
    for one in running:
        one.close()
    mapped = sum((folder / name).stat().st_size for name in ("model.onnx.data", "items.onnx.data"))
    return {
        "data_files_mb": mapped / 1e6,
        "private_mb": [info.uss / 1e6 for info in found],
        "shared_mb": [(info.rss - info.uss) / 1e6 for info in found],
        "proportional_mb": sum(info.pss for info in found) / 1e6,
    }


def main() -> None:
    """Export, run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-items", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=4)
    arguments = parser.parse_args()
    serving_speed.NUM_ITEMS = arguments.num_items
    model, result = student(4), {}
    with tempfile.TemporaryDirectory() as place:
        requests = write_requests(Path(place), [1])["batch 1"]
        for name, one in (("fp32", model), ("8-bit", quantize_model(model))):
            folder = graph_folder(one, Path(place) / name)
            result[name] = measure(folder, requests, arguments.processes)
            print(json.dumps({name: result[name]}), flush=True)
    record("process_memory", {"num_items": arguments.num_items, **result})


if __name__ == "__main__":
    main()

"""How far the 4-layer student's graphs and its checkpoint are from the floor of arithmetic and bytes.

    python benchmarks/floor.py

The student of `serving_speed.py`; full windows of 30 items, batch 1 and 32; ceilings are measured in the same run.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from recording import record
from serving_speed import NUM_ITEMS, WINDOW, graph_folder, student

from compress.int8 import quantize_model
from export.runtime import OnnxRecommender
from slmrec.machine import usable_cores
from slmrec.models.ranking import TorchRecommender
from slmrec.ragged import Ragged
from slmrec.recommender import Histories
from slmrec.roofline import measure_ceilings, measured_over_floor

ROUNDS = {1: 200, 32: 20}


def users(count: int) -> Histories:
    """Random full windows."""
    generator = np.random.default_rng(count)
    return Histories.of(Ragged.from_rows([generator.permutation(NUM_ITEMS)[:WINDOW] + 1 for _ in range(count)]))


def main() -> None:
    """Count, time, print and record."""
    model, rows = student(4), {}
    ceilings = measure_ceilings(usable_cores())
    with tempfile.TemporaryDirectory() as place:
        folders = {
            "graph, fp32": graph_folder(model, Path(place) / "fp32"),
            "graph, 8-bit": graph_folder(quantize_model(model), Path(place) / "int8"),
        }
        contestants: dict[str, Any] = {name: OnnxRecommender(folder) for name, folder in folders.items()}
        contestants["PyTorch, fp32"] = TorchRecommender(model, "cpu")
        for name, recommender in contestants.items():
            rows[name] = {}
            for size, rounds in ROUNDS.items():
                histories = users(size)
                work, seconds = recommender.work(histories), []
                for turn in range(rounds + 10):
                    start = time.perf_counter()
                    recommender.recommend(histories, 100)
                    if turn >= 10:
                        seconds.append(time.perf_counter() - start)
                rows[name][f"batch_{size}"] = measured_over_floor([float(np.median(seconds))], [work], ceilings)
            print(json.dumps({name: rows[name]}), flush=True)
    record("floor", {"ceilings": ceilings.to_json(), "rows": rows})


if __name__ == "__main__":
    main()

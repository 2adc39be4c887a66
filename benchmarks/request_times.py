"""How long one request takes by the rows of a table of `slmrec_table.py` that was filled on other machines.

    python benchmarks/request_times.py beauty --data ../shared/data/beauty

Time does not ask what a model has learned: SASRec is trained for one epoch, teacher and student not at all.
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

from recording import record
from slmrec_table import prepared, recipes

from compress.student import build_student
from slmrec.cli.loading import load_recommender
from slmrec.config import BenchmarkConfig
from slmrec.latency import measure_latency
from slmrec.models.ranking import TorchRecommender
from slmrec.sequences import test_cases
from slmrec.train_items import train_items
from slmrec.train_teacher import build_teacher


def main() -> None:
    """Build, time in turn, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["beauty", "ml-1m"])
    parser.add_argument("--data", type=Path, required=True, help="folder with sequences.txt and titles.tsv")
    arguments = parser.parse_args()
    items_config, teacher_config, student_config = recipes(arguments.name, seed=0)
    with tempfile.TemporaryDirectory() as place:
        data = prepared(arguments.name, arguments.data, Path(place))
        items_config = replace(items_config, train=replace(items_config.train, epochs=1))
        items, _ = train_items(data, Path(place) / "items", items_config)
        teacher = build_teacher(teacher_config, items, data)
        student = build_student(teacher, student_config)
        rows = {"SASRec": load_recommender(items, "cpu")} | {
            f"{model.num_layers} layers": TorchRecommender(model.eval(), "cpu") for model in (teacher, student)
        }
        config = BenchmarkConfig(rounds=100, batch_sizes=(), batch_rounds=2)
        timings = measure_latency(rows, test_cases(data.sequences).histories, config)
    times = {row: timing.latency()["p50_ms"] for row, timing in timings.items()}
    record(f"request_times_{arguments.name.replace('-', '_')}", {"dataset": data.hash, "p50_ms": times})
    print(json.dumps(times, indent=2))


if __name__ == "__main__":
    main()

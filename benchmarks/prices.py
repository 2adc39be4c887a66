"""What a million users' lists cost: rates of one seed's models of `slmrec_table.py`, in turn, at an assumed price.

    python benchmarks/prices.py runs/table-ml-100k/seed-0 --hour-price 0.10

The price is that of an hour of the machine this runs on, in any currency; `slmcompress benchmark --gpu-hour-price` does
the same with any artefacts.
"""

import argparse
import contextlib
import json
from pathlib import Path

from graphs import as_graph
from recording import record

from compress.int8 import prepare, quantize_model
from slmrec.artifact import open_artifact
from slmrec.benchmark import price_per_million
from slmrec.cli.loading import load_recommender
from slmrec.compress_config import CalibrationConfig
from slmrec.config import BenchmarkConfig
from slmrec.dataset import load_dataset
from slmrec.latency import measure_latency
from slmrec.models.checkpoint import load_decoder
from slmrec.recommender import Recommender
from slmrec.sequences import test_cases, validation_cases


def main() -> None:
    """Measure, price, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seed", type=Path, help="folder of one seed")
    parser.add_argument("--hour-price", type=float, required=True)
    arguments = parser.parse_args()
    data = load_dataset(arguments.seed.parent / "data")
    rows: dict[str, Recommender] = {
        f"{row}, PyTorch": load_recommender(open_artifact(arguments.seed / folder), "cpu")
        for row, folder in {"SASRec-CE": "items", "teacher": "teacher", "SLMRec": "SLMRec"}.items()
    }
    teacher, student = (load_decoder(open_artifact(arguments.seed / row)).eval() for row in ("teacher", "SLMRec"))
    eight = quantize_model(prepare(student, validation_cases(data.sequences), CalibrationConfig()).model)
    with contextlib.ExitStack() as stack:
        for row, model in {"teacher, graph": teacher, "SLMRec, graph": student, "SLMRec, 8-bit graph": eight}.items():
            rows[row] = stack.enter_context(as_graph(model))
        config = BenchmarkConfig(rounds=20, batch_sizes=(32, 128), batch_rounds=10)
        timings = measure_latency(rows, test_cases(data.sequences).histories, config)
    found = {}
    for row, timing in timings.items():
        rates = timing.throughput()
        price = price_per_million(rates, arguments.hour_price)
        found[row] = {"users_per_second": rates, "price_per_million": price}
    record("prices", {"hour_price": arguments.hour_price, "rows": found})
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

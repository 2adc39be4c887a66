"""Memory that calibration takes, with few histories and with many: it must not grow with their number.

    python benchmarks/calibration_memory.py --counts 100,10000

A 4-layer decoder of SmolLM2's shape with random weights, histories of up to 50 items, each count in its own process.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np
from recording import record


def child(count: int) -> None:
    """Calibrate and print the peak of resident memory before and after."""
    from distill_speed import build

    from compress.calibrate import calibrate
    from slmrec.ragged import Ragged
    from slmrec.recommender import Histories

    generator = np.random.default_rng(0)
    rows = [generator.integers(1, 1683, size=int(n)) for n in generator.integers(5, 51, size=count)]
    model = build(4, 1682).eval()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    found = calibrate(model, Histories.of(Ragged.from_rows(rows)))
    print(
        json.dumps(
            {
                "histories": count, "tokens": found["layers.0.mlp.down"].num_tokens,
                "seconds": round(time.perf_counter() - start, 1), "peak_bytes_before": before,
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )  # fmt: skip


def main() -> None:
    """Run each count, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="100,10000")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(arguments.child)
        return
    results = []
    for count in arguments.counts.split(","):
        command = [sys.executable, __file__, "--child", count]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        results.append(json.loads(output.splitlines()[-1]))
        print(json.dumps(results[-1]), flush=True)
    record("calibration_memory", {"runs": results})


if __name__ == "__main__":
    main()

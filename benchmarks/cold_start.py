"""What keeping the optimised graph saves of a start.

    python benchmarks/cold_start.py

The 4-layer student of `serving_speed.py`, fp32 and 8-bit, with and without `graph_cache`, in turns: milliseconds from
nothing to a loaded graph and of its first answer, each in a process of its own whose libraries are loaded already.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from recording import record
from serving_speed import graph_folder, student

from compress.int8 import quantize_model
from slmrec.artifact import Stage, publish

ROUNDS = 10
CHILD = """
import json, sys, time
from pathlib import Path
import numpy as np
import onnxruntime
from export.runtime import OnnxRecommender
folder, cache = Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None
start = time.perf_counter()
one = OnnxRecommender(folder, cache=cache)
loaded = time.perf_counter()
one.run(np.arange(1, 31)[None], np.zeros((1, 0), np.int64))
print(json.dumps([1000 * (loaded - start), 1000 * (time.perf_counter() - loaded)]))
"""


def start(folder: Path, *cache: Path) -> list[float]:
    """Milliseconds of loading and of the first answer."""
    command = [sys.executable, "-c", CHILD, str(folder), *map(str, cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def main() -> None:
    """Export, start, print and record."""
    model, result = student(4), {}
    with tempfile.TemporaryDirectory() as place:
        cache = Path(place) / "cache"
        for name, one in (("fp32", model), ("8-bit", quantize_model(model))):
            folder = Path(place) / name
            with publish(folder, Stage(name="export", kind="graph", settings={})) as partial:
                graph_folder(one, partial / "inner")
                for path in (partial / "inner").iterdir():
                    path.rename(partial / path.name)
                (partial / "inner").rmdir()
            start(folder, cache)
            rounds: Any = [(start(folder), start(folder, cache)) for _ in range(ROUNDS)]
            plain, kept = np.median(rounds, axis=0).tolist()
            size = sum(path.stat().st_size for path in cache.rglob("*.data"))
            result[name] = {"plain_ms": plain, "kept_ms": kept, "cache_bytes": size}
            print(json.dumps({name: result[name]}), flush=True)
    record("cold_start", result)


if __name__ == "__main__":
    main()

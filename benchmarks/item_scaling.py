"""The item head by itself, from ten thousand items to ten million: time, memory, and the floor of one reading.

    python benchmarks/item_scaling.py --sizes 10000,100000,1000000,10000000

64 dimensions, the best 100, batch 1, two threads. The 8-bit table with certified lists, and the fp32 one up to a
million items, each size in a process of its own. The floor is the table's bytes over what two threads read a second in
the same run; items are drawn around 200 centres, as trained ones lie in groups.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from recording import RESULTS, record

from export.item_head import Head, certified_items, exact_items
from export.items import ROW_STEP, ItemWeights
from export.sessions import session_options
from export.writer import GraphWriter, save_graphs
from slmrec.machine import usable_cores

mpl.use("Agg")
from matplotlib import pyplot as plt

WIDTH, TOP_K, CENTRES = 64, 100, 200
LARGEST_FP32 = 1_000_000


def catalogue(num_items: int) -> ItemWeights:
    """Random items in groups."""
    generator = np.random.default_rng(0)
    rows = -(-(num_items + 1) // ROW_STEP) * ROW_STEP
    outputs = generator.standard_normal((rows, WIDTH), dtype=np.float32) * 0.5
    outputs += generator.standard_normal((CENTRES, WIDTH), dtype=np.float32)[generator.integers(0, CENTRES, rows)]
    offsets = np.zeros(rows, dtype=np.float32)
    offsets[0], offsets[num_items + 1 :] = -np.inf, -np.inf
    return ItemWeights(count=num_items, table=np.zeros((1, 1), np.float32), outputs=outputs, offsets=offsets)


def write_heads(num_items: int, folder: Path) -> list[str]:
    """Graphs from user vectors to the best items."""
    items, graphs = catalogue(num_items), {}
    ways = {"8-bit": certified_items} | ({"fp32": exact_items} if num_items <= LARGEST_FP32 else {})
    for name, way in ways.items():
        graph = GraphWriter(opset=20)
        users = graph.input("users", "float32", ["batch", WIDTH])
        masked = graph.input("masked", "int64", ["batch", "n"])
        found = way(Head(graph, items, users, masked, TOP_K, True))  # type: ignore[operator]
        outputs = (("scores", "float32"), ("items", "int64"), ("certified", "bool"))
        for value, (output, kind) in zip(found, outputs, strict=False):
            graph.output(value, output, kind, ["batch", "k"] if output != "certified" else ["batch"])
        graphs[f"{name}.onnx"] = graph
    save_graphs(graphs, folder)
    return list(ways)


def read_bandwidth(size_bytes: int = 2**30) -> float:
    """Bytes a second that all threads together read of a large array; the best of five."""
    threads = usable_cores()
    parts = np.array_split(np.ones(size_bytes // 8, dtype=np.int64), threads)
    best = 0.0
    for _ in range(5):
        workers = [threading.Thread(target=np.bitwise_or.reduce, args=(part,)) for part in parts]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, size_bytes / (time.perf_counter() - start))
    return best


def child(graph: Path, rounds: int) -> None:
    """Time one graph; print milliseconds, certified share and peak memory."""
    import onnxruntime as ort

    session = ort.InferenceSession(graph, session_options(usable_cores()), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    generator = np.random.default_rng(1)
    masked, seconds, certified = np.zeros((1, 1), dtype=np.int64), [], []
    for turn in range(rounds + 3):
        users = generator.standard_normal((1, WIDTH), dtype=np.float32)
        start = time.perf_counter()
        found = dict(zip(names, session.run(None, {"users": users, "masked": masked}), strict=True))
        if turn >= 3:
            seconds.append(time.perf_counter() - start)
            certified.append(bool(found.get("certified", [True])[0]))
    print(
        json.dumps(
            {
                "p50_ms": 1000 * float(np.median(seconds)), "p10_ms": 1000 * float(np.percentile(seconds, 10)),
                "certified": float(np.mean(certified)),
                "peak_bytes": peak_bytes(),
            }
        )
    )  # fmt: skip


def peak_bytes() -> int:
    """Peak of this process's resident memory; getrusage would count that of the parent it was forked from."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def measure(num_items: int, rounds: int) -> list[dict[str, Any]]:
    """One size: both tables, and the floor."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in write_heads(num_items, Path(folder)):
            command = [sys.executable, __file__, "--child", str(Path(folder) / f"{name}.onnx"), "--rounds", str(rounds)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            table_bytes = num_items * WIDTH * (1 if name == "8-bit" else 4)
            floor_ms = 1000 * table_bytes / read_bandwidth()
            found = json.loads(output.splitlines()[-1])
            rows.append(
                {"num_items": num_items, "table": name, "table_bytes": table_bytes, "floor_ms": floor_ms,
                 "over_floor": found["p50_ms"] / floor_ms, **found}
            )  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time against catalogue size."""
    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for name, colour in (("8-bit", "#0072B2"), ("fp32", "#D55E00")):
        own = [row for row in rows if row["table"] == name]
        sizes = [row["num_items"] for row in own]
        label = "8-bit table, certified lists" if name == "8-bit" else "fp32 table"
        axes.plot(sizes, [row["p50_ms"] for row in own], marker="o", color=colour, label=label)
        axes.plot(sizes, [row["floor_ms"] for row in own], color=colour, linestyle=":", label=f"{name}: one look at it")
    axes.set(xscale="log", yscale="log", xlabel="items", ylabel="ms, batch 1, the best 100")
    axes.legend(frameon=False)
    for suffix in (".svg", ".png"):
        figure.savefig(path.with_suffix(suffix), dpi=120, metadata={"Date": None} if suffix == ".svg" else None)


def main() -> None:
    """Measure, draw and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="10000,100000,1000000,10000000")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(arguments.child, arguments.rounds)
        return
    rows = [row for size in arguments.sizes.split(",") for row in measure(int(size), arguments.rounds)]
    record("item_scaling", {"width": WIDTH, "top_k": TOP_K, "rows": rows})
    draw(rows, RESULTS / "item_scaling")


if __name__ == "__main__":
    main()

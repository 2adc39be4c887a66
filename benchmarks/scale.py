"""A plan on paper: a list for each of 1 billion users out of 100 million items, on 8 and on 64 GPUs.

    python benchmarks/scale.py runs/demo/bundle

Arithmetic and bytes of the decoder are counted on the graph named, for full windows; the rest is multiplication. GPU
times are floors from NVIDIA's data sheets (`slmrec.roofline`), prices are assumptions: no GPU was used. What is
simulated here is the sharded item table: lists of 8 shards, merged, must be those of the whole table, ties included.
"""

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from recording import RESULTS, record

from export.item_head import Head, exact_items
from export.items import ROW_STEP, ItemWeights, read_items
from export.runtime import OnnxRecommender
from export.sessions import session_options
from export.top_k import top_k
from export.writer import GraphWriter, save_graphs
from slmrec.machine import usable_cores
from slmrec.ragged import Ragged
from slmrec.recommender import Histories
from slmrec.roofline import DEVICES, Ceilings, Work

SHARDS, MANY = 8, 64
ID_BYTES, SCORE_BYTES = 4, 4
PRICES = {"a100": 2.0, "h100": 3.0}
"""US dollars for a GPU and hour: assumptions, to be replaced by one's own."""
WAYS = {"16 bits": (2, False), "16 bits, scores written and read": (2, True), "8 bits": (1, False)}
"""Bytes of a number of the item table, and whether the scores of all items pass through memory."""


@dataclass(frozen=True)
class Decoder:
    """What a graph computes besides its item head, counted."""

    fp_operations: float
    """For a user."""
    int8_operations: float
    user_bytes: float
    """Looked up for a user."""
    weight_bytes: float
    """Read once a batch."""
    width: int
    """Of a user vector and of an item's."""
    history: int
    """Items of a full window."""


@dataclass(frozen=True)
class Plan:
    """What is to be computed."""

    num_users: int = 1_000_000_000
    num_items: int = 100_000_000
    top_k: int = 10
    batch: int = 4096
    """Users of one GPU at a time."""
    kept_batch: int = 64
    """The same where the scores of all items are kept: they have to fit into its memory."""


def count(folder: Path, batch: int = 64) -> Decoder:
    """Work of the graph of a folder, its item head taken off."""
    recommender = OnnxRecommender(folder)
    history = int(recommender.signature["max_history"])
    window = list(range(1, min(history, recommender.num_items) + 1))
    one, many = (recommender.work(Histories.of(Ragged.from_rows([window] * size))) for size in (1, batch))
    items = read_items(folder)
    user_bytes = (many.num_bytes - one.num_bytes) / (batch - 1)
    return Decoder(
        one.fp32_operations - 2.0 * items.rows * items.outputs.shape[1], one.int8_operations, user_bytes,
        one.num_bytes - user_bytes - items.outputs.nbytes, items.outputs.shape[1], history,
    )  # fmt: skip


def sizes(plan: Plan, decoder: Decoder, num_bytes: int = 2) -> dict[str, float]:
    """Bytes of everything that lies somewhere or moves."""
    table = float(plan.num_items * decoder.width * num_bytes)
    pair = ID_BYTES + SCORE_BYTES
    return {
        "item table": table,
        "item table, one of 8 shards": table / SHARDS,
        "histories": float(plan.num_users * decoder.history * ID_BYTES),
        "lists": float(plan.num_users * plan.top_k * pair),
        f"scores of {plan.kept_batch} users": float(plan.kept_batch * plan.num_items * SCORE_BYTES),
        "over the network for a user, 8 shards": float((SHARDS - 1) * (decoder.width * num_bytes + plan.top_k * pair)),
    }


def batch_size(plan: Plan, way: str) -> int:
    """Users of one GPU at a time."""
    return plan.kept_batch if WAYS[way][1] else plan.batch


def batch_work(plan: Plan, decoder: Decoder, way: str) -> Work:
    """What one GPU does for a batch; sharded, 8 of them do 8 batches with an eighth of the table each: the same."""
    num_bytes, written = WAYS[way]
    batch = batch_size(plan, way)
    products = 2.0 * batch * plan.num_items * decoder.width
    moved = 2.0 * batch * plan.num_items * SCORE_BYTES if written else 0.0
    return Work(
        fp32_operations=batch * decoder.fp_operations + (products if num_bytes == 2 else 0.0),
        int8_operations=batch * decoder.int8_operations + (products if num_bytes == 1 else 0.0),
        num_bytes=decoder.weight_bytes + batch * decoder.user_bytes
        + float(plan.num_items * decoder.width * num_bytes) + moved,
    )  # fmt: skip


def times(plan: Plan, decoder: Decoder, way: str, ceilings: Ceilings, price: float) -> dict[str, Any]:
    """Floor of the whole plan: GPU hours, hours on 8 and 64, and what a million lists cost at a price an hour."""
    work, batch = batch_work(plan, decoder, way), batch_size(plan, way)
    user_s = ceilings.floor_s(work) / batch
    arithmetic = ceilings.floor_s(Work(work.fp32_operations, work.int8_operations))
    alone = Work(decoder.fp_operations, decoder.int8_operations)
    hours = plan.num_users * user_s / 3600
    return {
        "way": way, "gpu": ceilings.name, "gpu_hours": hours, f"hours_on_{SHARDS}": hours / SHARDS,
        f"hours_on_{MANY}": hours / MANY, "users_per_gpu_second": 1 / user_s,
        "usd_per_million_lists": 1e6 * user_s / 3600 * price,
        "bound": "arithmetic" if arithmetic >= work.num_bytes / ceilings.read_bytes_s else "bytes",
        "head_share_of_arithmetic": 1 - batch * ceilings.floor_s(alone) / arithmetic,
    }  # fmt: skip


def shard(items: ItemWeights, number: int, shards: int) -> tuple[ItemWeights, int]:
    """A contiguous part of the catalogue, with a padding row of its own, and what its ids are short of."""
    size = -(-items.count // shards)
    first = min(number * size, items.count)
    count_here = min(first + size, items.count) - first
    rows = -(-(count_here + 1) // ROW_STEP) * ROW_STEP
    outputs = np.zeros((rows, items.outputs.shape[1]), dtype=np.float32)
    offsets = np.full(rows, -np.inf, dtype=np.float32)
    outputs[1 : count_here + 1] = items.outputs[first + 1 : first + count_here + 1]
    offsets[1 : count_here + 1] = items.offsets[first + 1 : first + count_here + 1]
    return ItemWeights(count=count_here, table=outputs, outputs=outputs, offsets=offsets), first


def head_lists(items: ItemWeights, users: np.ndarray, masked: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and ids by the head of the serving graph."""
    graph = GraphWriter(opset=20)
    inputs = graph.input("users", "float32", ["batch", "width"]), graph.input("masked", "int64", ["batch", "n"])
    best, found = _run(graph, exact_items(Head(graph, items, *inputs, k, True)), {"users": users, "masked": masked})
    return best, _without_missing(best, found)


def _without_missing(scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Ids, 0 where a list has no more items."""
    return np.where(np.isneginf(scores), 0, ids)


def merged_lists(
    items: ItemWeights, users: np.ndarray, masked: np.ndarray, k: int, shards: int = SHARDS
) -> tuple[np.ndarray, np.ndarray]:
    """The same by way of shards: the best k of each, then the best k of those in the shards' order.

    Shards are ranges of ids and their lists put ties by smaller id, so a tie's earlier place is the smaller id too.
    """
    scores, ids = [], []
    for number in range(shards):
        part, first = shard(items, number, shards)
        here = np.where((masked > first) & (masked <= first + part.count), masked - first, 0)
        if part.count:
            best, found = head_lists(part, users, here, min(k, part.count))
            scores.append(best)
            ids.append(found + first)
    columns = np.concatenate(ids, axis=1)
    graph = GraphWriter(opset=20)
    joined = graph.input("scores", "float32", ["batch", columns.shape[1]])
    both = top_k(graph, joined, columns.shape[1], k, block_max=False)
    best, places = _run(graph, both, {"scores": np.concatenate(scores, axis=1)})
    return best, _without_missing(best, np.take_along_axis(columns, places, axis=1))


def _run(graph: GraphWriter, values: Any, request: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    import onnxruntime as ort

    for value, (name, kind) in zip(values, (("scores_out", "float32"), ("found", "int64")), strict=True):
        graph.output(value, name, kind, ["batch", "k"])
    with tempfile.TemporaryDirectory() as folder:
        save_graphs({"head.onnx": graph}, Path(folder))
        path = str(Path(folder) / "head.onnx")
        session = ort.InferenceSession(path, session_options(usable_cores()), providers=["CPUExecutionProvider"])
        best, found = session.run(["scores_out", "found"], request)
    return best, found


def simulate(num_items: int, num_users: int, width: int, k: int, *, ties: bool) -> dict[str, Any]:
    """Whether merged lists are the whole table's, on random items; with `ties` many scores are equal whole numbers."""
    generator = np.random.default_rng(num_items)
    rows = -(-(num_items + 1) // ROW_STEP) * ROW_STEP

    def draw(*shape: int) -> np.ndarray:
        found = generator.integers(-1, 2, shape) if ties else generator.normal(size=shape)
        return found.astype(np.float32)

    outputs, users = (draw(count, width) for count in (rows, num_users))
    offsets = np.where((np.arange(rows) > 0) & (np.arange(rows) <= num_items), 0, -np.inf).astype(np.float32)
    items = ItemWeights(count=num_items, table=outputs, outputs=outputs, offsets=offsets)
    masked = generator.integers(0, num_items + 1, (num_users, 50))
    whole, merged = head_lists(items, users, masked, k), merged_lists(items, users, masked, k)
    return {
        "num_items": num_items, "num_users": num_users, "shards": SHARDS, "top_k": k, "ties": ties,
        "equal_neighbours": float((whole[0][:, 1:] == whole[0][:, :-1]).mean()),
        "same_items": bool(np.array_equal(whole[1], merged[1])),
        "same_scores": bool(np.array_equal(whole[0], merged[0])),
    }  # fmt: skip


def measured() -> dict[str, Any]:
    """Rates that were measured, on CPUs all of them, from `results/`."""
    floor = json.loads((RESULTS / "floor.json").read_text(encoding="utf-8"))["result"]["rows"]["graph, 8-bit"]
    head = json.loads((RESULTS / "item_scaling.json").read_text(encoding="utf-8"))["result"]["rows"]
    largest = max((row for row in head if row["table"] == "8-bit"), key=lambda row: row["num_items"])
    found = {
        "over_floor_8_bit_batch_32": floor["batch_32"]["measured_over_floor"],
        "largest_head_items": largest["num_items"], "largest_head_ms": largest["p50_ms"],
    }  # fmt: skip
    bulk = RESULTS / "bulk.json"
    if bulk.is_file():
        found["bulk"] = json.loads(bulk.read_text(encoding="utf-8"))["result"]["engines"]
    return found


def main() -> None:
    """Count, simulate, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a graph or bundle")
    for name, price in PRICES.items():
        parser.add_argument(f"--price-{name}", type=float, default=price, help="US dollars for a GPU and hour")
    arguments = parser.parse_args()
    plan, decoder = Plan(), count(arguments.folder)
    prices = {name: getattr(arguments, f"price_{name}") for name in PRICES}
    result = {
        "plan": asdict(plan), "decoder": asdict(decoder), "prices_usd_per_gpu_hour": prices,
        "bytes": sizes(plan, decoder),
        "floors": [
            times(plan, decoder, way, DEVICES[name], price) for name, price in prices.items() for way in WAYS
        ],
        "simulated": [simulate(200_000, 64, decoder.width, 100, ties=ties) for ties in (False, True)],
        "measured": measured(),
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    record("scale", result)


if __name__ == "__main__":
    main()

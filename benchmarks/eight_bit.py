"""What 8 bits cost and give, on trained models: accuracy, size, speed, and whether company changes a user's list.

    python benchmarks/eight_bit.py runs/table-ml-100k --models teacher,SLMRec

Each model below RUNS/seed-0 (`slmrec_table.py` makes them) in fp32, per-token 8-bit with and without migration of
outliers, and LLM.int8; its item table in 8 bits with certified lists. Then its graphs on ONNX Runtime, fp32 and 8-bit
in turns, and the fp32 graph quantized by ONNX Runtime's own `quantize_dynamic`: lists of users alone and in a batch.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from contest import contest, ratios
from graphs import as_graph
from recording import record
from serving_speed import own

from compress.int8 import prepare, quantize_model
from export.onnx_export import export_model
from export.runtime import OnnxRecommender
from slmrec.artifact import open_artifact
from slmrec.compress_config import CalibrationConfig
from slmrec.config import ExportConfig
from slmrec.dataset import Dataset, load_dataset
from slmrec.evaluate import TEST_PROTOCOL, VALIDATION_PROTOCOL, Accuracy, evaluate
from slmrec.metrics import overlap, ratio_of_means
from slmrec.models.checkpoint import load_decoder
from slmrec.models.decoder import DecoderModel
from slmrec.models.llm_int8 import llm_int8
from slmrec.models.ranking import TorchRecommender
from slmrec.recommender import Histories, Recommender
from slmrec.sequences import test_cases, validation_cases

COMPANY_USERS = 96


def asked(recommender: Recommender, data: Dataset) -> list[Accuracy]:
    """Accuracy on validation and test."""
    splits = ((validation_cases, VALIDATION_PROTOCOL), (test_cases, TEST_PROTOCOL))
    return [evaluate(recommender, cases(data.sequences), protocol=protocol) for cases, protocol in splits]


def shipped(model: DecoderModel, data: Dataset) -> list[Accuracy]:
    """The same of the model's graph."""
    with as_graph(model) as graph:
        return asked(graph, data)


def against(after: list[Accuracy], before: list[Accuracy]) -> dict[str, Any]:
    """Share of NDCG@10 that is left, with intervals, and of the first ten."""
    found: dict[str, Any] = {}
    for name, one, other in zip(("validation", "test"), after, before, strict=True):
        ratio = ratio_of_means(one.user_ndcg_10, other.user_ndcg_10)
        found[name] = {
            "ndcg@10": one.metrics["ndcg@10"].estimate, "of_fp32": [ratio.estimate, ratio.low, ratio.high],
            "overlap@10": float(overlap(one.top_10, other.top_10).mean()),
        }  # fmt: skip
    return found


def decoder_bytes(model: DecoderModel) -> int:
    """Bytes of the decoder's layers on disk."""
    return sum(value.nbytes for name, value in model.state_dict().items() if name.startswith("decoder.layers"))


def item_table(model: DecoderModel, data: Dataset) -> dict[str, Any]:
    """How many lists the 8-bit item table certifies, and whether they are those of the fp32 one."""
    cases = test_cases(data.sequences)
    rows = np.linspace(0, len(cases) - 1, min(len(cases), 2000)).astype(int)
    histories, found = cases.histories.select(rows), {}
    with as_graph(model, int8_items=False) as plain, as_graph(model, int8_items=True) as rounded:
        k = rounded.max_top_k
        for length in (10, k):
            one, other = (graph.recommend(histories, length) for graph in (plain, rounded))
            found[f"top {length} equal"] = float((one.item_ids == other.item_ids).all(axis=1).mean())
        windows = histories.item_ids.newest(model.max_history)
        nobody = np.zeros((1, 0), dtype=np.int64)
        certified = [
            rounded.session.run(["certified"], {"item_ids": row[None], "exclude_ids": nobody})[0][0] for row in windows
        ]
        found[f"top {k} certified"] = float(np.mean(certified))
    return found


def company(path: Path, histories: Histories) -> dict[str, Any]:
    """Users whose first ten are others alone than in a batch of all, where histories are ragged."""
    graph = OnnxRecommender(path)
    together = graph.recommend(histories, 10)
    singles = [graph.recommend(histories.select(np.array([row])), 10) for row in range(len(histories))]
    changed = [(one.item_ids[0] != items).any() for one, items in zip(singles, together.item_ids, strict=True)]
    bits = [np.array_equal(one.scores[0], scores) for one, scores in zip(singles, together.scores, strict=True)]
    return {"users": len(histories), "lists_changed": int(np.sum(changed)), "bit_equal": int(np.sum(bits))}


def quantized_dynamically(source: Path, target: Path) -> Path:
    """The graph as ONNX Runtime's own dynamic quantization makes it: one scale for a whole batch."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target.mkdir()
    for file in source.iterdir():
        if not file.name.startswith("model.onnx"):
            (target / file.name).write_bytes(file.read_bytes())
    quantize_dynamic(source / "model.onnx", target / "model.onnx", weight_type=QuantType.QInt8)
    return target


def speed(paths: dict[str, Path], histories: Histories, window: int, rounds: int) -> dict[str, Any]:
    """Times of a request and of a batch of 32 with the longest histories, each graph in a process of its own."""
    longest = histories.select(np.argsort(-histories.item_ids.lengths, kind="stable")[:32])
    item_ids = longest.item_ids.newest(window).pad_left(window)
    requests = {}
    for size, batches in (("batch 1", item_ids[:, None]), ("batch 32", item_ids[None])):
        requests[size] = paths["fp32"].parent / f"{size}.npz"
        np.savez(requests[size], item_ids=batches)
    contestants = {name: own("graph", path) for name, path in paths.items()}
    medians = contest(contestants, requests, rounds)
    for contestant in contestants.values():
        contestant.close()
    return {size: ratios(found, "fp32") for size, found in medians.items()}


def measure(path: Path, data: Dataset, rounds: int, *, with_llm_int8: bool) -> dict[str, Any]:
    """All of it for one model; accuracy by graphs, that of LLM.int8 by PyTorch, which alone computes so."""
    model = load_decoder(open_artifact(path)).eval()
    cases = validation_cases(data.sequences)
    before = shipped(model, data)
    prepared = prepare(model, cases, CalibrationConfig())
    eight = quantize_model(prepared.model)
    after = {"per token, migrated": shipped(eight, data), "per token": shipped(quantize_model(model), data)}
    if with_llm_int8:
        after["LLM.int8"] = asked(TorchRecommender(quantize_model(model, (), llm_int8), "cpu"), data)
    found: dict[str, Any] = {
        "fp32": {
            name: one.metrics["ndcg@10"].estimate for name, one in zip(("validation", "test"), before, strict=True)
        },
        "accuracy": {name: against(found, before) for name, found in after.items()},
        "migrated_groups": sum(one.strength > 0 for one in prepared.migrations),
        "groups": len(prepared.migrations),
        "decoder_bytes_of_fp32": decoder_bytes(eight) / decoder_bytes(model),
        "item_table": item_table(model, data),
    }
    histories = test_cases(data.sequences).histories
    some = histories.select(np.linspace(0, len(histories) - 1, COMPANY_USERS).astype(int))
    with tempfile.TemporaryDirectory() as folder:
        paths = {"fp32": Path(folder) / "fp32", "8-bit": Path(folder) / "int8"}
        for graph_path, source in zip(paths.values(), (model, eight), strict=True):
            graph_path.mkdir()
            export_model(source.eval(), graph_path, ExportConfig(append=False))
            data.items.save(graph_path)
        plain = Path(folder) / "plain"  # quantize_dynamic knows standard operations alone
        plain.mkdir()
        export_model(model, plain, ExportConfig(append=False, fuse_kernels=False))
        dynamic = quantized_dynamically(plain, Path(folder) / "dynamic")
        found["company"] = {name: company(p, some) for name, p in (paths | {"quantize_dynamic": dynamic}).items()}
        found["speed"] = speed(paths, histories, model.max_history, rounds)
        found["graph_bytes"] = {name: sum(f.stat().st_size for f in p.iterdir()) for name, p in paths.items()}
    return found


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--models", default="teacher,SLMRec")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--llm-int8", action=argparse.BooleanOptionalAction, default=True, help="slow on a CPU")
    arguments = parser.parse_args()
    data = load_dataset(arguments.runs / "data")
    name = arguments.runs.name.removeprefix("table-")
    result = {
        model: measure(arguments.runs / "seed-0" / model, data, arguments.rounds, with_llm_int8=arguments.llm_int8)
        for model in arguments.models.split(",")
    }
    record(f"eight_bit_{name.replace('-', '_')}", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

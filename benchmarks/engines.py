"""TensorRT-RTX engines of a trained student and of a catalogue of a million: sizes, build times, accuracy as placed.

    python benchmarks/engines.py runs/demo

Reads `data`, `student` and `student-int8` of a finished `slmcompress demo`. Engines are built without a GPU for SM80
(fp8: SM89) and read back; accuracy is that of the very graph they are built of, on ONNX Runtime: NDCG@10 as a share of
the fp32 student's, on validation and on test users.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from recording import record

from export.build_engine import build, load
from export.engine import default_shapes, input_ranges, place
from export.runtime import OnnxRecommender
from slmrec.artifact import Artifact, open_artifact
from slmrec.config import ExportConfig
from slmrec.dataset import Dataset, load_dataset
from slmrec.engine_config import EngineConfig
from slmrec.evaluate import Accuracy, evaluate, held_out_cases
from slmrec.metrics import ratio_of_means
from slmrec.models.checkpoint import load_checkpoint, load_decoder
from slmrec.models.decoder import DecoderModel

DEVICES = {"fp32": "8.0", "fp16": "8.0", "bf16": "8.0", "int8": "8.0", "fp8": "8.9"}
MILLION = 1_000_000
SPLITS = ("validation", "test")


def accuracies(recommender: Any, data: Dataset) -> dict[str, Accuracy]:
    """On both splits."""
    found = {}
    for split in SPLITS:
        cases, protocol = held_out_cases(data.sequences, split)
        found[split] = evaluate(recommender, cases, protocol=protocol)
    return found


def one_engine(
    model: DecoderModel, checkpoint: Artifact, data: Dataset, config: EngineConfig, folder: Path
) -> tuple[dict[str, Any], Path]:
    """Place, build and read back; gives the record and the folder of the placed graph."""
    assert config.precision is not None
    shapes = default_shapes(data, model.spec.max_history)
    start = time.perf_counter()
    placed = place(model, folder, ExportConfig(), config, input_ranges(checkpoint, config.ranges), shapes)
    seconds = time.perf_counter() - start
    device = DEVICES[config.precision]
    _, found = build(load("rtx"), placed.folder / "model.onnx", placed.recipe, device)
    onnx_bytes = sum(path.stat().st_size for path in placed.folder.glob("*.onnx*"))
    return {"device": device, "placed_s": round(seconds, 2), "onnx_bytes": onnx_bytes, **found}, placed.folder


def with_a_million(model: DecoderModel) -> DecoderModel:
    """The same decoder over a million items with random vectors."""
    large = DecoderModel(replace(model.spec, num_items=MILLION, has_titles=False))
    own = {name: value for name, value in model.state_dict().items() if name in large.state_dict()}
    fitting = {name: value for name, value in own.items() if large.state_dict()[name].shape == value.shape}
    for name, layer in model.decoder.named_modules():
        if type(layer) is not type(large.decoder.get_submodule(name)):
            parent, _, leaf = name.rpartition(".")
            setattr(large.decoder.get_submodule(parent), leaf, layer)
    large.load_state_dict(fitting, strict=False)
    return large.eval()


def main() -> None:
    """Build, ask, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    arguments = parser.parse_args()
    data = load_dataset(arguments.runs / "data")
    student, rounded = (open_artifact(arguments.runs / name) for name in ("student", "student-int8"))
    parent = accuracies(load_checkpoint(student, "cpu"), data)
    rows = []
    for precision in DEVICES:
        checkpoint = rounded if precision in ("int8", "fp8") else student
        model = load_decoder(checkpoint).eval()
        for rule in ("max", "percentile", "entropy") if precision in ("int8", "fp8") else ("percentile",):
            config = EngineConfig(precision=precision, ranges=rule)
            with tempfile.TemporaryDirectory() as folder:
                found, placed = one_engine(model, checkpoint, data, config, Path(folder))
                kept = {}
                if precision != "bf16":
                    own = accuracies(OnnxRecommender(placed), data)
                    for split in SPLITS:
                        ratio = ratio_of_means(own[split].user_ndcg_10, parent[split].user_ndcg_10)
                        kept[split] = [ratio.estimate, ratio.low, ratio.high]
            rows.append({"precision": precision, "ranges": rule, "num_items": data.num_items, "kept": kept, **found})
            print(json.dumps(rows[-1]), flush=True)
        with tempfile.TemporaryDirectory() as folder:
            found, _ = one_engine(
                with_a_million(model), checkpoint, data, EngineConfig(precision=precision), Path(folder)
            )
        rows.append({"precision": precision, "ranges": None, "num_items": MILLION, "kept": {}, **found})
        print(json.dumps(rows[-1]), flush=True)
    record("engines", {"dataset": data.info["num_users"], "rows": rows})


if __name__ == "__main__":
    main()

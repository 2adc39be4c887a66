"""TensorRT engines of a checkpoint: the graph with its precision placed, its accuracy, and what is built of it."""

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from export import build_engine
from export.build_engine import RECIPE, SUFFIX, BuildError, build, has_driver, load
from export.decoder import Serving
from export.engine_files import ENGINE_FILE, ENGINE_FOLDER
from export.graph import recommend_graph
from export.precision import LEVELS
from export.runtime import EXCLUDE_STEP, GRAPH_FILE, MAX_BATCH, SIGNATURE_FILE, OnnxRecommender
from export.signature import signature
from export.weights import ServingWeights, serving_weights
from export.writer import GraphWriter, save_graphs
from slmrec.artifact import Artifact, write_json
from slmrec.config import ExportConfig
from slmrec.dataset import Dataset
from slmrec.engine_config import EngineConfig, Shapes, profile_of
from slmrec.errors import CheckError, ConfigError
from slmrec.evaluate import VALIDATION_PROTOCOL, evaluate
from slmrec.gate import Gate, gate_of
from slmrec.models.decoder import DecoderModel
from slmrec.recommender import Recommender
from slmrec.sequences import validation_cases

CALIBRATION_FILE = "calibration.json"
USUAL_BATCH = 32
GATE_LIST = 10
"""Items of a list that the gate's NDCG@10 needs."""


@dataclass(frozen=True)
class Placed:
    """The graph with its precision placed, ready to be built."""

    folder: Path
    recipe: dict[str, Any]
    gate: Gate | None
    """None where no runtime here can run that precision, or lists are too short to be judged."""


def precision_for(weights: ServingWeights, config: EngineConfig) -> str:
    """The precision asked for, else int8 for an 8-bit checkpoint and fp16 for any other.

    Raises:
        ConfigError: 8-bit products without an 8-bit checkpoint, or fp8 for a device that has none.
    """
    precision = config.precision or ("int8" if weights.rounds_inputs else "fp16")
    if precision in LEVELS and not weights.rounds_inputs:
        raise ConfigError(
            f"{precision} needs calibrated ranges of activations, which this checkpoint does not have",
            remedy="slmcompress quantize --bits 8, and export what it makes; or --precision fp16",
        )
    if precision == "fp8":
        config.require_fp8()
    return precision


def input_ranges(checkpoint: Artifact, rule: str) -> dict[str, float]:
    """Calibrated ranges of every linear layer's input, by one rule; none for checkpoints without any."""
    path = checkpoint.path / CALIBRATION_FILE
    if not path.is_file():
        return {}
    ranges = json.loads(path.read_text(encoding="utf-8"))["input_ranges"]
    return {name: float(by_rule[rule]) for name, by_rule in ranges.items()}


def default_shapes(data: Dataset, max_history: int) -> dict[str, Shapes]:
    """Smallest, usual and largest shapes of requests, from the histories of the data set's validation users."""
    lengths = validation_cases(data.sequences).histories.item_ids.lengths
    usual = min(max_history, int(np.median(lengths)))
    excluded = [-(-int(length) // EXCLUDE_STEP) * EXCLUDE_STEP for length in (np.median(lengths), lengths.max() + 1)]
    return {
        "min": {"item_ids": (1, 1), "exclude_ids": (1, 0)},
        "opt": {"item_ids": (USUAL_BATCH, usual), "exclude_ids": (USUAL_BATCH, excluded[0])},
        "max": {"item_ids": (MAX_BATCH, max_history), "exclude_ids": (MAX_BATCH, excluded[1])},
    }


def place(
    model: DecoderModel, folder: Path, config: ExportConfig, engine: EngineConfig, ranges: dict[str, float],
    shapes: dict[str, Shapes],
) -> Placed:  # fmt: skip
    """Write `engine/`: the graph in standard ONNX with its precision placed, its recipe, and what builds it.

    Args:
        model: in `eval` mode.
        folder: of the artefact.
        config: of the graph; ONNX Runtime's own operations are left out.
        engine: what is to be built.
        ranges: of activations, see `input_ranges`.
        shapes: defaults of the profile, see `default_shapes`.
    """
    weights = serving_weights(model, fold_items=config.fold_items, spare_items=config.spare_items, ranges=ranges)
    precision = precision_for(weights, engine)
    plain = replace(config, fuse_kernels=False, tune=False, int8_items=False)
    profile = profile_of(engine, shapes, weights.items.rows, weights.layout.max_history)
    serving = Serving(weights, plain, {}, precision)
    graph = recommend_graph(serving)
    target = folder / ENGINE_FOLDER
    target.mkdir()
    save_graphs({GRAPH_FILE: graph}, target)
    described = signature(serving, {GRAPH_FILE: graph}, has_titles=model.titles is not None)
    write_json(target / SIGNATURE_FILE, described | {"precision": precision, "ties": "unspecified"})
    recipe = {
        "precision": precision, "profile": profile, "workspace": engine.workspace,
        "hardware_compat": engine.hardware_compat, "version_compatible": engine.version_compatible,
        "expected": expected_products(graph),
    }  # fmt: skip
    write_json(target / RECIPE, recipe)
    shutil.copyfile(build_engine.__file__, target / "build_engine.py")
    return Placed(target, recipe, None)


def expected_products(graph: GraphWriter) -> dict[str, dict[str, int]]:
    """How many products and roundings of each type the parsed network must have, by TensorRT's names of types."""
    kinds = {name: array.dtype.name for name, (array, _) in graph.constants.items()}
    made = {output: node for node in graph.nodes for output in node.output}
    names = {"float16": "HALF", "bfloat16": "BF16", "float32": "FLOAT", 10: "HALF", 16: "BF16", 1: "FLOAT"}
    rounded_names = {"int8": "INT8", "float8_e4m3fn": "FP8"}
    products: dict[str, int] = {}
    rounded: dict[str, int] = {}
    for node in graph.nodes:
        if node.op_type in ("MatMul", "Gemm"):
            left = made.get(node.input[0])
            cast = left is not None and left.op_type == "Cast"
            kind = names[left.attribute[0].i] if left is not None and cast else "FLOAT"
            products[kind] = products.get(kind, 0) + 1
        elif node.op_type == "QuantizeLinear":
            kind = rounded_names[kinds[node.input[2]]]
            rounded[kind] = rounded.get(kind, 0) + 1
    return {"products": products, "rounded": rounded}


def simulate(placed: Placed, reference: Recommender, data: Dataset, required: float) -> Placed:
    """Ask the placed graph on ONNX Runtime what an engine will be asked: its NDCG@10 against the checkpoint's.

    Raises:
        CheckError: it keeps less than `required` of it.
    """
    precision, graph = placed.recipe["precision"], None
    if precision != "bf16":  # ONNX Runtime has no bfloat16 products on CPUs
        graph = OnnxRecommender(placed.folder)
    if graph is None or graph.max_top_k < GATE_LIST:
        if precision in LEVELS:
            raise ConfigError(
                f"lists shorter than {GATE_LIST} cannot be judged by NDCG@10, and {precision} is not built unjudged",
                remedy="--top-k 10 or more, or --precision fp16",
            )
        return placed
    cases = validation_cases(data.sequences)
    before, after = (evaluate(one, cases, protocol=VALIDATION_PROTOCOL) for one in (reference, graph))
    gate = gate_of(before, after, required)
    if not gate.passed:
        raise CheckError(
            f"{placed.recipe['precision']} costs too much: {gate.to_text()}",
            remedy="--precision fp16, another --ranges, or a lower --accuracy-gate",
        )
    return replace(placed, gate=gate)


def build_all(placed: Placed, folder: Path, config: EngineConfig) -> dict[str, Any]:
    """Build the engines and write `engine.json`: what was built and read back, or why nothing was and what to do.

    Raises:
        ConfigError: a flavour that was asked for by name is not here, or cannot build for a device.
    """
    record: dict[str, Any] = {
        "precision": placed.recipe["precision"], "settings": asdict(config) | {"timing_cache": None}, "engines": [],
        "missing": None, "gate": placed.gate.to_json() if placed.gate is not None else None,
        "gate_text": placed.gate.to_text() if placed.gate is not None else "not judged",
    }  # fmt: skip
    builder = builder_for(config)
    if isinstance(builder, str):
        record["missing"] = builder
        write_json(folder / ENGINE_FILE, record)
        return record
    flavor, trt = builder
    devices: list[str | None] = list(config.compute_capability) or [None]
    for device in devices:
        name = "model" if len(devices) == 1 else f"model_sm{str(device).replace('.', '')}"
        recipe = placed.recipe | {"timing_cache": config.timing_cache}
        try:
            engine, found = build(trt, placed.folder / GRAPH_FILE, recipe, device)
        except BuildError as error:
            remedy = (
                "a larger --workspace" if config.workspace and "OutOfMemory" in str(error) else "slmcompress doctor"
            )
            raise ConfigError(f"{flavor}: {error}", remedy=remedy) from None
        file = f"{name}{SUFFIX[flavor]}"
        (folder / file).write_bytes(engine)
        record["engines"].append({"file": file, "flavor": flavor, **found})
    write_json(folder / ENGINE_FILE, record)
    return record


def builder_for(config: EngineConfig) -> tuple[str, Any] | str:
    """The flavour to build with and its module; auto is TensorRT on a machine with a GPU, or else why nothing is built.

    Raises:
        ConfigError: the flavour was asked for by name and is not here.
    """
    flavor = "tensorrt" if config.flavor == "auto" else config.flavor
    try:
        trt = load(flavor)
        if flavor == "tensorrt" and not has_driver():
            raise BuildError("TensorRT is installed, but there is no NVIDIA driver here to build with")
    except BuildError as error:
        if config.flavor == "auto":
            return str(error)
        raise ConfigError(str(error), remedy="--trt-flavor auto keeps the graph, to be built elsewhere") from None
    return flavor, trt

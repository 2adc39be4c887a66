"""export: a decoder checkpoint becomes an ONNX graph, and is not written unless it answers as the checkpoint does."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch

from export.graph import ServingGraph
from export.parity import PARITY_FILE, check_parity
from export.runtime import GRAPH_FILE, SIGNATURE_FILE, OnnxRecommender
from slmrec.artifact import Artifact, is_up_to_date, open_artifact, publish, write_json
from slmrec.config import ExportConfig, settings_of
from slmrec.dataset import Dataset, stage_on
from slmrec.locks import one_run_at_a_time
from slmrec.models.checkpoint import load_decoder, with_neutral_layers
from slmrec.models.decoder import DecoderModel
from slmrec.models.layers import Int8Linear, Int8WeightLinear
from slmrec.models.ranking import TorchRecommender

BUCKET_STEP = 8
"""Histories are padded to the next multiple of this, or to the window."""
INPUTS, OUTPUTS = ["item_ids", "exclude_ids"], ["top_items", "top_scores"]


@one_run_at_a_time
def export_checkpoint(
    checkpoint: Artifact, data: Dataset, output: Path, config: ExportConfig, *, force: bool = False
) -> tuple[Artifact, bool]:
    """Export a teacher or student; gives the artefact and whether it was there already.

    Raises:
        CheckError: the graph does not answer as the checkpoint does; nothing is written.
    """
    stage = stage_on(data, checkpoint, "export", "graph", settings_of(config))
    if is_up_to_date(output, stage, force=force):
        return open_artifact(output), True
    model = with_neutral_layers(load_decoder(checkpoint)).eval()
    with publish(output, stage) as folder:
        export_model(model, folder, config)
        data.items.save(folder)
        if not config.keep_history:
            parity = check_parity(TorchRecommender(model, "cpu"), OnnxRecommender(folder), data.sequences)
            write_json(folder / PARITY_FILE, parity.to_json())
    return open_artifact(output), False


def export_model(model: DecoderModel, folder: Path, config: ExportConfig) -> None:
    """Write `model.onnx`, `model.onnx.data` and `signature.json`."""
    graph = ServingGraph(model, config).eval()
    # sizes that differ from each other and from 0 and 1, so that no two are taken for one, or for a constant
    example = (torch.ones(3, 7, dtype=torch.int64), torch.ones(3, 5, dtype=torch.int64))
    free = torch.export.Dim.DYNAMIC
    with _quietly():
        program = torch.onnx.export(
            graph,
            example,
            dynamo=True,
            opset_version=config.opset,
            input_names=INPUTS,
            output_names=OUTPUTS,
            dynamic_shapes=({0: free, 1: free}, {0: free, 1: free}),
            custom_translation_table={
                torch.ops.slmcompress.matmul_int8.default: _matmul_int8,
                torch.ops.slmcompress.dequantize.default: _dequantize,
            },
        )
    assert program is not None
    _write_graph(program.model_proto, folder, signature(model, graph, config))


def signature(model: DecoderModel, graph: ServingGraph, config: ExportConfig) -> dict[str, Any]:
    """What a caller has to know of the graph, and all that the runtime reads besides it."""
    window, layout = model.max_history, graph.layout
    ids, lists = {"dtype": "int64"}, ["batch", "k"]
    return {
        "signature": "recommend",
        "inputs": {
            "item_ids": ids | {"shape": ["batch", "history"], "meaning": "oldest first, left-padded with 0"},
            "exclude_ids": ids | {"shape": ["batch", "excluded"], "meaning": "never returned, padded with 0"},
        },
        "outputs": {"top_items": ids | {"shape": lists}, "top_scores": {"dtype": "float32", "shape": lists}},
        "top_k": graph.top_k,
        "num_items": model.num_items,
        "max_history": window,
        "buckets": sorted({*range(BUCKET_STEP, window, BUCKET_STEP), window}),
        "positions": layout.positions,
        "prefix_length": layout.prefix_length,
        "suffix_length": layout.suffix_length,
        "keep_history": config.keep_history,
        "ties": "smaller id first",
        "opset": config.opset,
        "precision": "int8" if _count(model, Int8Linear) else "fp32",
        "num_8bit_layers": _count(model, Int8Linear) + _count(model, Int8WeightLinear),
    }


def _count(model: DecoderModel, kind: type) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def _write_graph(model: onnx.ModelProto, folder: Path, described: dict[str, Any]) -> None:
    try:
        onnx.save_model(
            model, folder / GRAPH_FILE, save_as_external_data=True, location=f"{GRAPH_FILE}.data", size_threshold=1024
        )
    except OSError as error:
        error.filename = error.filename or str(folder / GRAPH_FILE)  # a full disk is told without its file
        raise
    write_json(folder / SIGNATURE_FILE, described)


def _matmul_int8(inputs: Any, weight: Any) -> Any:
    """How the exporter writes `matmul_int8`: uint8 inputs with zero point 128, which processors multiply fastest."""
    from onnxscript import opset20 as op

    zero_point = op.Cast(op.Constant(value_int=128), to=onnx.TensorProto.UINT8)
    return op.MatMulInteger(inputs, weight, zero_point)


def _dequantize(weight: Any, scale: Any) -> Any:
    """How the exporter writes `dequantize`.

    As a cast and a product, which ONNX Runtime does once, when it loads. DequantizeLinear means the same, but with a
    product behind it ONNX Runtime makes MatMulNBits of the two, whose default rounds activations to 8 bits.
    """
    from onnxscript import opset20 as op

    return op.Mul(op.Cast(weight, to=onnx.TensorProto.FLOAT), scale)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The exporter prints its steps, and warns of its own use of deprecated functions."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

"""export: a decoder checkpoint becomes an ONNX graph, and is not written unless it answers as the checkpoint does."""

from pathlib import Path
from typing import Any

import numpy as np

from export.graph import Serving, append_graph, recommend_graph, rerank_graph
from export.items import PROJECTION_FILE
from export.parity import PARITY_FILE, check_parity
from export.runtime import APPEND_FILE, GRAPH_FILE, RERANK_FILE, SIGNATURE_FILE, TUNE_FILE, OnnxRecommender
from export.tune import tune
from export.weights import ServingWeights, serving_weights
from export.writer import save_graphs
from slmrec.artifact import Artifact, is_up_to_date, open_artifact, publish, write_json
from slmrec.config import ExportConfig, settings_of
from slmrec.dataset import Dataset, stage_on
from slmrec.errors import ConfigError
from slmrec.locks import one_run_at_a_time
from slmrec.models.checkpoint import load_decoder, with_neutral_layers
from slmrec.models.decoder import DecoderModel
from slmrec.models.ranking import TorchRecommender

BUCKET_STEP = 8
"""Histories are padded to the next multiple of this, or to the window."""


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
    """Write the graphs, their data files and `signature.json`.

    Raises:
        ConfigError: `append` was asked for, but positions depend on the length of the whole history.
    """
    weights = serving_weights(model, fold_items=config.fold_items, spare_items=config.spare_items)
    compact = weights.layout.positions == "compact"
    if config.append and not compact:
        raise ConfigError(
            "with padded positions every new item moves the items before it, so nothing can be kept of them",
            remedy="--no-append, or a teacher with --positions compact",
        )
    tuned = tune(weights) if config.tune and weights.rounds_inputs else None
    serving = Serving(weights, config, {} if tuned is None else tuned.kernels)
    graphs = {GRAPH_FILE: recommend_graph(serving), RERANK_FILE: rerank_graph(serving)}
    if config.append or (config.append is None and compact):
        graphs[APPEND_FILE] = append_graph(serving)
    save_graphs(graphs, folder)
    projection = model.item_proj
    np.savez(
        folder / PROJECTION_FILE, weight=projection.weight.detach().T.numpy(), bias=projection.bias.detach().numpy()
    )
    write_json(folder / SIGNATURE_FILE, signature(weights, config, list(graphs)))
    if tuned is not None:
        write_json(folder / TUNE_FILE, tuned.to_json())


def signature(weights: ServingWeights, config: ExportConfig, graphs: list[str]) -> dict[str, Any]:
    """What a caller has to know of the graph, and all that the runtime reads besides it."""
    layout = weights.layout
    window, ids, lists = layout.max_history, {"dtype": "int64"}, ["batch", "k"]
    return {
        "signature": "recommend",
        "inputs": {
            "item_ids": ids | {"shape": ["batch", "history"], "meaning": "oldest first, left-padded with 0"},
            "exclude_ids": ids | {"shape": ["batch", "excluded"], "meaning": "never returned, padded with 0"},
        },
        "outputs": {"top_items": ids | {"shape": lists}, "top_scores": {"dtype": "float32", "shape": lists}},
        "graphs": graphs,
        "keys_and_values": [len(weights.layers), weights.layers[0].kv_heads, weights.layers[0].head_dim],
        "capacity": weights.items.rows - 1,
        "head": "linear" if weights.items.has_biases else "tied",
        "top_k": min(config.top_k or 100, weights.items.count),
        "num_items": weights.items.count,
        "max_history": window,
        "buckets": sorted({*range(BUCKET_STEP, window, BUCKET_STEP), window}),
        "positions": layout.positions,
        "prefix_length": layout.prefix_length,
        "suffix_length": layout.suffix_length,
        "keep_history": config.keep_history,
        "ties": "smaller id first",
        "opset": config.opset,
        "precision": "int8" if weights.rounds_inputs else "fp32",
        "num_8bit_layers": weights.num_8bit_layers,
    }

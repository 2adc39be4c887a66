"""export: a decoder checkpoint becomes an ONNX graph, and is not written unless it answers as the checkpoint does."""

from pathlib import Path

import numpy as np

from export.decoder import Serving
from export.engine import build_all, builder_for, default_shapes, input_ranges, place, simulate
from export.graph import append_graph, recommend_graph, rerank_graph
from export.items import PROJECTION_FILE
from export.parity import PARITY_FILE, check_other_graphs, check_parity, some_histories
from export.runtime import APPEND_FILE, GRAPH_FILE, RERANK_FILE, SIGNATURE_FILE, TUNE_FILE, OnnxRecommender
from export.signature import signature
from export.tune import tune
from export.weights import serving_weights
from export.writer import save_graphs
from slmrec.artifact import Artifact, is_up_to_date, open_artifact, publish, write_json
from slmrec.config import ExportConfig, settings_of
from slmrec.dataset import Dataset, stage_on
from slmrec.engine_config import EngineConfig
from slmrec.errors import ConfigError
from slmrec.locks import one_run_at_a_time
from slmrec.models.checkpoint import load_decoder, require_finite, with_neutral_layers
from slmrec.models.decoder import DecoderModel
from slmrec.models.ranking import TorchRecommender


@one_run_at_a_time
def export_checkpoint(
    checkpoint: Artifact, data: Dataset, output: Path, config: ExportConfig, *,
    engine: EngineConfig | None = None, force: bool = False,
) -> tuple[Artifact, bool]:  # fmt: skip
    """Export a teacher or student; gives the artefact and whether it was there already.

    With `engine` settings TensorRT engines are built beside the graph, where TensorRT can build here.

    Raises:
        CheckError: the graph does not answer as the checkpoint does, or costs too much accuracy in the engine's
            precision; nothing is written.
    """
    settings, kind = settings_of(config), "graph"
    if engine is not None:
        builder = builder_for(engine)
        kind = "graph" if isinstance(builder, str) else "engine"
        built = settings_of(engine) | {"timing_cache": None}  # of how fast it is built, not of what
        settings |= {"engine": built, "builder": None if isinstance(builder, str) else builder[0]}
    stage = stage_on(data, checkpoint, "export", kind, settings)
    if is_up_to_date(output, stage, force=force):
        return open_artifact(output), True
    model = with_neutral_layers(load_decoder(checkpoint)).eval()
    with publish(output, stage) as folder:
        export_model(model, folder, config)
        data.items.save(folder)
        if not config.keep_history:
            parity = check_parity(TorchRecommender(model, "cpu"), OnnxRecommender(folder), data.sequences)
            write_json(folder / PARITY_FILE, parity.to_json())
        check_other_graphs(folder, some_histories(data.sequences))
        if engine is not None:
            shapes = default_shapes(data, model.spec.max_history)
            placed = place(model, folder, config, engine, input_ranges(checkpoint, engine.ranges), shapes)
            placed = simulate(placed, TorchRecommender(model, "cpu"), data, engine.accuracy_gate)
            build_all(placed, folder, engine)
    return open_artifact(output), False


def export_model(model: DecoderModel, folder: Path, config: ExportConfig) -> None:
    """Write the graphs, their data files and `signature.json`.

    Raises:
        CheckError: weights that are not finite.
        ConfigError: `append` was asked for, but positions depend on the length of the whole history.
    """
    require_finite(model)
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
    has_titles = model.titles is not None
    write_json(folder / SIGNATURE_FILE, signature(serving, graphs, has_titles=has_titles))
    if tuned is not None:
        write_json(folder / TUNE_FILE, tuned.to_json())

"""What a caller has to know of an artefact's graphs, and all that the runtime reads besides them."""

from collections.abc import Mapping
from typing import Any

from export.decoder import Serving
from export.writer import GraphWriter, Tensor

BUCKET_STEP = 8
"""Histories are padded to the next multiple of this, or to the window."""
MEANINGS = {
    "item_ids": "oldest first, left-padded with 0",
    "exclude_ids": "never returned, padded with 0",
    "candidate_ids": "to be scored, padded with 0",
    "new_item": "what the user has taken since, oldest first, left-padded with 0",
    "seen_ids": "the items whose keys and values are given, left-padded with 0",
    "past_length": "how many they are",
    "past_keys": "of these items, in their places",
    "past_values": "of these items, in their places",
    "certified": "whether a list needed no look at the fp32 table",
    "user_vectors": "what item outputs are multiplied by",
    "new_keys": "of the new items, for the next request",
    "new_values": "of the new items, for the next request",
}


def signature(model: Serving, graphs: Mapping[str, GraphWriter], *, has_titles: bool) -> dict[str, Any]:
    """`signature.json`: every graph's inputs and outputs, those of `recommend` at the top as well."""
    weights, config = model.weights, model.config
    layout = weights.layout
    tensors = {name: _tensors(graph) for name, graph in graphs.items()}
    return {
        "signature": "recommend",
        **tensors["model.onnx"],
        "graphs": list(graphs),
        "tensors": tensors,
        "keys_and_values": [len(weights.layers), weights.layers[0].kv_heads, weights.layers[0].head_dim],
        "capacity": weights.items.rows - 1,
        "head": "linear" if weights.items.has_biases else "tied",
        "folds_items": weights.projection is None,
        "has_titles": has_titles,
        "top_k": min(config.top_k or 100, weights.items.count),
        "num_items": weights.items.count,
        "max_history": layout.max_history,
        "buckets": sorted({*range(BUCKET_STEP, layout.max_history, BUCKET_STEP), layout.max_history}),
        "positions": layout.positions,
        "prefix_length": layout.prefix_length,
        "suffix_length": layout.suffix_length,
        "keep_history": config.keep_history,
        "ties": "smaller id first",
        "opset": config.opset,
        "precision": "int8" if weights.rounds_inputs else "fp32",
        "num_8bit_layers": weights.num_8bit_layers,
    }


def _tensors(graph: GraphWriter) -> dict[str, Any]:
    return {"inputs": _described(graph.inputs), "outputs": _described(graph.outputs)}


def _described(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        name: {"dtype": kind, "shape": shape} | ({"meaning": MEANINGS[name]} if name in MEANINGS else {})
        for name, (kind, shape) in tensors.items()
    }

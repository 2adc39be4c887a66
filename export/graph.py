"""The serving graphs, one for each signature: recommend, rerank, append."""

import numpy as np
from onnx import TensorProto

from export.decoder import DecoderGraph, Serving
from export.item_head import Head, certified_items, exact_items
from export.weights import ServingWeights
from export.writer import GraphWriter, Value, ints

ONE = ints(1)


def recommend_graph(model: Serving) -> GraphWriter:
    """Signature `recommend`: best items and their scores, best first, ties by smaller id.

    Where fewer than k items remain, id 0 with score -inf. A user vector that is not finite makes all its scores NaN.
    """
    graph, weights, config = GraphWriter(model.config.opset), model.weights, model.config
    decoder = DecoderGraph(graph, model)
    seen, excluded = (decoder.known(value) for value in _request(graph))
    users = _user_vectors(graph, weights, decoder.user_states(seen)[0])
    _best_items(graph, model, users, [excluded] if config.keep_history else [seen, excluded])
    return graph


def rerank_graph(model: Serving) -> GraphWriter:
    """Signature `rerank`: the scores of given candidates; -inf for 0, for unknown and for excluded ones.

    The user vectors they are products of go out as well.
    """
    graph, weights, config = GraphWriter(model.config.opset), model.weights, model.config
    decoder = DecoderGraph(graph, model)
    seen, excluded = (decoder.known(value) for value in _request(graph))
    candidates = decoder.known(graph.input("candidate_ids", "int64", ["batch", "candidates"]))
    users = _user_vectors(graph, weights, decoder.user_states(seen)[0])
    vectors = graph.op("Gather", graph.item_constant("outputs", weights.items.outputs), candidates)
    scores = graph.op("Squeeze", graph.op("MatMul", vectors, graph.op("Unsqueeze", users, ints(2))), ints(2))
    scores = graph.op(
        "Add", scores, graph.op("Gather", graph.item_constant("offsets", weights.items.offsets), candidates)
    )
    masked = graph.op("Concat", excluded, seen, axis=1) if not config.keep_history else excluded
    equal = graph.op("Equal", graph.op("Unsqueeze", candidates, ints(2)), graph.op("Unsqueeze", masked, ints(1)))
    # a sum: the largest of no values is undefined, and nothing may be excluded
    hits = graph.op("ReduceSum", graph.op("Cast", equal, to=TensorProto.INT32), ints(2), keepdims=0)
    gone = graph.op("Greater", hits, np.array(0, dtype=np.int32))
    scores = graph.op("Where", gone, np.array(-np.inf, dtype=np.float32), scores)
    graph.output(graph.op("Add", scores, _poison(graph, users)), "scores", "float32", ["batch", "candidates"])
    graph.output(users, "user_vectors", "float32", ["batch", weights.items.outputs.shape[1]])
    return graph


def append_graph(model: Serving) -> GraphWriter:
    """Signature `append`: as `recommend`, for new items after a past whose keys and values are given; gives theirs.

    A past of length 0 is allowed, so the same graph computes a history from its beginning.
    """
    graph, weights, config = GraphWriter(model.config.opset), model.weights, model.config
    decoder = DecoderGraph(graph, model)
    first = weights.layers[0]
    shape: list[int | str] = ["batch", len(weights.layers), first.kv_heads, "past", first.head_dim]
    new = decoder.known(graph.input("new_item", "int64", ["batch", "new"]))
    seen = decoder.known(graph.input("seen_ids", "int64", ["batch", "past"]))
    length = graph.input("past_length", "int64", ["batch"])
    keys, values = (graph.input(name, "float32", shape) for name in ("past_keys", "past_values"))
    excluded = decoder.known(graph.input("exclude_ids", "int64", ["batch", "excluded"]))
    states, new_keys, new_values = decoder.user_states(new, decoder.past(seen, length, keys, values))
    users = _user_vectors(graph, weights, states)
    _best_items(graph, model, users, [excluded] if config.keep_history else [seen, new, excluded])
    skipped = 0 if config.fold_prefix else weights.layout.prefix_length
    bounds = ints(skipped), graph.op("Add", graph.size(new, 1), ints(skipped))
    shape[3] = "new"
    for name, layers in (("new_keys", new_keys), ("new_values", new_values)):
        parts = [graph.op("Unsqueeze", graph.op("Slice", one, *bounds, ints(2)), ONE) for one in layers]
        whole = parts[0] if len(parts) == 1 else graph.op("Concat", *parts, axis=1)
        graph.output(whole, name, "float32", shape)
    return graph


def _request(graph: GraphWriter) -> list[Value]:
    return [
        graph.input("item_ids", "int64", ["batch", "history"]),
        graph.input("exclude_ids", "int64", ["batch", "excluded"]),
    ]


def _user_vectors(graph: GraphWriter, weights: ServingWeights, states: Value) -> Value:
    """What item outputs are compared with, [batch, width]."""
    projection = weights.user_proj
    return states if projection is None else graph.op("MatMul", states, projection)


def _best_items(graph: GraphWriter, model: Serving, users: Value, masked: list[Value]) -> None:
    """The outputs `top_items` and `top_scores`; with an 8-bit item table also `certified`."""
    weights, config = model.weights, model.config
    ids = graph.op("Concat", *masked, axis=1) if len(masked) > 1 else masked[0]
    k = min(config.top_k or 100, weights.items.count)
    head = Head(graph, weights.items, users, ids, k, config.block_max)
    if config.int8_items:
        best, found, certified = certified_items(head)
        graph.output(certified, "certified", "bool", ["batch"])
    else:
        best, found = exact_items(head)
    empty = graph.op("Equal", best, np.array(-np.inf, dtype=np.float32))
    graph.output(graph.op("Where", empty, np.array(0), found), "top_items", "int64", ["batch", "k"])
    graph.output(graph.op("Add", best, _poison(graph, users)), "top_scores", "float32", ["batch", "k"])


def _poison(graph: GraphWriter, users: Value) -> Value:
    """NaN for a user whose vector is not finite, else 0; a comparison would hide NaN from a list."""
    return graph.op("Mul", graph.op("ReduceSum", users, ONE, keepdims=1), np.array(0, dtype=np.float32))

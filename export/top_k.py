"""The best k of a row of scores, exactly."""

import numpy as np

from export.writer import GraphWriter, Value, ints

BLOCK = 128
"""Items in a block of the block-max top-K."""


def top_k(graph: GraphWriter, scores: Value, columns: int, k: int, *, block_max: bool = True) -> tuple[Value, Value]:
    """Best scores and their columns, [batch, k] each, best first, ties by smaller column.

    By way of block maxima where that is less work: only the k best blocks can hold one of the k best columns. Block
    numbers are put in ascending order before gathering, so that an engine that breaks ties by position (as ONNX
    defines it) breaks them by column.
    """
    num_blocks = -(-columns // BLOCK)
    if not block_max or k >= num_blocks:
        best, found = graph.ops("TopK", 2, scores, ints(k), axis=1)
        return best, found
    missing = num_blocks * BLOCK - columns
    if missing:
        scores = graph.op("Pad", scores, ints(0, 0, 0, missing), np.array(-np.inf, dtype=np.float32))
    blocks = graph.op("Reshape", scores, ints(0, num_blocks, BLOCK))
    largest = graph.op("ReduceMax", blocks, ints(2), keepdims=0)
    _, chosen = graph.ops("TopK", 2, largest, ints(k), axis=1)
    chosen, _ = graph.ops("TopK", 2, chosen, ints(k), axis=1, largest=0)
    gathered = graph.op("Reshape", block_values(graph, blocks, chosen), ints(0, k * BLOCK))
    best, places = graph.ops("TopK", 2, gathered, ints(k), axis=1)
    return best, top_places(graph, chosen, places)


def block_values(graph: GraphWriter, blocks: Value, chosen: Value) -> Value:
    """The chosen blocks of each row, [batch, chosen, BLOCK]."""
    return graph.op("GatherND", blocks, graph.op("Unsqueeze", chosen, ints(2)), batch_dims=1)


def top_places(graph: GraphWriter, chosen: Value, places: Value) -> Value:
    """Columns of the whole row, of places in the chosen blocks one after the other."""
    block = graph.op("GatherElements", chosen, graph.op("Div", places, np.array(BLOCK)), axis=1)
    return graph.op("Add", graph.op("Mul", block, np.array(BLOCK)), graph.op("Mod", places, np.array(BLOCK)))

"""From user vectors to the best items: by the fp32 table, or by its 8-bit copy with lists certified to be the same."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Int8
from onnx import TensorProto

from export.linear import Linears, Rounded
from export.runtime import ITEM_DATA
from export.top_k import BLOCK, block_values, top_k, top_places
from export.weights import ItemWeights
from export.writer import MICROSOFT, GraphWriter, Value, ints

UNIT = 2.0**-24
"""Rounding of one fp32 operation: a sum of n products errs by at most about n UNIT |u| |x|, in whatever order."""
LEAST_BYTES = 16 * 2**20
"""Tables of fewer bytes stay in the processor's cache, where 8 bits gain nothing."""
ROWS_AT_ONCE = 2**17
ONE, MINUS_INFINITY = ints(1), np.array(-np.inf, dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class Int8Items:
    """Item outputs (and, as a further column, biases) rounded row by row, and how far off each row is."""

    values: Int8[np.ndarray, "width rows"]
    scale: Float32[np.ndarray, " rows"]
    error: Float32[np.ndarray, " rows"]
    """For a user vector of length 1: how much larger a row's fp32 score can be than the rounded row's."""
    length: Float32[np.ndarray, " rows"]
    """Of the rounded row: what an error in the user vector is multiplied by at most."""
    rounding: Float32[np.ndarray, ""]
    """For a user vector of length 1: how far two fp32 scores of one item can lie apart."""

    @classmethod
    def of(cls, table: Float32[np.ndarray, "rows width"]) -> "Int8Items":
        """Round a table."""
        rows, width = table.shape
        values = np.empty((width, rows), dtype=np.int8)
        scale, error, length = (np.empty(rows, dtype=np.float32) for _ in range(3))
        allowance, longest = 2 * width * UNIT, 0.0
        for part in _slices(rows):
            exact = table[part].astype(np.float64)
            scale[part] = np.abs(exact).max(axis=1) / 127
            whole = np.rint(exact / np.maximum(scale[part], 1e-30)[:, None])
            values[:, part] = np.clip(whole, -127, 127).T
            rounded = values[:, part].T * scale[part].astype(np.float64)[:, None]
            norms = np.linalg.norm(exact, axis=1), np.linalg.norm(rounded, axis=1)
            error[part] = (np.linalg.norm(exact - rounded, axis=1) + allowance * sum(norms)) * (1 + 4 * UNIT)
            length[part] = norms[1] * (1 + 4 * UNIT)
            longest = max(longest, float(norms[0].max(initial=0)))
        rounding = np.array(2 * allowance * longest, dtype=np.float32)
        return cls(values=values, scale=scale, error=error, length=length, rounding=rounding)


@dataclass(frozen=True)
class Head:
    """What every way to the best items needs."""

    graph: GraphWriter
    items: ItemWeights
    users: Value
    """[batch, width]."""
    masked: Value
    """[batch, n]: ids never to be returned."""
    k: int
    block_max: bool


def exact_items(head: Head) -> tuple[Value, Value]:
    """Scores and rows of the best items, [batch, k], by the fp32 table."""
    graph = head.graph
    outputs, offsets = (graph.constant(values, ITEM_DATA) for values in (head.items.outputs, head.items.offsets))
    scores = graph.op("Gemm", head.users, outputs, offsets, transB=1)
    return top_k(graph, _without(graph, scores, head.masked), head.items.rows, head.k, block_max=head.block_max)


def certified_items(head: Head) -> tuple[Value, Value, Value]:
    """The same by way of the 8-bit table, and whether each list was certified, bool [batch].

    A product in 8 bits bounds the score of every item from above, block by block. The items with the largest bounds
    are scored again in fp32. A list is certified when its k-th score exceeds the bound of everything left out by more
    than fp32 rounding; if any of a batch is not, the uncertified ones are computed in full. So no item is missing from
    a list but one whose fp32 score is within rounding of its last.
    """
    graph, table = head.graph, _with_bias(head.items)
    rounded_table = Int8Items.of(table)
    users = _with_one(head)
    bounds = _Bounds.of(graph, users, rounded_table)
    scores = _without(graph, bounds.coarse(head.items), head.masked)
    rows, coarse, left_out = bounds.candidates(scores, head.k)
    vectors = graph.op("Gather", graph.constant(table, ITEM_DATA), rows)
    exact = graph.op("Squeeze", graph.op("MatMul", vectors, graph.op("Unsqueeze", users, ints(2))), ints(2))
    exact = graph.op("Where", graph.op("Equal", coarse, MINUS_INFINITY), MINUS_INFINITY, exact)
    best, places = graph.ops("TopK", 2, exact, ints(head.k), axis=1)
    found = graph.op("GatherElements", rows, places, axis=1)
    last = graph.op("Slice", best, ints(head.k - 1), ints(head.k), ONE)
    slack = graph.op("Mul", bounds.user_length, graph.constant(rounded_table.rounding, ITEM_DATA))
    certified = graph.op("Greater", graph.op("Sub", last, slack), left_out)
    scores, items = _full_where_needed(head, table, users, certified, (best, found))
    return scores, items, graph.op("Squeeze", certified, ONE)


@dataclass(frozen=True)
class _Bounds:
    """Upper bounds of scores in units of each user's own scale, so that no pass over all items is spent on it."""

    graph: GraphWriter
    table: Int8Items
    rounded: Rounded
    user_length: Value
    """[batch, 1], and rounding."""
    weight_of_error: Value
    """[batch, 1]: what an item's error adds, in the user's units."""
    weight_of_length: Value

    @classmethod
    def of(cls, graph: GraphWriter, users: Value, table: Int8Items) -> "_Bounds":
        rounded = Linears(graph, fused=True).rounded(users, graph.size(users, 0))
        whole = graph.op("Sub", graph.op("Cast", rounded.values, to=TensorProto.FLOAT), np.array(128, dtype=np.float32))
        lost = graph.op("Sub", users, graph.op("Mul", whole, rounded.scale))
        room = np.array(1 + (len(table.values) + 8) * UNIT, dtype=np.float32)
        lengths = [graph.op("Mul", graph.op("ReduceL2", value, ONE, keepdims=1), room) for value in (users, lost)]
        scale = graph.op("Max", rounded.scale, np.array(1e-30, dtype=np.float32))
        weights = [graph.op("Div", length, scale) for length in lengths]
        return cls(graph, table, rounded, lengths[0], *weights)

    def coarse(self, items: ItemWeights) -> Value:
        """Scores of the rounded table by the rounded user, [batch, rows]; -inf for items that must not be given."""
        closed = np.where(np.isfinite(items.offsets), 0, -np.inf).astype(np.float32)
        return self.graph.op(
            "MatMulIntegerToFloat", self.rounded.values, self.graph.constant(self.table.values, ITEM_DATA),
            np.array(1, dtype=np.float32), self.graph.constant(self.table.scale, ITEM_DATA),
            np.array(128, dtype=np.uint8), None, self.graph.constant(closed, ITEM_DATA), domain=MICROSOFT,
        )  # fmt: skip

    def candidates(self, scores: Value, k: int) -> tuple[Value, Value, Value]:
        """Rows with the largest bounds in ascending order, their coarse scores, and the largest bound left out."""
        graph, num_blocks = self.graph, len(self.table.scale) // BLOCK
        blocks = graph.op("Reshape", scores, ints(0, num_blocks, BLOCK))
        errors, lengths = (values.reshape(num_blocks, BLOCK) for values in (self.table.error, self.table.length))
        largest = graph.op("ReduceMax", blocks, ints(2), keepdims=0)
        of_blocks = self._raised(largest, *(graph.constant(v.max(axis=1), ITEM_DATA) for v in (errors, lengths)))
        chosen, left_blocks = self._largest(of_blocks, min(num_blocks, 2 * k + 32), num_blocks)
        number = min(num_blocks, 2 * k + 32)
        inside = block_values(graph, blocks, chosen)
        own = [graph.op("Gather", graph.constant(v, ITEM_DATA), chosen) for v in (errors, lengths)]
        axes = ints(1)
        raised = graph.op("Add", inside, graph.op("Mul", own[0], graph.op("Unsqueeze", self.weight_of_error, axes)))
        raised = graph.op("Add", raised, graph.op("Mul", own[1], graph.op("Unsqueeze", self.weight_of_length, axes)))
        flat, width = ints(0, number * BLOCK), number * BLOCK
        places, left_items = self._largest(graph.op("Reshape", raised, flat), min(width, 2 * k + 64), width)
        coarse = graph.op("GatherElements", graph.op("Reshape", inside, flat), places, axis=1)
        left = graph.op("Mul", graph.op("Max", left_blocks, left_items), self.rounded.scale)
        return top_places(graph, chosen, places), coarse, left

    def _raised(self, values: Value, errors: Value, lengths: Value) -> Value:
        graph = self.graph
        raised = graph.op("Add", values, graph.op("Mul", errors, self.weight_of_error))
        return graph.op("Add", raised, graph.op("Mul", lengths, self.weight_of_length))

    def _largest(self, values: Value, count: int, available: int) -> tuple[Value, Value]:
        """Columns of the largest values in ascending order, and the largest of the others, [batch, 1]."""
        graph = self.graph
        if count == available:
            batch = graph.size(values, 0)
            columns = graph.op("Expand", np.arange(count)[None], graph.shape(batch, count))
            return columns, graph.op("Expand", MINUS_INFINITY, graph.shape(batch, 1))
        best, places = graph.ops("TopK", 2, values, ints(count + 1), axis=1)
        left = graph.op("Slice", best, ints(count), ints(count + 1), ONE)
        places = graph.op("Slice", places, ints(0), ints(count), ONE)
        ascending, _ = graph.ops("TopK", 2, places, ints(count), axis=1, largest=0)
        return ascending, left


def _full_where_needed(
    head: Head, table: np.ndarray, users: Value, certified: Value, found: tuple[Value, Value]
) -> tuple[Value, Value]:
    """Lists of uncertified users by the whole table; without any, nothing is computed."""
    graph = head.graph
    missing = graph.op("ReduceMax", graph.op("Cast", graph.op("Not", certified), to=TensorProto.INT32), keepdims=0)
    full, kept = graph.branch(), graph.branch()
    # of a shape known only at run time: a constant table would be packed, which makes a private copy of it
    width = full.op("Add", full.op("Mul", full.size(head.masked, 0), ints(0)), ints(table.shape[1]))
    rows = full.op("Reshape", graph.constant(table, ITEM_DATA), full.op("Concat", ints(-1), width, axis=0))
    scores = full.op("FusedMatMul", users, rows, domain=MICROSOFT, transB=1)
    closed = np.where(np.isfinite(head.items.offsets), 0, -np.inf).astype(np.float32)
    scores = _without(full, full.op("Add", scores, graph.constant(closed, ITEM_DATA)), head.masked)
    whole = top_k(full, scores, head.items.rows, head.k, block_max=head.block_max)
    mixed = [full.op("Where", certified, own, other) for own, other in zip(found, whole, strict=True)]
    same = [kept.op("Identity", value) for value in found]
    scores, items = graph.ops_if(graph.op("Cast", missing, to=TensorProto.BOOL), (full, mixed), (kept, same))
    return scores, items


def _without(graph: GraphWriter, scores: Value, masked: Value) -> Value:
    """Scores with -inf for the given ids."""
    nothing = graph.op("Expand", MINUS_INFINITY, graph.op("Shape", masked))
    return graph.op("ScatterElements", scores, masked, nothing, axis=1)


def _with_bias(items: ItemWeights) -> np.ndarray:
    """The output table; where items have biases, with them as a further column."""
    biases = np.where(np.isfinite(items.offsets), items.offsets, 0).astype(np.float32)
    return np.concatenate([items.outputs, biases[:, None]], axis=1) if biases.any() else items.outputs


def _with_one(head: Head) -> Value:
    """User vectors; where items have biases, with a 1 that these are multiplied by."""
    graph, width = head.graph, head.items.outputs.shape[1]
    if _with_bias(head.items).shape[1] == width:
        return head.users
    ones = graph.op("Expand", np.array(1, dtype=np.float32), graph.shape(graph.size(head.users, 0), 1))
    return graph.op("Concat", head.users, ones, axis=1)


def _slices(rows: int) -> Iterator[slice]:
    return (slice(first, min(first + ROWS_AT_ONCE, rows)) for first in range(0, rows, ROWS_AT_ONCE))

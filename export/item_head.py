"""From user vectors to the best items: by the fp32 table, or by its 8-bit copy with lists certified to be the same."""

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from export.items import UNIT, ItemWeights
from export.linear import Linears, Rounded
from export.top_k import BLOCK, block_values, top_k, top_places
from export.writer import MICROSOFT, GraphWriter, Value, ints

SPARED = 25
"""One block more is looked at for each so many; in large catalogues more items lie close behind the last of a list."""
ONE, MINUS_INFINITY = ints(1), np.array(-np.inf, dtype=np.float32)


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

    def item(self, name: str) -> Value:
        """One of the item tables, see `ItemWeights.array`."""
        return self.graph.item_constant(name, self.items.array(name))


def exact_items(head: Head) -> tuple[Value, Value]:
    """Scores and rows of the best items, [batch, k], by the fp32 table."""
    graph = head.graph
    outputs, offsets = head.item("outputs"), head.item("offsets")
    scores = graph.op("Gemm", head.users, outputs, offsets, transB=1)
    return top_k(graph, _without(graph, scores, head.masked), head.items.rows, head.k, block_max=head.block_max)


def certified_items(head: Head) -> tuple[Value, Value, Value]:
    """The same by way of the 8-bit table, and whether each list was certified, bool [batch].

    A product in 8 bits bounds the score of every item from above, block by block. The items with the largest bounds
    are scored again in fp32. A list is certified when its k-th score exceeds the bound of everything left out by more
    than fp32 rounding; if any of a batch is not, the uncertified ones are computed in full. So no item is missing from
    a list but one whose fp32 score is within rounding of its last.
    """
    graph, users = head.graph, _with_one(head)
    bounds = _Bounds.of(head, users)
    scores = _without(graph, bounds.coarse(), head.masked)
    rows, coarse, left_out = bounds.candidates(scores, head.k)
    vectors = graph.op("Gather", head.item(head.items.exact), rows)
    exact = graph.op("Squeeze", graph.op("MatMul", vectors, graph.op("Unsqueeze", users, ints(2))), ints(2))
    exact = graph.op("Where", graph.op("Equal", coarse, MINUS_INFINITY), MINUS_INFINITY, exact)
    best, places = graph.ops("TopK", 2, exact, ints(head.k), axis=1)
    found = graph.op("GatherElements", rows, places, axis=1)
    last = graph.op("Slice", best, ints(head.k - 1), ints(head.k), ONE)
    slack = graph.op("Mul", bounds.user_length, head.item("rounding"))
    certified = graph.op("Greater", graph.op("Sub", last, slack), left_out)
    scores, items = _full_where_needed(head, users, certified, (best, found))
    return scores, items, graph.op("Squeeze", certified, ONE)


@dataclass(frozen=True)
class _Bounds:
    """Upper bounds of scores in units of each user's own scale, so that no pass over all items is spent on it."""

    head: Head
    rounded: Rounded
    user_length: Value
    """[batch, 1], and rounding."""
    weight_of_error: Value
    """[batch, 1]: what an item's error adds, in the user's units."""
    weight_of_length: Value

    @classmethod
    def of(cls, head: Head, users: Value) -> "_Bounds":
        graph = head.graph
        rounded = Linears(graph, fused=True).rounded(users, graph.size(users, 0))
        whole = graph.op("Sub", graph.op("Cast", rounded.values, to=TensorProto.FLOAT), np.array(128, dtype=np.float32))
        lost = graph.op("Sub", users, graph.op("Mul", whole, rounded.scale))
        room = np.array(1 + (head.items.array(head.items.exact).shape[1] + 8) * UNIT, dtype=np.float32)
        lengths = [graph.op("Mul", graph.op("ReduceL2", value, ONE, keepdims=1), room) for value in (users, lost)]
        scale = graph.op("Max", rounded.scale, np.array(1e-30, dtype=np.float32))
        weights = [graph.op("Div", length, scale) for length in lengths]
        return cls(head, rounded, lengths[0], *weights)

    def coarse(self) -> Value:
        """Scores of the rounded table by the rounded user, [batch, rows]; -inf for items that must not be given."""
        head = self.head
        return head.graph.op(
            "MatMulIntegerToFloat", self.rounded.values, head.item("rounded"), np.array(1, dtype=np.float32),
            head.item("scale"), np.array(128, dtype=np.uint8), None, head.item("closed"), domain=MICROSOFT,
        )  # fmt: skip

    def candidates(self, scores: Value, k: int) -> tuple[Value, Value, Value]:
        """Rows with the largest bounds in ascending order, their coarse scores, and the largest bound left out."""
        graph, num_blocks = self.head.graph, self.head.items.rows // BLOCK
        number = min(num_blocks, 2 * k + 32 + min(3 * k, num_blocks // SPARED))
        blocks = graph.op("Reshape", scores, ints(0, num_blocks, BLOCK))
        largest = graph.op("ReduceMax", blocks, ints(2), keepdims=0)
        of_blocks = self._raised(largest, self.head.item("block_errors"), self.head.item("block_lengths"), None)
        chosen, left_blocks = self._largest(of_blocks, number, num_blocks)
        inside = block_values(graph, blocks, chosen)
        own = [graph.op("Gather", self.head.item(name), chosen) for name in ("errors", "lengths")]
        raised = self._raised(inside, own[0], own[1], ONE)
        flat, width = ints(0, number * BLOCK), number * BLOCK
        places, left_items = self._largest(graph.op("Reshape", raised, flat), min(width, 2 * k + 64), width)
        coarse = graph.op("GatherElements", graph.op("Reshape", inside, flat), places, axis=1)
        left = graph.op("Mul", graph.op("Max", left_blocks, left_items), self.rounded.scale)
        return top_places(graph, chosen, places), coarse, left

    def _raised(self, values: Value, errors: Value, lengths: Value, axes: np.ndarray | None) -> Value:
        """Coarse scores plus what they may be too small by; users' weights get further axes."""
        graph = self.head.graph
        for each, weight in ((errors, self.weight_of_error), (lengths, self.weight_of_length)):
            wide = weight if axes is None else graph.op("Unsqueeze", weight, axes)
            values = graph.op("Add", values, graph.op("Mul", each, wide))
        return values

    def _largest(self, values: Value, count: int, available: int) -> tuple[Value, Value]:
        """Columns of the largest values in ascending order, and the largest of the others, [batch, 1]."""
        graph = self.head.graph
        if count == available:
            batch = graph.size(values, 0)
            columns = graph.op("Expand", np.arange(count)[None], graph.shape(batch, count))
            return columns, graph.op("Expand", MINUS_INFINITY, graph.shape(batch, 1))
        best, places = graph.ops("TopK", 2, values, ints(count + 1), axis=1)
        left = graph.op("Slice", best, ints(count), ints(count + 1), ONE)
        places = graph.op("Slice", places, ints(0), ints(count), ONE)
        ascending, _ = graph.ops("TopK", 2, places, ints(count), axis=1, largest=0)
        return ascending, left


def _full_where_needed(head: Head, users: Value, certified: Value, found: tuple[Value, Value]) -> tuple[Value, Value]:
    """Lists of uncertified users by the whole table; without any, nothing is computed."""
    graph = head.graph
    missing = graph.op("ReduceMax", graph.op("Cast", graph.op("Not", certified), to=TensorProto.INT32), keepdims=0)
    full, kept = graph.branch(), graph.branch()
    # of a shape known only at run time: a constant table would be packed, which makes a private copy of it
    width = full.op(
        "Add", full.op("Mul", full.size(head.masked, 0), ints(0)), ints(head.items.array(head.items.exact).shape[1])
    )
    rows = full.op("Reshape", head.item(head.items.exact), full.op("Concat", ints(-1), width, axis=0))
    scores = full.op("FusedMatMul", users, rows, domain=MICROSOFT, transB=1)
    scores = _without(full, full.op("Add", scores, head.item("closed")), head.masked)
    whole = top_k(full, scores, head.items.rows, head.k, block_max=head.block_max)
    mixed = [full.op("Where", certified, own, other) for own, other in zip(found, whole, strict=True)]
    same = [kept.op("Identity", value) for value in found]
    scores, items = graph.ops_if(graph.op("Cast", missing, to=TensorProto.BOOL), (full, mixed), (kept, same))
    return scores, items


def _without(graph: GraphWriter, scores: Value, masked: Value) -> Value:
    """Scores with -inf for the given ids."""
    nothing = graph.op("Expand", MINUS_INFINITY, graph.op("Shape", masked))
    return graph.op("ScatterElements", scores, masked, nothing, axis=1)


def _with_one(head: Head) -> Value:
    """User vectors; where items have biases, with a 1 that these are multiplied by."""
    graph = head.graph
    if not head.items.has_biases:
        return head.users
    ones = graph.op("Expand", np.array(1, dtype=np.float32), graph.shape(graph.size(head.users, 0), 1))
    return graph.op("Concat", head.users, ones, axis=1)

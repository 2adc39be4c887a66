"""The serving graph: history in, top-K items out; everything constant is computed once, nothing twice."""

from dataclasses import dataclass

import numpy as np

from export.linear import Linears, joined
from export.top_k import top_k
from export.weights import LayerWeights, LinearWeights, ServingWeights
from export.writer import MICROSOFT, GraphWriter, Value, ints
from slmrec.config import ExportConfig

MASKED = np.array(-1e9, dtype=np.float32)
"""Added to the score of a key that must not be seen; finite, so that a row without any key stays finite."""
ZERO, ONE = ints(0), ints(1)


@dataclass(frozen=True)
class Tokens:
    """The tokens of a batch that layers compute, and what they may see. Sizes are int64 tensors of one element."""

    batch: Value
    length: Value
    rows: Value
    """batch * length."""
    positions: Value
    """[batch, length]: where each stands, for its rotation."""
    counts: Value
    """[batch, length]: its number among real tokens; padding has that of the token before it."""
    seen_counts: Value
    """[batch, prefix + length]: the same of the tokens seen, the folded prefix first."""
    seen_valid: Value
    """[batch, prefix + length]: whether a token may be seen at all."""


class DecoderGraph:
    """Writes the decoder of a recommender, exact but for rounding."""

    def __init__(self, graph: GraphWriter, weights: ServingWeights, config: ExportConfig) -> None:
        self.graph, self.weights, self.config = graph, weights, config
        self.linears = Linears(graph, fused=config.fuse_kernels)

    def known(self, ids: Value) -> Value:
        """Ids outside 1..num_items become 0, as padding is; ONNX would read -1 as the last row."""
        graph = self.graph
        limit = np.array(self.weights.num_items, dtype=np.int64)
        inside = graph.op(
            "And", graph.op("Greater", ids, np.array(0, dtype=np.int64)), graph.op("LessOrEqual", ids, limit)
        )
        return graph.op("Where", inside, ids, np.array(0, dtype=np.int64))

    def user_states(self, item_ids: Value) -> Value:
        """States at the user-vector position before the final norm, [batch, hidden]; ids are known ones."""
        tokens, hidden = self.tokens(item_ids)
        added: Value | None = None
        depth = len(self.weights.layers)
        for number, layer in enumerate(self.weights.layers):
            newest_only = self.config.newest_only and number == depth - 1
            hidden, added = self._layer(layer, tokens, hidden, added, newest_only=newest_only)
        assert added is not None
        if not self.config.newest_only:
            hidden, added = (self._newest(tokens, value) for value in (hidden, added))
        normed, _ = self.linears.add_and_norm(hidden, added, self.weights.norm)
        return normed

    def tokens(self, item_ids: Value) -> tuple[Tokens, Value]:
        """Tokens of a batch and their vectors, [batch * length, hidden]."""
        graph, layout = self.graph, self.weights.layout
        folded, own_prefix = self._prefix_lengths()
        batch = graph.size(item_ids, 0)
        real = graph.op("Not", graph.op("Equal", item_ids, np.array(0, dtype=np.int64)))
        attended = self._attended(item_ids, real)
        parts = [self.item_vectors(item_ids)]
        ones = {length: self._filled(batch, length) for length in {own_prefix, layout.suffix_length, folded} if length}
        real_parts, valid_parts = [graph.op("Cast", real, to=7)], [attended]
        position_parts = [self._item_positions(item_ids, attended)]
        if own_prefix:
            parts.insert(0, self._rows(self.weights.prefix, batch))
            real_parts.insert(0, ones[own_prefix])
            valid_parts.insert(0, graph.op("Cast", ones[own_prefix], to=9))
            position_parts.insert(0, graph.op("Mul", ones[own_prefix], np.arange(own_prefix)[None]))
        if layout.suffix_length:
            parts.append(self._rows(self.weights.suffix, batch))
            real_parts.append(ones[layout.suffix_length])
            valid_parts.append(graph.op("Cast", ones[layout.suffix_length], to=9))
            position_parts.append(self._suffix_positions(attended, batch))
        vectors, is_real, valid, positions = (
            self._joined(part) for part in (parts, real_parts, valid_parts, position_parts)
        )
        counts = graph.op("Add", graph.op("CumSum", is_real, np.array(1)), np.array(folded - 1))
        seen, seen_valid = counts, valid
        if folded:
            seen = self._joined([graph.op("Mul", ones[folded], np.arange(folded)[None]), counts])
            seen_valid = self._joined([graph.op("Cast", ones[folded], to=9), valid])
        length = graph.size(positions, 1)
        hidden = graph.op("Reshape", vectors, ints(-1, self.weights.hidden_size))
        return Tokens(batch, length, graph.size(hidden, 0), positions, counts, seen, seen_valid), hidden

    def item_vectors(self, item_ids: Value) -> Value:
        """What the decoder reads of items, [batch, history, hidden]."""
        items = self.weights.items
        vectors = self.graph.op("Gather", items.table, item_ids)
        if items.projection is None:
            return vectors
        assert items.projection.bias is not None
        return self.graph.op("Add", self.graph.op("MatMul", vectors, items.projection.weight), items.projection.bias)

    def _layer(
        self, layer: LayerWeights, tokens: Tokens, hidden: Value, added: Value | None, *, newest_only: bool
    ) -> tuple[Value, Value]:
        """What goes on unchanged, and what the layer adds to it, [batch * length, hidden] both."""
        linears = self.linears
        if added is None:
            normed = linears.norm(hidden, layer.input_norm)
        else:
            normed, hidden = linears.add_and_norm(hidden, added, layer.input_norm)
        query, keys, values = self._heads(layer, tokens, normed, newest_only=newest_only)
        if newest_only:
            hidden = self._newest(tokens, hidden)
        attended = self._attend(layer, tokens, query, keys, values, newest_only=newest_only)
        rows = tokens.batch if newest_only else tokens.rows
        normed, hidden = linears.add_and_norm(hidden, linears.product(attended, layer.out, rows), layer.forward_norm)
        return hidden, linears.gated(normed, layer.gate, layer.up, layer.down, rows)

    def _heads(
        self, layer: LayerWeights, tokens: Tokens, normed: Value, *, newest_only: bool
    ) -> tuple[Value, Value, Value]:
        """Queries of the tokens that ask, keys and values of all: [batch, heads, length, head_dim], rotated."""
        graph, counts = self.graph, [layer.num_heads, layer.kv_heads, layer.kv_heads]
        parts = [layer.query, layer.key, layer.value]
        if newest_only:
            asking = self.linears.product(self._newest(tokens, normed), layer.query, tokens.batch)
            [query] = self._split_heads(asking, tokens.batch, ONE, counts[:1], layer)
            keys, values = self._project(normed, parts[1:], tokens, counts[1:], layer)
            positions = graph.op("Slice", tokens.positions, ints(-1), ints(2**31), ONE)
        else:
            query, keys, values = self._project(normed, parts, tokens, counts, layer)
            positions = tokens.positions
        if layer.query_norm is not None:
            query = self.linears.norm(query, layer.query_norm)
        if layer.key_norm is not None:
            keys = self.linears.norm(keys, layer.key_norm)
        return self._rotated(query, positions), self._rotated(keys, tokens.positions), values

    def _project(
        self, inputs: Value, parts: list[LinearWeights], tokens: Tokens, counts: list[int], layer: LayerWeights
    ) -> list[Value]:
        one = joined(parts) if self.config.join_projections else None
        if one is not None:
            return self._split_heads(
                self.linears.product(inputs, one, tokens.rows), tokens.batch, tokens.length, counts, layer
            )
        return [
            self._split_heads(
                self.linears.product(inputs, part, tokens.rows), tokens.batch, tokens.length, [count], layer
            )[0]
            for part, count in zip(parts, counts, strict=True)
        ]

    def _split_heads(
        self, flat: Value, batch: Value, length: Value | np.ndarray, counts: list[int], layer: LayerWeights
    ) -> list[Value]:
        graph = self.graph
        shape = graph.op("Concat", batch, length, ints(sum(counts), layer.head_dim), axis=0)
        heads = graph.op("Transpose", graph.op("Reshape", flat, shape), perm=[0, 2, 1, 3])
        return [heads] if len(counts) == 1 else graph.ops("Split", len(counts), heads, ints(*counts), axis=1)

    def _rotated(self, heads: Value, positions: Value) -> Value:
        graph, weights = self.graph, self.weights
        if self.config.fuse_kernels:
            return graph.op("RotaryEmbedding", heads, positions, weights.cos, weights.sin, domain=MICROSOFT)
        cos, sin = (
            graph.op("Unsqueeze", graph.op("Gather", table, positions), ONE)
            for table in (
                np.concatenate([weights.cos] * 2, axis=1),
                np.concatenate([-weights.sin, weights.sin], axis=1),
            )
        )
        half = weights.cos.shape[1]
        first, second = graph.ops("Split", 2, heads, ints(half, half), axis=3)
        turned = graph.op("Concat", second, first, axis=3)
        return graph.op("Add", graph.op("Mul", heads, cos), graph.op("Mul", turned, sin))

    def _attend(
        self, layer: LayerWeights, tokens: Tokens, query: Value, keys: Value, values: Value, *, newest_only: bool
    ) -> Value:
        """Attention of grouped queries without copies of keys and values, [batch * asking, heads * head_dim]."""
        graph = self.graph
        if self.config.fold_prefix and self.weights.layout.prefix_length:
            keys = graph.op("Concat", self._rows(layer.prefix_keys, tokens.batch), keys, axis=2)
            values = graph.op("Concat", self._rows(layer.prefix_values, tokens.batch), values, axis=2)
        groups = layer.num_heads // layer.kv_heads
        grouped = graph.op("Reshape", query, ints(0, layer.kv_heads, -1, layer.head_dim))
        bias = self._bias(layer.sliding_window, tokens, groups, newest_only=newest_only)
        if self.config.fuse_kernels:
            scores = graph.op("FusedMatMul", grouped, keys, domain=MICROSOFT, transB=1, alpha=layer.scaling)
        else:
            turned = graph.op("Transpose", keys, perm=[0, 1, 3, 2])
            scores = graph.op("Mul", graph.op("MatMul", grouped, turned), np.array(layer.scaling, dtype=np.float32))
        weights = graph.op("Softmax", graph.op("Add", scores, bias), axis=-1)
        mixed = graph.op("MatMul", weights, values)
        shape = graph.op(
            "Concat", tokens.batch, ints(layer.num_heads), ONE if newest_only else tokens.length,
            ints(layer.head_dim), axis=0,
        )  # fmt: skip
        heads = graph.op("Transpose", graph.op("Reshape", mixed, shape), perm=[0, 2, 1, 3])
        return graph.op("Reshape", heads, ints(-1, layer.num_heads * layer.head_dim))

    def _bias(self, window: int | None, tokens: Tokens, groups: int, *, newest_only: bool) -> Value:
        """0 where a token may see another, else -1e9: [batch, 1, groups * asking, seen]."""
        graph = self.graph
        asking = graph.op("Slice", tokens.counts, ints(-1), ints(2**31), ONE) if newest_only else tokens.counts
        distance = graph.op(
            "Sub", graph.op("Unsqueeze", asking, ints(1, 3)), graph.op("Unsqueeze", tokens.seen_counts, ints(1, 2))
        )
        allowed = graph.op("GreaterOrEqual", distance, np.array(0))
        allowed = graph.op("And", allowed, graph.op("Unsqueeze", tokens.seen_valid, ints(1, 2)))
        if window is not None:
            allowed = graph.op("And", allowed, graph.op("Less", distance, np.array(window)))
        bias = graph.op("Where", allowed, np.array(0, dtype=np.float32), MASKED)
        return graph.op("Concat", *[bias] * groups, axis=2) if groups > 1 else bias

    def _newest(self, tokens: Tokens, rows: Value) -> Value:
        """The newest token's row of each user, [batch, width]."""
        graph = self.graph
        shape = graph.op("Concat", tokens.batch, tokens.length, ints(-1), axis=0)
        return graph.op("Gather", graph.op("Reshape", rows, shape), np.array(-1), axis=1)

    def _attended(self, item_ids: Value, real: Value) -> Value:
        """Which items others may see: no padding and no masked id (see `prompt.attended_items`)."""
        graph, layout = self.graph, self.weights.layout
        attended = real
        for item in layout.masked_ids:
            attended = graph.op("And", attended, graph.op("Not", graph.op("Equal", item_ids, np.array(item))))
        if layout.masked_ids and not layout.suffix_length:
            others = graph.op("Slice", attended, ZERO, ints(-1), ONE)
            newest = graph.op("Slice", real, ints(-1), ints(2**31), ONE)
            attended = graph.op("Concat", others, newest, axis=1)
        return attended

    def _item_positions(self, item_ids: Value, attended: Value) -> Value:
        """Position of every item, see `prompt.item_positions`."""
        graph, layout = self.graph, self.weights.layout
        if layout.positions == "compact":
            count = graph.op("CumSum", graph.op("Cast", attended, to=7), np.array(1))
            place = graph.op("Max", graph.op("Sub", count, np.array(1)), np.array(0))
            return graph.op("Add", place, np.array(layout.prefix_length))
        width = graph.op("Squeeze", graph.size(item_ids, 1), ZERO)
        newest = np.array(layout.prefix_length + layout.max_history)
        columns = graph.op("Range", graph.op("Sub", newest, width), newest, np.array(1))
        return graph.op("Add", graph.op("Mul", item_ids, np.array(0)), columns)

    def _suffix_positions(self, attended: Value, batch: Value) -> Value:
        """Positions of the response tokens, right after the newest item."""
        graph, layout = self.graph, self.weights.layout
        offsets = np.arange(layout.suffix_length)[None] + layout.prefix_length
        if layout.positions == "padded":
            return graph.op("Mul", self._filled(batch, layout.suffix_length), offsets + layout.max_history)
        count = graph.op("ReduceSum", graph.op("Cast", attended, to=7), ONE, keepdims=1)
        return graph.op("Add", count, offsets)

    def _prefix_lengths(self) -> tuple[int, int]:
        """Instruction tokens that are folded, and that are computed."""
        length = self.weights.layout.prefix_length
        return (length, 0) if self.config.fold_prefix else (0, length)

    def _rows(self, constant: np.ndarray, batch: Value) -> Value:
        """A constant, once for every user."""
        return self.graph.op("Expand", constant[None], self.graph.shape(batch, *constant.shape))

    def _filled(self, batch: Value, length: int) -> Value:
        """Ones, int64 [batch, length]."""
        return self.graph.op("Expand", np.array(1), self.graph.shape(batch, length))

    def _joined(self, parts: list[Value]) -> Value:
        return parts[0] if len(parts) == 1 else self.graph.op("Concat", *parts, axis=1)


def recommend_graph(weights: ServingWeights, config: ExportConfig) -> GraphWriter:
    """Signature `recommend`: best items and their scores, best first, ties by smaller id.

    Where fewer than k items remain, id 0 with score -inf. A user vector that is not finite makes all its scores NaN.
    """
    graph = GraphWriter(config.opset)
    decoder = DecoderGraph(graph, weights, config)
    item_ids = graph.input("item_ids", "int64", ["batch", "history"])
    exclude_ids = graph.input("exclude_ids", "int64", ["batch", "excluded"])
    seen, excluded = decoder.known(item_ids), decoder.known(exclude_ids)
    users = user_vectors(graph, weights, decoder.user_states(seen))
    scores = item_scores(graph, weights, users)
    k = min(config.top_k or 100, weights.num_items)
    masked = [excluded] if config.keep_history else [seen, excluded]
    scores = without(graph, scores, masked, decoder)
    best, items = top_k(graph, scores, weights.num_items + 1, k, block_max=config.block_max)
    nothing = graph.op("Equal", best, np.array(-np.inf, dtype=np.float32))
    # a comparison would hide NaN from the list
    poison = graph.op("Mul", graph.op("ReduceSum", users, ONE, keepdims=1), np.array(0, dtype=np.float32))
    graph.output(graph.op("Where", nothing, np.array(0), items), "top_items", "int64", ["batch", "k"])
    graph.output(graph.op("Add", best, poison), "top_scores", "float32", ["batch", "k"])
    return graph


def user_vectors(graph: GraphWriter, weights: ServingWeights, states: Value) -> Value:
    """What item outputs are compared with, [batch, width]."""
    projection = weights.items.user_proj
    return states if projection is None else graph.op("MatMul", states, projection)


def item_scores(graph: GraphWriter, weights: ServingWeights, users: Value) -> Value:
    """Scores of all items, column 0 for padding, [batch, num_items + 1]."""
    scores = graph.op("MatMul", users, np.ascontiguousarray(weights.items.outputs.T))
    return scores if weights.items.bias is None else graph.op("Add", scores, weights.items.bias)


def without(graph: GraphWriter, scores: Value, masked: list[Value], decoder: DecoderGraph) -> Value:
    """Scores with -inf for padding and for the given ids."""
    batch = graph.size(scores, 0)
    ids = graph.op("Concat", graph.op("Expand", np.array(0), graph.shape(batch, 1)), *masked, axis=1)
    nothing = graph.op("Expand", np.array(-np.inf, dtype=np.float32), graph.op("Shape", ids))
    return graph.op("ScatterElements", scores, ids, nothing, axis=1)

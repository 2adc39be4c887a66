"""The decoder in a serving graph: item ids in, user states out; everything constant is computed once, nothing twice."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from export.linear import Linears, Rows, Shape, joined
from export.precision import TypedLinears
from export.weights import LayerWeights, LinearWeights, ServingWeights
from export.writer import MICROSOFT, GraphWriter, Value, ints
from slmrec.config import ExportConfig

MASKED = np.array(-1e9, dtype=np.float32)
"""Added to the score of a key that must not be seen; finite, so that a row without any key stays finite."""
ZERO, ONE = ints(0), ints(1)


@dataclass(frozen=True)
class Past:
    """What is known of the items before: left-padded, t of them, instruction and response not among them."""

    keys: Value
    """[batch, layers, kv_heads, t, head_dim], rotated."""
    values: Value
    counts: Value
    """[batch, t], see `Tokens.counts`."""
    valid: Value
    """[batch, t], see `Tokens.seen_valid`."""
    length: Value
    """[batch, 1]: real items."""
    attended: Value
    """[batch, 1]: those of them that others see."""


@dataclass(frozen=True)
class Tokens:
    """The tokens of a batch that layers compute, and what they may see. Sizes are int64 tensors of one element."""

    batch: Value
    length: Value
    every: Rows
    """All rows, batch * length."""
    newest: Rows
    """The newest token of each user."""
    positions: Value
    """[batch, length]: where each stands, for its rotation."""
    counts: Value
    """[batch, length]: its number among real tokens; padding has that of the token before it."""
    seen_counts: Value
    """[batch, seen]: the same of the tokens seen, the folded prefix first, then the past."""
    seen_valid: Value
    """[batch, seen]: whether a token may be seen at all."""
    past: Past | None


@dataclass(frozen=True)
class Serving:
    """What graphs are written from."""

    weights: ServingWeights
    config: ExportConfig
    kernels: Mapping[Shape, str]
    """Measured choices of `--tune`; empty without it."""
    precision: str | None = None
    """Placed in the graph for TensorRT, which computes what the graph says; None: ONNX Runtime's own choice."""


class DecoderGraph:
    """Writes the decoder of a recommender, exact but for rounding."""

    def __init__(self, graph: GraphWriter, model: Serving) -> None:
        self.graph, self.weights, self.config = graph, model.weights, model.config
        self.linears = (
            Linears(graph, fused=model.config.fuse_kernels, kernels=model.kernels)
            if model.precision is None
            else TypedLinears(graph, model.precision)
        )

    def known(self, ids: Value) -> Value:
        """Ids outside 1..num_items become 0, as padding is; ONNX would read -1 as the last row."""
        graph = self.graph
        limit = graph.op("ReduceMax", graph.item_constant("count", self.weights.items.array("count")), keepdims=0)
        inside = graph.op(
            "And", graph.op("Greater", ids, np.array(0, dtype=np.int64)), graph.op("LessOrEqual", ids, limit)
        )
        return graph.op("Where", inside, ids, np.array(0, dtype=np.int64))

    def user_states(self, item_ids: Value, past: Past | None = None) -> tuple[Value, list[Value], list[Value]]:
        """States at the user-vector position, normed, [batch, hidden]; keys and values of each layer for all tokens.

        Args:
            item_ids: known ids, [batch, history], left-padded.
            past: of the items before these.
        """
        tokens, hidden = self.tokens(item_ids, past)
        keys, values = [], []
        added: Value | None = None
        depth = len(self.weights.layers)
        for number, layer in enumerate(self.weights.layers):
            newest_only = self.config.newest_only and number == depth - 1
            hidden, added, own_keys, own_values = self._layer(number, layer, tokens, (hidden, added), newest_only)
            keys.append(own_keys)
            values.append(own_values)
        assert added is not None
        if not self.config.newest_only:
            hidden, added = (self._newest(tokens, value) for value in (hidden, added))
        normed, _ = self.linears.add_and_norm(hidden, added, self.weights.norm)
        return normed, keys, values

    def past(self, seen_ids: Value, length: Value, keys: Value, values: Value) -> Past:
        """The past from its inputs: ids [batch, t], lengths [batch], keys and values."""
        graph = self.graph
        width = graph.op("Squeeze", graph.size(seen_ids, 1), ZERO)
        length = graph.op("Unsqueeze", graph.op("Max", graph.op("Min", length, width), np.array(0)), ONE)
        columns = graph.op("Range", np.array(0), width, np.array(1))
        places = graph.op("Add", graph.op("Sub", graph.op("Unsqueeze", columns, ZERO), width), length)
        is_real = graph.op("Not", graph.op("Equal", seen_ids, np.array(0)))
        real = graph.op("And", graph.op("GreaterOrEqual", places, np.array(0)), is_real)
        valid = self._unmasked(seen_ids, real)
        return Past(keys, values, self._after_past(places, None), valid, length, self._total(valid))

    def tokens(self, item_ids: Value, past: Past | None = None) -> tuple[Tokens, Value]:
        """Tokens of a batch and their vectors, [batch * length, hidden]."""
        graph, layout = self.graph, self.weights.layout
        batch, before = graph.size(item_ids, 0), np.arange(layout.prefix_length)
        real = graph.op("Not", graph.op("Equal", item_ids, np.array(0, dtype=np.int64)))
        attended = self._attended(item_ids, real)
        parts = [
            (
                self.item_vectors(item_ids),
                self._after_past(graph.op("Sub", self._running(real), np.array(1)), past.length if past else None),
                attended,
                self._item_positions(item_ids, attended, past),
            )
        ]
        folded: list[tuple[Value, Value]] = []
        if layout.prefix_length:
            own = graph.op("Mul", self._filled(batch, layout.prefix_length), before[None])
            all_valid = self._all_valid(batch, layout.prefix_length)
            if self.config.fold_prefix:
                folded = [(own, all_valid)]
            else:
                parts.insert(0, (self._rows(self.weights.prefix, batch), own, all_valid, own))
        if layout.suffix_length:
            newest = self._after_past(self._total(real), past.length if past else None)
            counts = graph.op("Add", newest, np.arange(layout.suffix_length)[None])
            valid = self._all_valid(batch, layout.suffix_length)
            positions = self._suffix_positions(attended, batch, past)
            parts.append((self._rows(self.weights.suffix, batch), counts, valid, positions))
        vectors, counts, valid, positions = (self._joined(list(column)) for column in zip(*parts, strict=True))
        seen = [*folded, *([(past.counts, past.valid)] if past else []), (counts, valid)]
        seen_counts, seen_valid = (self._joined(list(column)) for column in zip(*seen, strict=True))
        length = graph.size(positions, 1)
        hidden = graph.op("Reshape", vectors, ints(-1, self.weights.hidden_size))
        every, one = Rows(graph.size(hidden, 0), False), Rows(batch, True)
        return Tokens(batch, length, every, one, positions, counts, seen_counts, seen_valid, past), hidden

    def item_vectors(self, item_ids: Value) -> Value:
        """What the decoder reads of items, [batch, history, hidden]."""
        projection = self.weights.projection
        vectors = self.graph.op("Gather", self.graph.item_constant("table", self.weights.items.table), item_ids)
        if projection is None:
            return vectors
        assert projection.bias is not None
        return self.graph.op("Add", self.graph.op("MatMul", vectors, projection.weight), projection.bias)

    def _layer(
        self, number: int, layer: LayerWeights, tokens: Tokens, stream: tuple[Value, Value | None], newest_only: bool
    ) -> tuple[Value, Value, Value, Value]:
        """What goes on unchanged and what the layer adds to it, [rows, hidden] both; its keys and values."""
        linears = self.linears
        hidden, added = stream
        if added is None:
            normed = linears.norm(hidden, layer.input_norm)
        else:
            normed, hidden = linears.add_and_norm(hidden, added, layer.input_norm)
        query, keys, values = self._heads(layer, tokens, normed, newest_only=newest_only)
        if newest_only:
            hidden = self._newest(tokens, hidden)
        seen = [self._seen(number, name, tokens, own) for name, own in (("keys", keys), ("values", values))]
        attended = self._attend(layer, tokens, query, seen, newest_only=newest_only)
        rows = tokens.newest if newest_only else tokens.every
        normed, hidden = linears.add_and_norm(hidden, linears.product(attended, layer.out, rows), layer.forward_norm)
        return hidden, linears.gated(normed, layer.gate, layer.up, layer.down, rows), keys, values

    def _seen(self, number: int, name: str, tokens: Tokens, own: Value) -> Value:
        """Keys or values of the folded prefix, of the past and of the tokens themselves."""
        parts = [self.linears.kept(own)]
        if tokens.past is not None:
            past = tokens.past.keys if name == "keys" else tokens.past.values
            parts.insert(0, self.graph.op("Gather", past, np.array(number), axis=1))
        if self.config.fold_prefix and self.weights.layout.prefix_length:
            layer = self.weights.layers[number]
            prefix = layer.prefix_keys if name == "keys" else layer.prefix_values
            parts.insert(0, self._rows(self.linears.stored(prefix), tokens.batch))
        return parts[0] if len(parts) == 1 else self.graph.op("Concat", *parts, axis=2)

    def _heads(
        self, layer: LayerWeights, tokens: Tokens, normed: Value, *, newest_only: bool
    ) -> tuple[Value, Value, Value]:
        """Queries of the tokens that ask, keys and values of all: [batch, heads, length, head_dim], rotated."""
        counts = [layer.num_heads, layer.kv_heads, layer.kv_heads]
        parts = [layer.query, layer.key, layer.value]
        if newest_only:
            asking = self.linears.product(self._newest(tokens, normed), layer.query, tokens.newest)
            [query] = self._split_heads(asking, tokens.batch, ONE, counts[:1], layer)
            keys, values = self._project(normed, parts[1:], tokens, counts[1:], layer)
            positions = self._last_column(tokens.positions)
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
                self.linears.product(inputs, one, tokens.every), tokens.batch, tokens.length, counts, layer
            )
        return [
            self._split_heads(
                self.linears.product(inputs, part, tokens.every), tokens.batch, tokens.length, [count], layer
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
        self, layer: LayerWeights, tokens: Tokens, query: Value, seen: list[Value], *, newest_only: bool
    ) -> Value:
        """Attention of grouped queries without copies of keys and values, [batch * asking, heads * head_dim]."""
        graph, (keys, values) = self.graph, seen
        groups = layer.num_heads // layer.kv_heads
        asked = ints(groups) if newest_only else graph.op("Mul", tokens.length, ints(groups))
        grouped_shape = graph.op("Concat", tokens.batch, ints(layer.kv_heads), asked, ints(layer.head_dim), axis=0)
        grouped = graph.op("Reshape", query, grouped_shape)
        bias = self._bias(layer.sliding_window, tokens, groups, newest_only=newest_only)
        scores = self.linears.scores(grouped, keys, layer.scaling)
        weights = graph.op("Softmax", graph.op("Add", scores, bias), axis=-1)
        mixed = self.linears.mixed(weights, values)
        shape = graph.op(
            "Concat", tokens.batch, ints(layer.num_heads), ONE if newest_only else tokens.length,
            ints(layer.head_dim), axis=0,
        )  # fmt: skip
        heads = graph.op("Transpose", graph.op("Reshape", mixed, shape), perm=[0, 2, 1, 3])
        return graph.op("Reshape", heads, ints(-1, layer.num_heads * layer.head_dim))

    def _bias(self, window: int | None, tokens: Tokens, groups: int, *, newest_only: bool) -> Value:
        """0 where a token may see another, else -1e9: [batch, 1, groups * asking, seen]."""
        graph = self.graph
        asking = self._last_column(tokens.counts) if newest_only else tokens.counts
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
        shape = graph.op("Concat", tokens.batch, tokens.length, ints(self.weights.hidden_size), axis=0)
        return graph.op("Gather", graph.op("Reshape", rows, shape), np.array(-1), axis=1)

    def _attended(self, item_ids: Value, real: Value) -> Value:
        """Which items others may see: no padding and no masked id (see `prompt.attended_items`)."""
        layout, attended = self.weights.layout, self._unmasked(item_ids, real)
        if layout.masked_ids and not layout.suffix_length:
            others = self.graph.op("Slice", attended, ZERO, ints(-1), ONE)
            attended = self.graph.op("Concat", others, self._last_column(real), axis=1)
        return attended

    def _unmasked(self, item_ids: Value, real: Value) -> Value:
        """Real items but for those whose ids are masked, bool [batch, history]."""
        graph = self.graph
        for item in self.weights.layout.masked_ids:
            real = graph.op("And", real, graph.op("Not", graph.op("Equal", item_ids, np.array(item))))
        return real

    def _last_column(self, rows: Value) -> Value:
        """[batch, 1] of [batch, n]."""
        return self.graph.op("Slice", rows, ints(-1), ints(2**31), ONE)

    def _item_positions(self, item_ids: Value, attended: Value, past: Past | None) -> Value:
        """Position of every item, see `prompt.item_positions`."""
        graph, layout = self.graph, self.weights.layout
        if layout.positions == "compact":
            place = graph.op("Max", graph.op("Sub", self._running(attended), np.array(1)), np.array(0))
            return self._after_past(place, past.attended if past else None)
        width = graph.op("Squeeze", graph.size(item_ids, 1), ZERO)
        newest = np.array(layout.prefix_length + layout.max_history)
        columns = graph.op("Range", graph.op("Sub", newest, width), newest, np.array(1))
        columns = graph.op("Max", columns, np.array(0))  # histories longer than the window are the runtime's to cut
        return graph.op("Add", graph.op("Mul", item_ids, np.array(0)), columns)

    def _suffix_positions(self, attended: Value, batch: Value, past: Past | None) -> Value:
        """Positions of the response tokens, right after the newest item."""
        graph, layout = self.graph, self.weights.layout
        offsets = np.arange(layout.suffix_length)[None]
        if layout.positions == "padded":
            first = layout.prefix_length + layout.max_history
            return graph.op("Mul", self._filled(batch, layout.suffix_length), offsets + first)
        return graph.op("Add", self._after_past(self._total(attended), past.attended if past else None), offsets)

    def _running(self, flags: Value) -> Value:
        """How many of the flags up to each one are set, [batch, history]."""
        return self.graph.op("CumSum", self.graph.op("Cast", flags, to=TensorProto.INT64), np.array(1))

    def _total(self, flags: Value) -> Value:
        """How many flags of a row are set, [batch, 1]."""
        return self.graph.op("ReduceSum", self.graph.op("Cast", flags, to=TensorProto.INT64), ONE, keepdims=1)

    def _after_past(self, places: Value, past: Value | None) -> Value:
        """Places among the items of a request as places among all tokens."""
        if past is not None:
            places = self.graph.op("Add", places, past)
        return self.graph.op("Add", places, np.array(self.weights.layout.prefix_length))

    def _all_valid(self, batch: Value, length: int) -> Value:
        return self.graph.op("Cast", self._filled(batch, length), to=TensorProto.BOOL)

    def _rows(self, constant: np.ndarray, batch: Value) -> Value:
        """A constant, once for every user."""
        return self.graph.op("Expand", constant[None], self.graph.shape(batch, *constant.shape))

    def _filled(self, batch: Value, length: int) -> Value:
        """Ones, int64 [batch, length]."""
        return self.graph.op("Expand", np.array(1), self.graph.shape(batch, length))

    def _joined(self, parts: list[Value]) -> Value:
        return parts[0] if len(parts) == 1 else self.graph.op("Concat", *parts, axis=1)

"""Linear layers in a serving graph: fp32, 8-bit with activations rounded per token, 8-bit weights in fp32."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, numpy_helper

from export.weights import LinearWeights, NormWeights
from export.writer import MICROSOFT, GraphWriter, Value, ints

BLOCK = 32
"""Inputs that share a scale in the kernel `blocks`."""


@dataclass(frozen=True)
class Rounded:
    """Rows in 8 bits: uint8 with zero point 128, [rows, width], and the scale of each row, [rows, 1]."""

    values: Value
    scale: Value


@dataclass(frozen=True)
class Rows:
    """What a linear layer reads: how many rows, an int64 tensor of one element, and whether it is one for each user."""

    count: Value
    one_per_user: bool


Shape = tuple[int, int, bool]
"""Inputs, outputs, and whether there is one row for each user."""


class Linears:
    """Writes linear layers and norms; `fused` uses ONNX Runtime's own operations where they save passes over data.

    `kernels` says which way a layer that computes in 8 bits does so, by its shape: `integer`, rows rounded by a scale
    of their own (the default); `blocks`, each block of 32 inputs by one; `fp32`, inputs not rounded.
    """

    def __init__(self, graph: GraphWriter, *, fused: bool, kernels: Mapping[Shape, str] | None = None) -> None:
        self.graph, self.fused, self.kernels = graph, fused, dict(kernels or {})

    def kernel(self, layer: LinearWeights, rows: Rows) -> str:
        """How a layer that computes in 8 bits does so."""
        return self.kernels.get((*layer.weight.shape, rows.one_per_user), "integer")

    def product(self, inputs: Value, layer: LinearWeights, rows: Rows) -> Value:
        """Outputs [rows, out] of inputs [rows, in]."""
        graph = self.graph
        kernel = self.kernel(layer, rows) if layer.rounds_inputs else "fp32"
        if layer.scale is None:
            outputs = graph.op("MatMul", inputs, layer.weight)
        elif kernel == "integer":
            rounded = self.rounded(inputs, rows.count)
            outputs = graph.op("Mul", self.int8_product(rounded, layer), rounded.scale)
        elif kernel == "blocks":
            outputs = self._block_product(inputs, layer)
        else:  # a cast and a product, done once at load; ONNX Runtime would fuse DequantizeLinear into rounding inputs
            weight = graph.op("Mul", graph.op("Cast", layer.weight, to=TensorProto.FLOAT), layer.scale)
            outputs = graph.op("MatMul", inputs, weight)
        return outputs if layer.bias is None else graph.op("Add", outputs, layer.bias)

    def rounded(self, inputs: Value, rows: Value) -> Rounded:
        """Each row by a scale of its own, so that a user's activations do not depend on who shares the batch."""
        graph = self.graph
        largest = graph.op("ReduceMax", graph.op("Abs", inputs), ints(-1), keepdims=0)
        scale = graph.op("Mul", largest, np.array(1 / 127, dtype=np.float32))
        column = graph.op("Unsqueeze", scale, ints(1))
        if not self.fused:
            return Rounded(self._quantize_plainly(inputs, column), column)
        value = numpy_helper.from_array(np.array([128], dtype=np.uint8))
        zero_points = graph.op("ConstantOfShape", rows, value=value)
        return Rounded(graph.op("QuantizeLinear", inputs, scale, zero_points, axis=0), column)

    def int8_product(self, rounded: Rounded, layer: LinearWeights) -> Value:
        """The product without the scales of its rows and without bias."""
        graph, zero_point = self.graph, np.array(128, dtype=np.uint8)
        if self.fused:
            one = np.array(1, dtype=np.float32)
            return graph.op(
                "MatMulIntegerToFloat", rounded.values, layer.weight, one, layer.scale, zero_point, domain=MICROSOFT
            )
        sums = graph.op("MatMulInteger", rounded.values, layer.weight, zero_point)
        return graph.op("Mul", graph.op("Cast", sums, to=TensorProto.FLOAT), layer.scale)

    def _block_product(self, inputs: Value, layer: LinearWeights) -> Value:
        """The same weights; inputs are rounded block by block of a row, which is finer."""
        assert layer.scale is not None
        width, outputs = layer.weight.shape
        assert width % BLOCK == 0
        shifted = (layer.weight.T.astype(np.int16) + 128).astype(np.uint8)
        return self.graph.op(
            "MatMulNBits", inputs, shifted.reshape(outputs, width // BLOCK, BLOCK),
            np.repeat(layer.scale, width // BLOCK), domain=MICROSOFT,
            K=width, N=outputs, bits=8, block_size=BLOCK, accuracy_level=4,
        )  # fmt: skip

    def norm(self, inputs: Value, norm: NormWeights) -> Value:
        """Root mean square norm of the last dimension."""
        graph = self.graph
        if self.fused:
            return graph.op("SimplifiedLayerNormalization", inputs, norm.weight, axis=-1, epsilon=norm.epsilon)
        square = graph.op("ReduceMean", graph.op("Mul", inputs, inputs), ints(-1), keepdims=1)
        root = graph.op("Sqrt", graph.op("Add", square, np.array(norm.epsilon, dtype=np.float32)))
        return graph.op("Mul", graph.op("Div", inputs, root), norm.weight)

    def add_and_norm(self, inputs: Value, added: Value, norm: NormWeights) -> tuple[Value, Value]:
        """The norm of a sum, and the sum; rows are [rows, width]."""
        graph = self.graph
        if self.fused:
            normed, _, _, total = graph.ops(
                "SkipSimplifiedLayerNormalization", 4, inputs, added, norm.weight, domain=MICROSOFT,
                epsilon=norm.epsilon,
            )  # fmt: skip
            return normed, total
        total = graph.op("Add", inputs, added)
        return self.norm(total, norm), total

    def gated(self, inputs: Value, gate: LinearWeights, up: LinearWeights, down: LinearWeights, rows: Rows) -> Value:
        """down(silu(gate(inputs)) * up(inputs)).

        In 8 bits the row scales of `up` pass its product and the rounding unchanged, and are applied to one number a
        row instead of to the whole row.
        """
        graph = self.graph
        opened = self._silu(self.product(inputs, gate, rows))
        in_integers = all(part.rounds_inputs and self.kernel(part, rows) == "integer" for part in (up, down))
        if not in_integers or up.bias is not None:
            return self.product(graph.op("Mul", opened, self.product(inputs, up, rows)), down, rows)
        rounded_in = self.rounded(inputs, rows.count)
        rounded = self.rounded(graph.op("Mul", opened, self.int8_product(rounded_in, up)), rows.count)
        scale = graph.op("Mul", rounded.scale, rounded_in.scale)
        outputs = graph.op("Mul", self.int8_product(rounded, down), scale)
        return outputs if down.bias is None else graph.op("Add", outputs, down.bias)

    def scores(self, query: Value, keys: Value, scaling: float) -> Value:
        """Products of queries and keys, times `scaling`: [batch, heads, asking, seen]."""
        graph = self.graph
        if self.fused:
            return graph.op("FusedMatMul", query, keys, domain=MICROSOFT, transB=1, alpha=scaling)
        turned = graph.op("Transpose", keys, perm=[0, 1, 3, 2])
        return graph.op("Mul", graph.op("MatMul", query, turned), np.array(scaling, dtype=np.float32))

    def mixed(self, weights: Value, values: Value) -> Value:
        """Values by their attention weights."""
        return self.graph.op("MatMul", weights, values)

    def stored(self, array: np.ndarray) -> np.ndarray:
        """Constant keys or values in the type that products read."""
        return array

    def kept(self, heads: Value) -> Value:
        """Keys or values in that type."""
        return heads

    def _silu(self, inputs: Value) -> Value:
        """Inputs * sigmoid(inputs)."""
        if self.fused:
            return self.graph.op("QuickGelu", inputs, domain=MICROSOFT, alpha=1.0)
        return self.graph.op("Mul", inputs, self.graph.op("Sigmoid", inputs))

    def _quantize_plainly(self, inputs: Value, scale: Value) -> Value:
        graph = self.graph
        steps = graph.op("Round", graph.op("Div", inputs, graph.op("Max", scale, np.array(1e-30, dtype=np.float32))))
        return graph.op("Cast", graph.op("Add", steps, np.array(128, dtype=np.float32)), to=TensorProto.UINT8)


def joined(layers: Sequence[LinearWeights]) -> LinearWeights | None:
    """Layers that read one input as a single layer; None where they are not of one kind."""
    first = layers[0]
    if len({layer.kind for layer in layers}) > 1:
        return None
    biases = [
        np.zeros(layer.weight.shape[1], dtype=np.float32) if layer.bias is None else layer.bias for layer in layers
    ]
    return LinearWeights(
        weight=np.ascontiguousarray(np.concatenate([layer.weight for layer in layers], axis=1)),
        scale=None if first.scale is None else np.concatenate([layer.scale for layer in layers]),
        bias=None if all(layer.bias is None for layer in layers) else np.concatenate(biases),
        rounds_inputs=first.rounds_inputs,
        input_range=first.input_range,
    )

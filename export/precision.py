"""Linear layers and attention with their precision placed in the graph, as strongly typed TensorRT wants it.

Products run in the narrow type; norms, softmax, rotations, gates and the residual stream are fp32. 8-bit products have
static symmetric scales (zero point 0), by tensor for inputs and by output channel for int8 weights; TensorRT's parser
takes no other. FP8 is E4M3, its weights by tensor.
"""

import ml_dtypes
import numpy as np
from onnx import TensorProto

from export.linear import Linears, Rows
from export.weights import LinearWeights
from export.writer import GraphWriter, Value
from slmrec.errors import ConfigError

NARROW = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
TENSOR_TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
BASE = {"int8": "fp16", "fp8": "fp16"}
"""What 8-bit precisions compute in where they do not compute in 8 bits: attention, and layers kept in full."""
LEVELS = {"int8": 127.0, "fp8": 448.0}
"""Largest magnitude of the 8-bit type."""
LARGEST_FP16 = 65504.0


class TypedLinears(Linears):
    """Writes products in one of `slmrec.engine_config.PRECISIONS`."""

    def __init__(self, graph: GraphWriter, precision: str) -> None:
        super().__init__(graph, fused=False)
        self.precision, self.base = precision, BASE.get(precision, precision)
        self.num_8bit_products = self.num_narrow_products = 0

    def product(self, inputs: Value, layer: LinearWeights, rows: Rows) -> Value:
        """Outputs [rows, out], fp32, of inputs [rows, in], fp32."""
        if layer.scale is not None and self.precision in LEVELS:
            outputs = self._eight_bit_product(inputs, layer)
        else:
            weight = layer.weight.astype(np.float32) * layer.scale if layer.scale is not None else layer.weight
            outputs = self._narrow_product(inputs, self._stored_weight(weight))
        return outputs if layer.bias is None else self.graph.op("Add", outputs, layer.bias)

    def gated(self, inputs: Value, gate: LinearWeights, up: LinearWeights, down: LinearWeights, rows: Rows) -> Value:
        """down(silu(gate(inputs)) * up(inputs))."""
        opened = self._silu(self.product(inputs, gate, rows))
        return self.product(self.graph.op("Mul", opened, self.product(inputs, up, rows)), down, rows)

    def scores(self, query: Value, keys: Value, scaling: float) -> Value:
        """Scaled before the product, so that fp16 cannot overflow where the scaled score would not."""
        scaled = self.graph.op("Mul", query, np.array(scaling, dtype=np.float32))
        return self._narrow_product(scaled, self.graph.op("Transpose", keys, perm=[0, 1, 3, 2]))

    def mixed(self, weights: Value, values: Value) -> Value:
        """Values by their attention weights, fp32."""
        return self._narrow_product(weights, values)

    def stored(self, array: np.ndarray) -> np.ndarray:
        """Constant keys or values in the narrow type."""
        return array.astype(NARROW[self.base]) if self.base in NARROW else array

    def kept(self, heads: Value) -> Value:
        """Keys or values in the narrow type."""
        return self._cast(heads)

    def _narrow_product(self, left: Value, right: Value | np.ndarray) -> Value:
        self.num_narrow_products += 1
        product = self.graph.op("MatMul", self._cast(left), right)
        return product if self.base not in NARROW else self.graph.op("Cast", product, to=TensorProto.FLOAT)

    def _eight_bit_product(self, inputs: Value, layer: LinearWeights) -> Value:
        if layer.input_range is None or layer.scale is None:
            raise ConfigError(
                f"{self.precision} needs calibrated ranges of activations, which this checkpoint does not have",
                remedy="slmcompress quantize --bits 8, whose checkpoint has them",
            )
        graph, kind = self.graph, np.dtype(np.int8) if self.precision == "int8" else np.dtype(ml_dtypes.float8_e4m3fn)
        self.num_8bit_products += 1
        zero = np.zeros((), dtype=kind)
        scale = np.array(max(layer.input_range, 1e-12) / LEVELS[self.precision], dtype=np.float32)
        rounded = graph.op("QuantizeLinear", inputs, scale, zero)
        left = graph.op("DequantizeLinear", rounded, scale, zero)
        if self.precision == "int8":
            right = graph.op("DequantizeLinear", layer.weight, layer.scale, np.zeros(len(layer.scale), kind), axis=1)
        else:
            weight = layer.weight.astype(np.float32) * layer.scale
            step = np.array(max(float(np.abs(weight).max()), 1e-12) / LEVELS["fp8"], dtype=np.float32)
            right = graph.op("DequantizeLinear", (weight / step).astype(kind), step, zero)
        return graph.op("MatMul", left, right)

    def _stored_weight(self, weight: np.ndarray) -> np.ndarray:
        if self.base == "fp16" and float(np.abs(weight).max()) > LARGEST_FP16:
            raise ConfigError(
                f"a weight of {np.abs(weight).max():.3g} is more than fp16 holds", remedy="--precision bf16 or fp32"
            )
        return weight.astype(NARROW[self.base]) if self.base in NARROW else weight

    def _cast(self, value: Value) -> Value:
        return self.graph.op("Cast", value, to=TENSOR_TYPES[self.base]) if self.base in NARROW else value

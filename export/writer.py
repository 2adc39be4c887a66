"""Writing an ONNX graph, one operation after the other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MICROSOFT = "com.microsoft"
"""ONNX Runtime's own operations."""
KINDS = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT, "bool": TensorProto.BOOL}
IR_VERSION = 10
INLINE_BYTES = 1024
"""Constants of more bytes go into the data file."""

Value = str
"""Name of a tensor in the graph."""


class GraphWriter:
    """An ONNX graph in the making; the same operation on the same values is written once.

    >>> graph = GraphWriter(opset=20)
    >>> x = graph.input("x", "float32", ["batch", 2])
    >>> graph.output(graph.op("MatMul", x, np.eye(2, dtype=np.float32)), "y", "float32", ["batch", 2])
    >>> [node.op_type for node in graph.model().graph.node]
    ['MatMul', 'Identity']
    """

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self._known: dict[tuple[Any, ...], str] = {}
        self._made: dict[bytes, list[Value]] = {}

    def input(self, name: str, kind: str, shape: Sequence[int | str]) -> Value:
        """An input of the graph."""
        self.inputs.append(helper.make_tensor_value_info(name, KINDS[kind], shape))
        return name

    def output(self, value: Value, name: str, kind: str, shape: Sequence[int | str]) -> None:
        """Make a value an output of the graph."""
        self.nodes.append(helper.make_node("Identity", [value], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, KINDS[kind], shape))

    def constant(self, array: np.ndarray, name: str | None = None) -> Value:
        """A constant; small ones of the same content are one."""
        key = (array.dtype.str, array.shape, array.tobytes()) if array.nbytes <= INLINE_BYTES else (id(array),)
        if key not in self._known:
            self._known[key] = name or f"constant_{len(self.constants)}"
            self.constants[self._known[key]] = array
        return self._known[key]

    def op(self, kind: str, *inputs: Value | np.ndarray | None, domain: str = "", **attributes: Any) -> Value:
        """An operation with one output; arrays among its inputs become constants, None an input left out."""
        return self.ops(kind, 1, *inputs, domain=domain, **attributes)[0]

    def ops(
        self, kind: str, num_outputs: int, *inputs: Value | np.ndarray | None, domain: str = "", **attributes: Any
    ) -> list[Value]:
        """An operation with several outputs."""
        names = ["" if value is None else self._name(value) for value in inputs]
        node = helper.make_node(kind, names, [], domain=domain, **attributes)
        key = node.SerializeToString(deterministic=True)
        if key not in self._made:
            self._made[key] = [f"{kind}_{len(self.nodes)}_{number}" for number in range(num_outputs)]
            node.output.extend(self._made[key])
            node.name = self._made[key][0]
            self.nodes.append(node)
        return self._made[key]

    def shape(self, *parts: Value | int) -> Value:
        """A shape of known sizes and of computed ones, which are int64 tensors of one element."""
        return self.op("Concat", *(ints(part) if isinstance(part, int) else part for part in parts), axis=0)

    def size(self, value: Value, axis: int) -> Value:
        """Size along an axis that is not negative, as an int64 tensor of one element."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def model(self) -> onnx.ModelProto:
        """The whole, its large constants still inside."""
        constants = [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        graph = helper.make_graph(self.nodes, "slmcompress", self.inputs, self.outputs, constants)
        opsets = [helper.make_opsetid("", self.opset)]
        if any(node.domain == MICROSOFT for node in self.nodes):
            opsets.append(helper.make_opsetid(MICROSOFT, 1))
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="slmcompress")

    def save(self, path: Path) -> None:
        """Write the graph, and its large constants beside it as `<name>.data`."""
        try:
            onnx.save_model(
                self.model(), path, save_as_external_data=True, location=f"{path.name}.data",
                size_threshold=INLINE_BYTES,
            )  # fmt: skip
        except OSError as error:
            error.filename = error.filename or str(path)  # a full disk is told without its file
            raise

    def _name(self, value: Value | np.ndarray) -> Value:
        return self.constant(value) if isinstance(value, np.ndarray) else value


def ints(*values: int) -> np.ndarray:
    """A constant of whole numbers, as shapes and axes are given."""
    return np.array(values, dtype=np.int64)

"""Writing an ONNX graph, one operation after the other, and graphs that share their large constants."""

import contextlib
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.runtime import DATA_FILES, DECODER_DATA, ITEM_DATA

MICROSOFT = "com.microsoft"
"""ONNX Runtime's own operations."""
KINDS = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT, "bool": TensorProto.BOOL}
IR_VERSION = 10
INLINE_BYTES = 1024
"""Constants of more bytes go into a data file."""
ALIGNMENT = 4096
"""Constants begin at multiples of this, so that ONNX Runtime maps the file instead of copying it."""


Value = str
"""Name of a tensor in the graph."""
Tensor = tuple[str, list[int | str]]
"""Type and shape of an input or output: int64, float32 or bool; sizes, and names of those that are free."""


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
        self.constants: dict[str, tuple[np.ndarray, str]] = {}
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self._made: dict[bytes, list[Value]] = {}
        self._domains: set[str] = set()
        self._numbers = itertools.count()

    def input(self, name: str, kind: str, shape: Sequence[int | str]) -> Value:
        """An input of the graph."""
        self.inputs[name] = (kind, list(shape))
        return name

    def output(self, value: Value, name: str, kind: str, shape: Sequence[int | str]) -> None:
        """Make a value an output of the graph."""
        self.nodes.append(helper.make_node("Identity", [value], [name]))
        self.outputs[name] = (kind, list(shape))

    def constant(self, array: np.ndarray) -> Value:
        """A constant; ones of the same content are one. Large ones go into the decoder's data file."""
        digest = hashlib.sha256(raw_bytes(array)).hexdigest()
        return self._add(f"constant_{array.dtype}_{'x'.join(map(str, array.shape))}_{digest[:16]}", array, DECODER_DATA)

    def item_constant(self, name: str, array: np.ndarray) -> Value:
        """A constant that follows the catalogue: in the items' data file under its own name, to be replaced there."""
        return self._add(f"items.{name}", array, ITEM_DATA)

    def _add(self, name: str, array: np.ndarray, file: str) -> Value:
        self.constants.setdefault(name, (array, file))
        return name

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
            self._made[key] = [f"{kind}_{next(self._numbers)}" for _ in range(num_outputs)]
            self._domains.add(domain)
            node.output.extend(self._made[key])
            node.name = self._made[key][0]
            self.nodes.append(node)
        return self._made[key]

    def branch(self) -> "GraphWriter":
        """A part of the graph that `ops_if` computes or not; it may read every value of the graph so far."""
        part = GraphWriter(self.opset)
        part.constants, part._numbers = self.constants, self._numbers
        part._made = dict(self._made)
        return part

    def ops_if(
        self,
        condition: Value,
        then: tuple["GraphWriter", Sequence[Value]],
        other: tuple["GraphWriter", Sequence[Value]],
    ) -> list[Value]:
        """The values of one branch or of the other."""
        branches = []
        for name, (part, values) in (("then", then), ("else", other)):
            outputs = [helper.make_empty_tensor_value_info(value) for value in values]
            branches.append(helper.make_graph(part.nodes, name, [], outputs))
            self._domains |= part._domains
        return self.ops("If", len(then[1]), condition, then_branch=branches[0], else_branch=branches[1])

    def shape(self, *parts: Value | int) -> Value:
        """A shape of known sizes and of computed ones, which are int64 tensors of one element."""
        return self.op("Concat", *(ints(part) if isinstance(part, int) else part for part in parts), axis=0)

    def size(self, value: Value, axis: int) -> Value:
        """Size along an axis that is not negative, as an int64 tensor of one element."""
        return self.op("Shape", value, start=axis, end=axis + 1)

    def model(self, constants: Mapping[str, onnx.TensorProto] | None = None) -> onnx.ModelProto:
        """The whole; with `constants` the given tensors stand for the constants of these names."""
        tensors = [
            (constants or {}).get(name) or numpy_helper.from_array(array, name)
            for name, (array, _) in self.constants.items()
        ]
        inputs, outputs = (
            [helper.make_tensor_value_info(name, KINDS[kind], shape) for name, (kind, shape) in described.items()]
            for described in (self.inputs, self.outputs)
        )
        graph = helper.make_graph(self.nodes, "slmcompress", inputs, outputs, tensors)
        opsets = [helper.make_opsetid("", self.opset)]
        if MICROSOFT in self._domains:
            opsets.append(helper.make_opsetid(MICROSOFT, 1))
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="slmcompress")

    def _name(self, value: Value | np.ndarray) -> Value:
        return self.constant(value) if isinstance(value, np.ndarray) else value


def save_graphs(graphs: Mapping[str, GraphWriter], folder: Path) -> None:
    """Write graphs by file name, and both data files, empty ones too; what several graphs hold is there once."""
    with contextlib.ExitStack() as opened:  # closes both, also where the disk is full
        files = {name: opened.enter_context(contextlib.closing(_DataFile(folder / name))) for name in DATA_FILES}
        for name, graph in graphs.items():
            outside = {
                constant: files[file].add(constant, array)
                for constant, (array, file) in graph.constants.items()
                if array.nbytes > INLINE_BYTES or file != DECODER_DATA
            }
            _write(folder / name, graph.model(outside).SerializeToString(deterministic=True))


class _DataFile:
    """Constants one after the other; the same name is written once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("wb")
        self._places: dict[str, int] = {}

    def add(self, name: str, array: np.ndarray) -> onnx.TensorProto:
        """A tensor that refers to the file."""
        content = np.ascontiguousarray(array)
        if name not in self._places:
            with _naming(self.path):
                self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
                self._places[name] = self._file.tell()
                self._file.write(raw_bytes(content))
        tensor = onnx.TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        place = {"location": self.path.name, "offset": self._places[name], "length": content.nbytes}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def close(self) -> None:
        """Bring everything to disk."""
        with _naming(self.path):
            self._file.close()


def raw_bytes(array: np.ndarray) -> memoryview:
    """An array's bytes, also of types that numpy has from elsewhere (bfloat16, 8-bit floating point)."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _write(path: Path, content: bytes) -> None:
    with _naming(path):
        path.write_bytes(content)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A full disk is told without the file that found no room."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def ints(*values: int) -> np.ndarray:
    """A constant of whole numbers, as shapes and axes are given."""
    return np.array(values, dtype=np.int64)

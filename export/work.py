"""What a graph computes for a request: arithmetic of its products and bytes it must read, counted as it runs."""

import json
import tempfile
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from slmrec.roofline import Work

PRODUCTS = frozenset(
    {"MatMul", "FusedMatMul", "Gemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits"}
)
"""Operations whose last input dimension is summed over; the first input is what is multiplied by the second."""
LOOKUPS = frozenset({"Gather", "GatherND", "GatherElements"})
"""Operations that read of a table what they give."""
ITEM_BYTES = {"float": 4, "float16": 2, "int64": 8, "int32": 4, "uint8": 1, "int8": 1, "bool": 1, "double": 8}


def count_work(graph: Path, request: Mapping[str, np.ndarray], options: Any) -> Work:
    """Run the graph once under ONNX Runtime's profiler and add up what its nodes say of their shapes.

    Args:
        graph: an ONNX file.
        request: its inputs.
        options: session options to run it with, as it is served.
    """
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "run")
        session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        session.run(None, dict(request))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    nodes = [event["args"] for event in events if event["cat"] == "Node" and event["name"].endswith("_kernel_time")]
    return add_up(nodes)


def add_up(nodes: Iterable[Mapping[str, Any]]) -> Work:
    """Work of nodes as the profiler describes them: their name, the types and shapes they read and give, constants.

    A product's weights are counted where they are no input of the node's (constants that were packed beforehand).
    """
    work = Work()
    for node in nodes:
        name = node["op_name"]
        if name in PRODUCTS:
            work += _product(node)
        elif name in LOOKUPS:
            work += Work(num_bytes=sum(_size(one) for one in node["output_type_shape"]))
        else:
            work += Work(num_bytes=int(node.get("parameter_size", 0)))
    return work


def _product(node: Mapping[str, Any]) -> Work:
    [(kind, shape)] = node["input_type_shape"][0].items()
    [(_, result)] = node["output_type_shape"][0].items()
    operations = 2.0 * prod(result) * shape[-1]
    whole = kind in ("uint8", "int8") or node["op_name"] in ("DynamicQuantizeMatMul", "MatMulNBits")
    others = [next(iter(one.values())) for one in node["input_type_shape"][1:]]
    has_weights = not any(len(other) >= 2 for other in others)
    weights = shape[-1] * result[-1] * (1 if whole else 4) if has_weights else 0
    parameters = int(node.get("parameter_size", 0))
    counts = {"int8_operations": operations} if whole else {"fp32_operations": operations}
    return Work(num_bytes=max(weights, parameters), **counts)


def _size(described: Mapping[str, Any]) -> int:
    [(kind, shape)] = described.items()
    return int(prod(shape)) * ITEM_BYTES[kind]

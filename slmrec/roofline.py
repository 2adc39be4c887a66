"""The floor of a request: its arithmetic and its bytes over what the machine can do at best.

Arithmetic is that of matrix products, two operations for each multiplication, as the artefact itself runs them; bytes
are those a request cannot avoid: every weight once, and the rows it looks up. Caches are left out, so what fits into
one can beat the floor of bytes.
"""

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np

from slmrec.recommender import Histories

REPEATS = 5
READ_BYTES = 2**28
PRODUCT = (1024, 2048, 2048)
"""Rows, depth and columns of the products that measure the peak."""


@dataclass(frozen=True)
class Work:
    """What a request takes at least."""

    fp32_operations: float = 0.0
    """Of products in floating point, of whatever width."""
    int8_operations: float = 0.0
    num_bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.fp32_operations + other.fp32_operations,
            self.int8_operations + other.int8_operations,
            self.num_bytes + other.num_bytes,
        )


@runtime_checkable
class CountsWork(Protocol):
    """A recommender that can say what an answer takes."""

    def work(self, histories: Histories) -> Work:
        """Arithmetic and bytes of one call of `recommend` for these users."""
        ...


@dataclass(frozen=True)
class Ceilings:
    """What a machine does at best, a second."""

    name: str
    fp32_operations_s: float
    int8_operations_s: float
    read_bytes_s: float
    copy_bytes_s: float | None = None
    """Read and written; None where it is not known."""
    is_estimate: bool = False
    """From a data sheet, not measured."""

    def floor_s(self, work: Work) -> float:
        """Seconds that the work takes at least: arithmetic and reading can overlap, so the longer of the two.

        >>> Ceilings("toy", 100.0, 200.0, 10.0).floor_s(Work(fp32_operations=100, int8_operations=100, num_bytes=5))
        1.5
        """
        arithmetic = work.fp32_operations / self.fp32_operations_s + work.int8_operations / self.int8_operations_s
        return max(arithmetic, work.num_bytes / self.read_bytes_s)

    def to_json(self) -> dict[str, Any]:
        """As benchmark.json holds it."""
        return asdict(self)


DEVICES = {
    "a100": Ceilings("a100", 312e12, 624e12, 2.039e12, is_estimate=True),
    "h100": Ceilings("h100", 989e12, 1979e12, 3.35e12, is_estimate=True),
}
"""NVIDIA's data sheets (SXM, 80 GB), dense: the floating-point peak is that of fp16 on tensor cores."""


def measure_ceilings(threads: int) -> Ceilings:
    """Products and large reads on this machine, the best of some repetitions each."""
    rows, depth, columns = PRODUCT
    operations = 2.0 * rows * depth * columns
    fp32_s, int8_s = (_best(call) for call in _products(threads))
    source = np.ones(READ_BYTES // 8, dtype=np.int64)
    target = np.empty_like(source)
    ends = np.linspace(0, len(source), threads + 1).astype(int).tolist()
    slices = [slice(*pair) for pair in itertools.pairwise(ends)]
    read_s = _best(lambda: _together([partial(np.bitwise_or.reduce, source[one]) for one in slices]))
    copy_s = _best(lambda: _together([partial(np.copyto, target[one], source[one]) for one in slices]))
    return Ceilings(
        "this machine", operations / fp32_s, operations / int8_s, READ_BYTES / read_s, 2 * READ_BYTES / copy_s
    )


def measured_over_floor(seconds: Sequence[float], works: Sequence[Work], ceilings: Ceilings) -> dict[str, Any]:
    """Floor of some requests and how far above it they took: medians over the requests, work their mean."""
    floors = np.array([ceilings.floor_s(work) for work in works])
    total = sum(works, Work())
    arithmetic = Ceilings(ceilings.name, ceilings.fp32_operations_s, ceilings.int8_operations_s, np.inf)
    bound = "arithmetic" if arithmetic.floor_s(total) >= total.num_bytes / ceilings.read_bytes_s else "bytes"
    found = {name: value / len(works) for name, value in asdict(total).items()}
    found |= {"floor_ms": 1000 * float(np.median(floors)), "bound": bound}
    if not ceilings.is_estimate:
        found["measured_over_floor"] = float(np.median(np.asarray(seconds) / floors))
    return found


def roofline_text(rows: Mapping[str, Mapping[str, Any]], ceilings: Mapping[str, Any]) -> str:
    """A table for people: artefact, request, arithmetic, bytes, floor, and measured over floor."""
    estimate = " (estimate from the data sheet)" if ceilings["is_estimate"] else ""
    lines = [
        f"{ceilings['name']}{estimate}: {ceilings['fp32_operations_s'] / 1e9:,.0f} billion operations a second in "
        f"floating point, {ceilings['int8_operations_s'] / 1e9:,.0f} in 8 bits; {ceilings['read_bytes_s'] / 1e9:,.1f} "
        "GB/s read"
    ]
    for name, by_batch in rows.items():
        for batch, one in by_batch.items():
            over = f", measured {one['measured_over_floor']:.1f} times that" if "measured_over_floor" in one else ""
            lines.append(
                f"{name}, {batch.replace('_', ' ')}: {(one['fp32_operations'] + one['int8_operations']) / 1e9:.3f} "
                f"billion operations, {one['num_bytes'] / 1e6:.1f} MB, floor {one['floor_ms']:.3f} ms by "
                f"{one['bound']}{over}"
            )
    return "\n".join(lines)


def _products(threads: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """A product in fp32 and one in 8 bits, by ONNX Runtime where it is there, else both by numpy."""
    rows, depth, columns = PRODUCT
    generator = np.random.default_rng(0)
    left, right = generator.random((rows, depth), np.float32), generator.random((depth, columns), np.float32)
    try:
        import onnxruntime as ort
    except ImportError:
        return lambda: left @ right, lambda: left @ right
    from onnx import TensorProto, helper, numpy_helper

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    calls: list[Callable[[], object]] = []
    whole = generator.integers(0, 255, (rows, depth), dtype=np.uint8)
    weights = generator.integers(-127, 127, (depth, columns), dtype=np.int8)
    for operation, one, constant, kinds in (
        ("MatMul", left, right, (TensorProto.FLOAT, TensorProto.FLOAT)),
        ("MatMulInteger", whole, weights, (TensorProto.UINT8, TensorProto.INT32)),
    ):
        graph = helper.make_graph(
            [helper.make_node(operation, ["x", "w"], ["y"])], "peak",
            [helper.make_tensor_value_info("x", kinds[0], [rows, depth])],
            [helper.make_tensor_value_info("y", kinds[1], [rows, columns])],
            [numpy_helper.from_array(constant, "w")],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        calls.append(partial(session.run, None, {"x": one}))
    return calls[0], calls[1]


def _together(calls: Sequence[Callable[[], object]]) -> None:
    workers = [threading.Thread(target=call) for call in calls]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def _best(call: Callable[[], object]) -> float:
    call()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)

"""--tune: which kernel computes a layer in 8 bits, by measurement on this machine."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from export.linear import BLOCK, Linears, Rows, Shape, joined
from export.sessions import session_options
from export.weights import LinearWeights, ServingWeights
from export.writer import GraphWriter
from slmrec.machine import usable_cores

KERNELS = ("integer", "blocks", "fp32")
BATCH_SIZES = (1, 32)
LEAST_GAIN = 0.05
"""A kernel replaces the default if it takes this much less time at batch 1, and no more at batch 32."""
SECONDS = 0.05
"""Time for each kernel, shape and batch."""


@dataclass(frozen=True)
class Tuned:
    """The choices, and the times they rest on."""

    kernels: Mapping[Shape, str]
    milliseconds: Mapping[Shape, Mapping[int, Mapping[str, float]]]
    """Of each shape, batch size and kernel: the median of a call."""

    def to_json(self) -> dict[str, Any]:
        """What `tune.json` holds."""
        return {
            "threads": usable_cores(),
            "layers": [
                {
                    "inputs": shape[0], "outputs": shape[1], "rows": "one a user" if shape[2] else "every token",
                    "kernel": self.kernels[shape],
                    "milliseconds": {f"batch {size}": dict(found) for size, found in times.items()},
                }
                for shape, times in self.milliseconds.items()
            ],
        }  # fmt: skip


def tune(weights: ServingWeights) -> Tuned:
    """Time every kernel for every shape of an 8-bit layer, at batch 1 and 32 with full windows.

    The weights are the same in all of them, and so are lists alone and in company; `blocks` and `fp32` round inputs
    more finely than the checkpoint does, or not at all.
    """
    length = weights.layout.max_history + weights.layout.suffix_length
    kernels: dict[Shape, str] = {}
    milliseconds: dict[Shape, dict[int, dict[str, float]]] = {}
    for shape, layer in _shapes(weights):
        rows = {size: size * (1 if shape[2] else length) for size in BATCH_SIZES}
        milliseconds[shape] = {size: _times(layer, shape, count) for size, count in rows.items()}
        kernels[shape] = _choice(milliseconds[shape])
    return Tuned(kernels, milliseconds)


def _shapes(weights: ServingWeights) -> Iterator[tuple[Shape, LinearWeights]]:
    """One layer of every shape that graphs ask for."""
    seen: set[Shape] = set()
    for number, layer in enumerate(weights.layers):
        newest_only = number == len(weights.layers) - 1
        together = [layer.key, layer.value] if newest_only else [layer.query, layer.key, layer.value]
        parts: list[tuple[LinearWeights | None, bool]]
        parts = [(part, newest_only) for part in (layer.out, layer.gate, layer.up, layer.down)]
        parts += [(joined(together), False), *([(layer.query, True)] if newest_only else [])]
        for part, one_per_user in parts:
            if part is not None and part.rounds_inputs and (*part.weight.shape, one_per_user) not in seen:
                seen.add((*part.weight.shape, one_per_user))
                yield (*part.weight.shape, one_per_user), part


def _times(layer: LinearWeights, shape: Shape, rows: int) -> dict[str, float]:
    """Milliseconds of each kernel, in turns."""
    import onnxruntime as ort

    options = session_options(usable_cores())
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or the others would be disturbed
    sessions = {}
    for kernel in KERNELS if shape[0] % BLOCK == 0 else ("integer", "fp32"):
        graph = GraphWriter(opset=20)
        inputs = graph.input("inputs", "float32", ["rows", shape[0]])
        product = Linears(graph, fused=True, kernels={shape: kernel}).product(
            inputs, layer, Rows(graph.size(inputs, 0), shape[2])
        )
        graph.output(product, "outputs", "float32", ["rows", shape[1]])
        sessions[kernel] = ort.InferenceSession(graph.model().SerializeToString(), options)
    request = {"inputs": np.random.default_rng(0).standard_normal((rows, shape[0]), dtype=np.float32)}
    seconds: dict[str, list[float]] = {kernel: [] for kernel in sessions}
    while sum(seconds["integer"]) < SECONDS:
        for kernel, session in sessions.items():
            start = time.perf_counter()
            session.run(None, request)
            seconds[kernel].append(time.perf_counter() - start)
    return {kernel: 1000 * float(np.median(found[1:] or found)) for kernel, found in seconds.items()}


def _choice(times: Mapping[int, Mapping[str, float]]) -> str:
    """The fastest at batch 1 that is worth it and costs nothing at batch 32.

    >>> _choice({1: {"integer": 1.0, "blocks": 0.8}, 32: {"integer": 2.0, "blocks": 1.9}})
    'blocks'
    >>> _choice({1: {"integer": 1.0, "blocks": 0.8}, 32: {"integer": 2.0, "blocks": 3.0}})
    'integer'
    """
    small, large = (times[size] for size in BATCH_SIZES)
    allowed = [name for name in small if large[name] <= large["integer"]]
    best = min(allowed, key=lambda name: small[name])
    return best if small[best] <= (1 - LEAST_GAIN) * small["integer"] else "integer"

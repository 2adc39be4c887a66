"""A contestant of `serving_speed.py`: the plain ONNX export in OpenVINO, in its own precision or int8 by NNCF.

    .venv/bin/python contestant.py FOLDER fp32|int8

Run with the Python of `requirements.txt` and PYTHONPATH=benchmarks; nothing of slmcompress is imported. FOLDER is one
of `plain_folder` in `serving_speed.py`, which optimum's contestant has exported (`FOLDER/optimum/model.onnx`).
"""

import os
import sys
from pathlib import Path

import nncf
import numpy as np
import openvino as ov
from contest import answer

TOP_K, CALIBRATION = 100, 300


def main() -> None:
    """Load, quantize where asked, and answer."""
    folder, precision = Path(sys.argv[1]), sys.argv[2]
    with np.load(folder / "head.npz") as stored:
        user_proj, outputs = stored["user_proj"], np.ascontiguousarray(stored["outputs"].T)
        before, after = int(stored["prefix_length"]), int(stored["suffix_length"])
    texts = np.arange(before + after)[None]

    def words(item_ids: np.ndarray) -> np.ndarray:
        own = np.repeat(texts, len(item_ids), axis=0)
        return np.concatenate([own[:, :before], item_ids + (before + after - 1), own[:, before:]], axis=1)

    core = ov.Core()
    model = core.read_model(folder / "optimum" / "model.onnx")
    names = [port.get_any_name() for port in model.inputs]

    def feed(item_ids: np.ndarray) -> dict[str, np.ndarray]:
        tokens = words(item_ids)
        values = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
        values["position_ids"] = np.repeat(np.arange(tokens.shape[1])[None], len(tokens), axis=0)
        return {name: values[name] for name in names}

    if precision == "int8":
        generator = np.random.default_rng(1)
        histories = [generator.integers(1, outputs.shape[1] + 1, (1, 30)) for _ in range(CALIBRATION)]
        model = nncf.quantize(model, nncf.Dataset(histories, feed), model_type=nncf.ModelType.TRANSFORMER)
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0))}
    compiled = core.compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()

    def call(item_ids: np.ndarray) -> np.ndarray:
        state = request.infer(feed(item_ids))[compiled.output(0)][:, -1]
        scores = (state @ user_proj) @ outputs
        np.put_along_axis(scores, item_ids - 1, -np.inf, axis=1)
        best = np.argpartition(-scores, TOP_K, axis=1)[:, :TOP_K]
        order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1)
        return np.take_along_axis(best, order, axis=1) + 1

    answer(call)


if __name__ == "__main__":
    main()

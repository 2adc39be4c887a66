"""The Triton model repository of a bundle: graph and plans, their configuration, warm-up requests, and a client."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export import triton_client
from export.engine_files import ENGINE_FILE, read_engines
from export.runtime import DATA_FILES, EXCLUDE_STEP, GRAPH_FILE, MAX_BATCH, read_signature
from slmrec.recommender import Histories

GRAPH_MODEL, PLAN_MODEL = "recommend", "recommend_trt"
PLAN_FILE = "model.plan"
DATA_TYPES = {"int64": "TYPE_INT64", "float32": "TYPE_FP32", "bool": "TYPE_BOOL"}
QUEUE_DELAY_US = 500


def write_triton(folder: Path, histories: Histories) -> None:
    """Write `triton/`: the ONNX graph, TensorRT plans where there are any, and a client that pads as they need.

    Args:
        folder: of the bundle, complete but for this.
        histories: requests to warm up with, one for each bucket of lengths.
    """
    signature, home = read_signature(folder), folder / "triton"
    warmup = warmup_requests(histories, signature)
    version = _model(home / GRAPH_MODEL, config(GRAPH_MODEL, signature, warmup), warmup) / GRAPH_FILE
    version.mkdir()
    for name in (GRAPH_FILE, *DATA_FILES):
        shutil.copyfile(folder / name, version / name)
    plans = read_engines(folder)["engines"] if (folder / ENGINE_FILE).exists() else []
    plans = [one for one in plans if one["flavor"] == "tensorrt"]  # TensorRT-RTX engines are not for Triton
    batches = [MAX_BATCH, *(plan["profile"]["item_ids"][2][0] for plan in plans)]
    if plans:
        version = _model(home / PLAN_MODEL, config(PLAN_MODEL, signature, warmup, plans), warmup)
        for plan in plans:
            shutil.copyfile(folder / plan["file"], version / plan["file"])
    shutil.copyfile(triton_client.__file__, home / "client.py")
    padding = _padding(signature, min(batches))
    (home / "padding.json").write_text(json.dumps(padding), encoding="ascii")


def _padding(signature: dict[str, Any], max_batch: int) -> dict[str, Any]:
    """What the client has to know."""
    return {
        "buckets": signature["buckets"], "exclude_step": EXCLUDE_STEP, "keep_history": signature["keep_history"],
        "num_items": signature["num_items"], "max_batch": max_batch,
    }  # fmt: skip


def warmup_requests(histories: Histories, signature: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """A request for each bucket that any history falls into: bucket -> inputs, one user, padded."""
    windows = histories.item_ids.newest(int(signature["max_history"]))
    padding, found = _padding(signature, 1), {}
    for bucket in signature["buckets"]:
        lengths = np.where(windows.lengths <= bucket, windows.lengths, 0)
        row = int(np.argmax(lengths))
        if lengths[row]:
            asked = triton_client.padded([windows[row].tolist()], [histories.exclude_ids[row].tolist()], padding)
            found[f"width_{bucket}"] = asked[0][1]
    return found


def config(
    name: str,
    signature: dict[str, Any],
    warmup: dict[str, dict[str, np.ndarray]],
    plans: Sequence[dict[str, Any]] = (),
) -> str:
    """The model configuration, as protobuf text; Triton batches requests of equal widths alone."""
    tensors = [
        f"{kind} [\n"
        + ",\n".join(_tensor(tensor, signature[f"{kind}s"][tensor], signature) for tensor in wanted)
        + "\n]"
        for kind, wanted in (("input", ("item_ids", "exclude_ids")), ("output", ("top_items", "top_scores")))
    ]
    place = "KIND_GPU" if plans else "KIND_CPU"
    lines = [
        f'name: "{name}"',
        'platform: "tensorrt_plan"' if plans else 'backend: "onnxruntime"',
        f"max_batch_size: {min([MAX_BATCH, *(plan['profile']['item_ids'][2][0] for plan in plans)])}",
        *tensors,
        f"dynamic_batching {{ max_queue_delay_microseconds: {QUEUE_DELAY_US} }}",
        f"instance_group [ {{ kind: {place} count: 1 }} ]",
        *_for_plans(plans),
        *(_warmup(one, inputs) for one, inputs in warmup.items()),
    ]
    return "\n".join(lines) + "\n"


def _model(folder: Path, text: str, warmup: dict[str, dict[str, np.ndarray]]) -> Path:
    """A model's folder with configuration and warm-up files; gives that of its version."""
    version = folder / "1"
    version.mkdir(parents=True)
    (folder / "config.pbtxt").write_text(text, encoding="ascii")
    (folder / "warmup").mkdir()
    for bucket, inputs in warmup.items():
        for name, array in inputs.items():
            (folder / "warmup" / f"{name}_{bucket}").write_bytes(array.tobytes())
    return version


def _tensor(name: str, described: dict[str, Any], signature: dict[str, Any]) -> str:
    sizes = [{"k": int(signature["top_k"])}.get(one, -1) if isinstance(one, str) else one for one in described["shape"]]
    return f'  {{ name: "{name}" data_type: {DATA_TYPES[described["dtype"]]} dims: {sizes[1:]} }}'


def _for_plans(plans: Sequence[dict[str, Any]]) -> list[str]:
    if not plans:
        return []
    named = [plan for plan in plans if plan["compute_capability"] is not None]
    files = [f'cc_model_filenames {{ key: "{plan["compute_capability"]}" value: "{plan["file"]}" }}' for plan in named]
    return [f'default_model_filename: "{plans[0]["file"]}"', *files, "optimization { cuda { graphs: true } }"]


def _warmup(name: str, inputs: dict[str, np.ndarray]) -> str:
    parts = [
        f'  inputs {{ key: "{tensor}" value {{ data_type: TYPE_INT64 dims: [ {array.shape[1]} ] '
        f'input_data_file: "{tensor}_{name}" }} }}'
        for tensor, array in inputs.items()
    ]
    return "\n".join([f'model_warmup {{ name: "{name}" batch_size: 1 count: 3', *parts, "}"])

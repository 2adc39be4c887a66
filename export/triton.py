"""The Triton model repository of a bundle: the ONNX graph with its external data, and its configuration."""

import shutil
from pathlib import Path

from export.runtime import DATA_FILES, GRAPH_FILE, read_signature

MODEL_NAME = "recommend"
MAX_BATCH = 256


def write_triton(folder: Path) -> None:
    """Write `triton/recommend/`; external data lies beside the graph in `1/model.onnx/`, as Triton wants it."""
    signature = read_signature(folder)
    model = folder / "triton" / MODEL_NAME
    version = model / "1" / GRAPH_FILE
    version.mkdir(parents=True)
    for name in (GRAPH_FILE, *DATA_FILES):
        shutil.copyfile(folder / name, version / name)
    (model / "config.pbtxt").write_text(config(int(signature["top_k"])), encoding="ascii")


def config(top_k: int) -> str:
    """The model configuration, as protobuf text; Triton batches requests of equal widths alone."""
    return f"""\
name: "{MODEL_NAME}"
backend: "onnxruntime"
max_batch_size: {MAX_BATCH}
input [
  {{ name: "item_ids" data_type: TYPE_INT64 dims: [ -1 ] }},
  {{ name: "exclude_ids" data_type: TYPE_INT64 dims: [ -1 ] }}
]
output [
  {{ name: "top_items" data_type: TYPE_INT64 dims: [ {top_k} ] }},
  {{ name: "top_scores" data_type: TYPE_FP32 dims: [ {top_k} ] }}
]
dynamic_batching {{ max_queue_delay_microseconds: 500 }}
"""

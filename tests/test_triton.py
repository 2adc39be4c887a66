"""The Triton repository of a bundle, read by Triton's own definition of a configuration."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st

from export.bundle import bundle, write_sums
from export.golden import stored_golden
from export.onnx_export import export_checkpoint
from export.runtime import OnnxRecommender
from export.triton import config, warmup_requests
from export.triton_client import padded
from export.verify import verify
from slmrec.artifact import Stage, canonical_hash, file_sha256, open_artifact, publish
from slmrec.config import DataConfig, ExportConfig
from slmrec.dataset import load_dataset
from slmrec.errors import CheckError
from slmrec.interactions import prepare_dataset
from slmrec.models.checkpoint import save_checkpoint
from slmrec.synthetic import write_log

SIZES = {onnx.TensorProto.INT64: "TYPE_INT64", onnx.TensorProto.FLOAT: "TYPE_FP32"}


def parsed(text):
    """A configuration as Triton's protobuf definition has it; unknown fields are errors."""
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse(text, model_config_pb2.ModelConfig())


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    prepare_dataset([write_log(runs / "log.txt", num_items=40, num_users=60)], runs / "data", DataConfig())
    data = load_dataset(runs / "data")
    with publish(runs / "student", Stage(name="distill", kind="checkpoint", settings={})) as folder:
        save_checkpoint(folder, tiny_model(prompt="none", num_items=data.num_items))
        data.items.save(folder)
    graph, _ = export_checkpoint(open_artifact(runs / "student"), data, runs / "export", ExportConfig(top_k=9))
    bundle(graph, data, runs / "bundle")
    return runs / "bundle"


def test_names_types_and_shapes_are_those_of_the_graph(made):
    model = made / "triton/recommend"
    found = parsed((model / "config.pbtxt").read_text())
    graph = onnx.load(model / "1/model.onnx/model.onnx", load_external_data=False).graph
    assert (found.name, found.backend, found.max_batch_size) == (model.name, "onnxruntime", 256)
    for ours, theirs in ((found.input, graph.input), (found.output, graph.output)):
        described = {value.name: value.type.tensor_type for value in theirs}
        assert {tensor.name for tensor in ours} <= set(described)
        for tensor in ours:
            kind = described[tensor.name]
            assert (
                type(tensor).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[tensor.data_type].name
                == SIZES[kind.elem_type]
            )
            sizes = [dim.dim_value or dim.dim_param for dim in kind.shape.dim]
            assert len(tensor.dims) == len(sizes) - 1
    assert [list(tensor.dims) for tensor in found.input] == [[-1], [-1]]
    assert [list(tensor.dims) for tensor in found.output] == [[9], [9]]
    assert found.HasField("dynamic_batching")


def test_warm_up_requests_are_real_ones_of_every_bucket_and_run(made):
    model = made / "triton/recommend"
    found = parsed((model / "config.pbtxt").read_text())
    recommender = OnnxRecommender(made)
    histories, _ = stored_golden(made)
    lengths = histories.item_ids.newest(recommender.signature["max_history"]).lengths
    reached = {min(bucket for bucket in recommender.signature["buckets"] if bucket >= length) for length in lengths}
    assert {one.name for one in found.model_warmup} == {f"width_{bucket}" for bucket in reached}
    for one in found.model_warmup:
        arrays = {}
        for name, tensor in one.inputs.items():
            stored = np.frombuffer((model / "warmup" / tensor.input_data_file).read_bytes(), dtype=np.int64)
            arrays[name] = stored.reshape(1, *tensor.dims)
        items, _ = recommender.run(arrays["item_ids"], arrays["exclude_ids"])
        assert items[0, 0] > 0
        assert not set(items[0].tolist()) & set(arrays["exclude_ids"][0].tolist()) - {0}


def test_plans_are_named_by_compute_capability(made):
    signature = json.loads((made / "signature.json").read_text())
    plans = [
        {"file": "model_sm80.plan", "compute_capability": "8.0", "profile": {"item_ids": [[1, 1], [8, 8], [64, 10]]}},
        {"file": "model_sm90.plan", "compute_capability": "9.0", "profile": {"item_ids": [[1, 1], [8, 8], [32, 10]]}},
    ]
    histories, _ = stored_golden(made)
    found = parsed(config("recommend_trt", signature, warmup_requests(histories, signature), plans))
    assert (found.platform, found.max_batch_size) == ("tensorrt_plan", 32)  # what every plan can take
    assert dict(found.cc_model_filenames) == {"8.0": "model_sm80.plan", "9.0": "model_sm90.plan"}
    assert found.optimization.cuda.graphs
    assert found.instance_group[0].kind == type(found.instance_group[0]).KIND_GPU
    alone = parsed(
        config("recommend_trt", signature, {}, [plans[0] | {"file": "model.plan", "compute_capability": None}])
    )
    assert (alone.default_model_filename, len(alone.cc_model_filenames)) == ("model.plan", 0)


def test_the_client_pads_as_the_runtime_does(made):
    histories, golden = stored_golden(made)
    padding = json.loads((made / "triton/padding.json").read_text())
    assert (padding["max_batch"], padding["num_items"]) == (256, OnnxRecommender(made).num_items)
    rows = ([row.tolist() for row in ids] for ids in (histories.item_ids, histories.exclude_ids))
    requests = padded(*rows, padding | {"max_batch": 7})
    recommender = OnnxRecommender(made)
    asked = []
    for rows, arrays in requests:
        items, scores = recommender.run(arrays["item_ids"], arrays["exclude_ids"])
        np.testing.assert_array_equal(items, golden.item_ids[rows])
        np.testing.assert_array_equal(scores, golden.scores[rows])
        asked += rows
    assert sorted(asked) == list(range(len(histories)))


@given(
    st.lists(st.lists(st.integers(1, 500), min_size=1, max_size=70), min_size=1, max_size=12),
    st.booleans(), st.data(),
)  # fmt: skip
def test_padded_requests_hold_every_user_once_at_his_own_width(histories, keep_history, data):
    excluded = [data.draw(st.lists(st.integers(1, 500), max_size=40)) for _ in histories]
    buckets, seen = [8, 16, 24, 50], []
    padding = {"buckets": buckets, "exclude_step": 32, "keep_history": keep_history, "num_items": 500, "max_batch": 3}
    for rows, arrays in padded(histories, excluded, padding):
        assert len(rows) <= 3
        for place, row in enumerate(rows):
            newest = histories[row][-50:]
            own = arrays["item_ids"][place]
            assert own[own > 0].tolist() == newest
            assert len(own) == min(bucket for bucket in buckets if bucket >= len(newest))
            gone = set(excluded[row]) | (set() if keep_history else set(histories[row]))
            assert set(arrays["exclude_ids"][place].tolist()) - {0} == gone
            assert arrays["exclude_ids"].shape[1] % 32 == 0
        seen += rows
    assert sorted(seen) == list(range(len(histories)))


def test_the_client_is_a_script_of_its_own(made):
    script = [
        sys.executable,
        "-B",
        "-c",
        "import sys; sys.path.insert(0, '.'); import client; print(sorted(sys.modules))",
    ]
    found = subprocess.run(script, cwd=made / "triton", capture_output=True, text=True, check=True)
    assert "'torch'" not in found.stdout
    assert "'export'" not in found.stdout
    padding = json.loads((made / "triton/padding.json").read_text())
    with pytest.raises(ValueError, match="row 0 has no history"):
        padded([[]], [[]], padding)
    for history, excluded in (([1, 41], []), ([1], [-1]), ([0], [])):
        with pytest.raises(ValueError, match=r"row 0 has the id (41|-1|0); items are 1 to 40"):
            padded([history], [excluded], padding)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "warmup/x", ""])
def test_a_configuration_that_names_files_elsewhere_does_not_verify(made, tmp_path, name):
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    text = copy / "triton/recommend/config.pbtxt"
    changed = re.sub(r'input_data_file: "[^"]*"', f'input_data_file: "{name}"', text.read_text(), count=1)
    assert changed != text.read_text()
    text.write_text(changed)
    manifest = json.loads((copy / "manifest.json").read_text())
    relative = "triton/recommend/config.pbtxt"
    manifest["files"][relative] = {"sha256": file_sha256(text), "size_bytes": text.stat().st_size}
    hashes = {path: entry["sha256"] for path, entry in manifest["files"].items()}
    manifest["hash"] = canonical_hash({"kind": "bundle", "files": hashes})
    (copy / "manifest.json").write_text(json.dumps(manifest))
    write_sums(copy)
    with pytest.raises(CheckError, match=r"recommend/config\.pbtxt names the file"):
        verify(copy)


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ("1,2", "refused"), ("1,two", "'two'"), ("41", "items are 1 to 40"), ("0", "items are 1 to 40"),
    ],
)  # fmt: skip
def test_the_client_says_in_one_line_what_is_wrong(made, history, message):
    script = [sys.executable, str(made / "triton/client.py"), "127.0.0.1:9", "recommend", history]
    found = subprocess.run(script, check=False, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error: ")
    assert message in found.stderr
    assert found.stderr.count("\n") == 1

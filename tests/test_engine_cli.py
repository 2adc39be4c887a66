"""`export --trt` as typed: what it builds, keeps, hands over and refuses."""

import json
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from export.bundle import bundle
from export.engine import default_shapes, place, simulate
from export.engine_runtime import TensorRTRecommender
from export.verify import verify
from slmrec.artifact import open_artifact
from slmrec.cli.main import main
from slmrec.config import DataConfig, ExportConfig
from slmrec.dataset import load_dataset
from slmrec.engine_config import EngineConfig
from slmrec.errors import CheckError, ConfigError
from slmrec.evaluate import VALIDATION_PROTOCOL, evaluate
from slmrec.interactions import prepare_dataset
from slmrec.models.checkpoint import load_decoder, save_checkpoint
from slmrec.models.ranking import TorchRecommender
from slmrec.sequences import validation_cases
from slmrec.synthetic import write_log

TENSORRT = find_spec("tensorrt") is not None


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    """A dataset, a student and its 8-bit version as `quantize` writes it."""
    from compress.quantize import quantize
    from slmrec.artifact import Stage, publish
    from slmrec.compress_config import CalibrationConfig, QuantizeConfig

    runs = tmp_path_factory.mktemp("runs")
    prepare_dataset([write_log(runs / "log.txt", num_items=40, num_users=90)], runs / "data", DataConfig())
    data = load_dataset(runs / "data")
    model = tiny_model(prompt="none", num_items=data.num_items).eval()
    with publish(runs / "student", Stage(name="distill", kind="checkpoint", settings={})) as folder:
        save_checkpoint(folder, model)
        data.items.save(folder)
    config = QuantizeConfig(accuracy_gate=0.01, calibration=CalibrationConfig(histories=64))
    quantize(open_artifact(runs / "student"), data, runs / "student-int8", config)
    return runs


def call(runs, *arguments):
    return CliRunner().invoke(main, ["--runs", str(runs), *map(str, arguments)], standalone_mode=False)


def test_defaults_of_the_profile_come_from_the_data(runs):
    data = load_dataset(runs / "data")
    lengths = validation_cases(data.sequences).histories.item_ids.lengths
    shapes = default_shapes(data, 10)
    assert shapes["max"]["exclude_ids"][1] >= lengths.max() + 1
    assert shapes["max"]["exclude_ids"][1] % 32 == 0
    assert shapes["opt"]["item_ids"] == (32, min(10, int(np.median(lengths))))


@pytest.mark.skipif(TENSORRT, reason="TensorRT is here, and builds")
def test_export_trt_as_typed_without_tensorrt_keeps_the_graph_and_says_how_to_build_it(runs, tmp_path):
    found = call(
        runs, "export", "--trt", "-m", runs / "student-int8", "-o", tmp_path / "engine", "--accuracy-gate", 0.5
    )
    assert found.exception is None
    assert "no engine was built: tensorrt is not installed" in found.stdout
    assert f"python {tmp_path / 'engine/engine/build_engine.py'} --output ." in found.stdout
    assert open_artifact(tmp_path / "engine").kind == "graph"
    assert not [*(tmp_path / "engine").glob("*.plan"), *(tmp_path / "engine").glob("*.rtx")]
    again = call(
        runs,
        "export",
        "--trt",
        "-m",
        runs / "student-int8",
        "-o",
        tmp_path / "engine",
        "--accuracy-gate",
        0.5,
        "--json",
    )
    record = json.loads(again.stdout)
    assert record["up_to_date"]
    assert record["engine"]["engines"] == []
    assert record["engine"]["precision"] == "int8"
    assert record["engine"]["gate"]["num_users"] == 90


def test_rtx_engines_for_two_devices_go_into_a_bundle_but_not_to_triton(runs, tmp_path):
    flags = ["--trt-flavor", "rtx", "--compute-capability", "8.0, 8.6", "--precision", "fp16"]
    made = call(runs, "export", "--trt", "-m", runs / "student", "-o", tmp_path / "engine", *flags)
    assert made.exception is None
    graph = open_artifact(tmp_path / "engine")
    assert graph.kind == "engine"
    assert {path.name for path in graph.path.glob("model*.rtx")} == {"model_sm80.rtx", "model_sm86.rtx"}
    record = json.loads((graph.path / "engine.json").read_text())
    assert [one["device"] for one in record["engines"]] == ["SM80", "SM86"]
    assert record["gate"]["ratio"] == pytest.approx(1, abs=0.05)
    bundle(graph, load_dataset(runs / "data"), tmp_path / "bundle")
    names = {path.relative_to(tmp_path / "bundle").as_posix() for path in (tmp_path / "bundle").rglob("*")}
    assert {"model_sm80.rtx", "engine/build_engine.py", "engine/recipe.json", "engine/model.onnx.data"} <= names
    card, bom = ((tmp_path / "bundle" / name).read_text() for name in ("README.md", "mlbom.cdx.json"))
    assert "| `model_sm86.rtx` | rtx " in card
    assert ('"model_sm86.rtx"' in bom, "build_engine.py --output" in card) == (True, True)
    assert not {name for name in names if name.startswith("triton") and name.endswith((".rtx", ".plan"))}
    assert verify(tmp_path / "bundle").parity.num_equal_lists == verify(tmp_path / "bundle").parity.num_users
    answer = call(runs, "recommend", "-m", tmp_path / "engine", "-k", 3, "--json", "1", "2")
    assert len(json.loads(answer.stdout)["items"]) == 3
    tampered = onnx.load(tmp_path / "bundle/engine/model.onnx", load_external_data=False)
    tampered.graph.initializer.add(name="x", data_location=onnx.TensorProto.EXTERNAL).external_data.add(
        key="location", value="/etc/passwd"
    )
    (tmp_path / "bundle/engine/model.onnx").write_bytes(tampered.SerializeToString())
    with pytest.raises(CheckError, match=r"engine/model\.onnx is not as SHA256SUMS says"):
        verify(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--precision", "fp16"], "--precision is for TensorRT engines"),
        (["--trt", "--precision", "int8", "-m", "student"], "int8 needs calibrated ranges"),
        (["--trt", "--precision", "fp8", "--compute-capability", "8.0"], r"fp8 on compute capability 8\.0"),
        (
            ["--trt", "--trt-flavor", "rtx", "--compute-capability", "9.0"],
            r"rtx: this TensorRT does not build for .* 9\.0",
        ),
        (["--trt", "--max-shapes", "item_ids:9x9"], "batches"),
        (["--trt", "--min-shapes", "item_ids:9x9", "--max-shapes", "item_ids:8x9"], "item_ids:8x9, below the 9x9"),
        (["--trt", "--timing-cache", "nowhere/cache"], "the folder of timing_cache=nowhere/cache does not exist"),
    ],
)
def test_engines_that_cannot_be_leave_nothing_behind(runs, tmp_path, flags, message):
    flags = [str(runs / flag) if flag == "student" else flag for flag in flags]
    found = (
        call(runs, "export", "-o", tmp_path / "engine", "--accuracy-gate", 0.1, *flags)
        if "--trt" in flags
        else call(runs, "export", "-o", tmp_path / "engine", *flags)
    )
    assert isinstance(found.exception, ConfigError)
    with pytest.raises(ConfigError, match=message):
        raise found.exception
    assert not (tmp_path / "engine").exists()


def test_a_precision_that_costs_too_much_is_not_built(runs):
    data = load_dataset(runs / "data")
    cases = validation_cases(data.sequences)

    class Perfect:
        """Knows the answers."""

        num_items, max_top_k = data.num_items, 100

        def __init__(self, model):
            self.own = TorchRecommender(model, "cpu")
            rows = zip(map(tuple, cases.histories.item_ids), cases.targets, strict=True)
            self.targets = dict(rows)

        def recommend(self, histories, k):
            answer = self.own.recommend(histories, k)
            for row, history in enumerate(histories.item_ids):
                target = self.targets[tuple(history)]
                rest = [item for item in answer.item_ids[row] if item != target][: k - 1]
                answer.item_ids[row] = [target, *rest]
            return answer

    model = load_decoder(open_artifact(runs / "student")).eval()
    assert evaluate(Perfect(model), cases, protocol=VALIDATION_PROTOCOL).metrics["ndcg@10"].estimate == 1
    folder = runs / "too-much"
    folder.mkdir()
    placed = place(model, folder, ExportConfig(), EngineConfig(precision="fp16"), {}, default_shapes(data, 10))
    with pytest.raises(CheckError, match="fp16 costs too much"):
        simulate(placed, Perfect(model), data, 0.99)
    assert simulate(replace(placed), TorchRecommender(model, "cpu"), data, 0.9).gate.passed


@pytest.mark.skipif(find_spec("cuda") is not None, reason="CUDA bindings are here")
def test_an_engine_without_cuda_bindings_says_what_is_missing(runs, tmp_path):
    made = call(
        runs, "export", "--trt", "-m", runs / "student", "-o", tmp_path / "engine", "--trt-flavor", "rtx",
        "--compute-capability", "8.0", "--precision", "fp16",
    )  # fmt: skip
    assert made.exception is None
    with pytest.raises(ConfigError, match="CUDA bindings are not installed"):
        TensorRTRecommender(tmp_path / "engine")
    (tmp_path / "engine" / "SHA256SUMS").write_text("")
    with pytest.raises(ConfigError, match="is a bundle, whose engines are code from elsewhere"):
        TensorRTRecommender(tmp_path / "engine")


def test_8_bit_engines_of_short_lists_are_not_built_unjudged(runs, tmp_path):
    flags = ["--trt-flavor", "rtx", "--compute-capability", "8.0", "--top-k", 7, "-o", tmp_path / "engine"]
    found = call(runs, "export", "--trt", "-m", runs / "student-int8", *flags)
    with pytest.raises(ConfigError, match="int8 is not built unjudged"):
        raise found.exception
    assert not (tmp_path / "engine").exists()

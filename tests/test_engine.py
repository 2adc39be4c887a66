"""TensorRT engines: precision as placed, real builds by TensorRT-RTX without a GPU, and what is read back of them."""

import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.calibrate import calibrate, static_ranges
from compress.int8 import quantize_model
from export import build_engine
from export.build_engine import BuildError, build, load
from export.engine import place
from export.engine_files import read_engines
from export.engine_runtime import fitting_engine
from export.runtime import OnnxRecommender
from slmrec.config import ExportConfig
from slmrec.engine_config import EngineConfig, parse_shapes, profile_of
from slmrec.errors import ArtifactError, ConfigError
from slmrec.models.ranking import TorchRecommender
from slmrec.ragged import Ragged
from slmrec.recommender import Histories

USERS = Histories.of(Ragged.from_rows([[1], [5, 9, 2], list(range(1, 11)), [7] * 4, list(range(3, 16))]))
SHAPES = {
    "min": {"item_ids": (1, 1), "exclude_ids": (1, 0)},
    "opt": {"item_ids": (8, 8), "exclude_ids": (8, 32)},
    "max": {"item_ids": (64, 10), "exclude_ids": (64, 64)},
}
NARROW = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}
TENSORRT = find_spec("tensorrt") is not None


@pytest.fixture(scope="module")
def placed_graph(tiny_model, tmp_path_factory):
    """Place a tiny model in a precision: gives the model that stands for the checkpoint, and the placed graph."""
    made = {}

    def make(precision, family="llama", **settings):
        key = (precision, family, *settings.items())
        if key not in made:
            model = tiny_model(family, prompt="slmrec", num_layers=2).eval()
            ranges = {}
            if precision in ("int8", "fp8"):
                found = static_ranges(calibrate(model, USERS), model.num_layers)
                ranges = {name: by_rule["max"] for name, by_rule in found.items()}
                model = quantize_model(model)
            config = EngineConfig(precision=precision, **settings)
            folder = tmp_path_factory.mktemp(precision)
            made[key] = model, place(model, folder, ExportConfig(), config, ranges, SHAPES)
        return made[key]

    return make


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_fp32_as_placed_answers_as_pytorch_does(placed_graph, family):
    model, placed = placed_graph("fp32", family)
    expected = TorchRecommender(model, "cpu").recommend(USERS, 10)
    found = OnnxRecommender(placed.folder).recommend(USERS, 10)
    np.testing.assert_array_equal(found.item_ids, expected.item_ids)
    scale = np.abs(expected.scores[np.isfinite(expected.scores)]).max()
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 5e-3), ("int8", 0.1), ("fp8", 0.25)])
def test_narrow_precisions_stay_near_the_checkpoint_and_differ_from_it(placed_graph, precision, tolerance):
    model, placed = placed_graph(precision)
    expected = TorchRecommender(model, "cpu").recommend(USERS, 20)
    found = OnnxRecommender(placed.folder).recommend(USERS, 20)
    scores = np.zeros((2, len(USERS), 21))
    for row in range(len(USERS)):
        for which, answer in enumerate((expected, found)):
            scores[which, row, answer.item_ids[row]] = np.where(np.isfinite(answer.scores[row]), answer.scores[row], 0)
    gap = np.abs(scores[0] - scores[1])[:, 1:].max()
    assert 0 < gap <= tolerance * np.abs(scores[0]).max()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "fp8"])
def test_norms_softmax_and_scores_are_fp32_at_every_precision(placed_graph, precision):
    _, placed = placed_graph(precision)
    model = onnx.load(placed.folder / "model.onnx")
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    kinds = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    judged = [node for node in model.graph.node if node.op_type in ("Softmax", "ReduceMean", "Sqrt", "Gemm", "Sigmoid")]
    assert {node.op_type for node in judged} == {"Softmax", "ReduceMean", "Sqrt", "Gemm", "Sigmoid"}
    for node in judged:
        assert kinds[node.input[0]] == onnx.TensorProto.FLOAT, node.name
    assert not any(node.domain for node in model.graph.node)
    assert not any(node.op_type == "IsNaN" for node in model.graph.node)


@pytest.mark.parametrize(
    ("precision", "device"),
    [("fp32", "8.0"), ("fp16", "8.0"), ("bf16", "8.6"), ("int8", "8.0"), ("fp8", "8.9"), ("fp16", "12.0")],
)
def test_a_real_engine_is_built_and_is_what_was_asked_for(placed_graph, precision, device):
    _, placed = placed_graph(precision, workspace=256)
    engine, found = build(load("rtx"), placed.folder / "model.onnx", placed.recipe, device)
    assert len(engine) == found["size_bytes"] > 50_000
    assert found["device"] == f"SM{device.replace('.', '')}"
    assert found["profile"]["item_ids"] == [[1, 1], [8, 8], [64, 10]]
    assert found["profile"]["exclude_ids"] == [[1, 0], [8, 32], [64, 64]]
    assert (found["tf32"], found["workspace"]) == (False, 256)
    assert found["outputs"] == {"top_items": "INT64", "top_scores": "FLOAT"}
    attention = 2 * 2  # two layers, scores and mixing
    products = 2 * 7 - 2  # queries, keys, values joined but in the last layer, where keys and values are
    products += 1
    if precision in NARROW:
        kind = NARROW[precision]
        narrow = found["products"][kind]
        assert narrow - 2 * (precision == "fp32") == attention + products - 2
        assert found["rounded"] == {}
    else:
        assert found["products"]["HALF"] == attention
        assert found["products"]["FLOAT"] - 2 == products - 2
        assert set(found["rounded"]) == {"INT8" if precision == "int8" else "FP8"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expected": {"products": {"HALF": 1}, "rounded": {}}}, "products was to be {'HALF': 1}"),
        ({"expected": {"products": {}, "rounded": {"INT8": 4}}}, "products was to be {}"),
        ({"hardware_compat": "no_such_level"}, "hardware_compat=no_such_level is not known"),
    ],
)
def test_an_engine_that_is_not_what_was_asked_for_is_an_error(placed_graph, change, message):
    _, placed = placed_graph("fp16")
    with pytest.raises(BuildError, match=message.replace("{", r"\{").replace("}", r"\}")):
        build(load("rtx"), placed.folder / "model.onnx", placed.recipe | change, "8.0")


def test_a_device_that_cannot_be_built_for_is_named_with_those_that_can(placed_graph):
    _, placed = placed_graph("fp16")
    with pytest.raises(BuildError, match=r"does not build for compute capability 9\.0, only for SM75, SM80"):
        build(load("rtx"), placed.folder / "model.onnx", placed.recipe, "9.0")


def test_what_the_parser_refuses_is_named_by_its_node(placed_graph, tmp_path):
    node = onnx.helper.make_node("NoSuchOperation", ["x"], ["y"], name="the culprit")
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", value[:1], value[1:]))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(BuildError, match=r"node 'the culprit' \(NoSuchOperation\)"):
        build(load("rtx"), tmp_path / "model.onnx", placed_graph("fp16")[1].recipe, "8.0")


def test_a_flavour_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(build_engine, "MODULES", {"tensorrt": ("no_such_module",), "rtx": ("no_such_module",)})
    with pytest.raises(BuildError, match="pip install tensorrt-rtx-cu13-bindings"):
        load("rtx")


def test_the_script_of_a_bundle_builds_by_itself(placed_graph, tmp_path):
    _, placed = placed_graph("fp16")
    script = [sys.executable, str(placed.folder / "build_engine.py"), "--output", str(tmp_path)]
    elsewhere = {"cwd": "/", "capture_output": True, "text": True, "env": {"PATH": "/usr/bin"}}
    found = subprocess.run([*script, "--flavor", "rtx"], check=False, **elsewhere)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "model.rtx").stat().st_size == json.loads(found.stdout)["size_bytes"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.rtx"]
    for folder, message in ((placed.folder, "is inside what was handed over"), (tmp_path / "gone", "is no folder")):
        refused = [*script[:2], "--output", str(folder), "--flavor", "rtx"]
        found = subprocess.run(refused, check=False, **elsewhere)
        assert (found.returncode, message in found.stderr) == (2, True), found.stderr
    if not TENSORRT:
        missing = subprocess.run(script, check=False, **elsewhere)
        assert missing.returncode == 2
        assert "tensorrt is not installed; try: pip install tensorrt" in missing.stderr
    lines = (placed.folder / "build_engine.py").read_text().splitlines()
    imports = {line.split()[1] for line in lines if line.startswith(("import", "from"))}
    assert imports <= {"argparse", "ctypes", "importlib", "json", "sys", "time", "pathlib", "typing"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp8", "compute_capability": ("8.9", "8.0")}, r"fp8 on compute capability 8\.0"),
        ({"precision": "int4"}, "precision='int4'"),
        ({"compute_capability": ("sm80",)}, "compute_capability='sm80' is none"),
        ({"workspace": 0}, "workspace=0 MiB"),
        ({"opt_shapes": "items:1x1"}, r"--opt-shapes has 'items:1x1'"),
        ({"max_shapes": "item_ids:8"}, r"--max-shapes has 'item_ids:8'"),
        ({"flavor": "nvidia"}, "flavor='nvidia'"),
        ({"ranges": "mean"}, "ranges='mean'"),
        ({"flavor": "rtx", "timing_cache": "timings"}, "TensorRT-RTX keeps no kernel timings"),
        ({"accuracy_gate": 0.0}, r"accuracy_gate=0\.0 is no share"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_built(settings, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "rows", "message"),
    [
        ({}, 2**26, r"a batch of 64 times 67108864 items are more scores than TensorRT can index"),
        (
            {"max_shapes": "item_ids:4x10,exclude_ids:4x64", "opt_shapes": "item_ids:8x8,exclude_ids:8x32"},
            128,
            "--max-shapes has item_ids:4x10, below the 8x8 before it",
        ),
        (
            {"min_shapes": "item_ids:1x9,exclude_ids:1x0", "max_shapes": "item_ids:8x8,exclude_ids:8x8"},
            128,
            "--max-shapes has item_ids:8x8, below the 1x9 before it",
        ),
        ({"opt_shapes": "item_ids:4x8"}, 128, r"--opt-shapes leads to batches of 4 \(item_ids\) and 8 \(exclude_ids\)"),
        ({"max_shapes": "item_ids:4x8"}, 128, "--max-shapes leads to batches"),
        ({"max_shapes": "item_ids:4x11,exclude_ids:4x32"}, 128, "of width 11, and the graph's window is 10"),
        (
            {"max_shapes": "item_ids:4x8,exclude_ids:4x0", "opt_shapes": "item_ids:4x8,exclude_ids:4x0"},
            128,
            "lets no item be excluded",
        ),
        ({"min_shapes": "item_ids:0x1,exclude_ids:0x0"}, 128, "a batch of 0"),
        ({"min_shapes": "item_ids:1x0,exclude_ids:1x0"}, 128, "item_ids of width 0"),
    ],
)
def test_profiles_that_cannot_be_are_refused(settings, rows, message):
    with pytest.raises(ConfigError, match=message):
        profile_of(EngineConfig(**settings), SHAPES, rows, 10)


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 50)), min_size=3, max_size=3), st.integers(1, 600))
def test_shapes_in_order_are_taken_as_spelled(pairs, excluded):
    batches, widths = (sorted(column) for column in zip(*pairs, strict=True))
    spelled = {
        f"{kind}_shapes": f"item_ids:{batch}x{width},exclude_ids:{batch}x{excluded}"
        for kind, batch, width in zip(("min", "opt", "max"), batches, widths, strict=True)
    }
    profile = profile_of(EngineConfig(**spelled), SHAPES, 1000)
    assert profile["item_ids"] == [[batch, width] for batch, width in zip(batches, widths, strict=True)]
    assert [shape[1] for shape in profile["exclude_ids"]] == [excluded] * 3
    assert parse_shapes(spelled["min_shapes"], "")["exclude_ids"] == (batches[0], excluded)


def test_a_cap_moves_the_defaults_that_nobody_asked_for():
    capped = profile_of(EngineConfig(max_shapes="item_ids:4x6,exclude_ids:4x16"), SHAPES, 128)
    assert capped == {"item_ids": [[1, 1], [4, 6], [4, 6]], "exclude_ids": [[1, 0], [4, 16], [4, 16]]}
    least = profile_of(EngineConfig(min_shapes="item_ids:16x9,exclude_ids:16x0"), SHAPES, 128)
    assert least["item_ids"] == [[16, 9], [16, 9], [64, 10]]


def built(capability, hardware_compat="none"):
    return {"file": "model.plan", "compute_capability": capability, "hardware_compat": hardware_compat}


@pytest.mark.parametrize(
    ("engines", "device", "chosen"),
    [
        ([built("8.0"), built("9.0")], "9.0", 1), ([built(None)], "12.0", 0), ([built("8.0", "ampere_plus")], "8.6", 0),
        ([built("8.0")], "8.6", None), ([built("8.6", "ampere_plus")], "8.0", None), ([], "8.0", None),
        ([built("8.0", "ampere_plus")], "10.0", 0),
    ],
)  # fmt: skip
def test_the_engine_for_a_device_is_its_own_or_one_that_is_compatible(engines, device, chosen, tmp_path):
    if chosen is None:
        with pytest.raises(ArtifactError, match=r"holds no engine|this GPU is"):
            fitting_engine(engines, device, tmp_path)
    else:
        assert fitting_engine(engines, device, tmp_path) is engines[chosen]


@pytest.mark.parametrize("name", ["../evil.plan", "/model.plan", "model.onnx", "model_sm80.plan.bak", "model_smx.plan"])
def test_an_engine_by_another_name_is_not_read(tmp_path, name):
    (tmp_path / "engine.json").write_text(json.dumps({"engines": [built("8.0") | {"file": name}]}))
    with pytest.raises(ArtifactError, match="names the engine"):
        read_engines(tmp_path)


def test_8_bit_engines_need_a_quantized_checkpoint(tiny_model, tmp_path):
    model = tiny_model(prompt="none").eval()
    with pytest.raises(ConfigError, match="int8 needs calibrated ranges"):
        place(model, tmp_path, ExportConfig(), EngineConfig(precision="int8"), {}, SHAPES)
    with pytest.raises(ConfigError, match="fp8 needs calibrated ranges"):
        place(quantize_model(model), tmp_path, ExportConfig(), EngineConfig(precision="fp8"), {}, SHAPES)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "device"), [("fp32", "8.0"), ("fp16", "8.0"), ("int8", "8.0"), ("fp8", "8.9")])
def test_engines_over_a_million_items_build(tiny_model, tmp_path, precision, device):
    model, ranges = tiny_model(prompt="none", num_layers=1, num_items=1_000_000).eval(), {}
    if precision in ("int8", "fp8"):
        found = static_ranges(calibrate(model, USERS), 1)
        ranges, model = {name: by_rule["max"] for name, by_rule in found.items()}, quantize_model(model)
    shapes = {kind: {name: (min(shape[0], 16), shape[1]) for name, shape in of.items()} for kind, of in SHAPES.items()}
    placed = place(model, tmp_path, ExportConfig(), EngineConfig(precision=precision), ranges, shapes)
    engine, found = build(load("rtx"), placed.folder / "model.onnx", placed.recipe, device)
    assert len(engine) == found["size_bytes"] > 1_000_000 * 8 * 4

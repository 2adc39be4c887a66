"""distill as a stage: live and online teachers, several students of one teacher, what a run leaves behind."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from distilling import NO_FEATURES
from safetensors.torch import load_file

from compress.distill import distill, distill_stage
from compress.plan import plan_distillation
from slmrec.artifact import open_artifact
from slmrec.compress_config import DistillConfig, FeatureConfig, OnlineConfig
from slmrec.config import DataConfig, RecipeConfig, SasrecConfig, TeacherConfig, TrainConfig, WindowConfig
from slmrec.dataset import load_dataset
from slmrec.errors import ArtifactError, ConfigError
from slmrec.interactions import prepare_dataset
from slmrec.synthetic import write_backbone, write_log
from slmrec.train_items import train_items
from slmrec.train_teacher import train_teacher

TRAIN = TrainConfig(epochs=1, batch_size=32, learning_rate=1e-3, precision="fp32", warmup_steps=2)
CONFIG = DistillConfig(num_layers=2, num_blocks=2, train=TRAIN)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Data, and a teacher of 3 layers without a prompt."""
    runs = tmp_path_factory.mktemp("runs")
    prepare_dataset([write_log(runs / "log.txt", num_users=100)], runs / "data", DataConfig())
    write_backbone(runs / "backbone", num_layers=3)
    data = load_dataset(runs / "data")
    items, _ = train_items(data, runs / "items", SasrecConfig(hidden_size=16, train=TRAIN))
    config = TeacherConfig(
        backbone=str(runs / "backbone"), num_layers=3, recipe=RecipeConfig(prompt="none", dropout=0.0), train=TRAIN,
        window=WindowConfig(max_history=10),
    )  # fmt: skip
    train_teacher(items, data, runs / "teacher", config)
    return runs


def made(runs, output, config):
    artifact, _ = distill(open_artifact(runs / "teacher"), load_dataset(runs / "data"), output, config)
    lines = (output / "training.jsonl").read_text().splitlines()
    return load_file(artifact.path / "model.safetensors"), [json.loads(line) for line in lines]


def test_a_live_teacher_gives_the_student_of_a_float32_store(runs, tmp_path):
    stored, curve = made(runs, tmp_path / "a", replace(CONFIG, features=FeatureConfig(dtype="float32")))
    live, other = made(runs, tmp_path / "b", replace(CONFIG, features=FeatureConfig(source="live")))
    for one, two in zip(curve, other, strict=True):
        if "loss" in one:
            assert one == pytest.approx(two, rel=1e-4)
    assert all(((stored[name] - live[name]).abs() < 1e-3).all() for name in stored)
    assert not list(tmp_path.glob(".*")), "nothing is left behind"


@pytest.mark.parametrize(("signal", "config"), [("features", CONFIG), ("logits", replace(CONFIG, **NO_FEATURES))])
def test_teacher_and_student_are_trained_together_and_the_student_is_kept(runs, tmp_path, signal, config):
    before = load_file(runs / "teacher" / "model.safetensors")
    weights, curve = made(runs, tmp_path / "student", replace(config, online=OnlineConfig(signal=signal)))
    terms = {name for record in curve for name in record}
    assert {"ce", "teacher_ce", "direction_block_1" if signal == "features" else "logits_block_1"} <= terms
    assert {name.split(".")[2] for name in weights if name.startswith("decoder.layers.")} == {"0", "1"}
    assert not any("teacher" in name or "adapter" in name for name in weights)
    after = load_file(runs / "teacher" / "model.safetensors")
    assert all((before[name] == after[name]).all() for name in before), "the teacher's own artefact stays"


def test_online_parts_of_a_step_are_refused_where_they_would_have_scales_of_their_own(runs, tmp_path, monkeypatch):
    parts = replace(CONFIG, online=OnlineConfig(), train=replace(TRAIN, accumulate=2))
    with pytest.raises(ConfigError, match="its own teacher's norm"):
        made(runs, tmp_path / "a", parts)
    with monkeypatch.context() as patched:
        patched.setattr("compress.student.process_count", lambda: 2)
        with pytest.raises(ConfigError, match="its own teacher's norm"):
            made(runs, tmp_path / "b", replace(CONFIG, online=OnlineConfig()))
    curves = [
        made(runs, tmp_path / name, replace(CONFIG, online=OnlineConfig(), magnitude_scale="none", train=train))[1]
        for name, train in (("one", TRAIN), ("two", replace(TRAIN, accumulate=2)))
    ]
    for one, two in zip(*([r for r in curve if "loss" in r] for curve in curves), strict=True):
        assert one == pytest.approx(two, rel=1e-4)


def test_a_store_that_is_kept_serves_the_next_student_and_stays(runs, tmp_path):
    kept = replace(CONFIG, features=FeatureConfig(keep=True))
    made(runs, tmp_path / "first", kept)
    [shelf] = tmp_path.glob(".features-*")
    file = shelf / "features.bin"
    written = file.stat().st_mtime_ns
    made(runs, tmp_path / "second", replace(CONFIG, supervision_weight=0.0))
    assert file.stat().st_mtime_ns == written
    assert file.exists()


def test_what_a_killed_run_with_other_settings_had_stored_goes_once_the_output_is_made(runs, tmp_path, monkeypatch):
    class KilledError(Exception):
        pass

    def killed(*_):
        raise KilledError

    output = tmp_path / "student"
    with monkeypatch.context() as patch:
        patch.setattr("compress.distill.train", killed)
        with pytest.raises(KilledError):
            made(runs, output, replace(CONFIG, features=FeatureConfig(dtype="float32")))
    assert len(list(tmp_path.glob(".features-*"))) == 1, "it may be resumed"
    made(runs, tmp_path / "another", CONFIG)
    assert len(list(tmp_path.glob(".features-*"))) == 1, "another output's run leaves it"
    made(runs, output, CONFIG)
    assert not list(tmp_path.glob(".*"))


def test_features_of_a_run_killed_at_its_first_batch_go_too(runs, tmp_path, monkeypatch):
    class KilledError(Exception):
        pass

    def killed(*_):
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("compress.features._write_batch", killed)
        with pytest.raises(KilledError):
            made(runs, tmp_path / "student", replace(CONFIG, features=FeatureConfig(dtype="float32")))
    made(runs, tmp_path / "student", CONFIG)
    assert not list(tmp_path.glob(".*"))


def test_a_student_of_the_backbone_is_another_run_when_the_backbone_changes(runs):
    teacher, data = open_artifact(runs / "teacher"), load_dataset(runs / "data")
    config = replace(CONFIG, init="backbone")
    before = distill_stage(teacher, data, config).key
    text = (runs / "backbone" / "config.json").read_text()
    (runs / "backbone" / "config.json").write_text(text + "\n")
    assert distill_stage(teacher, data, config).key != before
    assert distill_stage(teacher, data, CONFIG).key == distill_stage(teacher, data, CONFIG).key
    (runs / "backbone" / "config.json").write_text(text)
    assert distill_stage(teacher, data, config).key == before


def test_plans_of_live_and_online_teachers_count_them(runs):
    teacher, data = open_artifact(runs / "teacher"), load_dataset(runs / "data")
    stored, live, online = (
        plan_distillation(teacher, data, config, "cpu")[0]
        for config in (
            CONFIG,
            replace(CONFIG, features=FeatureConfig(source="live")),
            replace(CONFIG, online=OnlineConfig(signal="logits"), **NO_FEATURES),
        )
    )
    targets = sum(max(0, len(row) - 3) for row in data.sequences)
    assert stored.feature_store_bytes == targets * 2 * 64 * 2, "blocks, hidden, bytes of bfloat16"
    assert live.feature_store_bytes is None
    assert live.memory_per_device_bytes["teacher_weights"] == stored.teacher_weights_bytes
    assert online.parameters["decoder"] > stored.parameters["decoder"]
    assert online.memory_per_device_bytes["teacher_activations"] > stored.memory_per_device_bytes["activations"]
    parts = {name: value for name, value in online.memory_per_device_bytes.items() if name != "total"}
    assert online.memory_per_device_bytes["total"] == sum(parts.values())


def test_an_output_that_another_run_makes_is_refused_before_anything_is_loaded(runs, tmp_path):
    script = "import sys; from pathlib import Path; from slmrec.locks import claimed\n"
    script += "with claimed(Path(sys.argv[1])): print(flush=True); input()"
    command = [sys.executable, "-c", script, str(tmp_path / "student")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        other.stdout.readline()
        with pytest.raises(ArtifactError, match="another run is writing"):
            made(runs, tmp_path / "student", CONFIG)
        other.communicate("\n")

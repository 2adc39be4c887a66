"""Two processes, micro-batches and checkpoints of activations: the curve of one process, up to rounding."""

import dataclasses
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from compress.distill import store_spec
from compress.features import build_store
from compress.objective import DistillObjective, with_teacher
from compress.student import build_student, require_distillable
from slmrec.cli.main import main
from slmrec.compress_config import DistillConfig
from slmrec.config import DataConfig, RecipeConfig, SasrecConfig, TeacherConfig, TrainConfig, WindowConfig
from slmrec.dataset import load_dataset
from slmrec.errors import ConfigError, TrainingError
from slmrec.interactions import prepare_dataset
from slmrec.processes import connect
from slmrec.ragged import Ragged
from slmrec.samples import training_samples
from slmrec.synthetic import write_backbone, write_log
from slmrec.train import Task, split_rows, train
from slmrec.train_items import train_items
from slmrec.train_teacher import require_prefix_shareable

ROOT = Path(__file__).parents[1]
DRIVER = Path(__file__).with_name("killed_run.py")
STUDENT = ["--num-layers", "2", "--num-blocks", "2", "--epochs", "2", "--save-every-steps", "3", "--batch-size", "64",
           "--precision", "fp32"]  # fmt: skip
"""What killed_run.py trains as well."""

CURVE = {"rel": 1e-4, "abs": 1e-6}
"""Sums in another order, in fp32, over some twenty steps: measured 1e-5 at most."""


def call(runs, *arguments):
    """A command in this process."""
    result = CliRunner().invoke(main, ["--runs", str(runs), *map(str, arguments)], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def launched(*script, count=2, launcher=("--multi_gpu",)):
    """A script or "-m" module in processes that `accelerate launch` starts; gives the finished launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "--num_processes", count,
               "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port,
               *script]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command = [str(part) for part in command]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)


def command_launched(runs, *arguments, **settings):
    """A command in many processes; gives the launcher, its error output with it."""
    return launched("-m", "slmrec.cli.main", "--runs", runs, *arguments, "--device", "cpu", **settings)


def curve(artifact):
    return [json.loads(line) for line in (artifact / "training.jsonl").read_text().splitlines()]


def assert_same_curve(one, other):
    """Records of two runs agree; terms' own gradient norms are taken by one process alone, of its first share."""
    one, other = ([record for record in log if "gradient_norms" not in record] for log in (one, other))
    assert len(one) == len(other) > 2
    for ours, theirs in zip(one, other, strict=True):
        assert ours == pytest.approx(theirs, **CURVE)


def assert_same_weights(one, other):
    ours, theirs = (load_file(artifact / "model.safetensors") for artifact in (one, other))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-4, msg=name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Data, items and a teacher without dropout, by one process."""
    runs = tmp_path_factory.mktemp("runs")
    prepare_dataset([write_log(runs / "log.txt", num_users=199)], runs / "data", DataConfig())
    items = TrainConfig(epochs=1, batch_size=64, learning_rate=1e-3, precision="fp32")
    train_items(load_dataset(runs / "data"), runs / "items", SasrecConfig(hidden_size=16, train=items))
    write_backbone(runs / "backbone", num_layers=2)
    assert json.loads(call(runs, *teacher(runs), "--dry-run", "--json"))["num_samples"] % 33 == 1
    call(runs, *teacher(runs))
    return runs


def teacher(runs):
    """A teacher's command; 199 samples in batches of 33 leave a step of one row, which one process alone can take."""
    shape = ["--backbone", runs / "backbone", "--num-layers", 2, "--prompt", "none", "--dropout", 0]
    return ["train-teacher", *shape, "--epochs", 2, "--batch-size", 33, "--precision", "fp32"]


@pytest.mark.slow
def test_two_processes_train_a_teacher_as_one_does(runs, tmp_path):
    ended = command_launched(runs, *teacher(runs), "--accumulate", 2, "-o", tmp_path / "teacher")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("validation NDCG@10") == 1, "the main process alone prints"
    assert_same_curve(curve(tmp_path / "teacher"), curve(runs / "teacher"))
    assert_same_weights(tmp_path / "teacher", runs / "teacher")
    assert not list(tmp_path.glob(".*")), "what was kept to be resumed is removed"


FSDP2 = """
distributed_type: FSDP
fsdp_config: {fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP,
              fsdp_transformer_layer_cls_to_wrap: LlamaDecoderLayer, fsdp_reshard_after_forward: true}
use_cpu: true
"""
"""What `accelerate config` would write, as far as it matters."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["data parallel", "weights sharded"])
def test_two_processes_distill_as_one_does_though_killed_and_resumed(runs, tmp_path, kind):
    call(runs, "distill", *STUDENT, "-o", tmp_path / "one")
    (tmp_path / "fsdp.yaml").write_text(FSDP2)
    launcher = ("--multi_gpu",) if kind == "data parallel" else ("--config_file", tmp_path / "fsdp.yaml")
    assert launched(DRIVER, "distill", runs, "-", "step", 5, launcher=launcher).returncode != 0
    assert not (runs / "student").exists()
    assert (runs / ".student.work" / "state.safetensors").exists()
    ended = launched(DRIVER, "distill", runs, "-", "never", 0, launcher=launcher)
    assert ended.returncode == 0, ended.stderr
    made = shutil.move(runs / "student", tmp_path / "student")
    assert_same_curve(curve(made), curve(tmp_path / "one"))
    assert_same_weights(made, tmp_path / "one")


def test_parallelism_that_the_loop_does_not_know_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="asks for FSDP1") as refused:
        connect(torch.device("cpu"))
    assert "fsdp_version: 2" in refused.value.remedy
    monkeypatch.setenv("FSDP_VERSION", "2")
    connect(torch.device("cpu"))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="DeepSpeed"):
        connect(torch.device("cpu"))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all_processes_with_one_message(runs, tmp_path):
    flags = ["--learning-rate", "1e9", "--warmup-steps", 0, "-o", tmp_path / "teacher"]
    ended = command_launched(runs, *teacher(runs), *flags)
    assert ended.returncode != 0
    assert ended.stderr.count("Error: train-teacher: the loss is nan") == 1
    assert "slmrec/train.py" not in ended.stderr, "no traceback of ours"
    assert not (tmp_path / "teacher").exists()


def test_a_launcher_that_starts_one_process_for_many_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ConfigError, match="starts a single process") as refused:
        connect(torch.device("cpu"))
    assert "--multi_gpu" in refused.value.remedy


def test_other_stages_are_one_processs_work(runs, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="quantize is one process's work, but 2 were started"):
        call(runs, "quantize")


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(TrainingError("the loss is nan", remedy="less")))
    assert (type(error), error.problem, error.remedy) == (TrainingError, "the loss is nan", "less")


@pytest.mark.parametrize("accumulate", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("num_rows", [1, 4, 7, 16])
def test_every_row_has_one_place_and_processes_take_as_many_steps(num_rows, count, accumulate):
    parts = [split_rows(np.arange(num_rows), index, count, accumulate) for index in range(count)]
    assert sorted(np.concatenate([part for own in parts for part in own]).tolist()) == list(range(num_rows))
    assert {len(own) for own in parts} == {min(accumulate, -(-num_rows // count))}


SEQUENCES = Ragged.from_rows([[*range(1, 8)], [9, 8, 7, 6, 5], [3, 4, 5, 6], [*range(11, 20)], [5, 4, 3, 2, 1, 7]])


def distilled(tiny_model, work, **changes):
    """The curve of a few steps of distillation, every term in it."""
    teacher = tiny_model(num_layers=4, prompt="none").eval()
    settings = TrainConfig(**{"epochs": 3, "batch_size": 4, "learning_rate": 1e-3, "precision": "fp32"} | changes)
    config = DistillConfig(num_layers=2, num_blocks=2, train=settings)
    samples = training_samples(SEQUENCES, WindowConfig(max_history=4), "all", after_suffix=False)
    work.mkdir()
    store = build_store(teacher, samples, store_spec(teacher, config), work, "key")
    objective = DistillObjective(build_student(teacher, config), config)
    if settings.checkpoint_gradients:
        objective.student.checkpoint_gradients()
    task = Task(
        title="test", objective=objective, lengths=samples.lengths, validate=lambda: 0.0,
        batch=lambda rows: with_teacher(samples.batch(rows), store.read(rows), has_prefix=False),
    )  # fmt: skip
    return train(task, settings, work, "key", torch.device("cpu")).log


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"accumulate": 4}, {"checkpoint_gradients": True}])
def test_less_memory_gives_the_same_curve(tiny_model, tmp_path, changes):
    whole = distilled(tiny_model, tmp_path / "whole")
    assert {"ce", "magnitude_block_1", "supervision_block_1", "gradient_norm"} <= set(whole[1])
    assert_same_curve(distilled(tiny_model, tmp_path / "less", **changes), whole)


def test_more_micro_batches_than_sequences_are_refused():
    with pytest.raises(ConfigError, match="batch_size=4 cannot be cut into accumulate=5"):
        TrainConfig(epochs=1, batch_size=4, learning_rate=1e-3, accumulate=5)


def test_a_shared_instruction_and_shards_exclude_each_other(tiny_model, monkeypatch):
    model, settings = tiny_model(prompt="prefix"), TrainConfig(epochs=1, batch_size=4, learning_rate=1e-3)
    require_prefix_shareable(model.spec, settings)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="shared instruction and FSDP"):
        require_prefix_shareable(model.spec, settings)
    require_prefix_shareable(dataclasses.replace(model.spec, share_prefix=False), settings)


def test_a_shared_instruction_and_checkpoints_exclude_each_other(tiny_model):
    settings = TrainConfig(epochs=1, batch_size=4, learning_rate=1e-3, checkpoint_gradients=True)
    with pytest.raises(ConfigError, match="shared instruction") as refused:
        TeacherConfig(train=settings)
    assert "--no-share-prefix" in refused.value.remedy
    TeacherConfig(train=settings, share_prefix=False)
    TeacherConfig(train=settings, recipe=RecipeConfig(prompt="none"))
    student = DistillConfig(num_layers=2, num_blocks=2, train=settings)
    with pytest.raises(ConfigError, match="shared instruction"):
        require_distillable(tiny_model(num_layers=4, prompt="prefix"), student)
    require_distillable(tiny_model(num_layers=4, prompt="none"), student)
    alone = dataclasses.replace(student, share_prefix=False)
    require_distillable(tiny_model(num_layers=4, prompt="prefix"), alone)
    assert not build_student(tiny_model(num_layers=4, prompt="prefix"), alone).spec.share_prefix

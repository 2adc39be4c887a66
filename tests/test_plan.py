"""What --dry-run says of a run, against closed formulas and against what a real forward pass keeps."""

import dataclasses
import json
import resource
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from slmrec.artifact import open_artifact
from slmrec.cli.main import main
from slmrec.config import DataConfig, SasrecConfig, TrainConfig, WindowConfig
from slmrec.dataset import load_dataset
from slmrec.errors import ArtifactError
from slmrec.interactions import prepare_dataset
from slmrec.models.checkpoint import load_decoder
from slmrec.models.decoder import FAMILIES, DecoderModel
from slmrec.plan import plan_training
from slmrec.ragged import Ragged
from slmrec.samples import NextItemObjective, training_samples
from slmrec.synthetic import write_backbone, write_log
from slmrec.train_items import train_items

LLAMA_7B = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu"}  # fmt: skip
"""Shape of LLaMA-2-7B (arXiv:2307.09288)."""
DECODER_7B = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
TRAIN = TrainConfig(epochs=2, batch_size=16, learning_rate=1e-3)
ITEM_DIM = 16


def dry_run(runs, *arguments):
    command = ["--runs", str(runs), *map(str, arguments), "--dry-run"]
    result = CliRunner().invoke(main, [*command, "--json"], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    text = CliRunner().invoke(main, command, standalone_mode=False).stdout
    return json.loads(result.stdout), text


def teacher_of(runs):
    """The folder of a teacher of four layers; trained once."""
    shape = ["--backbone", runs / "backbone", "--num-layers", 4, "--prompt", "none", "--epochs", 1]
    result = CliRunner().invoke(main, ["--runs", str(runs), "train-teacher", *map(str, shape)], standalone_mode=False)
    assert result.exception is None
    return runs / "teacher"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    prepare_dataset([write_log(runs / "log.txt", num_users=50)], runs / "data", DataConfig())
    items = TrainConfig(epochs=1, batch_size=64, learning_rate=1e-3, precision="fp32")
    train_items(load_dataset(runs / "data"), runs / "items", SasrecConfig(hidden_size=ITEM_DIM, train=items))
    write_backbone(runs / "backbone")
    (runs / "7b").mkdir()
    (runs / "7b" / "config.json").write_text(json.dumps(LLAMA_7B))
    return runs


def test_a_7b_run_is_planned_from_its_config_alone(runs):
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    flags = ["--backbone", runs / "7b", "--num-layers", 32, "--prompt", "none", "--precision", "fp32"]
    plan, text = dry_run(runs, "train-teacher", *flags, "--batch-size", 16)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert time.perf_counter() - start < 30
    assert grown < 1e9, "no weights are allocated"
    items = 61 * ITEM_DIM + ITEM_DIM * 4096 + 4096
    total = DECODER_7B + items + 4096 * ITEM_DIM
    parameters = {"decoder": DECODER_7B, "items": items, "head": 4096 * ITEM_DIM, "total": total, "trainable": total}
    assert plan["parameters"] == parameters
    memory = plan["memory_per_device_bytes"]
    assert memory["gradients"] == memory["best_weights"] == 4 * total
    assert memory["adamw_state"] == 8 * total
    assert memory["total"] == sum(memory.values()) - memory["total"]
    assert plan["tokens_per_epoch"] == {"items": plan["num_items_read"], "prompt": 0, "total": plan["num_items_read"]}
    assert plan["feature_store_bytes"] == plan["num_targets"] * 4 * 4096 * 2, "four blocks in bfloat16"
    assert "decoder 6,476.272" in text
    shallow, _ = dry_run(runs, "train-teacher", "--backbone", runs / "7b", "--num-layers", 2, "--prompt", "none")
    assert shallow["feature_store_bytes"] == plan["feature_store_bytes"] / 2, "as many blocks as layers"
    assert "once a student is distilled from it" in text
    assert not (runs / "teacher").exists()


def test_lora_trains_a_share_and_keeps_state_of_that_alone(runs):
    flags = ["--backbone", runs / "7b", "--num-layers", 32, "--prompt", "none", "--tuning", "lora"]
    plan, _ = dry_run(runs, "train-teacher", *flags)
    lora = 32 * 3 * 16 * (4096 + 11008)
    assert (plan["parameters"]["lora"], plan["parameters"]["decoder"]) == (lora, DECODER_7B)
    assert plan["memory_per_device_bytes"]["adamw_state"] == 8 * plan["parameters"]["trainable"]
    assert plan["parameters"]["trainable"] == lora + plan["parameters"]["items"] + plan["parameters"]["head"]


def test_micro_batches_and_checkpoints_need_less_memory(runs):
    flags = ["--backbone", runs / "7b", "--num-layers", 32, "--prompt", "none", "--batch-size", 32]
    whole, quarter, checkpointed = (
        dry_run(runs, "train-teacher", *flags, *more)[0]["memory_per_device_bytes"]["activations"]
        for more in ([], ["--accumulate", 4], ["--checkpoint-gradients"])
    )
    assert quarter == whole / 4
    assert checkpointed < whole / 4


def test_datasets_of_other_items_are_refused_by_a_dry_run_too(runs, tmp_path):
    prepare_dataset([write_log(tmp_path / "log.txt", num_users=50, num_items=33)], tmp_path / "data", DataConfig())
    shape, other = ["--backbone", runs / "backbone", "--prompt", "none"], ["-d", tmp_path / "data"]
    with pytest.raises(ArtifactError, match="have different catalogues"):
        dry_run(runs, "train-teacher", *shape, *other)
    with pytest.raises(ArtifactError, match="have different catalogues"):
        dry_run(runs, "distill", "-m", teacher_of(runs), *other)


def test_a_distillation_is_planned_with_its_feature_store(runs, monkeypatch):
    path = teacher_of(runs)
    plan, text = dry_run(runs, "distill", "--num-layers", 2, "--num-blocks", 2)
    assert plan["feature_store_bytes"] == plan["num_targets"] * 2 * 64 * 2
    teacher = load_decoder(open_artifact(path))
    assert plan["teacher_weights_bytes"] == sum(v.nbytes for v in [*teacher.parameters(), *teacher.buffers()])
    assert plan["parameters"]["adapters"] == 64 * ITEM_DIM
    assert plan["parameters"]["decoder"] == sum(v.numel() for v in teacher.decoder.layers[:2].parameters()) + 64
    assert "teacher's features" in text
    assert plan["disk_free_bytes"] > plan["feature_store_bytes"]
    assert "do not fit" not in text
    with monkeypatch.context() as small:
        small.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=plan["feature_store_bytes"] - 1))
        _, text = dry_run(runs, "distill", "--num-layers", 2, "--num-blocks", 2, "-o", runs / "new" / "student")
    assert f"the features do not fit: {runs} has" in text
    narrow, _ = dry_run(runs, "distill", "--num-layers", 2, "--num-blocks", 2, "--hidden-size", 32, "--init", "random")
    assert narrow["parameters"]["projections"] == 2 * 32 * 64


SEQUENCES = Ragged.from_rows([np.arange(1, 12) + shift % 5 for shift in range(16)])


def prepared(tiny_model, *, share_prefix=True, **shape):
    """A model, its objective, and samples that fill one batch."""
    model = tiny_model(**shape)
    model = DecoderModel(dataclasses.replace(model.spec, share_prefix=share_prefix))
    return model, NextItemObjective(model), training_samples(SEQUENCES, WindowConfig(), "all", after_suffix=False)


def kept_bytes(objective, batch, *, bf16):
    """Storage that autograd saves in a forward pass, parameters and buffers aside."""
    own = {value.untyped_storage().data_ptr() for value in [*objective.parameters(), *objective.buffers()]}
    kept = {}

    def keep(value):
        storage = value.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), value)
        return value

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
    ):
        loss = sum(objective(batch).values())
    assert loss.requires_grad
    return sum(size for address, (size, _) in kept.items() if address not in own)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("prompt", "share_prefix"), [("none", True), ("prefix", True), ("prefix", False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_estimated_to_a_sixth(tiny_model, family, prompt, share_prefix, bf16):
    model, objective, samples = prepared(tiny_model, family=family, prompt=prompt, share_prefix=share_prefix)
    batch = samples.batch(np.arange(16))
    kept = kept_bytes(objective, batch, bf16=bf16)
    memory = plan_training(model, objective, samples, TRAIN, bf16=bf16).memory_per_device_bytes
    beyond_the_forward_pass = 2 * batch.num_targets * model.num_items * 4
    estimate = memory["activations"] + memory["bf16_weights"] - beyond_the_forward_pass
    assert estimate == pytest.approx(kept, rel=1 / 6)


@pytest.mark.parametrize(("share_prefix", "forwards"), [(True, 3), (False, 16)])
def test_an_instruction_counts_once_a_step_or_once_a_row(tiny_model, share_prefix, forwards):
    model, objective, samples = prepared(tiny_model, prompt="prefix", share_prefix=share_prefix)
    plan = plan_training(model, objective, samples, dataclasses.replace(TRAIN, batch_size=6), bf16=False)
    items = int(samples.lengths.sum())
    assert plan.tokens_per_epoch == {"items": items, "prompt": forwards * 5, "total": items + forwards * 5}


def test_many_devices_share_the_rows_and_shards_the_weights(tiny_model, monkeypatch):
    model, objective, samples = prepared(tiny_model, prompt="none")
    one = plan_training(model, objective, samples, TRAIN, bf16=False).memory_per_device_bytes
    monkeypatch.setenv("WORLD_SIZE", "4")
    four = plan_training(model, objective, samples, TRAIN, bf16=False)
    assert four.num_processes == 4
    assert four.memory_per_device_bytes["activations"] == one["activations"] / 4
    assert four.memory_per_device_bytes["adamw_state"] == one["adamw_state"]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    sharded = plan_training(model, objective, samples, TRAIN, bf16=False).memory_per_device_bytes
    assert sharded["adamw_state"] == one["adamw_state"] // 4

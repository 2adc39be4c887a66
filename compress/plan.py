"""What a distillation will take, worked out from shapes alone."""

from dataclasses import replace

import torch
from torch import nn

from compress.distill import objective_of, store_spec, stores_features, student_samples
from compress.features import StoreSpec
from compress.student import online_teacher_spec, require_distillable, student_spec
from slmrec.artifact import Artifact
from slmrec.compress_config import DistillConfig, FeatureConfig
from slmrec.dataset import Dataset, require_same_items
from slmrec.models.checkpoint import build_model, require_decoder
from slmrec.models.decoder import DecoderModel
from slmrec.models.ranking import resolve_device
from slmrec.plan import BF16_BYTES, Plan, activation_bytes, load_of, plan_training
from slmrec.samples import Samples
from slmrec.train import computes_in_bf16


def plan_distillation(
    teacher_artifact: Artifact, data: Dataset, config: DistillConfig, device: str
) -> tuple[Plan, Samples]:
    """Sizes of the student's training and of the store of its teacher's features, and what it is trained on.

    Raises:
        ConfigError: teacher and student cannot be matched block by block.
        ArtifactError: the teacher knows other items than the dataset.
    """
    require_same_items(teacher_artifact, data)
    with torch.device("meta"):
        teacher = require_decoder(build_model(teacher_artifact), teacher_artifact)
        require_distillable(teacher, config)
        student = DecoderModel(student_spec(teacher, config))
        teacher.spec = online_teacher_spec(teacher, config)
        objective = objective_of(teacher, student, config)
    samples = student_samples(teacher_artifact, teacher, data)
    bf16 = computes_in_bf16(config.train, resolve_device(device))
    plan = plan_training(student, objective, samples, config.train, bf16=bf16)
    plan = _with_teacher(plan, teacher, objective, samples, (config, bf16))
    if not stores_features(teacher, config):
        return plan, samples
    size_bytes = store_spec(teacher, config).size_bytes(int(samples.num_targets.sum()))
    return replace(plan, feature_store_bytes=size_bytes, teacher_weights_bytes=_weights_bytes(teacher)), samples


def with_features_to_come(plan: Plan, teacher: DecoderModel, samples: Samples) -> Plan:
    """A teacher's plan, with the size of what a student will read of it by the default settings."""
    spec = StoreSpec(
        num_blocks=min(DistillConfig.num_blocks, teacher.num_layers), hidden_size=teacher.hidden_size,
        dtype=FeatureConfig.dtype, list_size=0,
    )  # fmt: skip
    return replace(plan, feature_store_bytes=spec.size_bytes(int(samples.num_targets.sum())))


def _with_teacher(
    plan: Plan, teacher: DecoderModel, objective: nn.Module, samples: Samples, settings: tuple[DistillConfig, bool]
) -> Plan:
    """What a teacher takes on every device during training: all it needs to learn too, or its weights to be asked."""
    config, bf16 = settings
    extra: dict[str, int] = {}
    if config.online is not None:
        load = load_of(teacher, objective, samples, config.train)
        checkpointed = config.train.checkpoint_gradients
        extra["teacher_activations"] = activation_bytes(teacher, load, bf16=bf16, checkpointed=checkpointed)
        extra["teacher_bf16_weights"] = (
            sum(value.numel() for value in teacher.decoder.parameters()) * BF16_BYTES if bf16 else 0
        )
    elif config.features.source == "live" and store_spec(teacher, config).columns():
        extra["teacher_weights"] = _weights_bytes(teacher)
    memory = {**plan.memory_per_device_bytes, **extra}
    memory["total"] += sum(extra.values())
    return replace(plan, memory_per_device_bytes=memory)


def _weights_bytes(model: DecoderModel) -> int:
    return sum(value.numel() * value.element_size() for value in [*model.parameters(), *model.buffers()])

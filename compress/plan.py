"""What a distillation will take, worked out from shapes alone."""

from dataclasses import replace

import torch

from compress.distill import objective_of, store_spec, student_samples
from compress.student import require_distillable, student_spec
from slmrec.artifact import Artifact
from slmrec.compress_config import DistillConfig
from slmrec.dataset import Dataset
from slmrec.models.checkpoint import build_model, require_decoder
from slmrec.models.decoder import DecoderModel
from slmrec.models.ranking import resolve_device
from slmrec.plan import Plan, plan_training
from slmrec.samples import Samples
from slmrec.train import computes_in_bf16


def plan_distillation(
    teacher_artifact: Artifact, data: Dataset, config: DistillConfig, device: str
) -> tuple[Plan, Samples]:
    """Sizes of the student's training and of the store of its teacher's features, and what it is trained on.

    Raises:
        ConfigError: teacher and student cannot be matched block by block.
    """
    with torch.device("meta"):
        teacher = require_decoder(build_model(teacher_artifact), teacher_artifact)
        require_distillable(teacher, config)
        student = DecoderModel(student_spec(teacher, config))
        objective = objective_of(teacher, student, config)
    samples = student_samples(teacher_artifact, teacher, data)
    spec = store_spec(teacher, config)
    stored = config.online is None and config.features.source == "stored"
    bf16 = computes_in_bf16(config.train, resolve_device(device))
    plan = plan_training(student, objective, samples, config.train, bf16=bf16)
    weights = [*teacher.parameters(), *teacher.buffers()]
    return replace(
        plan,
        feature_store_bytes=spec.size_bytes(int(samples.num_targets.sum())) if stored else 0,
        teacher_weights_bytes=sum(value.numel() * value.element_size() for value in weights),
    ), samples

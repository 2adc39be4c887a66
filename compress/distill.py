"""distill: a small student follows the teacher's features block by block (SLMRec, arXiv:2405.17890)."""

import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.blocks import block_ends, kept_layers, state_index
from compress.features import build_features
from compress.losses import direction_loss, magnitude_loss
from slmrec.artifact import Artifact, Stage, existing, work_folder
from slmrec.catalogue import load_catalogue, require_same_catalogue
from slmrec.config import DistillConfig, WindowConfig, settings_of
from slmrec.dataset import Dataset
from slmrec.errors import ConfigError
from slmrec.evaluate import validation_ndcg
from slmrec.models.checkpoint import load_decoder, publish_checkpoint, quantized_layers
from slmrec.models.decoder import DecoderModel, DecoderSpec, decoder_settings
from slmrec.models.ranking import TorchRecommender, resolve_device
from slmrec.processes import connect, on_main
from slmrec.samples import Samples, cross_entropy
from slmrec.sequences import validation_cases
from slmrec.train import Batch, Progress, Task, train
from slmrec.train_teacher import ITEM_PARAMETERS, load_backbone, require_prefix_shareable, teacher_samples


class DistillObjective(nn.Module):
    """Cross-entropy, feature direction, feature magnitude and multiple supervision, every term by name."""

    def __init__(self, student: DecoderModel, config: DistillConfig) -> None:
        super().__init__()
        self.student, self.config = student, config
        self.ends = block_ends(student.num_layers, config.num_blocks)
        adapted = config.num_blocks - 1 if config.supervision_weight else 0
        self.adapters = nn.ModuleList(
            nn.Linear(student.hidden_size, student.spec.item_dim, bias=False) for _ in range(adapted)
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Weighted terms: ce, and per block direction_block_i, magnitude_block_i, supervision_block_i.

        Feature terms are averaged over blocks and supervision over the blocks before the last (SLMRec eq. 6).
        """
        assert batch.features is not None
        config, wanted, norms = self.config, batch.targets != 0, batch.feature_norms
        states = self.student(batch.item_ids)
        targets = batch.targets[wanted]
        terms = {"ce": cross_entropy(self.student.logits(states[-1][wanted]), targets)}
        for block, end in enumerate(self.ends):
            feature, teacher = states[state_index(end)][wanted], batch.features[:, block]
            name, share = f"block_{block + 1}", 1 / config.num_blocks
            if config.direction_weight:
                terms[f"direction_{name}"] = config.direction_weight * share * direction_loss(feature, teacher)
            if config.magnitude_weight:
                distance = self._magnitude(feature, teacher, None if norms is None else norms[block])
                terms[f"magnitude_{name}"] = config.magnitude_weight * share * distance
        for block, adapter in enumerate(self.adapters):
            feature = states[state_index(self.ends[block])][wanted]
            loss = cross_entropy(_adapted_logits(adapter, feature, self.student), targets)
            terms[f"supervision_block_{block + 1}"] = config.supervision_weight / len(self.adapters) * loss
        return terms

    def _magnitude(self, feature: Tensor, teacher: Tensor, norm: Tensor | None) -> Tensor:
        """The squared distance, on the scale of the whole step where the batch is a part of it."""
        if self.config.magnitude_scale == "hidden" and norm is not None:
            return magnitude_loss(feature, teacher, scale="none") / norm
        return magnitude_loss(feature, teacher, scale=self.config.magnitude_scale)


def _adapted_logits(adapter: nn.Module, feature: Tensor, student: DecoderModel) -> Tensor:
    """Scores of the catalogue from a feature inside the student, in fp32 as the head's."""
    with torch.autocast(feature.device.type, enabled=False):
        return adapter(feature.float()) @ student.item_outputs().T  # type: ignore[no-any-return]


def distill(
    teacher_artifact: Artifact,
    data: Dataset,
    output: Path,
    config: DistillConfig,
    *,
    device: str = "auto",
    force: bool = False,
) -> tuple[Artifact, bool]:
    """Train a student from a teacher checkpoint; gives the artefact and whether it was there already."""
    require_same_catalogue(
        load_catalogue(teacher_artifact.path),
        data.items,
        model_name=str(teacher_artifact.path),
        data_name=str(data.artifact.path),
    )
    parents = {"teacher": teacher_artifact, "data": data.artifact}
    stage = Stage(name="distill", kind="checkpoint", settings=settings_of(config), parents=parents)
    connect(resolve_device(device))
    there = on_main(lambda: existing(output, stage, force=force))
    if there is not None:
        return there, True
    teacher = load_decoder(teacher_artifact)
    require_distillable(teacher, config)
    student = build_student(teacher, config)
    samples = student_samples(teacher_artifact, teacher, data)
    run = (work_folder(output), stage.key, device)
    progress = _fit(teacher, DistillObjective(student, config), samples, data, run)
    return on_main(lambda: publish_checkpoint(output, stage, student, progress.log, data.items)), False


def require_distillable(teacher: DecoderModel, config: DistillConfig) -> None:
    """Refuse a pair of teacher and student that cannot be matched block by block."""
    if quantized_layers(teacher):
        raise ConfigError(
            "the teacher is an 8-bit checkpoint", remedy="distil from its fp32 parent, quantize afterwards"
        )
    if config.num_layers > teacher.num_layers:
        raise ConfigError(
            f"the student would have {config.num_layers} layers, the teacher has {teacher.num_layers}",
            remedy=f"--num-layers {teacher.num_layers} or fewer",
        )
    if teacher.spec.recipe.head != "tied" and config.supervision_weight:
        raise ConfigError(
            "multiple supervision compares with the item table, which a linear head does not have",
            remedy="--supervision-weight 0, or a teacher with --head tied",
        )
    require_prefix_shareable(student_spec(teacher, config), config.train)


def student_spec(teacher: DecoderModel, config: DistillConfig) -> DecoderSpec:
    """The student's shape: the teacher's, cut to fewer layers."""
    settings = decoder_settings(teacher.decoder.config, config.num_layers)
    return replace(teacher.spec, decoder=settings, share_prefix=teacher.spec.share_prefix and config.share_prefix)


def build_student(teacher: DecoderModel, config: DistillConfig) -> DecoderModel:
    """A student before training: the teacher's items and head, and layers of the teacher or of the backbone."""
    torch.manual_seed(config.train.seed)
    student = DecoderModel(student_spec(teacher, config))
    ours = {n: v for n, v in teacher.state_dict().items() if not n.startswith("decoder.")}
    student.load_state_dict(ours, strict=False)
    if config.init == "backbone":
        decoder = load_backbone(teacher.spec.backbone, config.num_layers).decoder
        sources = list(range(config.num_layers))
    else:
        decoder, sources = teacher.decoder, kept_layers(teacher.num_layers, config.num_layers)
    for layer, source in zip(student.decoder.layers, sources, strict=True):
        layer.load_state_dict(decoder.layers[source].state_dict())
    student.decoder.norm.load_state_dict(decoder.norm.state_dict())
    return student


def student_samples(artifact: Artifact, teacher: DecoderModel, data: Dataset) -> Samples:
    """The samples the teacher was trained on."""
    return teacher_samples(teacher.spec.recipe, WindowConfig(**artifact.settings["window"]), data)


def _fit(
    teacher: DecoderModel, objective: DistillObjective, samples: Samples, data: Dataset, run: tuple[Path, str, str]
) -> Progress:
    work, key, device = run
    target = resolve_device(device)
    blocks = objective.config.num_blocks
    store = on_main(lambda: build_features(copy.copy(teacher).to(target).eval(), samples, blocks, work, key))
    teacher.cpu()
    if objective.config.train.checkpoint_gradients:
        objective.student.checkpoint_gradients()
    cases = validation_cases(data.sequences)
    task = Task(
        title="distill",
        objective=objective,
        lengths=samples.lengths,
        batch=lambda rows: samples.batch(rows)._replace(features=store.read(rows)),
        validate=lambda: validation_ndcg(TorchRecommender(objective.student, target.type), cases),
        item_parameters=ITEM_PARAMETERS,
    )
    return train(task, objective.config.train, work, key, target)

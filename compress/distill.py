"""distill: a small student follows the teacher's features block by block (SLMRec, arXiv:2405.17890)."""

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from compress.features import Reader, StoreSpec, build_store, drop_store, live_reader
from compress.objective import DistillObjective, OnlineObjective, with_teacher
from compress.student import build_student, online_teacher_spec, require_distillable
from slmrec.artifact import Artifact, Stage, replace_json, work_folder
from slmrec.begun import existing
from slmrec.compress_config import DistillConfig
from slmrec.config import WindowConfig, settings_of
from slmrec.dataset import Dataset, require_same_items
from slmrec.errors import ArtifactError
from slmrec.evaluate import validation_ndcg
from slmrec.locks import claimed, one_run_at_a_time
from slmrec.models.checkpoint import CONFIG_FILE, load_decoder, publish_checkpoint
from slmrec.models.decoder import DecoderModel
from slmrec.models.ranking import TorchRecommender, resolve_device
from slmrec.processes import connect, on_main
from slmrec.samples import Samples
from slmrec.sequences import validation_cases
from slmrec.train import Batch, Task, train
from slmrec.train_teacher import ITEM_PARAMETERS, backbone_hash, teacher_samples

SHELVES_FILE = "shelves.json"
DISTILLED_PARAMETERS = (*ITEM_PARAMETERS, "projections")
"""Parameters that learn at the item learning rate."""


@dataclass(frozen=True)
class Pair:
    """Who follows whom."""

    artifact: Artifact
    """The teacher's."""
    teacher: DecoderModel
    student: DecoderModel


@one_run_at_a_time
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
    require_same_items(teacher_artifact, data)
    stage, target = distill_stage(teacher_artifact, data, config), resolve_device(device)
    connect(target)
    there = on_main(lambda: existing(output, stage, force=force))
    if there is not None:
        return there, True
    teacher = load_decoder(teacher_artifact)
    require_distillable(teacher, config)
    student = build_student(teacher, config)
    if config.online is not None:
        teacher.spec = online_teacher_spec(teacher, config)
    pair = Pair(teacher_artifact, teacher, student)
    with followed(pair, data, config, output, target) as task:
        progress = train(task, config.train, work_folder(output), stage.key, target)
        shelves = on_main(lambda: begun_shelves(output))
        made = on_main(lambda: publish_checkpoint(output, stage, student, progress.log, data.items))
    on_main(lambda: drop_shelves(shelves, keep_last=config.features.keep))
    return made, False


@contextmanager
def followed(pair: Pair, data: Dataset, config: DistillConfig, output: Path, device: torch.device) -> Iterator[Task]:
    """The task of training a student, with its teacher's features at hand, stored beside `output` if need be."""
    samples = student_samples(pair.artifact, pair.teacher, data)
    key = store_spec(pair.teacher, config).key(pair.artifact.hash, samples)
    shelf = output.parent / f".features-{key[:16]}"
    with claimed(shelf) if stores_features(pair.teacher, config) else nullcontext():
        on_main(lambda: _note_shelf(output, shelf.name))
        reader = _reader(pair.teacher, samples, config, (shelf, key, device))
        yield _task(pair.teacher, pair.student, (samples, reader), data, config)


def begun_shelves(output: Path) -> list[Path]:
    """Where runs into this output have stored features, this run last; known until the work folder is removed."""
    path = work_folder(output) / SHELVES_FILE
    names: list[str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return [output.with_name(name) for name in names]


def drop_shelves(shelves: Sequence[Path], *, keep_last: bool = False) -> None:
    """Remove stored features once the output is safe: this run's, and those of runs killed and never resumed."""
    for shelf in shelves:
        try:
            with claimed(shelf):
                drop_store(shelf, keep=keep_last and shelf == shelves[-1])
        except ArtifactError:  # a run into another output reads it, and will drop it
            continue


def _note_shelf(output: Path, name: str) -> None:
    others = [shelf.name for shelf in begun_shelves(output) if shelf.name != name]
    replace_json(work_folder(output) / SHELVES_FILE, [*others, name])


def distill_stage(teacher: Artifact, data: Dataset, config: DistillConfig) -> Stage:
    """The run as a manifest names it."""
    settings = settings_of(config)
    del settings["features"]["keep"]  # what is left on the shelf changes nothing in the student
    if config.init == "backbone":
        settings["backbone_hash"] = backbone_hash(teacher_backbone(teacher))
    return Stage(
        name="distill", kind="checkpoint", settings=settings, parents={"teacher": teacher, "data": data.artifact}
    )


def teacher_backbone(teacher: Artifact) -> str:
    """Name of the pretrained decoder that a teacher was made from."""
    config = json.loads((teacher.path / CONFIG_FILE).read_text(encoding="utf-8"))
    return str(config["spec"]["backbone"]) if "spec" in config else ""


def store_spec(teacher: DecoderModel, config: DistillConfig) -> StoreSpec:
    """What the student's terms need of a frozen teacher."""
    return StoreSpec(
        num_blocks=config.num_blocks if config.matches_features else 0,
        hidden_size=teacher.hidden_size,
        dtype=config.features.dtype,
        list_size=min(config.list_size, teacher.num_items) if config.list_weight else 0,
    )


def stores_features(teacher: DecoderModel, config: DistillConfig) -> bool:
    """Whether a frozen teacher's features are computed before training."""
    needed = bool(store_spec(teacher, config).columns())
    return needed and config.online is None and config.features.source == "stored"


def student_samples(artifact: Artifact, teacher: DecoderModel, data: Dataset) -> Samples:
    """The samples the teacher was trained on; of a student, those of the teacher it descends from."""
    stages = [*artifact.manifest["lineage"], {"stage": artifact.stage, "settings": artifact.settings}]
    [*_, settings] = [one["settings"] for one in stages if one["stage"] in ("train-teacher", "import-teacher")]
    return teacher_samples(teacher.spec.recipe, WindowConfig(**settings["window"]), data)


def objective_of(teacher: DecoderModel, student: DecoderModel, config: DistillConfig) -> nn.Module:
    """What is minimised: the student's terms alone, or the teacher's as well."""
    distillation = DistillObjective(student, config, teacher.hidden_size)
    return distillation if config.online is None else OnlineObjective(teacher, distillation)


def _task(
    teacher: DecoderModel,
    student: DecoderModel,
    source: tuple[Samples, Reader | None],
    data: Dataset,
    config: DistillConfig,
) -> Task:
    samples, reader = source
    if config.train.checkpoint_gradients:
        student.checkpoint_gradients()
        if config.online is not None:
            teacher.checkpoint_gradients()
    cases = validation_cases(data.sequences)

    def batch(rows: np.ndarray) -> Batch:
        plain = samples.batch(rows)
        has_prefix = student.spec.prefix_length > 0
        return plain if reader is None else with_teacher(plain, reader(rows), has_prefix=has_prefix)

    def validate() -> float:
        return validation_ndcg(TorchRecommender(student, next(student.parameters()).device.type), cases)

    return Task(
        title="distill",
        objective=objective_of(teacher, student, config),
        lengths=samples.lengths,
        batch=batch,
        validate=validate,
        item_parameters=DISTILLED_PARAMETERS,
    )


def _reader(
    teacher: DecoderModel, samples: Samples, config: DistillConfig, place: tuple[Path, str, torch.device]
) -> Reader | None:
    """How a frozen teacher's features reach a batch; None where no term needs them."""
    shelf, key, device = place
    spec = store_spec(teacher, config)
    if config.online is not None or not spec.columns():
        return None
    frozen = copy.copy(teacher).to(device).eval()
    if not stores_features(teacher, config):
        return live_reader(frozen, samples, spec)
    store = on_main(lambda: build_store(frozen, samples, spec, shelf, key))
    teacher.cpu()
    return store.read

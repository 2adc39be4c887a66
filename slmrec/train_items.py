"""train-items: SASRec with full cross-entropy, the item table of a teacher and the bar it has to pass."""

from dataclasses import replace
from pathlib import Path

import torch

from slmrec.artifact import Artifact, Stage, work_folder
from slmrec.begun import existing
from slmrec.config import SasrecConfig, settings_of
from slmrec.dataset import Dataset
from slmrec.evaluate import validation_ndcg
from slmrec.locks import one_run_at_a_time
from slmrec.models.checkpoint import publish_checkpoint
from slmrec.models.ranking import TorchRecommender, resolve_device
from slmrec.models.sasrec import Sasrec
from slmrec.processes import connect, on_main
from slmrec.samples import NextItemObjective, Samples, training_samples
from slmrec.sequences import validation_cases
from slmrec.train import Task, train


def item_samples(config: SasrecConfig, data: Dataset) -> Samples:
    """What SASRec is trained on: every position of every window, or every prefix."""
    return training_samples(data.sequences, config.window, config.supervision, after_suffix=False)


def items_stage(config: SasrecConfig, data: Dataset) -> Stage:
    """The run as a manifest names it."""
    return Stage(name="train-items", kind="checkpoint", settings=settings_of(config), parents={"data": data.artifact})


def _as_long_as_trained(config: SasrecConfig, samples: Samples) -> SasrecConfig:
    """The settings, with a history no longer than any that is learned from: positions beyond would stay untrained."""
    longest = min(config.window.max_history, int(samples.lengths.max()))
    return replace(config, window=replace(config.window, max_history=longest))


@one_run_at_a_time
def train_items(
    data: Dataset, output: Path, config: SasrecConfig, *, device: str = "auto", force: bool = False
) -> tuple[Artifact, bool]:
    """Train SASRec on a dataset; gives the artefact and whether it was there already."""
    stage = items_stage(config, data)
    target = resolve_device(device)
    connect(target)
    there = on_main(lambda: existing(output, stage, force=force))
    if there is not None:
        return there, True
    samples = item_samples(config, data)
    torch.manual_seed(config.train.seed)
    model = Sasrec(_as_long_as_trained(config, samples), data.num_items)
    cases = validation_cases(data.sequences)
    task = Task(
        title="train-items",
        objective=NextItemObjective(model),
        lengths=samples.lengths,
        batch=samples.batch,
        validate=lambda: validation_ndcg(TorchRecommender(model, target.type), cases),
    )
    progress = train(task, config.train, work_folder(output), stage.key, target)
    return on_main(lambda: publish_checkpoint(output, stage, model, progress.log, data.items)), False

"""train-items: SASRec with full cross-entropy, the item table of a teacher and the bar it has to pass."""

import shutil
from pathlib import Path

import torch

from slmrec.artifact import Artifact, Stage, is_up_to_date, open_artifact, publish, work_folder
from slmrec.config import SasrecConfig, settings_of
from slmrec.dataset import Dataset
from slmrec.evaluate import validation_ndcg
from slmrec.models.checkpoint import save_checkpoint
from slmrec.models.ranking import TorchRecommender, resolve_device
from slmrec.models.sasrec import Sasrec
from slmrec.samples import NextItemObjective, Samples, training_samples
from slmrec.sequences import validation_cases
from slmrec.train import Task, train


def item_samples(config: SasrecConfig, data: Dataset) -> Samples:
    """What SASRec is trained on: every position of every window."""
    return training_samples(data.sequences, config.window, "all", after_suffix=False)


def train_items(
    data: Dataset, output: Path, config: SasrecConfig, *, device: str = "auto", force: bool = False
) -> tuple[Artifact, bool]:
    """Train SASRec on a dataset; gives the artefact and whether it was there already."""
    stage = Stage(name="train-items", kind="checkpoint", settings=settings_of(config), parents={"data": data.artifact})
    if is_up_to_date(output, stage, force=force):
        return open_artifact(output), True
    torch.manual_seed(config.train.seed)
    model = Sasrec(config, data.num_items)
    samples = item_samples(config, data)
    cases = validation_cases(data.sequences)
    target = resolve_device(device)
    task = Task(
        title="train-items",
        objective=NextItemObjective(model),
        lengths=samples.lengths,
        batch=samples.batch,
        validate=lambda: validation_ndcg(TorchRecommender(model, target.type), cases),
    )
    work = work_folder(output)
    progress = train(task, config.train, work, stage.key, target)
    with publish(output, stage) as folder:
        save_checkpoint(folder, model.cpu(), progress.log)
        data.items.save(folder)
    shutil.rmtree(work)
    return open_artifact(output), False

"""What a command says of the artefact it made."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmrec.artifact import Artifact, Stage, is_made, open_artifact, work_path
from slmrec.begun import require_own_progress

if TYPE_CHECKING:
    from slmrec.config import TrainConfig
    from slmrec.plan import Plan
    from slmrec.samples import Samples


def made(artifact: Artifact, was_there: bool) -> dict[str, Any]:
    """The JSON result every stage shares."""
    return {
        "output": str(artifact.path),
        "stage": artifact.stage,
        "hash": artifact.hash,
        "size_bytes": artifact.size_bytes,
        "up_to_date": was_there,
    }


def made_text(artifact: Artifact, was_there: bool) -> str:
    """One line for people."""
    if was_there:
        return f"{artifact.path} is up to date"
    return f"{artifact.path}: {artifact.stage}, {artifact.size_bytes / 1e6:.1f} MB"


def trained(artifact: Artifact, was_there: bool) -> tuple[dict[str, Any], str]:
    """Result and text of a training stage: the best validation NDCG@10 is named."""
    from slmrec.models.checkpoint import TRAINING_FILE

    records = [json.loads(line) for line in (artifact.path / TRAINING_FILE).read_text(encoding="utf-8").splitlines()]
    best = max((record for record in records if "validation_ndcg@10" in record), key=lambda r: r["validation_ndcg@10"])
    result = made(artifact, was_there) | {"validation_ndcg@10": best["validation_ndcg@10"], "best_epoch": best["epoch"]}
    metric, epoch = best["validation_ndcg@10"], best["epoch"] + 1
    text = f"{made_text(artifact, was_there)}; validation NDCG@10 {metric:.4f} (epoch {epoch})"
    return result, text


def already(output: Path, stage: Callable[[], Stage], *, force: bool) -> Artifact | None:
    """What a run would find in its place: this very artefact, none, or an error as the run itself would give."""
    if output.exists() and is_made(output, stage(), force=force):
        return open_artifact(output)
    if work_path(output).exists():
        require_own_progress(output, stage(), force=force)
    return None


def planned(
    output: Path, samples: "Samples", config: "TrainConfig", plan: "Plan | None" = None
) -> tuple[dict[str, Any], str]:
    """Result and text of a training stage's --dry-run; a decoder's has a plan of its sizes."""
    steps = -(-len(samples.lengths) // config.batch_size) * config.epochs
    result = {
        "output": str(output),
        "dry_run": True,
        "num_samples": len(samples.lengths),
        "num_items_read": int(samples.lengths.sum()),
        "num_targets": int(samples.num_targets.sum()),
        "epochs": config.epochs,
        "steps": steps,
    }
    text = (
        f"would write {output}: {result['num_samples']} samples, {result['num_items_read']} items read and "
        f"{result['num_targets']} targets an epoch; {config.epochs} epochs, {steps} steps of {config.batch_size}"
    )
    return (result, text) if plan is None else (result | plan.to_json(), f"{text}\n{plan.to_text()}")

"""What a command says of the artefact it made."""

import json
from typing import Any

from slmrec.artifact import Artifact
from slmrec.models.checkpoint import TRAINING_FILE


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
    records = [json.loads(line) for line in (artifact.path / TRAINING_FILE).read_text(encoding="utf-8").splitlines()]
    best = max((record for record in records if "validation_ndcg@10" in record), key=lambda r: r["validation_ndcg@10"])
    result = made(artifact, was_there) | {"validation_ndcg@10": best["validation_ndcg@10"], "best_epoch": best["epoch"]}
    metric, epoch = best["validation_ndcg@10"], best["epoch"] + 1
    text = f"{made_text(artifact, was_there)}; validation NDCG@10 {metric:.4f} (epoch {epoch})"
    return result, text

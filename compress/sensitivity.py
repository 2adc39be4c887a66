"""sensitivity: what 8 bits in each layer alone cost, measured on validation users."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from compress.calibrate import require_hits, some_cases
from compress.int8 import decoder_linears, load_full_precision, prepare, quantize_model
from compress.plots import bars
from slmrec.artifact import Artifact, is_up_to_date, open_artifact, publish, write_json
from slmrec.compress_config import SensitivityConfig
from slmrec.config import settings_of
from slmrec.dataset import Dataset, stage_on
from slmrec.evaluate import VALIDATION_PROTOCOL, Accuracy, evaluate
from slmrec.locks import one_run_at_a_time
from slmrec.metrics import overlap
from slmrec.models.decoder import DecoderModel
from slmrec.models.layers import Int8Linear
from slmrec.models.ranking import TorchRecommender
from slmrec.progress import progress_bar
from slmrec.sequences import Cases, validation_cases

SENSITIVITY_FILE = "sensitivity.json"


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What 8 bits in one layer alone cost."""

    layer: str
    ndcg_loss: float
    """Of NDCG@10, relative to fp32; negative where 8 bits happen to rank better."""
    overlap_loss: float
    """Share of the first ten recommendations that change."""


@one_run_at_a_time
def write_sensitivity(
    parent: Artifact, data: Dataset, output: Path, config: SensitivityConfig, *, device: str, force: bool = False
) -> tuple[Artifact, bool]:
    """Measure every layer of a checkpoint and write table and plot; gives the artefact and whether it was there."""
    stage = stage_on(data, parent, "sensitivity", "analysis", settings_of(config))
    if is_up_to_date(output, stage, force=force):
        return open_artifact(output), True
    cases = validation_cases(data.sequences)
    model = prepare(load_full_precision(parent), cases, config.calibration, device).model
    some = some_cases(cases, config.max_users, config.calibration.seed)
    found = sensitivity(model, some, device)
    with publish(output, stage) as folder:
        write_json(
            folder / SENSITIVITY_FILE,
            {"num_users": len(some), "split": "validation", "layers": [vars(one) for one in found]},
        )
        losses = {
            "first ten recommendations that change": [100 * one.overlap_loss for one in found],
            "NDCG@10 lost": [100 * one.ndcg_loss for one in found],
        }
        names = [one.layer for one in found]
        bars(names, losses, folder / "sensitivity", label="%, when this layer alone is 8-bit")
    return open_artifact(output), False


def read_sensitivity(artifact: Artifact) -> dict[str, Any]:
    """What `sensitivity.json` holds."""
    found: dict[str, Any] = json.loads((artifact.path / SENSITIVITY_FILE).read_text(encoding="utf-8"))
    return found


def sensitivity_text(layers: Sequence[dict[str, Any]]) -> str:
    """A table for the terminal, most sensitive first."""
    width = max(len(one["layer"]) for one in layers)
    lines = [f"{'layer':<{width}}  top-10 changed  NDCG@10 lost"]
    for one in layers:
        lines.append(f"{one['layer']:<{width}}  {100 * one['overlap_loss']:12.2f} %  {100 * one['ndcg_loss']:10.2f} %")
    return "\n".join(lines)


def sensitivity(
    model: DecoderModel,
    cases: Cases,
    device: str,
    layers: Sequence[str] | None = None,
    make: Callable[[nn.Linear], nn.Module] = Int8Linear.from_linear,
) -> list[Sensitivity]:
    """What 8 bits in each linear layer alone cost these users, most sensitive first (by the lists that change).

    `layers` are those measured, by default all; `make` gives the 8-bit layer of a linear one.
    """
    every, found = decoder_linears(model), []
    layers = every if layers is None else layers
    with progress_bar("sensitivity", len(layers) + 1) as bar:
        before = accuracy_of(model, cases, device)
        whole = require_hits(before.metrics["ndcg@10"].estimate, len(cases))
        bar(1)
        for layer in layers:
            alone = quantize_model(model, [name for name in every if name != layer], make)
            after = accuracy_of(alone, cases, device)
            ratio = after.metrics["ndcg@10"].estimate / whole
            changed = 1 - float(overlap(after.top_10, before.top_10).mean())
            found.append(Sensitivity(layer=layer, ndcg_loss=1 - ratio, overlap_loss=changed))
            bar(1)
    return sorted(found, key=lambda one: -one.overlap_loss)


def accuracy_of(model: DecoderModel, cases: Cases, device: str) -> Accuracy:
    """Accuracy on validation cases."""
    return evaluate(TorchRecommender(model, device), cases, protocol=VALIDATION_PROTOCOL)

"""importance: which layers of a decoder matter, by three measures, read where the user vector is read."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from compress.calibrate import require_hits, some_cases
from compress.int8 import load_full_precision
from compress.plots import heatmap
from slmrec.artifact import Artifact, is_up_to_date, open_artifact, publish, write_json
from slmrec.compress_config import ImportanceConfig
from slmrec.config import settings_of
from slmrec.dataset import Dataset, stage_on
from slmrec.errors import ConfigError
from slmrec.evaluate import validation_ndcg
from slmrec.locks import one_run_at_a_time
from slmrec.models.decoder import DecoderModel, decoder_settings
from slmrec.models.ranking import TorchRecommender, resolve_device
from slmrec.progress import progress_bar
from slmrec.recommender import Histories
from slmrec.sequences import Cases, validation_cases

IMPORTANCE_FILE = "importance.json"
USERS_AT_ONCE = 128


@dataclass(frozen=True, kw_only=True)
class LayerImportance:
    """One layer, by each criterion; the smaller, the sooner it can go."""

    layer: int
    angular: float
    """Mean angle between the user vectors before and after it, over pi (Gromov et al., arXiv:2403.17887)."""
    influence: float
    """1 - mean cosine of the two (ShortGPT, arXiv:2403.03853)."""
    damage: float
    """Share of validation NDCG@10 that is lost without it; what the other two are judged by."""


@one_run_at_a_time
def write_importance(
    parent: Artifact, data: Dataset, output: Path, config: ImportanceConfig, *, device: str, force: bool = False
) -> tuple[Artifact, bool]:
    """Measure every layer and every stretch of layers; gives the artefact and whether it was there."""
    stage = stage_on(data, parent, "importance", "analysis", settings_of(config))
    if is_up_to_date(output, stage, force=force):
        return open_artifact(output), True
    model = load_full_precision(parent).eval()
    if model.num_layers == 1:
        raise ConfigError(f"{parent.path} has a single layer, which cannot be left out", remedy="a deeper -m/--model")
    cases = some_cases(validation_cases(data.sequences), config.max_users, config.seed)
    angles, influence = user_vector_changes(model.to(resolve_device(device)), cases.histories)
    losses = damages(model, cases, [(layer,) for layer in range(model.num_layers)], device)
    layers = [
        LayerImportance(layer=layer, angular=float(angles[layer, 0]), influence=influence[layer], damage=losses[layer])
        for layer in range(model.num_layers)
    ]
    with publish(output, stage) as folder:
        table = [[None if np.isnan(value) else float(value) for value in row] for row in angles]
        write_json(
            folder / IMPORTANCE_FILE,
            {
                "num_users": len(cases), "split": "validation", "layers": [vars(one) for one in layers],
                "angular_distance": table,
            },
        )  # fmt: skip
        draw(angles, folder / "angular_distance")
    return open_artifact(output), False


def read_importance(artifact: Artifact) -> dict[str, Any]:
    """What `importance.json` holds."""
    found: dict[str, Any] = json.loads((artifact.path / IMPORTANCE_FILE).read_text(encoding="utf-8"))
    return found


def importance_text(layers: Sequence[dict[str, Any]]) -> str:
    """A table for the terminal."""
    lines = ["layer  angular distance  block influence  NDCG@10 lost without it"]
    for one in layers:
        lines.append(
            f"{one['layer']:5}  {one['angular']:16.3f}  {one['influence']:15.3f}  {100 * one['damage']:20.1f} %"
        )
    return "\n".join(lines)


def draw(angles: Float[np.ndarray, "layers sizes"], path: Path) -> None:
    """Angular distance of every stretch of layers: first layer by length."""
    count = len(angles)
    heatmap(
        angles.T, path, rows=[str(size) for size in range(1, count + 1)], columns=[str(i) for i in range(count)],
        labels=("layers in the stretch", "first layer of the stretch", "angular distance of the user vector"),
    )  # fmt: skip


@torch.inference_mode()
def user_vector_changes(
    model: DecoderModel, histories: Histories
) -> tuple[Float[np.ndarray, "layers sizes"], list[float]]:
    """How far each stretch of layers turns the user vector, and each layer's influence; means over users.

    Entry [l, n - 1] is arccos(cos(h_l, h_(l + n))) / pi of the states before and after n layers from l on; NaN where
    the decoder has no such stretch. All states are those before the final norm.
    """
    depth = model.num_layers
    angles, cosines = np.full((depth, depth), np.nan), np.zeros((depth + 1, depth + 1))
    sums = np.zeros((depth + 1, depth + 1))
    windows = histories.item_ids.newest(model.max_history)
    for length in np.unique(windows.lengths):
        group = np.flatnonzero(windows.lengths == length)
        for start in range(0, len(group), USERS_AT_ONCE):
            rows = group[start : start + USERS_AT_ONCE]
            states = user_states(model, torch.from_numpy(windows.select(rows).pad_left(int(length))))
            for first, last in itertools.combinations(range(depth + 1), 2):
                cosine = torch.cosine_similarity(states[first], states[last], dim=-1).clamp(-1, 1)
                sums[first, last] += float(torch.arccos(cosine).sum()) / np.pi
                cosines[first, last] += float(cosine.sum())
    for first, last in itertools.combinations(range(depth + 1), 2):
        angles[first, last - first - 1] = sums[first, last] / len(histories)
    return angles, [float(1 - cosines[layer, layer + 1] / len(histories)) for layer in range(depth)]


def user_states(model: DecoderModel, item_ids: Tensor) -> list[Float[Tensor, "batch hidden"]]:
    """State at the user-vector position before the first layer and after each, none of them normed."""
    held: list[Tensor] = []
    hook = model.decoder.norm.register_forward_pre_hook(lambda _, inputs: held.append(inputs[0]))
    states = model(item_ids.to(next(model.parameters()).device))
    hook.remove()
    return [state[:, -1] for state in [*states[:-1], held[-1]]]


def damages(model: DecoderModel, cases: Cases, stretches: Sequence[Sequence[int]], device: str) -> list[float]:
    """Share of NDCG@10 that is lost without each of the named sets of layers."""
    with progress_bar("importance", len(stretches) + 1) as bar:
        whole = require_hits(validation_ndcg(TorchRecommender(model, device), cases), len(cases))
        bar(1)
        losses = []
        for dropped in stretches:
            rest = keep_layers(model, [layer for layer in range(model.num_layers) if layer not in dropped])
            losses.append(1 - validation_ndcg(TorchRecommender(rest, device), cases) / whole)
            bar(1)
    return losses


def keep_layers(model: DecoderModel, kept: Sequence[int]) -> DecoderModel:
    """A copy with the named layers alone, in the order named."""
    settings = decoder_settings(model.decoder.config, model.num_layers) | {"num_hidden_layers": len(kept)}
    if settings.get("layer_types"):
        settings["layer_types"] = [settings["layer_types"][layer] for layer in kept]
    smaller = DecoderModel(replace(model.spec, decoder=settings))
    others = {name: value for name, value in model.state_dict().items() if not name.startswith("decoder.layers.")}
    smaller.load_state_dict(others, strict=False)
    for layer, source in zip(smaller.decoder.layers, kept, strict=True):
        layer.load_state_dict(model.decoder.layers[source].state_dict())
    return smaller.train(model.training)

"""prune: a decoder without some of its layers, heads or channels, healed by distillation from what it was."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from compress.calibrate import calibrate, some_cases
from compress.distill import Pair, begun_shelves, drop_shelves, followed
from compress.importance import damages, keep_layers, user_vector_changes
from compress.student import require_distillable
from compress.width import cut_width, require_narrower
from slmrec.artifact import Artifact, open_artifact, publish, replace_json, work_folder, write_json
from slmrec.begun import existing
from slmrec.compress_config import DistillConfig, PruneConfig
from slmrec.config import settings_of
from slmrec.dataset import Dataset, stage_on
from slmrec.errors import ConfigError
from slmrec.locks import one_run_at_a_time
from slmrec.models.checkpoint import load_decoder, quantized_layers, require_finite, save_checkpoint
from slmrec.models.decoder import DecoderModel
from slmrec.models.ranking import resolve_device
from slmrec.sequences import Cases, validation_cases
from slmrec.train import train
from slmrec.writing import save_tensors

PRUNING_FILE, CHOICE_FILE = "pruning.json", "choice.json"
WIDTHS = ("mlp_size", "num_heads")
CALIBRATION_USERS = 512


@dataclass
class Pruned:
    """A decoder on its way down."""

    model: DecoderModel
    kept: list[int]
    """Layers that are left, by their number in the unpruned decoder."""
    turns: list[dict[str, Any]] = field(default_factory=list)
    """What each turn dropped."""
    log: list[dict[str, Any]] = field(default_factory=list)
    """Curves of the healing."""


@dataclass(frozen=True)
class Setting:
    """What does not change from turn to turn."""

    parent: Artifact
    whole: DecoderModel
    data: Dataset
    config: PruneConfig
    device: str
    output: Path
    key: str

    @property
    def cases(self) -> Cases:
        """Validation users that are asked what a layer is worth."""
        return some_cases(
            validation_cases(self.data.sequences), self.config.importance.max_users, self.config.importance.seed
        )


@one_run_at_a_time
def prune(
    parent: Artifact, data: Dataset, output: Path, config: PruneConfig, *, device: str = "auto", force: bool = False
) -> tuple[Artifact, bool]:
    """Cut a checkpoint down and heal it; gives the artefact and whether it was there already.

    Past half the depth it goes in turns of a third at most, each healed before the next. A killed run goes on with
    the turn, and within its healing with the step, that it was at.
    """
    stage = stage_on(data, parent, "prune", "checkpoint", settings_of(config))
    there = existing(output, stage, force=force)
    if there is not None:
        return there, True
    whole = load_decoder(parent).eval()
    require_finite(whole)
    require_prunable(whole, config, parent)
    setting = Setting(parent, whole, data, config, device, output, stage.key)
    pruned = _all_turns(setting)
    with publish(output, stage) as folder:
        save_checkpoint(folder, pruned.model.cpu(), pruned.log)
        write_json(folder / PRUNING_FILE, {"kept_layers": pruned.kept, "turns": pruned.turns})
        data.items.save(folder)
    shelves = begun_shelves(output)
    shutil.rmtree(work_folder(output))
    drop_shelves(shelves)
    return open_artifact(output), False


def read_pruning(artifact: Artifact) -> tuple[dict[str, Any], str]:
    """What was dropped: the record, and a line for people."""
    record: dict[str, Any] = json.loads((artifact.path / PRUNING_FILE).read_text(encoding="utf-8"))
    kept = ", ".join(str(layer) for layer in record["kept_layers"])
    widths = [f"{name} {record['turns'][-1].get(name)}" for name in WIDTHS if record["turns"][-1].get(name)]
    return record, "; ".join([f"kept the layers {kept} of its parent", *widths])


def require_prunable(model: DecoderModel, config: PruneConfig, parent: Artifact) -> None:
    """Refuse what cannot be cut, or not so far."""
    depth = model.num_layers
    if quantized_layers(model):
        raise ConfigError(
            f"{parent.path} is an 8-bit checkpoint, whose weights cannot be healed",
            remedy="prune its fp32 parent (-m/--model), and quantize afterwards",
        )
    if config.num_layers is not None and config.num_layers >= depth:
        raise ConfigError(
            f"num_layers={config.num_layers}, but {parent.path} has {depth} layers",
            remedy=f"--num-layers between 1 and {depth - 1}" if depth > 1 else "--mlp-size: it has a single layer",
        )
    if config.drop and (min(config.drop) < 0 or max(config.drop) >= depth or len(config.drop) >= depth):
        raise ConfigError(
            f"--drop {','.join(map(str, config.drop))}, but {parent.path} has the layers 0 to {depth - 1}",
            remedy="--drop with layers that are there, one of them left at least",
        )
    require_narrower(model, config.mlp_size, config.num_heads)
    if config.heal_epochs:
        require_distillable(model, healing(model, _depths(depth, config)[-1], config))


def depths(num_layers: int, wanted: int) -> list[int]:
    """Depth after each turn: at once down to half, further in turns of a third of what is there.

    >>> depths(8, 6), depths(8, 4), depths(8, 2)
    ([6], [4], [6, 4, 3, 2])
    """
    if 2 * wanted >= num_layers:
        return [wanted]
    found = [num_layers]
    while found[-1] > wanted:
        found.append(max(wanted, found[-1] - max(1, found[-1] // 3)))
    return found[1:]


def choose_layers(setting: Setting, model: DecoderModel, count: int) -> list[int]:
    """The layers whose loss is smallest by the criterion, ascending; never the last."""
    config, cases, candidates = setting.config, setting.cases, range(model.num_layers - 1)
    stretches = [tuple(range(start, start + count)) for start in range(model.num_layers - count)]
    if config.criterion == "damage":
        if config.contiguous:
            losses = damages(model, cases, stretches, setting.device)
            return list(stretches[int(np.argmin(losses))])
        return _least_damage(setting, model, cases, count)
    angles, influence = user_vector_changes(model.to(resolve_device(setting.device)), cases.histories)
    if config.contiguous and config.criterion == "angular":
        return list(stretches[int(np.argmin(angles[: len(stretches), count - 1]))])
    single = angles[:, 0] if config.criterion == "angular" else np.array(influence)
    if config.contiguous:
        return list(stretches[int(np.argmin([single[list(stretch)].sum() for stretch in stretches]))])
    return sorted(int(layer) for layer in np.argsort(single[: len(candidates)], kind="stable")[:count])


def healing(teacher: DecoderModel, num_layers: int, config: PruneConfig) -> DistillConfig:
    """How a cut decoder follows the whole one: SLMRec's terms, without adapters where there is nothing to adapt."""
    blocks = min(4, num_layers)
    supervised = blocks > 1 and teacher.spec.recipe.head == "tied"
    return DistillConfig(
        num_layers=num_layers,
        num_blocks=blocks,
        item_table=teacher.spec.recipe.item_table,
        supervision_weight=0.1 if supervised else 0.0,
        share_prefix=teacher.spec.share_prefix,
        train=replace(config.train, epochs=config.heal_epochs),
    )


def _least_damage(setting: Setting, model: DecoderModel, cases: Cases, count: int) -> list[int]:
    """One layer after the other, each time the one that is missed least beside those dropped before."""
    dropped: list[int] = []
    for _ in range(count):
        left = [layer for layer in range(model.num_layers - 1) if layer not in dropped]
        losses = damages(model, cases, [(*dropped, layer) for layer in left], setting.device)
        dropped.append(left[int(np.argmin(losses))])
    return sorted(dropped)


def _depths(num_layers: int, config: PruneConfig) -> list[int]:
    """Depth after each turn of a run; one turn where layers are named, or widths alone are cut."""
    if config.num_layers is not None:
        return depths(num_layers, config.num_layers)
    return [num_layers - len(config.drop)]


def _all_turns(setting: Setting) -> Pruned:
    pruned = Pruned(setting.whole, list(range(setting.whole.num_layers)))
    plan = _depths(setting.whole.num_layers, setting.config)
    for number, depth in enumerate(plan):
        is_last = number == len(plan) - 1
        saved = work_folder(setting.output) / f"turn-{number}.safetensors"
        before = None if is_last else _resumed(setting, saved)
        if before is not None:
            pruned = before
            continue
        pruned = _turn(setting, pruned, depth, f"{setting.key}-{number}", is_last=is_last)
        if not is_last:
            notes = {"key": setting.key, **{n: json.dumps(getattr(pruned, n)) for n in ("kept", "turns", "log")}}
            partial = saved.with_suffix(".partial")
            save_tensors(partial, pruned.model.state_dict(), notes)
            partial.rename(saved)
    return pruned


def _turn(setting: Setting, before: Pruned, depth: int, key: str, *, is_last: bool) -> Pruned:
    config, model = setting.config, before.model
    gone = _chosen(setting, model, model.num_layers - depth, key)
    kept = [layer for layer in range(model.num_layers) if layer not in gone]
    smaller = keep_layers(model.cpu(), kept)
    turn: dict[str, Any] = {"dropped_layers": [before.kept[layer] for layer in gone], "num_layers": depth}
    if is_last and (config.mlp_size or config.num_heads):
        histories = some_cases(setting.cases, CALIBRATION_USERS, config.importance.seed).histories
        found = calibrate(smaller.to(resolve_device(setting.device)), histories)
        smaller = cut_width(smaller.cpu(), found, config.mlp_size, config.num_heads)
        turn |= {"mlp_size": config.mlp_size, "num_heads": config.num_heads}
    log = _heal(setting, smaller, key) if config.heal_epochs else []
    return Pruned(smaller, [before.kept[layer] for layer in kept], [*before.turns, turn], [*before.log, *log])


def _chosen(setting: Setting, model: DecoderModel, count: int, key: str) -> Sequence[int]:
    """The layers to drop; once chosen they stay, whatever a resumed run would choose elsewhere."""
    if setting.config.drop or not count:
        return setting.config.drop
    path = work_folder(setting.output) / CHOICE_FILE
    if path.exists():
        noted = json.loads(path.read_text(encoding="utf-8"))
        if noted["key"] == key:
            layers: list[int] = noted["layers"]
            return layers
    chosen = choose_layers(setting, model, count)
    replace_json(path, {"key": key, "layers": chosen})
    return chosen


def _heal(setting: Setting, smaller: DecoderModel, key: str) -> list[dict[str, Any]]:
    """Train the smaller decoder to follow the whole one; its weights change."""
    config = healing(setting.whole, smaller.num_layers, setting.config)
    target = resolve_device(setting.device)
    torch.manual_seed(config.train.seed)  # of the adapters
    pair = Pair(setting.parent, setting.whole.cpu(), smaller)
    with followed(pair, setting.data, config, setting.output, target) as task:
        log = train(task, config.train, work_folder(setting.output), key, target).log
    smaller.eval()
    return log


def _resumed(setting: Setting, saved: Path) -> Pruned | None:
    """A turn that an earlier run had finished."""
    if not saved.exists():
        return None
    with safe_open(saved, framework="pt") as state:
        notes = state.metadata()
        if notes["key"] != setting.key:
            return None
        kept, turns, log = (json.loads(notes[name]) for name in ("kept", "turns", "log"))
        model = keep_layers(setting.whole, kept)
        model.load_state_dict({name: state.get_tensor(name) for name in state.keys()})  # noqa: SIM118
    return Pruned(model, kept, turns, log)

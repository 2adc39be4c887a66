"""Folders of the E4SRec and SLMRec codes, of PEFT and of Hugging Face: which tensor of them means what.

E4SRec (github.com/HestiaSky/E4SRec, finetune.py) ends with a PEFT adapter and `adapter.pth`; its and SLMRec's
Trainers (github.com/WujiangXu/SLMRec, model.py) save one state dict of everything. Neither saves its settings.
`training_args.bin`, optimizer, scheduler and RNG files, which need code to be read, are never opened.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from slmrec.errors import ConfigError, DataError
from slmrec.foreign.tensors import TABLE_ENDINGS, read_table, read_tensors

ADAPTER_CONFIG, DECODER_CONFIG, PROJECTIONS = "adapter_config.json", "config.json", "adapter.pth"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
TRAINER_FILES = ("model.safetensors", "pytorch_model.bin")
PARTS = {"teacher": "model_teacher.", "student": "model_student."}
"""Prefixes in an online run, which trains both at once."""

DECODER_NAME = re.compile(r"(?:llama_model\.)?(?:base_model\.model\.)?(?:model\.)?(layers\.\d+\..+|norm\.weight)")
LORA_NAME = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
LEFT_OUT = re.compile(
    r"down_layer_.+|.*(?:embed_tokens|lm_head)\.weight|.*\.rotary_emb\.inv_freq|.*\.(?:SCB|weight_format)"
)
"""Adapters of multiple supervision, the vocabulary (the prompt's comes from the backbone), what 8-bit layers keep."""
HEAD_NAMES = ("input_proj.weight", "input_proj.bias", "score.weight")
OTHER_TASK = ("user_proj.", "user_embeds.")


@dataclass(frozen=True, kw_only=True, eq=False)
class ForeignTeacher:
    """What a folder holds, by this package's names."""

    folder: Path
    files: tuple[Path, ...]
    """All that were read."""
    base: Mapping[str, Tensor]
    """Decoder weights in floating point, such as layers.0.mlp.up_proj.weight; those missing are the backbone's."""
    lora: Mapping[str, tuple[Tensor, Tensor]]
    """Layer name, such as layers.0.mlp.up_proj -> A [rank, inputs] and B [outputs, rank]."""
    heads: Mapping[str, Tensor]
    """input_proj.weight [hidden, dim], input_proj.bias and score.weight, all or none."""
    table: Tensor
    """Item table [rows, dim]."""
    lora_alpha: float | None
    """Where the folder says so."""
    has_decoder: bool
    """Whether the folder is a Hugging Face decoder of its own."""
    num_layers: int
    """Decoder layers that the tensors or, of a whole decoder, its config name."""


def read_teacher(folder: Path, part: str, table_file: Path | None) -> ForeignTeacher:
    """Read a folder of any known layout, and the item table beside or inside it.

    Raises:
        DataError: no known layout, no item table, a tensor nobody knows, or a file that cannot be read.
        ConfigError: a part was asked for that the folder does not have, or a LoRA variant that is not known.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder", remedy="the folder that the training wrote, not a file of it")
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    has_decoder = not is_adapter and (folder / DECODER_CONFIG).is_file()
    alpha = _lora_alpha(folder / ADAPTER_CONFIG) if is_adapter else None
    files = [] if has_decoder else [_weights_file(folder, ADAPTER_FILES if is_adapter else TRAINER_FILES)]
    if (is_adapter or has_decoder) and (folder / PROJECTIONS).is_file():
        files.append(folder / PROJECTIONS)
    tensors = _of_part(folder, {name: value for file in files for name, value in read_tensors(file).items()}, part)
    table = tensors.pop("input_embeds.weight", None)
    base, lora, heads = _sort(folder, tensors)
    num_layers = _decoder_layers(folder) if has_decoder else _layers(folder, [*base, *lora])
    if table is None or table_file is not None:
        table_file = table_file or _table_file(folder)
        table = read_table(table_file)
        files.append(table_file)
    _require_matrices(folder, {"input_embeds.weight": table})
    return ForeignTeacher(
        folder=folder,
        files=(*files, folder / ADAPTER_CONFIG) if is_adapter else tuple(files),
        base=base,
        lora=lora,
        heads=heads,
        table=table.float(),
        lora_alpha=alpha,
        has_decoder=has_decoder,
        num_layers=num_layers,
    )


def read_json(path: Path) -> dict[str, object]:
    """A JSON object.

    Raises:
        DataError: the file is something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}", remedy="copy the folder again") from None
    if not isinstance(value, dict):
        raise DataError(f"{path} is no JSON object", remedy="copy the folder again")
    return value


def _weights_file(folder: Path, names: Iterable[str]) -> Path:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is not None:
        return found
    checkpoints = sorted(str(path) for path in folder.glob("checkpoint-*") if path.is_dir())
    remedy = f"one of {', '.join(checkpoints)}" if checkpoints else "the folder that the training wrote"
    others = "" if (folder / ADAPTER_CONFIG).is_file() else f"no {ADAPTER_CONFIG}, no {DECODER_CONFIG}, and "
    raise DataError(f"{folder} holds {others}none of {', '.join(names)}", remedy=remedy)


def _lora_alpha(path: Path) -> float:
    """Alpha of an adapter, whose other settings must be those of plain LoRA."""
    settings = read_json(path)
    for name in ("use_dora", "use_rslora", "fan_in_fan_out", "alpha_pattern", "rank_pattern", "layers_to_transform"):
        if settings.get(name):
            raise ConfigError(
                f"{path} sets {name}, which is not plain LoRA", remedy="merge it by PEFT, then import that"
            )
    alpha = settings.get("lora_alpha")
    if settings.get("peft_type") != "LORA" or not isinstance(alpha, int | float):
        raise ConfigError(f"{path} is of type {settings.get('peft_type')}, expected LORA", remedy="a LoRA adapter")
    return float(alpha)


def _of_part(folder: Path, tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors of one model of an online run, or all where there is one model."""
    if any(name.startswith(tuple(PARTS.values())) for name in tensors):
        prefix = PARTS[part]
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    if part != "teacher":
        raise ConfigError(f"{folder} holds one model, not a {part} beside a teacher", remedy="no --part")
    return dict(tensors)


def _table_file(folder: Path) -> Path:
    """The one file of the folder that may be an item table."""
    weights = ("model", "adapter", "pytorch_model", "optimizer", "scheduler", "rng_state", "training_args")
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in TABLE_ENDINGS)
    found = [path for path in files if not path.name.startswith(weights)]
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} files that may be its item table: {', '.join(path.name for path in found)}"
    raise DataError(
        f"{folder} holds {what if found else 'no item table'}",
        remedy="--table FILE (.npy, .safetensors or .pkl), such as SASRec_item_embed.pkl",
    )


def _sort(
    folder: Path, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Base weights, LoRA pairs and heads; 8-bit base weights are left out."""
    base: dict[str, Tensor] = {}
    halves: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if LEFT_OUT.fullmatch(name):
            continue
        decoder = DECODER_NAME.fullmatch(name)
        if name in HEAD_NAMES:
            heads[name] = value.float()
        elif decoder is None:
            raise _unknown(folder, name)
        elif lora := LORA_NAME.fullmatch(decoder[1]):
            halves[f"{lora[1]}.{lora[2]}"] = value.float()
        elif value.is_floating_point():
            base[decoder[1].replace(".base_layer.", ".")] = value
    if heads and set(heads) != set(HEAD_NAMES):
        raise DataError(
            f"{folder} holds {', '.join(sorted(heads))} alone, expected all of {', '.join(HEAD_NAMES)}",
            remedy="copy the folder again: tensors are missing",
        )
    _require_matrices(folder, {name: value for name, value in heads.items() if name.endswith("weight")})
    return base, _pairs(folder, halves), heads


def _pairs(folder: Path, halves: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """LoRA's A and B by the layer they belong to."""
    layers = sorted({name.rpartition(".")[0] for name in halves})
    broken = next((name for name in layers if not {f"{name}.A", f"{name}.B"} <= halves.keys()), None)
    if broken is not None:
        raise DataError(f"{folder} holds half a LoRA pair for {broken}", remedy="copy the folder again")
    _require_matrices(folder, halves)
    pairs = {name: (halves[f"{name}.A"], halves[f"{name}.B"]) for name in layers}
    unlike = next((name for name, (a, b) in pairs.items() if len(a) != b.shape[1]), None)
    if unlike is not None:
        ranks = f"{len(pairs[unlike][0])} and {pairs[unlike][1].shape[1]}"
        raise DataError(f"{folder} holds a LoRA pair of ranks {ranks} for {unlike}", remedy="copy the folder again")
    return pairs


def _require_matrices(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, value in tensors.items():
        if value.ndim != 2:
            raise DataError(
                f"{folder} holds {list(value.shape)} for {name}, expected a matrix",
                remedy="a folder of one of the layouts that slmcompress import-teacher --help names",
            )


def _unknown(folder: Path, name: str) -> DataError:
    if name.startswith(OTHER_TASK):
        return DataError(
            f"{folder} holds {name}: it was trained on E4SRec's `general` task, which reads a vector of the user",
            remedy="a model of the `sequential` task",
        )
    return DataError(f"{folder} holds {name}, which no known teacher has", remedy="slmcompress import-teacher --help")


def _layers(folder: Path, names: Iterable[str]) -> int:
    """How many layers the tensors belong to; they have to follow each other from 0."""
    layers = {int(name.split(".")[1]) for name in names if name.startswith("layers.")}
    if not layers or layers != set(range(len(layers))):
        raise DataError(
            f"{folder} holds the decoder layers {sorted(layers)}, expected 0 and those that follow it",
            remedy="a folder with all layers of the model",
        )
    return len(layers)


def _decoder_layers(folder: Path) -> int:
    """How many layers a Hugging Face decoder has."""
    layers = read_json(folder / DECODER_CONFIG).get("num_hidden_layers")
    if not isinstance(layers, int):
        raise DataError(f"{folder / DECODER_CONFIG} names no num_hidden_layers", remedy="a Hugging Face decoder")
    return layers

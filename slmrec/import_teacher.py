"""import-teacher: a recommender trained by the E4SRec or SLMRec code becomes a checkpoint like any other.

Which tensor means what: `slmrec.foreign.layouts` and `conventions`. Which table row is which item of the dataset:
`slmrec.foreign.rows`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from slmrec.artifact import Artifact, Stage, file_sha256, is_up_to_date, open_artifact, publish
from slmrec.config import ImportConfig, RecipeConfig, WindowConfig, settings_of
from slmrec.dataset import Dataset
from slmrec.errors import ConfigError, DataError
from slmrec.foreign.conventions import Convention, convention_of
from slmrec.foreign.layouts import ForeignTeacher, read_teacher
from slmrec.foreign.rows import rows_by_file, rows_by_order
from slmrec.foreign.weights import decoder_weights
from slmrec.locks import one_run_at_a_time
from slmrec.models.checkpoint import save_checkpoint
from slmrec.models.decoder import DecoderModel, DecoderSpec, decoder_settings
from slmrec.models.prompt import prompt_embeddings
from slmrec.train_teacher import backbone_hash, load_backbone

LORA_ALPHA = 16.0
"""Both codes' default."""


@one_run_at_a_time
def import_teacher(
    folder: Path, data: Dataset, output: Path, config: ImportConfig, *, force: bool = False
) -> tuple[Artifact, bool]:
    """Write a foreign teacher as a checkpoint; gives the artefact and whether it was there already.

    Raises:
        DataError: folder, item table, row file or backbone cannot be read, or do not belong together.
        ConfigError: a setting asks for what they do not have.
    """
    teacher = read_teacher(folder, config.part, None if config.table_file is None else Path(config.table_file))
    convention = convention_of(teacher, data.num_items)
    rows = item_rows(teacher, convention, config, data)
    config = resolve(config, teacher, convention)
    settings = settings_of(config, hashed=["backbone", "table_file", "items_file"])
    settings |= {"convention": convention.name, "hashes": _hashes(teacher, config)}
    stage = Stage(name="import-teacher", kind="checkpoint", settings=settings, parents={"data": data.artifact})
    if is_up_to_date(output, stage, force=force):
        return open_artifact(output), True
    model = build_imported(teacher, convention, config, rows)
    with publish(output, stage) as partial:
        save_checkpoint(partial, model)
        data.items.save(partial)
    return open_artifact(output), False


def resolve(config: ImportConfig, teacher: ForeignTeacher, convention: Convention) -> ImportConfig:
    """The settings, with what the files or else their code say where nothing was asked for.

    Raises:
        ConfigError: more layers are asked for than the teacher has.
    """
    if (config.num_layers or 0) > teacher.num_layers:
        raise ConfigError(
            f"{config.num_layers} layers were asked for, {teacher.folder} holds {teacher.num_layers}",
            remedy=f"--num-layers {teacher.num_layers} or fewer",
        )
    alpha = teacher.lora_alpha if config.lora_alpha is None else config.lora_alpha
    return replace(
        config,
        num_layers=config.num_layers or teacher.num_layers,
        lora_alpha=LORA_ALPHA if alpha is None else alpha,
        positions=config.positions or convention.positions,
        window=replace(
            config.window or WindowConfig(max_history=convention.max_history), max_events=convention.max_events
        ),
    )


def item_rows(
    teacher: ForeignTeacher, convention: Convention, config: ImportConfig, data: Dataset
) -> Int64[np.ndarray, " items"]:
    """Row of the item table of each item 1..num_items of the dataset."""
    num_rows, first = len(teacher.table), convention.first_row
    if convention.may_lack_padding and num_rows == data.num_items:
        first = 0
    if config.items_file is not None:
        return rows_by_file(data.items, num_rows, first, Path(config.items_file))
    return rows_by_order(data.items, num_rows, first, padding_optional=convention.may_lack_padding)


def build_imported(
    teacher: ForeignTeacher, convention: Convention, config: ImportConfig, rows: Int64[np.ndarray, " items"]
) -> DecoderModel:
    """The teacher as a model of this package; `config` is resolved, `rows` names the table row of each item.

    Raises:
        DataError: tensors of the teacher do not fit the decoder, or are not finite.
    """
    assert config.num_layers is not None
    assert config.lora_alpha is not None
    backbone = load_backbone(config.backbone, 1 if teacher.has_decoder else config.num_layers)
    own = load_backbone(str(teacher.folder), config.num_layers) if teacher.has_decoder else backbone
    prefix, suffix = prompt_embeddings(backbone.folder, backbone.embeddings, config.prompt)
    pretrained = {name: value for name, value in own.decoder.state_dict().items() if "embed_tokens" not in name}
    decoder = decoder_weights(teacher, pretrained, config.lora_alpha)
    weights = {f"decoder.{name}": value for name, value in decoder.items()}
    weights |= _item_weights(teacher, convention, rows, own.decoder.config.hidden_size)
    weights |= {"prefix": prefix, "suffix": suffix}
    broken = next((name for name, value in weights.items() if not torch.isfinite(value).all()), None)
    if broken is not None:
        raise DataError(f"{teacher.folder}: {broken} holds NaN or infinity", remedy="an earlier checkpoint of that run")
    if prefix.shape[1] != own.decoder.config.hidden_size:
        raise DataError(
            f"the prompt's token vectors are {prefix.shape[1]} wide in {backbone.folder}, the decoder "
            f"{own.decoder.config.hidden_size} in {teacher.folder}",
            remedy="--backbone FOLDER of the decoder the teacher was trained on",
        )
    settings = decoder_settings(own.decoder.config, config.num_layers)
    model = DecoderModel(_spec(convention, config, rows, settings, weights))
    model.load_state_dict(weights)
    return model


def _item_weights(
    teacher: ForeignTeacher, convention: Convention, rows: Int64[np.ndarray, " items"], hidden: int
) -> dict[str, Tensor]:
    """Item table, input projection and head, by the model's names; items in the order of their internal ids."""
    dim, identity = teacher.table.shape[1], torch.eye(hidden)
    heads = dict(teacher.heads)
    if not heads:
        if dim != hidden:
            raise DataError(
                f"{teacher.folder} holds no input_proj and score; its item table is {dim} wide, the decoder {hidden}",
                remedy="adapter.pth with both beside it, or --table FILE with vectors as wide as the decoder's states",
            )
        heads = {"input_proj.weight": identity, "input_proj.bias": torch.zeros(hidden), "score.weight": identity}
    score = heads["score.weight"]
    expected = {"input_proj.weight": (hidden, dim), "input_proj.bias": (hidden,), "score.weight": (len(score), hidden)}
    for name, shape in expected.items():
        if tuple(heads[name].shape) != shape:
            raise DataError(
                f"{teacher.folder} holds {list(heads[name].shape)} for {name}, expected {list(shape)}: the decoder is "
                f"{hidden} wide, the item table {dim}",
                remedy="--backbone FOLDER and --table FILE the teacher was trained on",
            )
    places = torch.from_numpy(rows)
    weights = {
        "item_table.weight": torch.cat([torch.zeros(1, dim), teacher.table[places]]),
        "item_proj.weight": heads["input_proj.weight"],
        "item_proj.bias": heads["input_proj.bias"],
    }
    if convention.head == "tied":
        return weights | {"user_proj.weight": score}
    return weights | {"item_head.weight": score[places], "item_head.bias": torch.zeros(len(places))}


def _spec(
    convention: Convention,
    config: ImportConfig,
    rows: Int64[np.ndarray, " items"],
    decoder: dict[str, Any],
    weights: dict[str, Tensor],
) -> DecoderSpec:
    assert config.window is not None
    assert config.positions is not None
    return DecoderSpec(
        decoder=decoder,
        recipe=RecipeConfig(
            head=convention.head,
            prompt=config.prompt,
            positions=config.positions,
            supervision=convention.supervision,
            titles="none",
            item_table="frozen",
            dropout=0.0,
        ),
        num_items=len(rows),
        item_dim=weights["item_table.weight"].shape[1],
        max_history=config.window.max_history,
        prefix_length=len(weights["prefix"]),
        suffix_length=len(weights["suffix"]),
        has_titles=False,
        backbone=config.backbone,
        masked_ids=tuple((np.flatnonzero(rows == 0) + 1).tolist()) if convention.masks_first_row else (),
    )


def _hashes(teacher: ForeignTeacher, config: ImportConfig) -> dict[str, Any]:
    """Of all that the checkpoint is made from, besides the dataset."""
    files = [*teacher.files, *([Path(config.items_file)] if config.items_file is not None else [])]
    hashes = {"files": [file_sha256(file) for file in files]}
    decoders = {"backbone": config.backbone} | ({"decoder": str(teacher.folder)} if teacher.has_decoder else {})
    return hashes | {name: backbone_hash(folder) for name, folder in decoders.items()}

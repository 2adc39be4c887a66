"""The student before training: what it takes from its teacher, or from the pretrained decoder."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from compress.blocks import kept_layers
from slmrec.compress_config import DistillConfig
from slmrec.errors import ConfigError
from slmrec.models.checkpoint import quantized_layers
from slmrec.models.decoder import DecoderModel, DecoderSpec, decoder_settings
from slmrec.processes import process_count
from slmrec.train_teacher import load_backbone, require_prefix_shareable


def require_distillable(teacher: DecoderModel, config: DistillConfig) -> None:
    """Refuse a pair of teacher and student that cannot be matched block by block."""
    if quantized_layers(teacher):
        raise ConfigError(
            "the teacher is an 8-bit checkpoint", remedy="distil from its fp32 parent, quantize afterwards"
        )
    if config.num_layers > teacher.num_layers:
        raise ConfigError(
            f"the student would have {config.num_layers} layers, the teacher has {teacher.num_layers}",
            remedy=f"--num-layers {teacher.num_layers} or fewer",
        )
    if teacher.spec.recipe.head != "tied" and config.supervision_weight:
        raise ConfigError(
            "multiple supervision compares with the item table, which a linear head does not have",
            remedy="--supervision-weight 0, or a teacher with --head tied",
        )
    if config.hidden_size not in (None, teacher.hidden_size) and config.init != "random":
        raise ConfigError(
            f"layers of the teacher's width {teacher.hidden_size} cannot be copied to hidden_size={config.hidden_size} "
            f"(init={config.init})",
            remedy="--init random with --hidden-size",
        )
    require_prefix_shareable(student_spec(teacher, config), config.train)
    if config.online is not None:
        require_prefix_shareable(online_teacher_spec(teacher, config), config.train)
        _require_whole_steps(config)


def _require_whole_steps(config: DistillConfig) -> None:
    """Refuse to cut a step up where its parts would be scaled by norms of a teacher that only the whole step has."""
    scaled = config.matches_features and config.magnitude_weight > 0 and config.magnitude_scale == "hidden"
    if scaled and (config.train.accumulate > 1 or process_count() > 1):
        raise ConfigError(
            "online, each part of a step would divide its distances by its own teacher's norm",
            remedy="--l2-scale none, --magnitude-weight 0, or one process and --accumulate 1",
        )


def online_teacher_spec(teacher: DecoderModel, config: DistillConfig) -> DecoderSpec:
    """The teacher's shape where it is trained as well."""
    return replace(teacher.spec, share_prefix=teacher.spec.share_prefix and config.share_prefix)


def student_spec(teacher: DecoderModel, config: DistillConfig) -> DecoderSpec:
    """The student's shape: the teacher's, cut in depth and perhaps in width."""
    return replace(
        teacher.spec,
        decoder=student_settings(teacher, config),
        recipe=replace(teacher.spec.recipe, item_table=config.item_table),
        title_size=teacher.spec.title_width,
        share_prefix=teacher.spec.share_prefix and config.share_prefix,
    )


def build_student(teacher: DecoderModel, config: DistillConfig) -> DecoderModel:
    """A student before training: the teacher's items and head, and layers of the teacher or of the backbone."""
    torch.manual_seed(config.train.seed)
    student = DecoderModel(student_spec(teacher, config))
    narrower = student.hidden_size != teacher.hidden_size
    _copy_items(student, teacher, narrower=narrower)
    if config.init == "random":
        return student
    if config.init == "backbone":
        decoder: Any = load_backbone(teacher.spec.backbone, config.num_layers).decoder
        _require_same_shapes(student.decoder.layers[0], decoder.layers[0], teacher.spec.backbone)
        sources = list(range(config.num_layers))
    else:
        decoder = teacher.decoder
        first = config.init == "teacher-first"
        sources = list(range(config.num_layers)) if first else kept_layers(teacher.num_layers, config.num_layers)
    for layer, source in zip(student.decoder.layers, sources, strict=True):
        layer.load_state_dict(decoder.layers[source].state_dict())
    student.decoder.norm.load_state_dict(decoder.norm.state_dict())
    return student


def _require_same_shapes(ours: nn.Module, theirs: nn.Module, name: str) -> None:
    shapes = [{n: tuple(v.shape) for n, v in layer.state_dict().items()} for layer in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"layers of the backbone {name} have other shapes than the teacher's", remedy="--init teacher"
        )


def student_settings(teacher: DecoderModel, config: DistillConfig) -> dict[str, Any]:
    """The decoder's settings: the teacher's, cut in depth and, with `hidden_size`, in width.

    A narrower decoder keeps the size of a head and how many queries share a key: it has fewer heads, and a feed-forward
    of the same proportion.
    """
    parent = teacher.spec.decoder
    settings = decoder_settings(teacher.decoder.config, config.num_layers)
    width, size = config.hidden_size, teacher.hidden_size
    if width is None or width == size:
        return settings
    head_dim = int(parent.get("head_dim") or size // parent["num_attention_heads"])
    group = parent["num_attention_heads"] // parent["num_key_value_heads"]
    if width > size or width % (head_dim * group):
        possible = [str(w) for w in range(head_dim * group, size, head_dim * group)]
        raise ConfigError(
            f"hidden_size={width} is no width of a student of this teacher, expected are multiples of "
            f"{head_dim * group} ({group} heads of {head_dim} to a key) up to its {size}",
            remedy=f"--hidden-size {' or '.join(possible) or size}",
        )
    heads = width // head_dim
    intermediate = int(parent["intermediate_size"]) * width // size
    return settings | {
        "hidden_size": width, "head_dim": head_dim, "num_attention_heads": heads,
        "num_key_value_heads": heads // group, "intermediate_size": intermediate,
    }  # fmt: skip


@torch.no_grad()
def _copy_items(student: DecoderModel, teacher: DecoderModel, *, narrower: bool) -> None:
    """All that is not the decoder: items, maps and head; of a narrower student, what does not depend on the width."""
    ours, theirs = student.state_dict(), teacher.state_dict()
    kept = {
        name: value for name, value in theirs.items()
        if not name.startswith("decoder.") and ours[name].shape == value.shape
    }  # fmt: skip
    student.load_state_dict(kept, strict=False)
    if narrower:
        student.item_proj.bias.zero_()
        if student.title_input is not None:
            student.title_input.weight.zero_()
        for name in ("prefix", "suffix"):
            getattr(student, name).copy_(_projected(theirs[name], student.hidden_size))
        wanted = teacher.item_inputs(torch.arange(1, teacher.num_items + 1)).pow(2).mean().sqrt()
        found = student.item_inputs(torch.arange(1, student.num_items + 1)).pow(2).mean().sqrt()
        student.item_proj.weight.mul_(wanted / found)


def _projected(tokens: Float[Tensor, "tokens hidden"], width: int) -> Float[Tensor, "tokens narrower"]:
    """Token vectors in fewer dimensions, at their own RMS: a random projection keeps their geometry."""
    if not len(tokens):
        return tokens.new_zeros(0, width)
    directions, _ = torch.linalg.qr(torch.randn(tokens.shape[1], width))
    projected: Tensor = tokens @ directions
    return projected

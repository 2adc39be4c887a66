"""Decoder weights of a foreign teacher: its own where it has them, the backbone's elsewhere, LoRA merged into both."""

from collections.abc import Mapping

import torch
from torch import Tensor

from slmrec.errors import DataError
from slmrec.foreign.layouts import ForeignTeacher

NORM_TOLERANCE = 1e-2
"""Relative; norms pass through half precision on their way."""


def decoder_weights(teacher: ForeignTeacher, backbone: Mapping[str, Tensor], lora_alpha: float) -> dict[str, Tensor]:
    """Weights of the decoder in fp32: W + alpha / rank * B A where there is a LoRA pair (LoRA, arXiv:2106.09685).

    Args:
        teacher: layers beyond the backbone's are left out, as `--num-layers` asks for.
        backbone: state dict of the pretrained decoder, cut to the layers wanted, without its token embedding.
        lora_alpha: of every pair; the rank is read from its shape.

    Raises:
        DataError: a shape differs from the backbone's, the backbone has no such layer, or its norms are others.
    """
    layers = {_layer(name) for name in backbone}
    base = {name: value.float() for name, value in teacher.base.items() if _layer(name) in layers}
    lora = {name: pair for name, pair in teacher.lora.items() if _layer(name) in layers}
    for name, value in base.items():
        _require_shape(teacher, name, tuple(value.shape), backbone)
    _require_same_norms(teacher, base, backbone)
    weights = dict(backbone) | base
    for name, (a, b) in lora.items():
        weight = f"{name}.weight"
        _require_shape(teacher, weight, (b.shape[0], a.shape[1]), backbone)
        weights[weight] = weights[weight] + lora_alpha / a.shape[0] * (b @ a)
    return weights


def _layer(name: str) -> str:
    """The layer a weight belongs to; the final norm is one of its own."""
    return name.split(".")[1] if name.startswith("layers.") else "norm"


def _require_shape(teacher: ForeignTeacher, name: str, shape: tuple[int, ...], backbone: Mapping[str, Tensor]) -> None:
    expected = tuple(backbone[name].shape) if name in backbone else None
    if expected != shape:
        theirs = "nothing" if expected is None else list(expected)
        raise DataError(
            f"{teacher.folder} holds {list(shape)} for {name}, the backbone {theirs}",
            remedy="--backbone FOLDER of the decoder the teacher was trained on",
        )


def _require_same_norms(teacher: ForeignTeacher, base: Mapping[str, Tensor], backbone: Mapping[str, Tensor]) -> None:
    """Norms lie beside 8-bit weights, as frozen: other norms are another backbone's, or other layers'."""
    absent = {_layer(name) for name in backbone} - {_layer(name) for name in base if name.endswith("_proj.weight")}
    for name, value in base.items():
        if _layer(name) not in absent or name == "norm.weight" or "norm" not in name:
            continue
        if not torch.allclose(value, backbone[name], rtol=NORM_TOLERANCE, atol=NORM_TOLERANCE):
            raise DataError(
                f"{teacher.folder} holds no base weights in floating point, and its {name} is not the backbone's: "
                "it was trained on another decoder, or on other layers than the first ones",
                remedy="--backbone FOLDER of the decoder the teacher was trained on, its layers in that order",
            )

"""LLM.int8 layers (arXiv:2208.07339) as bitsandbytes has them, which is loaded where a model needs it alone.

Its weights are int8 by output channel; activations are too, by token, but for columns with an outlier, which compute in
fp16. PyTorch runs it; for other backends the same integers become an `Int8WeightLinear`.
"""

import logging
import sys
from typing import Any

from torch import nn

from slmrec.errors import ConfigError
from slmrec.models.layers import Int8WeightLinear

THRESHOLD = 6.0
"""Activations of this magnitude make their column an outlier; LLM.int8's own."""


def is_llm_int8(module: nn.Module) -> bool:
    """Whether a layer is one of bitsandbytes' 8-bit linear layers."""
    loaded = sys.modules.get("bitsandbytes")
    return loaded is not None and isinstance(module, loaded.nn.Linear8bitLt)


def llm_int8(linear: nn.Linear) -> nn.Module:
    """An LLM.int8 layer with the weights of a linear layer, rounded.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    layer = _bitsandbytes().nn.Linear8bitLt(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        has_fp16_weights=False,
        threshold=THRESHOLD,
    )
    layer.load_state_dict(linear.state_dict())
    moved: nn.Module = layer.to(linear.weight.device).eval()  # moving rounds
    return moved


def move(model: nn.Module, device: Any) -> nn.Module:
    """Move a model with all that its LLM.int8 layers keep beside their parameters, which `to` leaves where it was."""
    model.to(device)
    for layer in model.modules():
        if is_llm_int8(layer):
            for holder in (layer.weight, layer.state):
                for name in ("CB", "SCB"):
                    value = getattr(holder, name)
                    if value is not None:
                        setattr(holder, name, layer.weight.data if name == "CB" else value.to(device))
    return model


def dequantizing(layer: Any) -> Int8WeightLinear:
    """The same integers by the same scales, SCB / 127, in a layer that every backend has."""
    state = layer.state_dict()
    neutral = Int8WeightLinear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    neutral.weight.copy_(state["weight"])
    neutral.scale.copy_(state["SCB"].float() / 127)
    if neutral.bias is not None:
        neutral.bias.copy_(layer.bias.detach())
    return neutral


def transformers_settings(kept: list[str]) -> dict[str, Any]:
    """What transformers reads in a checkpoint's config to load it as LLM.int8, but for the layers kept."""
    return {
        "quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False,
        "llm_int8_threshold": THRESHOLD, "llm_int8_skip_modules": kept,
    }  # fmt: skip


def _bitsandbytes() -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it notes every cast to fp16, which is what LLM.int8 is
    try:
        import bitsandbytes
    except ImportError:
        raise ConfigError(
            "bitsandbytes is not installed", remedy='pip install "slmcompress[bnb]", or --backend neutral'
        ) from None
    return bitsandbytes

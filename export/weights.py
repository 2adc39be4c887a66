"""The numbers of a serving graph: a decoder recommender's weights as arrays, constants worked out beforehand."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int8
from torch import Tensor, nn

from export.items import ROW_STEP, ItemWeights
from slmrec.errors import ConfigError
from slmrec.models.decoder import DecoderModel
from slmrec.models.layers import Int8Linear, Int8WeightLinear
from slmrec.models.prompt import Layout

STATIC_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class LinearWeights:
    """inputs @ weight * scale + bias; without a scale the weight is fp32."""

    weight: Float32[np.ndarray, "inputs outputs"] | Int8[np.ndarray, "inputs outputs"]
    scale: Float32[np.ndarray, " outputs"] | None
    bias: Float32[np.ndarray, " outputs"] | None
    rounds_inputs: bool
    """Inputs are rounded to 8 bits, each token by its own scale."""
    input_range: float | None = None
    """Largest magnitude of inputs that a static scale covers; None where it was not calibrated."""

    @property
    def kind(self) -> tuple[bool, bool]:
        """Layers of one kind can be computed as one."""
        return self.scale is not None, self.rounds_inputs


@dataclass(frozen=True, kw_only=True)
class NormWeights:
    """inputs / rms(inputs) * weight."""

    weight: Float32[np.ndarray, " width"]
    epsilon: float


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One decoder layer."""

    query: LinearWeights
    key: LinearWeights
    value: LinearWeights
    out: LinearWeights
    gate: LinearWeights
    up: LinearWeights
    down: LinearWeights
    input_norm: NormWeights
    forward_norm: NormWeights
    query_norm: NormWeights | None
    key_norm: NormWeights | None
    num_heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    sliding_window: int | None
    """A token sees this many tokens, itself among them; None = all."""
    prefix_keys: Float32[np.ndarray, "kv_heads prefix head_dim"]
    """The instruction's keys, rotated."""
    prefix_values: Float32[np.ndarray, "kv_heads prefix head_dim"]

    @property
    def linears(self) -> tuple[LinearWeights, ...]:
        """All linear layers."""
        return self.query, self.key, self.value, self.out, self.gate, self.up, self.down


@dataclass(frozen=True, kw_only=True)
class ServingWeights:
    """All of a recommender."""

    layout: Layout
    hidden_size: int
    items: ItemWeights
    projection: LinearWeights | None
    """From what the item table holds to what the decoder reads; None where the table holds just that."""
    user_proj: Float32[np.ndarray, "hidden width"] | None
    """From the decoder's state to what items are compared with; None where they are compared with the state."""
    layers: tuple[LayerWeights, ...]
    norm: NormWeights
    prefix: Float32[np.ndarray, "prefix hidden"]
    suffix: Float32[np.ndarray, "suffix hidden"]
    cos: Float32[np.ndarray, "positions half"]
    sin: Float32[np.ndarray, "positions half"]

    @property
    def num_8bit_layers(self) -> int:
        """Linear layers with 8-bit weights."""
        return sum(linear.scale is not None for layer in self.layers for linear in layer.linears)

    @property
    def rounds_inputs(self) -> bool:
        """Whether any layer computes in 8 bits."""
        return any(linear.rounds_inputs for layer in self.layers for linear in layer.linears)


@torch.no_grad()
def serving_weights(
    model: DecoderModel,
    *,
    fold_items: bool = True,
    spare_items: float = 0.0,
    ranges: Mapping[str, float] | None = None,
) -> ServingWeights:
    """Take a model apart.

    Args:
        model: in `eval` mode; its layers are of the types that a checkpoint may hold.
        fold_items: multiply the item table by its projection now, so that a request reads rows and computes nothing.
        spare_items: rows for items to come, as a share of the catalogue.
        ranges: of the inputs of linear layers, by their name relative to the decoder, for static scales.

    Raises:
        ConfigError: its rotary embeddings depend on the length of a request, or its activation is not SiLU.
    """
    require_silu(model.decoder.config)
    require_static_rope(model.decoder.config)
    layout = model.spec.layout
    length = layout.prefix_length + layout.max_history + layout.suffix_length
    cos, sin = model.decoder.rotary_emb(torch.zeros(1, 1, model.hidden_size), torch.arange(length)[None])
    half = cos.shape[-1] // 2
    keys, values = _prefix_cache(model)
    return ServingWeights(
        layout=layout,
        hidden_size=model.hidden_size,
        items=_items(model, fold_items=fold_items, spare_items=spare_items),
        projection=None if _folds_items(model, fold_items=fold_items) else _linear(model.item_proj),
        user_proj=None if model.user_proj is None else _array(model.user_proj.weight.T),
        layers=tuple(
            _layer(layer, keys[number], values[number], _ranges_of(number, ranges or {}))
            for number, layer in enumerate(model.decoder.layers)
        ),
        norm=_norm(model.decoder.norm),
        prefix=_array(model.prefix),
        suffix=_array(model.suffix),
        cos=_array(cos[0, :, :half]),
        sin=_array(sin[0, :, :half]),
    )


def require_silu(config: Any) -> None:
    """Refuse decoders with another activation than the one that graphs are written with."""
    if config.hidden_act not in ("silu", "swish"):
        raise ConfigError(f"the activation {config.hidden_act!r} cannot be exported", remedy="a backbone with silu")


def require_static_rope(config: Any) -> None:
    """Refuse rotary embeddings whose frequencies depend on the request's length."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in STATIC_ROPE:
        raise ConfigError(
            f"rotary embeddings of type {kind!r} depend on the length of a request",
            remedy=f"a backbone with one of {', '.join(STATIC_ROPE)}",
        )


def _prefix_cache(model: DecoderModel) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The instruction's keys and values of every layer, by the very layers that serve (8-bit ones included)."""
    from transformers import DynamicCache

    if not model.spec.prefix_length:
        shape = (model.decoder.config.num_key_value_heads, 0, model.decoder.layers[0].self_attn.head_dim)
        empty = [np.zeros(shape, dtype=np.float32)] * model.num_layers
        return empty, empty
    cache = DynamicCache()  # without a config it keeps what a sliding window has left behind
    model.decoder(inputs_embeds=model.prefix[None], past_key_values=cache, use_cache=True)
    return [_array(layer.keys[0]) for layer in cache.layers], [_array(layer.values[0]) for layer in cache.layers]


def _folds_items(model: DecoderModel, *, fold_items: bool) -> bool:
    """Titles are always folded: what they add has no table of its own in the graph."""
    return fold_items or model.titles is not None


def _items(model: DecoderModel, *, fold_items: bool, spare_items: float) -> ItemWeights:
    head, count = model.item_head, model.num_items
    folds = _folds_items(model, fold_items=fold_items)
    table = model.item_inputs(torch.arange(1, count + 1)) if folds else model.item_table.weight[1:]
    bias = np.zeros(count, dtype=np.float32) if head is None else _array(head.bias)
    rows = -(-(1 + count + math.ceil(count * spare_items)) // ROW_STEP) * ROW_STEP
    return ItemWeights(
        count=count,
        table=_padded(_array(table), rows, 0),
        outputs=_padded(_array(model.item_outputs() if head is None else head.weight), rows, 0),
        offsets=_padded(bias, rows, -np.inf),
        has_biases=head is not None,
    )


def _padded(values: np.ndarray, rows: int, filler: float) -> np.ndarray:
    """One row before the values and as many after them as make `rows`."""
    widths = [(1, rows - 1 - len(values)), *[(0, 0)] * (values.ndim - 1)]
    return np.pad(values, widths, constant_values=filler)


def _ranges_of(number: int, ranges: Mapping[str, float]) -> dict[str, float]:
    """Ranges of one layer's inputs, by their name relative to it."""
    start = f"layers.{number}."
    return {name.removeprefix(start): value for name, value in ranges.items() if name.startswith(start)}


def _layer(layer: Any, keys: np.ndarray, values: np.ndarray, ranges: Mapping[str, float]) -> LayerWeights:
    attention = layer.self_attn
    head_dim = int(attention.head_dim)

    def linear(name: str) -> LinearWeights:
        return _linear(layer.get_submodule(name), ranges.get(name))

    return LayerWeights(
        query=linear("self_attn.q_proj"), key=linear("self_attn.k_proj"), value=linear("self_attn.v_proj"),
        out=linear("self_attn.o_proj"),
        gate=linear("mlp.gate_proj"), up=linear("mlp.up_proj"), down=linear("mlp.down_proj"),
        input_norm=_norm(layer.input_layernorm), forward_norm=_norm(layer.post_attention_layernorm),
        query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        num_heads=attention.q_proj.out_features // head_dim,
        kv_heads=attention.k_proj.out_features // head_dim,
        head_dim=head_dim,
        scaling=float(attention.scaling),
        sliding_window=getattr(attention, "sliding_window", None) or _sliding_window(attention),
        prefix_keys=keys, prefix_values=values,
    )  # fmt: skip


def _sliding_window(attention: Any) -> int | None:
    """Mistral's window is the model's; Qwen's belongs to some layers."""
    config = attention.config
    types = getattr(config, "layer_types", None)
    if types is not None:
        return config.sliding_window if types[attention.layer_idx] == "sliding_attention" else None
    return getattr(config, "sliding_window", None) if config.model_type == "mistral" else None


def _norm(norm: Any) -> NormWeights:
    return NormWeights(weight=_array(norm.weight), epsilon=float(norm.variance_epsilon))


def _linear(layer: nn.Linear | Int8Linear | Int8WeightLinear, input_range: float | None = None) -> LinearWeights:
    return LinearWeights(
        weight=_array(layer.weight.T),
        scale=None if isinstance(layer, nn.Linear) else _array(layer.scale),
        bias=None if layer.bias is None else _array(layer.bias),
        rounds_inputs=isinstance(layer, Int8Linear),
        input_range=input_range,
    )


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().cpu().numpy())

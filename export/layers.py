"""A decoder layer as it serves: fused projections, grouped attention without copies, explicit positions."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int32, UInt8
from torch import Tensor, nn

from slmrec.models.layers import Int8Linear, Int8WeightLinear

MASKED = -1e9
"""Added to the score of a key that must not be seen; finite, so that a row without any key stays finite."""

Rotation = tuple[Tensor, Tensor]
"""cos and sin of the positions, each [batch, length, head_dim]."""


@torch.library.custom_op("slmcompress::matmul_int8", mutates_args=())
def matmul_int8(inputs: Tensor, weight: Tensor) -> Tensor:
    """Exact product of uint8 inputs [rows, in] with zero point 128 and int8 weights [in, out]: int32 [rows, out].

    In ONNX it is MatMulInteger.
    """
    return torch._int_mm((inputs.to(torch.int16) - 128).to(torch.int8), weight)


@matmul_int8.register_fake
def _(inputs: Tensor, weight: Tensor) -> Tensor:
    return inputs.new_empty((inputs.shape[0], weight.shape[1]), dtype=torch.int32)


class Int8Product(nn.Module):
    """`Int8Linear` in operations that ONNX has: the same integers, the same two scales."""

    def __init__(self, layers: Sequence[Int8Linear]) -> None:
        super().__init__()
        self.register_buffer("weight", torch.cat([layer.weight for layer in layers]).T.contiguous())
        self.register_buffer("scale", torch.cat([layer.scale for layer in layers]))
        self.register_buffer("bias", _joined_bias(layers))
        self.weight: Tensor
        self.scale: Tensor
        self.bias: Tensor | None

    def forward(self, inputs: Float[Tensor, "batch length inputs"]) -> Float[Tensor, "batch length outputs"]:
        """Quantize each token by its own scale, multiply exactly, scale back."""
        scale = inputs.abs().amax(dim=-1, keepdim=True) / 127
        inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
        quantized: UInt8[Tensor, "batch length inputs"] = ((inputs * inverse).round() + 128).to(torch.uint8)
        batch, length, width = inputs.shape
        sums: Int32[Tensor, "rows outputs"] = matmul_int8(quantized.reshape(batch * length, width), self.weight)
        outputs = sums.reshape(batch, length, self.weight.shape[1]).float() * scale * self.scale
        return outputs if self.bias is None else outputs + self.bias


@torch.library.custom_op("slmcompress::dequantize", mutates_args=())
def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """Int8 weights [in, out] times the scale of their output channel [out], as DequantizeLinear does along axis 1."""
    return weight.float() * scale


@dequantize.register_fake
def _(weight: Tensor, scale: Tensor) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.float32)


class DequantizedProduct(nn.Module):
    """`Int8WeightLinear` in operations that ONNX has: 8-bit weights on disk, fp32 arithmetic."""

    def __init__(self, layers: Sequence[Int8WeightLinear]) -> None:
        super().__init__()
        self.register_buffer("weight", torch.cat([layer.weight for layer in layers]).T.contiguous())
        self.register_buffer("scale", torch.cat([layer.scale for layer in layers]))
        self.register_buffer("bias", _joined_bias(layers))
        self.weight: Tensor
        self.scale: Tensor
        self.bias: Tensor | None

    def forward(self, inputs: Float[Tensor, "batch length inputs"]) -> Float[Tensor, "batch length outputs"]:
        """Inputs @ (weight * scale) + bias."""
        outputs: Tensor = inputs @ dequantize(self.weight, self.scale)
        return outputs if self.bias is None else outputs + self.bias


class Parallel(nn.Module):
    """Linear layers that read the same input, as one product where all are of one kind."""

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__()
        self.sizes = [layer.out_features for layer in layers]
        kinds = {type(layer) for layer in layers}
        parts = [layers] if len(kinds) == 1 else [[layer] for layer in layers]
        self.products = nn.ModuleList(_product(part) for part in parts)

    def forward(self, inputs: Float[Tensor, "batch length inputs"]) -> tuple[Tensor, ...]:
        """One output per layer."""
        outputs = [product(inputs) for product in self.products]
        return tuple(outputs[0].split(self.sizes, dim=-1)) if len(outputs) == 1 else tuple(outputs)


class RmsNorm(nn.Module):
    """x / rms(x) * weight, in fp32."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.register_buffer("weight", norm.weight.detach().clone())
        self.weight: Tensor
        self.epsilon = float(norm.variance_epsilon)

    def forward(self, inputs: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        """Normalise the last dimension."""
        scaled = inputs * torch.rsqrt(inputs.pow(2).mean(dim=-1, keepdim=True) + self.epsilon)
        return scaled * self.weight


class ServingLayer(nn.Module):
    """A transformers decoder layer (Llama, Mistral, Qwen2 or Qwen3), its weights rearranged.

    With `newest_only` keys and values are computed for all tokens, everything else for the newest alone.
    """

    def __init__(self, layer: Any, *, newest_only: bool) -> None:
        super().__init__()
        self.newest_only = newest_only
        attention, mlp = layer.self_attn, layer.mlp
        self.head_dim, self.scaling = int(attention.head_dim), float(attention.scaling)
        self.kv_heads = attention.k_proj.out_features // self.head_dim
        self.groups = attention.q_proj.out_features // attention.k_proj.out_features
        self.sliding_window = getattr(attention, "sliding_window", None) or _sliding_window(attention)
        self.input_norm, self.forward_norm = RmsNorm(layer.input_layernorm), RmsNorm(layer.post_attention_layernorm)
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.query = Parallel(qkv[:1]) if newest_only else None
        self.key_value = Parallel(qkv[1:]) if newest_only else None
        self.qkv = None if newest_only else Parallel(qkv)
        self.out = Parallel([attention.o_proj])
        self.gate_up, self.down = Parallel([mlp.gate_proj, mlp.up_proj]), Parallel([mlp.down_proj])
        self.activation = mlp.act_fn
        self.query_norm: nn.Module = RmsNorm(attention.q_norm) if hasattr(attention, "q_norm") else nn.Identity()
        self.key_norm: nn.Module = RmsNorm(attention.k_norm) if hasattr(attention, "k_norm") else nn.Identity()

    def forward(
        self,
        hidden: Float[Tensor, "batch length hidden"],
        rotation: Rotation,
        prefix: tuple[Tensor, Tensor] | None,
        allowed: Bool[Tensor, "batch 1 asking seen"],
    ) -> Float[Tensor, "batch asking hidden"]:
        """The layer's output for the tokens that ask."""
        query, keys, values = self.project(self.input_norm(hidden), rotation)
        if self.newest_only:
            hidden = hidden[:, -1:]
        if prefix is not None:
            keys, values = torch.cat([prefix[0], keys], dim=2), torch.cat([prefix[1], values], dim=2)
        return self.finish(hidden, query, keys, values, allowed)

    def project(self, normed: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, [batch, heads, length, head_dim], rotated; queries of the tokens that ask."""
        asking = rotation
        if self.qkv is not None:
            query, keys, values = (self._heads(part) for part in self.qkv(normed))
        else:
            assert self.query is not None
            assert self.key_value is not None
            asking = (rotation[0][:, -1:], rotation[1][:, -1:])
            [query] = (self._heads(part) for part in self.query(normed[:, -1:]))
            keys, values = (self._heads(part) for part in self.key_value(normed))
        return self._rotate(self.query_norm(query), asking), self._rotate(self.key_norm(keys), rotation), values

    def finish(
        self, hidden: Tensor, query: Tensor, keys: Tensor, values: Tensor, allowed: Tensor
    ) -> Float[Tensor, "batch asking hidden"]:
        """Attend and feed forward, with both residuals. A group's queries read their keys and values in place."""
        batch, _, asking, _ = query.shape
        grouped = query.reshape(batch, self.kv_heads, self.groups * asking, self.head_dim)
        scores = (grouped @ keys.transpose(2, 3)) * self.scaling
        bias = torch.where(allowed, 0.0, MASKED)[:, :, None]
        scores = scores.reshape(batch, self.kv_heads, self.groups, asking, keys.shape[2]) + bias
        weights = scores.softmax(dim=-1).reshape(batch, self.kv_heads, self.groups * asking, keys.shape[2])
        mixed = (weights @ values).reshape(batch, self.kv_heads * self.groups, asking, self.head_dim)
        joined = mixed.transpose(1, 2).reshape(batch, asking, self.kv_heads * self.groups * self.head_dim)
        [attended] = self.out(joined)
        hidden = hidden + attended
        gate, up = self.gate_up(self.forward_norm(hidden))
        [forwarded] = self.down(self.activation(gate) * up)
        output: Tensor = hidden + forwarded
        return output

    def _heads(self, flat: Tensor) -> Tensor:
        batch, length, width = flat.shape
        return flat.reshape(batch, length, width // self.head_dim, self.head_dim).transpose(1, 2)

    def _rotate(self, heads: Tensor, rotation: Rotation) -> Tensor:
        cos, sin = rotation[0][:, None], rotation[1][:, None]
        first, second = heads.chunk(2, dim=-1)
        return heads * cos + torch.cat([-second, first], dim=-1) * sin


def _sliding_window(attention: Any) -> int | None:
    """Mistral's window is the model's; Qwen's belongs to some layers."""
    config = attention.config
    types = getattr(config, "layer_types", None)
    if types is not None:
        return config.sliding_window if types[attention.layer_idx] == "sliding_attention" else None
    return getattr(config, "sliding_window", None) if config.model_type == "mistral" else None


def _product(layers: Sequence[Any]) -> nn.Module:
    """One product for layers of one kind that read the same input."""
    if isinstance(layers[0], Int8Linear):
        return Int8Product(layers)
    return DequantizedProduct(layers) if isinstance(layers[0], Int8WeightLinear) else _joined(layers)


def _joined(layers: Sequence[nn.Linear]) -> nn.Linear:
    first = layers[0]
    bias = _joined_bias(layers)
    joined = nn.Linear(first.in_features, sum(layer.out_features for layer in layers), bias=bias is not None)
    with torch.no_grad():
        joined.weight.copy_(torch.cat([layer.weight for layer in layers]))
        if bias is not None:
            joined.bias.copy_(bias)
    return joined


def _joined_bias(layers: Sequence[Any]) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    parts = [layer.scale if hasattr(layer, "scale") else layer.weight[:, 0] for layer in layers]
    return torch.cat(
        [
            torch.zeros_like(part) if layer.bias is None else layer.bias.detach()
            for layer, part in zip(layers, parts, strict=True)
        ]
    )

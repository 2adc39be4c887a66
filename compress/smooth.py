"""Outlier migration (SmoothQuant, arXiv:2211.10438): what is hard to round in activations moves into the weights.

A channel that a layer reads is divided by a factor in the module before, and multiplied by it in the layer's weights.
Factors are powers of two, so that in fp32 not a bit of the model's answers changes.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from compress.calibrate import InputGroup, Statistics, input_groups
from slmrec.models.decoder import DecoderModel
from slmrec.models.layers import quantize_rows

STRENGTHS = (0.25, 0.5, 0.75, 1.0)
"""Tried beside none at all; SmoothQuant's alpha."""


@dataclass(frozen=True, kw_only=True)
class Migration:
    """What was chosen for the layers that read one input."""

    group: str
    strength: float
    """SmoothQuant's alpha; 0 where nothing was moved."""
    error_before: float
    """Squared error of the 8-bit outputs over the squared outputs, on calibration tokens."""
    error_after: float


@dataclass(frozen=True)
class Copies:
    """How the channels a layer reads repeat those of its source, as grouped attention repeats value heads."""

    count: int = 1
    head_dim: int = 1

    def folded(self, values: Float[Tensor, " inputs"]) -> Float[Tensor, " source"]:
        """The largest value among the copies of each source channel."""
        return values.view(-1, self.count, self.head_dim).amax(dim=1).flatten()

    def spread(self, values: Float[Tensor, " source"]) -> Float[Tensor, " inputs"]:
        """Each source channel's value at all its copies."""
        return values.view(-1, 1, self.head_dim).expand(-1, self.count, -1).flatten()


@torch.no_grad()
def migrate(model: DecoderModel, statistics: Mapping[str, Statistics]) -> tuple[DecoderModel, list[Migration]]:
    """A copy whose channels are scaled by the strength with the least 8-bit error, and what was chosen."""
    migrated, chosen = copy.deepcopy(model), []
    for group in input_groups(model.num_layers):
        found, copies = statistics[group.name], _copies(migrated, group)
        weights = torch.cat([migrated.decoder.get_submodule(name).weight for name in group.linears])
        candidates = {0.0: torch.ones(weights.shape[1])}
        for strength in STRENGTHS:
            candidates[strength] = migration_factors(found.channel_max, weights, strength, copies)
        errors = {strength: output_error(found.sample, weights, s) for strength, s in candidates.items()}
        best = min(errors, key=lambda strength: errors[strength])
        if best:
            _apply(migrated, group, candidates[best], copies)
        chosen.append(Migration(group=group.name, strength=best, error_before=errors[0.0], error_after=errors[best]))
    return migrated, chosen


def migration_factors(
    channel_max: Float[Tensor, " inputs"], weights: Float[Tensor, "outputs inputs"], strength: float, copies: Copies
) -> Float[Tensor, " inputs"]:
    """Powers of two nearest max|x|^a / max|w|^(1 - a); copies of one source channel share their factor.

    Args:
        channel_max: largest activation of each channel.
        weights: of all layers that read the channels.
        strength: SmoothQuant's alpha, in [0, 1].
        copies: how channels repeat.
    """
    activations, columns = copies.folded(channel_max), copies.folded(weights.abs().amax(dim=0))
    is_used = (activations > 0) & (columns > 0)
    ratio = activations.clamp(min=1e-12) ** strength / columns.clamp(min=1e-12) ** (1 - strength)
    return copies.spread(torch.where(is_used, ratio.log2().round().exp2(), torch.ones_like(ratio)))


def output_error(
    tokens: Float[Tensor, "tokens inputs"], weights: Float[Tensor, "outputs inputs"], factors: Float[Tensor, " inputs"]
) -> float:
    """Squared error of 8-bit products (rows of both sides rounded by their own scale), relative to the outputs'."""
    rounded = [
        integers.float() * scale for integers, scale in map(quantize_rows, (tokens / factors, weights * factors))
    ]
    wanted = tokens @ weights.T
    return float((rounded[0] @ rounded[1].T - wanted).pow(2).sum() / wanted.pow(2).sum().clamp(min=1e-30))


def _copies(model: DecoderModel, group: InputGroup) -> Copies:
    source: Any = model.decoder.get_submodule(group.source)
    reader: Any = model.decoder.get_submodule(group.linears[0])
    if not group.source.endswith("v_proj"):
        return Copies()
    head_dim = int(model.decoder.layers[0].self_attn.head_dim)
    return Copies(reader.in_features // source.out_features, head_dim)


def _apply(model: DecoderModel, group: InputGroup, factors: Tensor, copies: Copies) -> None:
    source: Any = model.decoder.get_submodule(group.source)
    own = copies.folded(factors)
    rows = [source.weight] if source.weight.ndim == 1 else [source.weight, source.bias]
    for values in rows:
        if values is not None:
            values.div_(own if values.ndim == 1 else own[:, None])
    for name in group.linears:
        reader: Any = model.decoder.get_submodule(name)
        reader.weight.mul_(factors)

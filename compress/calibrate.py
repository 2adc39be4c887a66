"""What a decoder's linear layers read on real histories: ranges, channel maxima and a sample of tokens, streamed."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from slmrec.errors import CheckError
from slmrec.models.decoder import DecoderModel
from slmrec.models.ranking import TorchRecommender
from slmrec.progress import progress_bar
from slmrec.recommender import Histories
from slmrec.sequences import Cases

BINS, LEVELS = 2048, 128
"""Bins of a histogram of |x|, and the 8-bit levels of one sign."""
SAMPLE_TOKENS = 512
PERCENTILE = 0.9999
USERS_AT_ONCE = 64


@dataclass(frozen=True)
class InputGroup:
    """Linear layers of the decoder that read the same input, and the module whose output that input is, per channel."""

    name: str
    """Such as layers.3.self_attn.qkv."""
    linears: tuple[str, ...]
    source: str
    """A norm, or the linear layer before: v_proj of o_proj (through attention), up_proj of down_proj."""


def input_groups(num_layers: int) -> list[InputGroup]:
    """The four inputs of every layer, in the order they are computed; names are relative to the decoder."""
    groups = []
    for number in range(num_layers):
        attention, mlp = f"layers.{number}.self_attn", f"layers.{number}.mlp"
        groups += [
            InputGroup(
                f"{attention}.qkv",
                (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
                f"layers.{number}.input_layernorm",
            ),
            InputGroup(f"{attention}.o", (f"{attention}.o_proj",), f"{attention}.v_proj"),
            InputGroup(
                f"{mlp}.gate_up",
                (f"{mlp}.gate_proj", f"{mlp}.up_proj"),
                f"layers.{number}.post_attention_layernorm",
            ),
            InputGroup(f"{mlp}.down", (f"{mlp}.down_proj",), f"{mlp}.up_proj"),
        ]
    return groups


class Histogram:
    """Counts of |x| in equal bins; where a larger value comes two bins become one, so the size never grows."""

    def __init__(self) -> None:
        self.counts: Int64[Tensor, " bins"] = torch.zeros(BINS, dtype=torch.int64)
        self.width = 0.0

    def add(self, values: Tensor) -> None:
        """Count the magnitudes of all values."""
        magnitudes = values.abs().flatten().float()
        largest = float(magnitudes.max())
        if not self.width:
            self.width = (largest or 1.0) / BINS
        while largest > self.width * BINS:
            halves = self.counts.view(-1, 2).sum(dim=1)
            self.counts = torch.cat([halves, torch.zeros_like(halves)])
            self.width *= 2
        places = (magnitudes / self.width).long().clamp(max=BINS - 1)
        self.counts += torch.bincount(places, minlength=BINS)

    def percentile(self, share: float) -> float:
        """Upper end of the bin that this share of the values does not pass."""
        reached = torch.cumsum(self.counts, 0).double() / self.counts.sum()
        return (int((reached < share).sum()) + 1) * self.width

    def entropy_range(self) -> float:
        """Range whose 8-bit levels keep the most of the distribution (smallest Kullback-Leibler divergence).

        What lies outside is clipped to the last bin (Migacz, "8-bit inference with TensorRT", GTC 2017).
        """
        counts = self.counts.double().numpy()
        filled = int(np.flatnonzero(counts)[-1]) + 1
        best, chosen = np.inf, filled
        for stop in range(LEVELS, filled + 1, LEVELS // 8):
            if not counts[:stop].any():
                continue
            reference = counts[:stop].copy()
            reference[-1] += counts[stop:].sum()
            divergence = _divergence(reference, _in_levels(counts[:stop]))
            if divergence < best:
                best, chosen = divergence, stop
        return chosen * self.width


@dataclass
class Statistics:
    """What was seen of one input; nothing here grows with the number of histories."""

    histogram: Histogram
    channel_max: Float[Tensor, " inputs"]
    """Largest magnitude of each channel."""
    channel_sum: Float[Tensor, " inputs"]
    """Sum of each channel's magnitudes."""
    sample: Float[Tensor, "tokens inputs"]
    """Tokens drawn evenly from all."""
    num_tokens: int = 0

    @property
    def channel_mean(self) -> Float[Tensor, " inputs"]:
        """Mean magnitude of each channel: how much it takes part (Minitron, arXiv:2407.14679)."""
        return self.channel_sum / max(1, self.num_tokens)

    @property
    def largest(self) -> float:
        """Largest magnitude of all."""
        return float(self.channel_max.max())

    def ranges(self) -> dict[str, float]:
        """Largest magnitude that a static 8-bit scale should cover, by each rule; never above the largest seen.

        Divide by 127 for int8, by 448 for FP8 E4M3.
        """
        return {
            "max": self.largest,
            "percentile": min(self.largest, self.histogram.percentile(PERCENTILE)),
            "entropy": min(self.largest, self.histogram.entropy_range()),
        }


class _Collector:
    """Takes in tokens of one input; every token has a random key, and those with the largest keys are the sample."""

    def __init__(self, width: int, seed: int) -> None:
        self.found = Statistics(Histogram(), torch.zeros(width), torch.zeros(width), torch.zeros(0, width))
        self.keys = torch.zeros(0)
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, inputs: Tensor) -> None:
        tokens = inputs.detach().reshape(-1, inputs.shape[-1]).float().cpu()
        found = self.found
        found.histogram.add(tokens)
        found.channel_max = torch.maximum(found.channel_max, tokens.abs().amax(dim=0))
        found.channel_sum += tokens.abs().sum(dim=0)
        found.num_tokens += len(tokens)
        keys = torch.cat([self.keys, torch.rand(len(tokens), generator=self.generator)])
        self.keys, rows = keys.topk(min(SAMPLE_TOKENS, len(keys)))
        found.sample = torch.cat([found.sample, tokens])[rows]


def calibrate(model: DecoderModel, histories: Histories, *, seed: int = 0) -> dict[str, Statistics]:
    """Statistics of every input group, by its name, over all tokens of the histories.

    An instruction counts with every history, so that nothing depends on how they are batched.
    """
    collectors, hooks, spec = {}, [], model.spec
    model.spec = replace(spec, share_prefix=False)
    for number, group in enumerate(input_groups(model.num_layers)):
        linear: Any = model.decoder.get_submodule(group.linears[0])
        collectors[group.name] = _Collector(linear.in_features, seed + number)
        hooks.append(linear.register_forward_pre_hook(_adding(collectors[group.name])))
    recommender = TorchRecommender(model, next(model.parameters()).device.type)
    with progress_bar("calibration", len(histories)) as bar:
        for start in range(0, len(histories), USERS_AT_ONCE):
            rows = np.arange(start, min(start + USERS_AT_ONCE, len(histories)))
            recommender.recommend(histories.select(rows), k=1)
            bar(len(rows))
    for hook in hooks:
        hook.remove()
    model.spec = spec
    return {name: collector.found for name, collector in collectors.items()}


def require_hits(ndcg: float, num_users: int) -> float:
    """NDCG@10 of the whole model, of which the loss without a part is a share.

    Raises:
        CheckError: it is 0.
    """
    if ndcg > 0:
        return ndcg
    raise CheckError(
        f"none of {num_users} validation users finds his item among the first ten, so nothing can be lost",
        remedy="a model that has learned something, or more users",
    )


def some_cases(cases: Cases, count: int, seed: int) -> Cases:
    """Cases drawn at random, in their order; all where there are fewer."""
    return cases.select(np.sort(np.random.default_rng(seed).permutation(len(cases))[:count]))


def static_ranges(statistics: Mapping[str, Statistics], num_layers: int) -> dict[str, dict[str, float]]:
    """Ranges of every linear layer's input, by its name relative to the decoder."""
    ranges = {name: found.ranges() for name, found in statistics.items()}
    return {linear: ranges[group.name] for group in input_groups(num_layers) for linear in group.linears}


def _adding(collector: _Collector) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    return lambda _, inputs: collector.add(inputs[0])


def _in_levels(counts: np.ndarray) -> np.ndarray:
    """The counts as 8-bit levels can tell them: each level's spread evenly over its filled bins."""
    spread = np.zeros_like(counts)
    edges = np.linspace(0, len(counts), LEVELS + 1).round().astype(int)
    for start, stop in itertools.pairwise(edges):
        part = counts[start:stop]
        filled = part > 0
        if filled.any():
            spread[start:stop][filled] = part.sum() / filled.sum()
    return spread


def _divergence(reference: Sequence[float] | np.ndarray, candidate: Sequence[float] | np.ndarray) -> float:
    """KL(reference || candidate) of two histograms; bins that the candidate leaves empty count with a tiny share."""
    p, q = np.asarray(reference) / np.sum(reference), np.asarray(candidate) / np.sum(candidate)
    here = p > 0
    return float(np.sum(p[here] * np.log(p[here] / np.maximum(q[here], 1e-12))))

"""From a model's scores to a ranked list: the call that every PyTorch model answers alike."""

import os
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from slmrec.errors import CheckError
from slmrec.models.llm_int8 import move
from slmrec.recommender import PAD, Histories, TopK, check_top_k, most_popular
from slmrec.roofline import Work

MAX_TOP_K = 3840
"""TensorRT's limit; the same for every artefact."""


def _attention_operations(query: tuple[int, ...], key: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Two products for every query head, query and key; masked ones are computed too."""
    batch, heads, queries, width = query
    return 2 * 2 * batch * heads * queries * key[2] * width


def _product_operations(left: tuple[int, ...], right: tuple[int, ...], *_: Any, **__: Any) -> int:
    """A product of two matrices, [rows, inputs] and [inputs, outputs]."""
    return 2 * left[0] * left[1] * right[1]


INT8_PRODUCT = torch.ops.aten._int_mm
COUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_operations,
    INT8_PRODUCT: _product_operations,
}
"""PyTorch's own counter knows neither attention on CPUs nor products of 8-bit integers."""


class ScoringModel(Protocol):
    """What a model has to offer to be ranked."""

    num_items: int
    max_history: int

    def score(self, item_ids: Int64[Tensor, "batch history"]) -> Float[Tensor, "batch items"]:
        """Scores of the items 1..num_items (column i is item i + 1) after each left-padded history."""
        ...


def top_k(scores: Float32[Tensor, "batch items"], k: int) -> tuple[Tensor, Tensor]:
    """Ids (column + 1) and scores of the k best, best first, ties by smaller id.

    `torch.topk` leaves the order of ties open; a float's bits and its column make one integer key without ties.
    """
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # + 0.0 makes -0.0 equal 0.0
    ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)
    columns = torch.arange(scores.shape[1], device=scores.device)
    keys = (ordered << 32) | (0xFFFFFFFF - columns)
    best = 0xFFFFFFFF - (torch.topk(keys, min(k, scores.shape[1])).values & 0xFFFFFFFF)
    return best + 1, scores.gather(1, best)


class TorchRecommender:
    """A PyTorch model as a recommender; users are batched with others of exactly their own history length."""

    def __init__(
        self,
        model: nn.Module,
        device: str = "auto",
        batch_size: int = 256,
        num_interactions: Int64[np.ndarray, " items"] | None = None,
    ) -> None:
        self.device = resolve_device(device)
        self.model: Any = move(model, self.device)
        self.batch_size, self.num_interactions = batch_size, num_interactions

    @property
    def num_items(self) -> int:
        """Items 1..num_items can be recommended."""
        return int(self.model.num_items)

    @property
    def max_top_k(self) -> int:
        """Largest k that `recommend` accepts."""
        return MAX_TOP_K

    @torch.inference_mode()
    def recommend(self, histories: Histories, k: int) -> TopK:
        """Rank the catalogue for each history."""
        histories.check(self.num_items, newcomers=self.num_interactions is not None)
        check_top_k(k, self.max_top_k)
        was_training = self.model.training
        self.model.eval()
        windows = histories.item_ids.newest(int(self.model.max_history))
        items = np.full((len(histories), k), PAD, dtype=np.int64)
        scores = np.full((len(histories), k), -np.inf, dtype=np.float32)
        new = np.flatnonzero(windows.lengths == 0)
        if new.size and self.num_interactions is not None:
            popular = most_popular(self.num_interactions, histories.select(new).exclude_ids, k)
            items[new], scores[new] = popular.item_ids, popular.scores
        for length in np.unique(windows.lengths[windows.lengths > 0]):
            group = np.flatnonzero(windows.lengths == length)
            for start in range(0, len(group), self.batch_size):
                rows = group[start : start + self.batch_size]
                padded = windows.select(rows).pad_left(int(length))
                found, found_scores = self._rank(padded, histories.select(rows), k)
                items[rows, : found.shape[1]], scores[rows, : found.shape[1]] = found, found_scores
        self.model.train(was_training)
        return TopK(items, scores)

    def work(self, histories: Histories) -> Work:
        """Arithmetic of `recommend` for these users as PyTorch runs it, and every weight once.

        Where the processor has no 8-bit instructions, products of 8-bit layers are computed, and counted, in fp32.
        """
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            self.recommend(histories, 1)
        in_int8 = counter.get_flop_counts()["Global"].get(INT8_PRODUCT, 0)
        weights = [*self.model.parameters(), *self.model.buffers()]
        num_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
        return Work(float(counter.get_total_flops() - in_int8), float(in_int8), float(num_bytes))

    def _rank(self, padded: np.ndarray, histories: Histories, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores = self.model.score(torch.from_numpy(padded).to(self.device)).float()
        if torch.isnan(scores).any():
            raise CheckError(
                "the model gives NaN scores",
                remedy="train it again with a smaller --learning-rate, or check its source",
            )
        for ids in (histories.item_ids, histories.exclude_ids):
            rows = np.repeat(np.arange(len(ids)), ids.lengths)
            scores[torch.from_numpy(rows), torch.from_numpy(ids.values - 1)] = -torch.inf
        items, best = top_k(scores, k)
        items = torch.where(best == -torch.inf, PAD, items)
        return items.cpu().numpy(), best.cpu().numpy()


def resolve_device(device: str) -> torch.device:
    """Auto is a GPU where there is one (`accelerate launch --cpu` aside); asking for one not there is an error."""
    if device == "auto":
        forbidden = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
        return torch.device("cuda" if torch.cuda.is_available() and not forbidden else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        from slmrec.errors import ConfigError

        raise ConfigError("device=cuda, but PyTorch sees no GPU here", remedy="--device cpu, or slmcompress doctor")
    return torch.device(device)

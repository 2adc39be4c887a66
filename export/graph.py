"""The serving graph: history in, top-K items out; everything constant is computed once, nothing twice."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from export.layers import RmsNorm, ServingLayer
from slmrec.config import ExportConfig
from slmrec.errors import ConfigError
from slmrec.models.decoder import DecoderModel
from slmrec.models.prompt import attended_items, item_positions, suffix_positions

BLOCK = 128
"""Items in a block of the block-max top-K."""
STATIC_ROPE = ("default", "linear", "llama3", "yarn")


class ServingGraph(nn.Module):
    """A decoder recommender rewritten for serving, exact but for rounding.

    The instruction's keys and values are constants; the last layer runs for the last token alone; item projection and
    titles are folded into one input table; queries of a group attend without copies of their keys and values.
    """

    def __init__(self, model: DecoderModel, config: ExportConfig) -> None:
        super().__init__()
        spec = model.spec
        self.layout, self.num_items, self.keep_history = spec.layout, model.num_items, config.keep_history
        self.top_k = min(config.top_k or 100, model.num_items)
        depth = model.num_layers
        layers = enumerate(model.decoder.layers)
        self.layers: Any = nn.ModuleList(ServingLayer(layer, newest_only=i == depth - 1) for i, layer in layers)
        self.norm = RmsNorm(model.decoder.norm)
        self.users: Any = nn.Identity() if model.user_proj is None else model.user_proj
        self.cos: Tensor
        self.sin: Tensor
        self.item_inputs: Tensor
        self.item_outputs: Tensor
        self.item_bias: Tensor | None
        self.suffix: Tensor
        with torch.no_grad():
            self._fold_items(model)
            self._fold_positions(model)
            self._fold_prefix(model)

    def _fold_items(self, model: DecoderModel) -> None:
        """One row of input per item, one column of output per item; row and column 0 belong to padding."""
        inputs = model.item_inputs(torch.arange(model.num_items + 1))
        inputs[0] = 0
        self.register_buffer("item_inputs", inputs)
        head = model.item_head
        outputs = model.item_outputs() if head is None else head.weight
        self.register_buffer(
            "item_outputs", torch.cat([outputs.new_zeros(1, outputs.shape[1]), outputs]).T.contiguous()
        )
        bias = None if head is None else torch.cat([head.bias.new_zeros(1), head.bias])
        self.register_buffer("item_bias", bias)
        self.register_buffer("suffix", model.suffix.clone())

    def _fold_positions(self, model: DecoderModel) -> None:
        """Rotations for every position, from transformers' own rotary module."""
        require_static_rope(model.decoder.config)
        length = self.layout.prefix_length + self.layout.max_history + self.layout.suffix_length
        cos, sin = model.decoder.rotary_emb(torch.zeros(1, 1, model.hidden_size), torch.arange(length)[None])
        self.register_buffer("cos", cos[0].clone())
        self.register_buffer("sin", sin[0].clone())

    def _fold_prefix(self, model: DecoderModel) -> None:
        """Keys and values of the instruction, by the very layers that serve (8-bit ones included)."""
        length = self.layout.prefix_length
        hidden = model.prefix[None].clone()
        rotation = (self.cos[None, :length], self.sin[None, :length])
        index = torch.arange(length)[None]
        for number, layer in enumerate(self.layers):
            if length:
                query, keys, values = layer.project(layer.input_norm(hidden), rotation)
                self.register_buffer(f"prefix_keys_{number}", keys.clone())
                self.register_buffer(f"prefix_values_{number}", values.clone())
                asking = index[:, -1:] if layer.newest_only else index
                hidden = hidden[:, -1:] if layer.newest_only else hidden
                allowed = causal_mask(asking, index, index >= 0, layer.sliding_window)
                hidden = layer.finish(hidden, query, keys, values, allowed)

    def forward(
        self, item_ids: Int64[Tensor, "batch history"], exclude_ids: Int64[Tensor, "batch excluded"]
    ) -> tuple[Int64[Tensor, "batch k"], Float[Tensor, "batch k"]]:
        """Best items and their scores, best first, ties by smaller id.

        Args:
            item_ids: internal ids, oldest first, left-padded with 0; ids outside 1..num_items count as padding.
            exclude_ids: further ids never to be returned, padded with 0.

        Returns:
            Ids and scores; where fewer than k items remain, id 0 with score -inf. A user vector that is not finite
            makes all its scores NaN.
        """
        seen, excluded = self._known(item_ids), self._known(exclude_ids)
        users = self.users(self.norm(self.user_states(seen)))
        scores = users @ self.item_outputs
        if self.item_bias is not None:
            scores = scores + self.item_bias
        masked = [torch.zeros_like(seen[:, :1]), excluded] + ([] if self.keep_history else [seen])
        ids = torch.cat(masked, dim=1)
        scores = scores.scatter(1, ids, torch.full_like(ids, -torch.inf, dtype=torch.float32))
        best, items = block_max_top_k(scores, self.top_k)
        poison = users.sum(dim=1, keepdim=True) * 0  # a comparison would hide NaN from the list
        return torch.where(best == -torch.inf, 0, items), best + poison

    def user_states(self, item_ids: Int64[Tensor, "batch history"]) -> Float[Tensor, "batch hidden"]:
        """State at the user-vector position before the final norm."""
        layout, batch = self.layout, item_ids.shape[0]
        hidden = torch.cat([self.item_inputs[item_ids], self.suffix.expand(batch, -1, -1)], dim=1)
        positions = torch.cat([item_positions(item_ids, layout), suffix_positions(item_ids, layout)], dim=1)
        response = torch.ones_like(positions[:, : layout.suffix_length], dtype=torch.bool)
        prefix = torch.arange(layout.prefix_length, device=item_ids.device).expand(batch, -1)
        queries = layout.prefix_length + torch.cat([item_ids != 0, response], dim=1).long().cumsum(dim=1) - 1
        keys = torch.cat([prefix, queries], dim=1)
        attended = attended_items(item_ids, layout)
        valid = torch.cat([torch.ones_like(prefix, dtype=torch.bool), attended, response], dim=1)
        rotation = (self.cos[positions], self.sin[positions])
        for number, layer in enumerate(self.layers):
            asking = queries[:, -1:] if layer.newest_only else queries
            allowed = causal_mask(asking, keys, valid, layer.sliding_window)
            hidden = layer(hidden, rotation, self._prefix(number, item_ids), allowed)
        return hidden[:, -1]

    def _prefix(self, number: int, item_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        if not self.layout.prefix_length:
            return None
        keys, values = (self.get_buffer(f"prefix_{name}_{number}") for name in ("keys", "values"))
        return keys.expand(item_ids.shape[0], -1, -1, -1), values.expand(item_ids.shape[0], -1, -1, -1)

    def _known(self, ids: Int64[Tensor, "batch count"]) -> Int64[Tensor, "batch count"]:
        return torch.where((ids >= 1) & (ids <= self.num_items), ids, 0)


def causal_mask(
    queries: Int64[Tensor, "batch asking"],
    keys: Int64[Tensor, "batch seen"],
    valid: Bool[Tensor, "batch seen"],
    sliding_window: int | None,
) -> Bool[Tensor, "batch 1 asking seen"]:
    """Which keys a query may see: real, not newer, and within the window; all counted in real tokens.

    Padding shares the count of the token before it, so a pad's query sees something or, without a prefix, nothing.
    """
    distance = queries[:, :, None] - keys[:, None, :]
    allowed = (distance >= 0) & valid[:, None, :]
    if sliding_window is not None:
        allowed = allowed & (distance < sliding_window)
    return allowed[:, None]


def block_max_top_k(
    scores: Float[Tensor, "batch columns"], k: int
) -> tuple[Float[Tensor, "batch k"], Int64[Tensor, "batch k"]]:
    """Exact top-K by way of block maxima: only the k best blocks can hold one of the k best columns.

    Block numbers are put in ascending order before gathering, so that an engine that breaks ties by position (as
    ONNX defines it) breaks them by column.
    """
    batch, columns = scores.shape
    num_blocks = -(-columns // BLOCK)
    if k >= num_blocks:
        best, found = torch.topk(scores, k, dim=1)
        return best, found
    padded = nn.functional.pad(scores, (0, num_blocks * BLOCK - columns), value=-torch.inf)
    blocks = padded.reshape(batch, num_blocks, BLOCK)
    chosen = torch.topk(blocks.amax(dim=2), k, dim=1).indices.sort(dim=1).values
    gathered = blocks.gather(1, chosen[:, :, None].expand(-1, -1, BLOCK)).reshape(batch, k * BLOCK)
    best, places = torch.topk(gathered, k, dim=1)
    number = chosen.gather(1, places // BLOCK)
    return best, number * BLOCK + places % BLOCK


def require_static_rope(config: Any) -> None:
    """Refuse rotary embeddings whose frequencies depend on the request's length."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in STATIC_ROPE:
        raise ConfigError(
            f"rotary embeddings of type {kind!r} depend on the length of a request",
            remedy=f"a backbone with one of {', '.join(STATIC_ROPE)}",
        )

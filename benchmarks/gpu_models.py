"""The contestants of gpu.py: LLaMA's layers as published and as served here, and the item head, at any size."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

BLOCK, TOP_K = 128, 100


@dataclass(frozen=True)
class Sizes:
    """What is measured: the paper's sizes, or small ones that a CPU finishes."""

    hidden: int = 4096
    mlp: int = 11008
    heads: int = 32
    teacher_layers: int = 32
    batches: tuple[int, ...] = (1, 32, 512)
    catalogues: tuple[int, ...] = (15_000, 1_000_000)
    prompt: int = 69
    history: int = 30
    rounds: int = 20
    training_batch: int = 16

    @property
    def tokens(self) -> int:
        """Of a request as published."""
        return self.prompt + self.history


def narrow(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.float32


class Head(nn.Module):
    """Item scores and the best of them: flat, or by way of block maxima."""

    def __init__(self, num_items: int, width: int, device: torch.device, *, by_blocks: bool) -> None:
        super().__init__()
        rows = -(-num_items // BLOCK) * BLOCK
        self.by_blocks = by_blocks and rows // BLOCK > TOP_K
        self.table = torch.randn(rows, width, device=device, dtype=narrow(device))

    def forward(self, users: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and rows of the best items."""
        scores = users @ self.table.T
        if not self.by_blocks:
            return tuple(scores.topk(TOP_K, dim=1))  # type: ignore[return-value]
        blocks = scores.view(len(users), -1, BLOCK)
        chosen = blocks.amax(dim=2).topk(TOP_K, dim=1, sorted=False).indices.sort(dim=1).values
        inside = blocks.gather(1, chosen[:, :, None].expand(-1, -1, BLOCK)).flatten(1)
        best, places = inside.topk(TOP_K, dim=1)
        return best, chosen.gather(1, places // BLOCK) * BLOCK + places % BLOCK


class Published(nn.Module):
    """The whole prompt through every layer, all positions, as the published codes serve."""

    def __init__(self, sizes: Sizes, num_layers: int, device: torch.device) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaModel

        config = LlamaConfig(
            hidden_size=sizes.hidden, intermediate_size=sizes.mlp, num_hidden_layers=num_layers, vocab_size=64,
            num_attention_heads=sizes.heads, num_key_value_heads=sizes.heads, attn_implementation="eager",
        )  # fmt: skip
        with torch.device(device):
            self.decoder = LlamaModel(config).to(narrow(device)).eval()
        self.sizes = sizes

    def forward(self, vectors: Tensor) -> Tensor:
        """The newest token's state of [batch, history, hidden] item vectors behind the instruction."""
        prompt = self.decoder.embed_tokens.weight[:1].expand(len(vectors), self.sizes.prompt, -1)
        states = self.decoder(inputs_embeds=torch.cat([prompt, vectors], dim=1), use_cache=False).last_hidden_state
        return states[:, -1]  # type: ignore[no-any-return]


class Served(nn.Module):
    """The same layers as served here; weights are those of a `Published`, so that answers can be compared."""

    def __init__(self, published: Published) -> None:
        super().__init__()
        self.sizes, decoder = published.sizes, published.decoder
        self.layers, self.norm = decoder.layers, decoder.norm
        self.qkv = [
            torch.cat([one.self_attn.q_proj.weight, one.self_attn.k_proj.weight, one.self_attn.v_proj.weight])
            for one in self.layers
        ]
        prompt = decoder.embed_tokens.weight[:1].expand(1, self.sizes.prompt, -1)
        with torch.inference_mode():
            cache = decoder(inputs_embeds=prompt, use_cache=True).past_key_values
            positions = torch.arange(self.sizes.prompt, self.sizes.tokens, device=prompt.device)[None]
            self.cos, self.sin = (part[:, None] for part in decoder.rotary_emb(prompt, positions))
        self.keys = [one.keys.clone() for one in cache.layers]
        self.values = [one.values.clone() for one in cache.layers]

    def forward(self, vectors: Tensor) -> Tensor:
        """As `Published.forward`."""
        batch, length, width = vectors.shape
        heads, hidden = self.sizes.heads, vectors
        mask = torch.ones(length, self.sizes.tokens, dtype=torch.bool, device=vectors.device).tril(self.sizes.prompt)
        for number, layer in enumerate(self.layers):
            last = number == len(self.layers) - 1
            joined = functional.linear(layer.input_layernorm(hidden), self.qkv[number])
            parts = joined.view(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
            query, key = (self._rotated(part) for part in parts[:2])
            keys = torch.cat([self.keys[number].expand(batch, -1, -1, -1), key], dim=2)
            values = torch.cat([self.values[number].expand(batch, -1, -1, -1), parts[2]], dim=2)
            seen = mask
            if last:
                query, hidden, seen = query[:, :, -1:], hidden[:, -1:], mask[-1:]
            mixed = functional.scaled_dot_product_attention(query, keys, values, attn_mask=seen)
            hidden = hidden + layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.norm(hidden)[:, -1]  # type: ignore[no-any-return]

    def _rotated(self, heads: Tensor) -> Tensor:
        first, second = heads.chunk(2, dim=-1)
        return heads * self.cos + torch.cat([-second, first], dim=-1) * self.sin

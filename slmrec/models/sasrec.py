"""SASRec (Kang and McAuley, arXiv:1808.09781): self-attention over item embeddings, tied output."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from slmrec.config import SasrecConfig


class SasrecLayer(nn.Module):
    """Attention and feed-forward, each with a residual and a norm after it."""

    def __init__(self, config: SasrecConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads, self.rate = config.num_heads, config.dropout
        self.attention_norm, self.forward_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.up, self.down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Float[Tensor, "batch history size"], mask: Tensor) -> Float[Tensor, "batch history size"]:
        """Attend where `mask` (bool, [batch, 1, history, history]) is true."""
        batch, history, size = hidden.shape
        qkv = self.qkv(hidden).view(batch, history, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        rate = self.rate if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=rate)
        attended = self.out(attended.transpose(1, 2).reshape(batch, history, size))
        hidden = self.attention_norm(hidden + self.dropout(attended))
        output: Tensor = self.forward_norm(hidden + self.dropout(self.down(F.gelu(self.up(hidden)))))
        return output


class Sasrec(nn.Module):
    """Scores the catalogue after every position of a left-padded history.

    Trained on prefixes, items are counted from the newest one, which is read; trained at every position, from the
    oldest one. So the position that is read at has been trained in both.
    """

    def __init__(self, config: SasrecConfig, num_items: int) -> None:
        super().__init__()
        self.config, self.num_items, self.max_history = config, num_items, config.window.max_history
        self.item_table = nn.Embedding(num_items + 1, config.hidden_size, padding_idx=0)
        self.position_table = nn.Embedding(self.max_history, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.layers = nn.ModuleList(SasrecLayer(config) for _ in range(config.num_layers))
        self.dropout = nn.Dropout(config.dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.item_table.weight[0].zero_()

    def forward(self, item_ids: Int64[Tensor, "batch history"]) -> Float[Tensor, "batch history size"]:
        """User vector after every position; what stands at pads is meaningless."""
        width = item_ids.shape[1]
        positions = torch.arange(width - 1, -1, -1, device=item_ids.device).expand_as(item_ids)
        if self.config.supervision == "all":
            positions = ((item_ids != 0).cumsum(dim=1) - 1).clamp(min=0)
        hidden: Tensor = self.dropout(self.norm(self.item_table(item_ids) + self.position_table(positions)))
        causal = torch.ones(width, width, dtype=torch.bool, device=item_ids.device).tril()
        itself = torch.eye(width, dtype=torch.bool, device=item_ids.device)
        mask = (causal & (item_ids != 0)[:, None, :]) | itself  # a pad attends to itself, never to nothing
        for layer in self.layers:
            hidden = layer(hidden, mask[:, None])
        return hidden

    def logits(self, user_vectors: Float[Tensor, "... size"]) -> Float[Tensor, "... items"]:
        """Scores of the items 1..num_items, in fp32."""
        return user_vectors.float() @ self.item_table.weight[1:].float().T

    def score(self, item_ids: Int64[Tensor, "batch history"]) -> Float[Tensor, "batch items"]:
        """Scores after the newest item of each history."""
        return self.logits(self(item_ids)[:, -1])

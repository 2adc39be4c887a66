"""A folder of `plain_folder` in `serving_speed.py` around any decoder that PyTorch can call; needs torch and numpy."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

TOP_K = 100


def recommending(folder: Path, states: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    """Item ids, int64 [batch, history] without padding, to the best 100, [batch, 100].

    Args:
        folder: holds `head.npz`.
        states: words, int64 [batch, length], to the decoder's last hidden states, [batch, length, hidden].
    """
    with np.load(folder / "head.npz") as stored:
        user_proj, outputs = (torch.from_numpy(stored[name]) for name in ("user_proj", "outputs"))
        before, after = int(stored["prefix_length"]), int(stored["suffix_length"])

    @torch.inference_mode()
    def call(item_ids: np.ndarray) -> np.ndarray:
        items = torch.from_numpy(item_ids)
        texts = torch.arange(before + after).expand(len(items), -1)
        words = torch.cat([texts[:, :before], items + (before + after - 1), texts[:, before:]], dim=1)
        scores = (states(words)[:, -1] @ user_proj) @ outputs.T
        scores.scatter_(1, items - 1, -torch.inf)
        return scores.topk(TOP_K).indices.numpy() + 1  # type: ignore[no-any-return]

    return call

"""Input with a known answer, made here: item i is always followed by item i + 1, around the circle."""

from pathlib import Path

import numpy as np

NUM_USERS, NUM_ITEMS = 300, 60
LENGTHS = (5, 20)


def write_log(path: Path, *, seed: int = 0, num_users: int = NUM_USERS, num_items: int = NUM_ITEMS) -> Path:
    """Write sequences as `user item item ...` lines; a trained model must reach HR@1 = 1 on them."""
    generator = np.random.default_rng(seed)
    lines = []
    for user in range(1, num_users + 1):
        start, length = generator.integers(num_items), generator.integers(*LENGTHS)
        items = (start + np.arange(length)) % num_items + 1
        lines.append(" ".join(map(str, [user, *items])))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_backbone(folder: Path, *, seed: int = 0, num_layers: int = 4) -> Path:
    """Write a tiny LLaMA with random weights as a Hugging Face folder (0.5 MB, no tokenizer)."""
    import torch
    from transformers import LlamaConfig, LlamaModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=num_layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        initializer_range=0.1,
    )  # fmt: skip
    LlamaModel(config).save_pretrained(folder)
    return folder

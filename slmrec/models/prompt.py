"""The instruction around the items, and where every token stands (E4SRec and SLMRec, see their templates)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from slmrec.errors import DataError

INSTRUCTION = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\nGiven the user’s purchase "
    "history, predict next possible item to be purchased.\n\n### Input:\n"
)
RESPONSE = "\n### Response:\n"


@dataclass(frozen=True)
class Layout:
    """Lengths that place a token: prefix, the window of items, suffix; the convention; items that are not attended."""

    prefix_length: int
    suffix_length: int
    max_history: int
    positions: str
    """compact or padded."""
    masked_ids: tuple[int, ...] = ()
    """Items of a history that are masked as padding is (SLMRec's first item), see `attended_items`."""


def prompt_texts(prompt: str) -> tuple[str, str]:
    """Text before and after the items.

    >>> [bool(text) for name in ("slmrec", "prefix", "none") for text in prompt_texts(name)]
    [True, True, True, False, False, False]
    """
    return INSTRUCTION if prompt in ("slmrec", "prefix") else "", RESPONSE if prompt == "slmrec" else ""


def prompt_embeddings(
    backbone: Path, embeddings: Float[Tensor, "vocabulary hidden"], prompt: str
) -> tuple[Float[Tensor, "prefix hidden"], Float[Tensor, "suffix hidden"]]:
    """Token embeddings of the text before and after the items; no BOS is added."""
    before, after = (token_ids(backbone, text) for text in prompt_texts(prompt))
    return embeddings[before].clone(), embeddings[after].clone()


def token_ids(backbone: Path, text: str) -> Int64[Tensor, " tokens"]:
    """Tokens of a text by the backbone's own tokenizer, without special tokens."""
    if not text:
        return torch.zeros(0, dtype=torch.int64)
    tokenizer = load_tokenizer(backbone)
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)


def load_tokenizer(backbone: Path) -> Any:
    """The tokenizer of a backbone folder.

    Raises:
        DataError: the folder has none, or one that cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(backbone)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the backbone {backbone} has no tokenizer that loads: {' '.join(str(error).split()).split('. ')[0]}",
            remedy="its tokenizer.json beside config.json, or --prompt none --titles none",
        ) from None


def attended_items(item_ids: Int64[Tensor, "batch history"], layout: Layout) -> Bool[Tensor, "batch history"]:
    """Which items other tokens may see: no padding and no masked id.

    Without a suffix users are read at the newest item, which is then attended whatever it is; with one, a history of
    masked ids alone gives what the instruction and the response say.
    """
    attended = item_ids != 0
    for item in layout.masked_ids:
        attended = attended & (item_ids != item)
    if layout.masked_ids and not layout.suffix_length:
        attended = torch.cat([attended[:, :-1], item_ids[:, -1:] != 0], dim=1)
    return attended


def item_positions(item_ids: Int64[Tensor, "batch history"], layout: Layout) -> Int64[Tensor, "batch history"]:
    """Position of every item; pads and masked items get some position, and are not seen there.

    compact counts attended items. padded puts item j at prefix + (max_history - length) + j whatever the width; a
    masked item keeps its place.
    """
    width = item_ids.shape[1]
    if layout.positions == "padded":
        columns = torch.arange(width, device=item_ids.device) + layout.prefix_length + layout.max_history - width
        return columns + torch.zeros_like(item_ids)
    return layout.prefix_length + (attended_items(item_ids, layout).cumsum(dim=1) - 1).clamp(min=0)


def suffix_positions(item_ids: Int64[Tensor, "batch history"], layout: Layout) -> Int64[Tensor, "batch suffix"]:
    """Positions of the response tokens: right after the newest item."""
    offsets = torch.arange(layout.suffix_length, device=item_ids.device)
    if layout.positions == "padded":
        return layout.prefix_length + layout.max_history + offsets + torch.zeros_like(item_ids[:, :1])
    return layout.prefix_length + attended_items(item_ids, layout).sum(dim=1, keepdim=True) + offsets

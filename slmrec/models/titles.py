"""Title vectors: what the backbone's own token embeddings say of an item."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from slmrec.catalogue import Catalogue
from slmrec.models.prompt import load_tokenizer


def title_vectors(
    items: Catalogue, backbone: Path, embeddings: Float[Tensor, "vocabulary hidden"], known: Catalogue | None = None
) -> Float[Tensor, "items_plus_pad hidden"]:
    """Mean token embedding of each item's title and categories, centred, each of length 1.

    The centre is the mean over the items or, where these join a catalogue that a model has learned, over the `known`.

    Row 0 (padding) and items without a title are zero. Of length 1, because a map that learns from them at Adam's
    fixed step moves its output by the step times the sum of a vector's entries: at RMS 1 titles drown the ids.
    """
    rows, means = _means(items, backbone, embeddings)
    centre = means if known is None else _means(known, backbone, embeddings)[1]
    centred = means - centre.mean(dim=0)
    scale = centred.norm(dim=1, keepdim=True)
    vectors = embeddings.new_zeros(len(items) + 1, embeddings.shape[1])
    vectors[rows] = torch.where(scale > 0, centred / scale, torch.zeros_like(centred))
    return vectors


def _means(items: Catalogue, backbone: Path, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Ids of the items with a title, and the mean token embedding of each."""
    tokens = load_tokenizer(backbone)(_texts(items), add_special_tokens=False)["input_ids"]
    rows = torch.tensor([row + 1 for row, ids in enumerate(tokens) if ids], dtype=torch.int64)
    return rows, torch.stack([embeddings[torch.tensor(ids)].mean(dim=0) for ids in tokens if ids])


def _texts(items: Catalogue) -> list[str]:
    pairs = zip(items.titles, items.categories, strict=True)
    return [" ".join(part for part in pair if part) if pair[0] else "" for pair in pairs]

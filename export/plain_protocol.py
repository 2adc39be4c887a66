"""Plain JSON by external ids: what `POST /recommend` takes and gives."""

import json
from dataclasses import dataclass
from typing import Any

from export.inference_protocol import Limits, ProtocolError
from slmrec.catalogue import Catalogue
from slmrec.ragged import Ragged
from slmrec.recommender import PAD, Histories, TopK

FIELDS = ("user", "history", "exclude", "allow", "k", "strict")
DEFAULT_K = 10


@dataclass(frozen=True, eq=False)
class PlainRequest:
    """One user, by internal ids."""

    histories: Histories
    allowed: Ragged | None
    """The only items that may be recommended; None where all may."""
    k: int
    strict: bool
    dropped: dict[str, int]
    """How many ids of `history` and of `allow` are not in the catalogue."""


def parse_recommend(body: bytes, items: Catalogue, limits: Limits, top_k: int) -> PlainRequest:
    """Read a request.

    Args:
        body: JSON.
        items: the catalogue that knows the ids.
        limits: of lists.
        top_k: largest k.

    Raises:
        ProtocolError: it is malformed or beyond the limits.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise ProtocolError("the body is not JSON") from None
    if not isinstance(found, dict):
        raise ProtocolError("the body is no JSON object")
    stray = set(found) - set(FIELDS)
    if stray:
        raise ProtocolError(f"unknown fields: {', '.join(sorted(map(repr, stray)))}")
    history, history_dropped = _known("history", found.get("history"), items, limits)
    excluded, _ = _known("exclude", found.get("exclude", []), items, limits)
    allowed, allow_dropped = None, 0
    if "allow" in found:
        ids, allow_dropped = _known("allow", found["allow"], items, limits)
        allowed = Ragged.from_rows([ids])
    strict = found.get("strict", False)
    if not isinstance(strict, bool):
        raise ProtocolError("strict has to be true or false")
    return PlainRequest(
        Histories(Ragged.from_rows([history]), Ragged.from_rows([excluded])), allowed, _length(found, top_k), strict,
        {"history": history_dropped, "allow": allow_dropped},
    )  # fmt: skip


def recommend_response(request: PlainRequest, answer: TopK, items: Catalogue) -> dict[str, Any]:
    """The answer by external ids; a list ends where no item remains."""
    kept = answer.item_ids[0] != PAD
    found = answer.item_ids[0][kept].tolist()
    content: dict[str, Any] = {
        "items": [items.item_ids[item - 1] for item in found],
        "titles": [items.title_of(item) for item in found],
        "scores": answer.scores[0][kept].tolist(),
        "dropped": request.dropped["history"],
    }
    return content if request.allowed is None else content | {"dropped_allow": request.dropped["allow"]}


def _length(found: dict[str, Any], top_k: int) -> int:
    k = _whole(found.get("k", min(DEFAULT_K, top_k)))
    if k is None or not 1 <= k <= top_k:
        raise ProtocolError(f"k has to be a whole number from 1 to {top_k}")
    return k


def _whole(value: Any) -> int | None:
    """A whole number, which JSON may also write as 3.0; None for anything else."""
    if type(value) is int:
        return value
    return int(value) if type(value) is float and value.is_integer() else None


def _known(name: str, ids: Any, items: Catalogue, limits: Limits) -> tuple[list[int], int]:
    """Internal ids of those that the catalogue knows, and how many it does not."""
    if not isinstance(ids, list):
        raise ProtocolError(f"{name} has to be a list of item ids")
    if len(ids) > limits.max_ids:
        raise ProtocolError(f"{name} has {len(ids)} ids, possible are {limits.max_ids}")
    texts = [one if type(one) is str else _whole(one) for one in ids]
    if None in texts:
        raise ProtocolError(f"{name} has to be a list of item ids")
    known = [item for item in map(items.internal_ids.get, map(str, texts)) if item is not None]
    return known, len(ids) - len(known)

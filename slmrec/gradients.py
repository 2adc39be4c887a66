"""What each term of a loss asks of the weights: gradient norms, and a warning where one term drowns the others."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

EARLY_STEPS, EVERY_STEPS = (0, 20), 50
"""When norms are taken: at these steps, and again and again; each costs a backward pass per term."""
DOMINANT_SHARE = 0.9


def is_measured(step: int) -> bool:
    """Whether gradient norms are taken at a step.

    >>> [step for step in range(120) if is_measured(step)]
    [0, 20, 50, 100]
    """
    return step in EARLY_STEPS or step % EVERY_STEPS == 0


def term_norms(terms: Mapping[str, Tensor], parameters: Sequence[Tensor]) -> dict[str, float]:
    """Norm of each kind of term's gradient over all parameters; the blocks of one kind (`_block_i`) add up.

    The graph is kept, and no `.grad` changes.
    """
    kinds: dict[str, Tensor] = {}
    for name, value in terms.items():
        kind = name.split("_block_")[0]
        kinds[kind] = kinds[kind] + value if kind in kinds else value
    norms = {}
    for kind, value in kinds.items():
        found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        squares = [part.float().pow(2).sum() for part in found if part is not None]
        norms[kind] = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    return norms


def dominant_term(log: Sequence[Mapping[str, Any]]) -> str | None:
    """The term that held over 90 % of the gradient norms the last two times they were taken; None where none did.

    >>> records = [{"gradient_norms": {"ce": 1.0, "magnitude": 99.0}}, {"loss": 1.0}]
    >>> dominant_term(records), dominant_term(records + records)
    (None, 'magnitude')
    """
    measured = [record["gradient_norms"] for record in log if "gradient_norms" in record][-2:]
    if len(measured) < 2:
        return None
    largest = [max(norms, key=norms.__getitem__) for norms in measured]
    held = [norms[name] > DOMINANT_SHARE * sum(norms.values()) for norms, name in zip(measured, largest, strict=True)]
    return largest[0] if all(held) and largest[0] == largest[1] and len(measured[0]) > 1 else None

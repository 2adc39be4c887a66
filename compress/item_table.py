"""The item table in 8 bits, and lists from it that are the exact ones: scored coarsely, certified, rescored in fp32."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int8, Int64
from torch import Tensor

from slmrec.errors import ConfigError
from slmrec.models.layers import quantize_rows
from slmrec.models.ranking import top_k

UNIT = 2.0**-24
"""Rounding of one fp32 operation: a sum of n products errs by at most about n UNIT |u| |x|, in whatever order."""


@dataclass(frozen=True)
class Int8Table:
    """Item vectors rounded row by row, and how far off each row is."""

    rows: Int8[Tensor, "items width"]
    scale: Float[Tensor, "items 1"]
    error: Float[Tensor, " items"]
    """For a user vector of length 1: how much larger a row's fp32 score can be than its coarse one."""
    rounding: float
    """For a user vector of length 1: how far two fp32 scores of one item can lie apart."""

    @classmethod
    def of(cls, table: Float[Tensor, "items width"]) -> "Int8Table":
        """Round a table."""
        rows, scale = quantize_rows(table.float())
        rounded, exact = rows.double() * scale.double(), table.double()
        allowance = 2 * table.shape[1] * UNIT
        sums = allowance * (exact.norm(dim=1) + rounded.norm(dim=1))
        error = (exact - rounded).norm(dim=1) + sums
        return cls(rows, scale, error.float() * (1 + 4 * UNIT), 2 * allowance * float(exact.norm(dim=1).max()))

    def scores(self, users: Float[Tensor, "users width"]) -> Float[Tensor, "users items"]:
        """Coarse scores; the fp32 one is at most |u| times the row's error larger."""
        return users @ (self.rows.float() * self.scale).T


def certified_top_k(
    table: Float[Tensor, "items width"],
    rounded: Int8Table,
    users: Float32[Tensor, "users width"],
    excluded: Bool[Tensor, "users items"],
    *,
    k: int,
    candidates: int,
) -> tuple[Int64[Tensor, "users k"], Float[Tensor, "users k"], Bool[Tensor, " users"]]:
    """The k best items of each user by the fp32 table, and whose lists needed no second look.

    Candidates are those with the largest upper bounds. A list is certified when its k-th fp32 score exceeds the upper
    bound of every item left out by more than fp32 rounding; the others are computed in full. So no item is missing from
    a list but one whose fp32 score is within rounding of its last.

    Returns:
        Ids (row + 1), best first, ties by smaller id; fp32 scores; whether the list was certified.

    Raises:
        ConfigError: fewer candidates than k.
    """
    if candidates < k:
        raise ConfigError(f"{candidates} candidates cannot hold the best {k}", remedy=f"candidates={4 * k}")
    lengths = users.norm(dim=1, keepdim=True) * (1 + users.shape[1] * UNIT)
    upper = (rounded.scores(users) + lengths * rounded.error).masked_fill(excluded, -torch.inf)
    bounds, rows = upper.topk(min(candidates + 1, upper.shape[1]), dim=1)
    rows = rows[:, :candidates].sort(dim=1).values  # ascending, so that ties fall to the smaller id
    exact = torch.einsum("uw,ucw->uc", users, table[rows]).masked_fill(excluded.gather(1, rows), -torch.inf)
    places, scores = top_k(exact, k)
    items = rows.gather(1, places - 1) + 1
    left_out = bounds[:, candidates] if bounds.shape[1] > candidates else torch.full_like(bounds[:, 0], -torch.inf)
    certified = scores[:, -1] - lengths[:, 0] * rounded.rounding > left_out
    if not certified.all():
        again = ~certified
        full = (users[again] @ table.T).masked_fill(excluded[again], -torch.inf)
        items[again], scores[again] = top_k(full, k)
    return items, scores, certified

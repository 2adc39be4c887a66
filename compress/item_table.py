"""The item table in 8 bits, and lists from it that are the exact ones: scored coarsely, certified, rescored in fp32."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int8, Int64
from torch import Tensor

from slmrec.models.layers import quantize_rows
from slmrec.models.ranking import top_k

ROUNDING = 2.0**-20
"""Allowance for fp32 sums of products, relative to |u| |x|; sums of up to 2,000 products err by less."""


@dataclass(frozen=True)
class Int8Table:
    """Item vectors rounded row by row, and how far off each row is."""

    rows: Int8[Tensor, "items width"]
    scale: Float[Tensor, "items 1"]
    error: Float[Tensor, " items"]
    """|x - x_q|, rounding of the sums included for a user vector of length 1."""

    @classmethod
    def of(cls, table: Float[Tensor, "items width"]) -> "Int8Table":
        """Round a table."""
        rows, scale = quantize_rows(table.float())
        rounded = rows.float() * scale
        error = (table - rounded).norm(dim=1)
        return cls(rows, scale, error + ROUNDING * (table.norm(dim=1) + rounded.norm(dim=1)))

    def scores(self, users: Float[Tensor, "users width"]) -> Float[Tensor, "users items"]:
        """Coarse scores; the exact one is no further off than |u| times the row's error."""
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
    """The k best items of each user, exactly as by the fp32 table, and whose lists needed no second look.

    Candidates are those with the largest upper bounds. A list is certified when its k-th exact score exceeds the upper
    bound of every item left out; the others are computed in full.

    Returns:
        Ids (row + 1), best first, ties by smaller id; exact scores; whether the list was certified.
    """
    upper = rounded.scores(users) + users.norm(dim=1, keepdim=True) * rounded.error
    upper = upper.masked_fill(excluded, -torch.inf)
    bounds, rows = upper.topk(min(candidates + 1, upper.shape[1]), dim=1)
    rows = rows[:, :candidates].sort(dim=1).values  # ascending, so that ties fall to the smaller id
    exact = torch.einsum("uw,ucw->uc", users, table[rows]).masked_fill(excluded.gather(1, rows), -torch.inf)
    places, scores = top_k(exact, k)
    items = rows.gather(1, places - 1) + 1
    left_out = bounds[:, candidates] if bounds.shape[1] > candidates else torch.full_like(bounds[:, 0], -torch.inf)
    certified = scores[:, -1] > left_out
    if not certified.all():
        again = ~certified
        full = (users[again] @ table.T).masked_fill(excluded[again], -torch.inf)
        items[again], scores[again] = top_k(full, k)
    return items, scores, certified

"""The accuracy gate: what a smaller model keeps of its parent's ranking, on validation users."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from slmrec.evaluate import Accuracy
from slmrec.metrics import ratio_of_means


@dataclass(frozen=True, kw_only=True)
class Gate:
    """NDCG@10 on validation users after over before; the point estimate decides."""

    ratio: float
    low: float
    high: float
    """Paired 95 % bootstrap interval of the ratio."""
    required: float
    num_users: int
    ndcg_before: float
    ndcg_after: float

    @property
    def passed(self) -> bool:
        """Whether the point estimate reaches the gate."""
        return self.ratio >= self.required

    @property
    def underpowered(self) -> bool:
        """Whether the interval is wider than the gate's slack, so that these users cannot resolve it."""
        return self.high - self.low > 1 - self.required

    def to_json(self) -> dict[str, Any]:
        """What `gate.json` holds."""
        state = "underpowered" if self.underpowered else "passed" if self.passed else "failed"
        ends = {name: end if np.isfinite(end) else None for name, end in (("low", self.low), ("high", self.high))}
        return vars(self) | ends | {"gate": state, "passed": self.passed, "split": "validation"}

    def to_text(self) -> str:
        """One line for people."""
        text = (
            f"validation NDCG@10 {self.ndcg_before:.4f} -> {self.ndcg_after:.4f}: {self.ratio:.4f} of the parent's "
            f"(95 % interval {self.low:.4f} to {self.high:.4f}), gate {self.required}"
        )
        return text + (f"; not resolved by {self.num_users} users" if self.underpowered else "")


def gate_of(before: Accuracy, after: Accuracy, required: float) -> Gate:
    """Compare two models on the same users."""
    ratio = ratio_of_means(after.user_ndcg_10, before.user_ndcg_10)
    return Gate(
        ratio=ratio.estimate,
        low=ratio.low,
        high=ratio.high,
        required=required,
        num_users=after.num_users,
        ndcg_before=before.metrics["ndcg@10"].estimate,
        ndcg_after=after.metrics["ndcg@10"].estimate,
    )

"""Accuracy of any recommender, read from the lists it returns to a user."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from slmrec.errors import CheckError
from slmrec.metrics import Interval, hit_rate, mean_intervals, ndcg, ranks_of_targets, reciprocal_rank
from slmrec.ragged import Ragged
from slmrec.recommender import PAD, Histories, Recommender, TopK
from slmrec.sequences import Cases, test_cases, validation_cases

LIST_LENGTH = 100
"""Items asked for; the mean reciprocal rank is cut off here."""

TEST_PROTOCOL = "leave-one-out test, full catalogue, past excluded"
VALIDATION_PROTOCOL = "leave-one-out validation, full catalogue, past excluded"

REPEAT_WARNING_SHARE = 0.01


@dataclass(frozen=True, eq=False)
class Accuracy:
    """Accuracy of one artefact over users; metrics are fractions in [0, 1]."""

    metrics: Mapping[str, Interval]
    """hr@1, hr@5, hr@10, ndcg@5, ndcg@10 and mrr, each with its 95 % bootstrap interval over users."""
    protocol: str
    mrr_cutoff: int
    """Length of the lists that `mrr` was read from; `mrr` is MRR@this."""
    num_repeat_targets: int
    """Targets inside the user's excluded past, which count as misses."""
    ranks: np.ndarray
    """Rank of each user's target, 0 = best, -1 = not in the list; int64 [users]."""
    top_10: np.ndarray
    """First ten recommendations of each user, int64 [users, 10 or fewer]."""

    @property
    def num_users(self) -> int:
        """Users evaluated."""
        return len(self.ranks)

    @property
    def user_ndcg_10(self) -> np.ndarray:
        """NDCG@10 of each user, in the order of the cases; what paired comparisons need."""
        return ndcg(self.ranks, 10)

    @property
    def mrr_label(self) -> str:
        """MRR with its cutoff, such as MRR@100."""
        return f"MRR@{self.mrr_cutoff}"

    def to_json(self) -> dict[str, Any]:
        """Give the accuracy object of benchmark.json; what concerns single users stays in memory."""
        return {
            **{name: interval.estimate for name, interval in self.metrics.items()},
            "num_users": self.num_users,
            "protocol": self.protocol,
            "mrr_cutoff": self.mrr_cutoff,
            "num_repeat_targets": self.num_repeat_targets,
            "intervals": {name: [interval.low, interval.high] for name, interval in self.metrics.items()},
        }

    def to_text(self) -> str:
        """Lay out a small table for the terminal."""
        lines = [f"{self.protocol}; {self.num_users} users, 95 % bootstrap intervals"]
        for name, interval in self.metrics.items():
            label = self.mrr_label if name == "mrr" else name.upper()
            lines.append(f"  {label:<8} {interval.estimate:.4f}  [{interval.low:.4f}, {interval.high:.4f}]")
        if self.num_repeat_targets > REPEAT_WARNING_SHARE * self.num_users:
            lines.append(
                f"Warning: {self.num_repeat_targets} of {self.num_users} targets repeat an item of the user's past, "
                "which is never recommended, and count as misses (--allow-repeats evaluates an export that repeats)"
            )
        return "\n".join(lines)


def evaluate(
    recommender: Recommender,
    cases: Cases,
    *,
    protocol: str,
    batch_size: int = 256,
    progress: Callable[[int], object] | None = None,
) -> Accuracy:
    """Ask for each user's list as a client would, and look where the target stands in it.

    Args:
        recommender: any artefact; nothing but `recommend` is asked of it.
        cases: users with their past and their target.
        protocol: what the figures will be labelled with.
        batch_size: users in a call.
        progress: called after each batch with the number of users in it.

    Raises:
        CheckError: a list is not one that `Recommender.recommend` promises (NaN, duplicates, excluded items), or is
            too short for HR@10.
    """
    k = _list_length(recommender)
    ranks = np.empty(len(cases), dtype=np.int64)
    top_10 = np.empty((len(cases), min(k, 10)), dtype=np.int64)
    longest_first = np.argsort(-cases.histories.item_ids.lengths, kind="stable")
    for start in range(0, len(cases), batch_size):
        rows = longest_first[start : start + batch_size]
        batch = cases.select(rows)
        answer = recommender.recommend(batch.histories, k)
        check_lists(answer, batch.histories.exclude_ids, k=k, num_items=recommender.num_items)
        ranks[rows] = ranks_of_targets(answer.item_ids, batch.targets)
        top_10[rows] = answer.item_ids[:, :10]
        if progress is not None:
            progress(len(rows))
    repeats = _pairs_among(cases.targets[:, None], cases.histories.exclude_ids, recommender.num_items)
    return Accuracy(_metrics(ranks, k), protocol, k, int(repeats.sum()), ranks, top_10)


def held_out_cases(sequences: Ragged, split: str, *, allow_repeats: bool = False) -> tuple[Cases, str]:
    """Users of a split ("test" or "validation"), and the protocol that figures from them are labelled with."""
    cases = validation_cases(sequences) if split == "validation" else test_cases(sequences)
    protocol = VALIDATION_PROTOCOL if split == "validation" else TEST_PROTOCOL
    if not allow_repeats:
        return cases, protocol
    nothing = Ragged.from_lengths(np.zeros(0, dtype=np.int64), np.zeros(len(cases), dtype=np.int64))
    histories = Histories(cases.histories.item_ids, nothing)
    return Cases(cases.users, histories, cases.targets), protocol.replace("past excluded", "past allowed")


def validation_ndcg(recommender: Recommender, cases: Cases) -> float:
    """Mean NDCG@10 and nothing else: what early stopping watches after every epoch."""
    answer = recommender.recommend(cases.histories, k=10)
    return float(ndcg(ranks_of_targets(answer.item_ids, cases.targets), 10).mean())


def check_lists(answer: TopK, excluded: Ragged, *, k: int, num_items: int) -> None:
    """Refuse lists that break the promise of `Recommender.recommend`; no metric computed from them would mean much.

    Raises:
        CheckError: wrong shape, unknown ids, NaN, not best first, an item twice, or an item that was excluded.
    """
    expected = (len(excluded), k)
    if answer.item_ids.shape != expected or answer.scores.shape != expected:
        _refuse(f"lists of shape {answer.item_ids.shape} with scores {answer.scores.shape}, expected {expected}")
    item_ids, scores = answer.item_ids, answer.scores
    real = item_ids != PAD
    ordered = np.sort(item_ids, axis=1)
    for broken, what in (
        (np.isnan(scores), "a NaN score"),
        ((item_ids < 0) | (item_ids > num_items), f"an id outside 1..{num_items}"),
        (real & ~np.isfinite(scores), "an item with an infinite score"),
        (real[:, 1:] & ~real[:, :-1], "an item after padding"),
        (real[:, 1:] & (scores[:, 1:] > scores[:, :-1]), "a score above the one before it"),
        ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != PAD), "an item twice"),
        (_pairs_among(item_ids, excluded, num_items), "an excluded item"),
    ):
        if broken.any():
            users = np.flatnonzero(broken.any(axis=1))
            _refuse(f"{what} in the lists of {len(users)} of {len(answer)} users, the first at row {users[0]}")


def _list_length(recommender: Recommender) -> int:
    k = min(LIST_LENGTH, recommender.max_top_k, recommender.num_items)
    if k < min(10, recommender.num_items):
        raise CheckError(
            f"HR@10 needs lists of 10, this artefact returns {recommender.max_top_k} items at most",
            remedy="export again with --top-k 100",
        )
    return k


def _metrics(ranks: np.ndarray, k: int) -> dict[str, Interval]:
    columns = {
        "hr@1": hit_rate(ranks, 1),
        "hr@5": hit_rate(ranks, 5),
        "hr@10": hit_rate(ranks, 10),
        "ndcg@5": ndcg(ranks, 5),
        "ndcg@10": ndcg(ranks, 10),
        "mrr": reciprocal_rank(ranks, k),
    }
    return dict(zip(columns, mean_intervals(np.stack(list(columns.values()), axis=1)), strict=True))


def _pairs_among(item_ids: np.ndarray, listed: Ragged, num_items: int) -> np.ndarray:
    """Where row r of `item_ids` holds an item of row r of `listed`."""
    stride = num_items + 1
    rows = np.arange(len(item_ids))
    pairs = np.repeat(rows, listed.lengths) * stride + listed.values
    found: np.ndarray = np.isin(rows[:, None] * stride + item_ids, pairs) & (item_ids != PAD)
    return found


def _refuse(what: str) -> None:
    raise CheckError(
        f"the artefact returned {what}",
        remedy="make the artefact again; if it happens again, report it with the command that made it",
    )

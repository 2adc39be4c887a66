"""Whether two recommenders give the same answers, by a rule that a NaN cannot pass."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from export.runtime import APPEND_FILE, GRAPH_FILE, RERANK_FILE, OnnxRecommender
from export.states import AppendingRecommender, StateStore
from slmrec.errors import CheckError
from slmrec.metrics import ndcg, overlap, ranks_of_targets
from slmrec.ragged import Ragged
from slmrec.recommender import PAD, Histories, Recommender, TopK
from slmrec.sequences import test_cases, validation_cases

PARITY_FILE = "parity.json"
MAX_USERS = 2048
TOP_K = 10


@dataclass(frozen=True, kw_only=True)
class ParityRule:
    """What counts as equal; recorded, and applied again by `verify`."""

    precision: str
    score_tolerance: float = 2e-5
    """fp32: gap between scores of one rank, as a fraction of the largest score; lists may differ only within it."""
    overlap_at_10: float = 0.99
    """8 bits: least mean overlap of the top ten."""
    ndcg_relative: float = 0.002
    """8 bits: largest share of NDCG@10 that may be lost on the same users, beyond what chance explains."""
    ndcg_errors: float = 2.0
    """8 bits: standard errors of the paired difference over users that chance explains. A few hundred users resolve no
    .2 %: one target a rank lower is more."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """A passed check."""

    rule: ParityRule
    num_users: int
    num_equal_lists: int
    overlap_at_10: float
    max_score_gap: float
    """Largest gap between scores of one rank, as a fraction of the largest score."""

    def to_json(self) -> dict[str, Any]:
        """What `parity.json` holds."""
        return asdict(self)


def check_parity(expected: Recommender, actual: Any, sequences: Ragged) -> Parity:
    """Compare answers on validation users, whose histories have every length, in batches and alone.

    Args:
        expected: the recommender the graph was made from.
        actual: the graph's runtime; its signature names the precision.
        sequences: of a dataset; at most 2,048 users are asked for, spread over all lengths.

    Raises:
        CheckError: they differ by more than the rule allows, or a user's list depends on who shares the batch.
    """
    cases = validation_cases(sequences)
    if len(cases) > MAX_USERS:
        by_length = np.argsort(cases.histories.item_ids.lengths, kind="stable")
        cases = cases.select(by_length[np.linspace(0, len(cases) - 1, MAX_USERS).astype(np.int64)])
    k = min(TOP_K, actual.num_items, actual.max_top_k)
    rule = ParityRule(precision=actual.signature["precision"])
    one, other = expected.recommend(cases.histories, k), actual.recommend(cases.histories, k)
    parity = compare(one, other, rule)
    if rule.precision == "int8":
        require_kept_ndcg(one, other, cases.targets, rule)
    alone = np.unique(np.linspace(0, len(cases) - 1, 16).astype(np.int64))
    for row in alone:
        single = actual.recommend(cases.histories.select(np.array([row])), k)
        compare(TopK(other.item_ids[[row]], other.scores[[row]]), single, ParityRule(precision="fp32"))
    return parity


def some_histories(sequences: Ragged) -> Histories:
    """Real histories of every length, 64 at most."""
    histories = test_cases(sequences).histories
    by_length = np.argsort(histories.item_ids.lengths, kind="stable")
    return histories.select(by_length[np.unique(np.linspace(0, len(by_length) - 1, 64).astype(np.int64))])


def check_other_graphs(folder: Path, histories: Histories) -> None:
    """Whether `rerank` and `append` answer as `recommend` does.

    Raises:
        CheckError: they do not.
    """
    graph = OnnxRecommender(folder)
    k = min(10, graph.max_top_k, graph.num_items)
    rule = ParityRule(precision=graph.signature["precision"])
    answer = graph.recommend(histories, k)
    candidates = Ragged.from_rows([row[row != PAD] for row in answer.item_ids])
    for row, scores in enumerate(graph.rerank(histories, candidates)):
        wanted = answer.scores[row][answer.item_ids[row] != PAD]
        allowed = rule.score_tolerance * max(1e-30, float(np.abs(wanted).max(initial=0)))
        if not (np.abs(scores - wanted) <= allowed).all():
            raise _unequal(f"{RERANK_FILE} and {GRAPH_FILE} give other scores")
    if APPEND_FILE in graph.signature["graphs"]:
        appending = AppendingRecommender(folder, StateStore(max_bytes=2**28))
        longer = np.flatnonzero(histories.item_ids.lengths > 1)
        appending.recommend(Histories(histories.item_ids.without_last(1), histories.exclude_ids).select(longer), k)
        compare(answer, appending.recommend(histories, k), rule)


def compare(expected: TopK, actual: TopK, rule: ParityRule) -> Parity:
    """Apply the rule to two sets of lists of the same users.

    Raises:
        CheckError: the rule does not hold.
    """
    if expected.item_ids.shape != actual.item_ids.shape:
        raise _unequal(f"lists of shape {actual.item_ids.shape}, expected {expected.item_ids.shape}")
    gaps = score_gaps(expected.scores, actual.scores)
    equal = (expected.item_ids == actual.item_ids).all(axis=1)
    shared = float(overlap(expected.item_ids, actual.item_ids).mean()) if len(equal) else 1.0
    largest = float(gaps.max(initial=0.0))
    if rule.precision == "fp32":
        if not (gaps <= rule.score_tolerance).all():
            raise _unequal(f"scores differ by {largest:.2e} of their scale, allowed are {rule.score_tolerance:.0e}")
        _require_near_ties(expected, actual, rule)
    elif not shared >= rule.overlap_at_10 or not np.isfinite(gaps).all():
        raise _unequal(f"the lists overlap by {shared:.4f}, required are {rule.overlap_at_10}")
    return Parity(
        rule=rule, num_users=len(equal), num_equal_lists=int(equal.sum()), overlap_at_10=shared, max_score_gap=largest
    )


def score_gaps(
    expected: Float32[np.ndarray, "users k"], actual: Float32[np.ndarray, "users k"]
) -> Float32[np.ndarray, "users k"]:
    """Gap of each score as a fraction of the largest finite one; -inf against -inf is none, NaN stays NaN."""
    finite = np.isfinite(expected)
    scale = max(float(np.abs(expected[finite]).max(initial=0.0)), 1e-30)
    both_empty = (expected == -np.inf) & (actual == -np.inf)
    with np.errstate(invalid="ignore"):
        gaps = np.abs(expected - actual) / np.float32(scale)
    return np.where(both_empty, np.float32(0), gaps).astype(np.float32)


def _require_near_ties(expected: TopK, actual: TopK, rule: ParityRule) -> None:
    """Lists may differ only in items whose scores are as close as rounding brings them."""
    limit = (
        2
        * rule.score_tolerance
        * max(float(np.abs(expected.scores[np.isfinite(expected.scores)]).max(initial=0)), 1e-30)
    )
    for row in np.flatnonzero((expected.item_ids != actual.item_ids).any(axis=1)):
        known = dict(zip(expected.item_ids[row].tolist(), expected.scores[row].tolist(), strict=True))
        worst = float(expected.scores[row, -1])
        for item, score in zip(actual.item_ids[row].tolist(), actual.scores[row].tolist(), strict=True):
            wanted = known.get(item, worst)
            if wanted != score and not abs(wanted - score) <= limit:  # -inf equals -inf and is no distance from it
                raise _unequal(f"item {item} of row {row} has the score {score}, expected {wanted}")


def require_kept_ndcg(one: TopK, other: TopK, targets: np.ndarray, rule: ParityRule) -> None:
    """Whether the second lists are as accurate as the first; that they are the same ones is for their overlap to say.

    Raises:
        CheckError: NDCG@10 is lower by more than the rule allows.
    """
    before, after = (ndcg(ranks_of_targets(top.item_ids, targets), 10) for top in (one, other))
    change = after - before
    allowed = rule.ndcg_relative * before.mean() + rule.ndcg_errors * change.std() / np.sqrt(len(change))
    if not -change.mean() <= allowed + 1e-12:
        raise _unequal(f"NDCG@10 is {after.mean():.5f}, that of the checkpoint {before.mean():.5f}")


def _unequal(what: str) -> CheckError:
    return CheckError(f"the two do not answer alike: {what}", remedy="--force to make it again; if it stays, report it")

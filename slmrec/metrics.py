"""How good ranked lists are, per user, and how sure one can be of a mean or a difference over users."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from slmrec.errors import CheckError

MISSED = -1
"""Rank of a target that its list does not hold."""

RESAMPLES = 2000
"""Bootstrap resamples; the ends of a 95 % interval then rest on 50 of them each."""

CHUNK_CELLS = 4_000_000
"""Users times resamples held in memory at once."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """The same users under two artefacts: mean difference and the chance of it if there were none."""

    difference: Interval
    p_value: float


def ranks_of_targets(item_ids: Int64[np.ndarray, "users k"], targets: Int64[np.ndarray, " users"]) -> np.ndarray:
    """Rank of each user's target in the list as returned, 0 = best; -1 where the list does not hold it.

    >>> ranks_of_targets(np.array([[7, 3, 9], [4, 5, 6]]), np.array([9, 1])).tolist()
    [2, -1]
    """
    hits = item_ids == targets[:, None]
    return np.where(hits.any(axis=1), hits.argmax(axis=1), MISSED).astype(np.int64)


def hit_rate(ranks: Int64[np.ndarray, " users"], k: int) -> Float64[np.ndarray, " users"]:
    """1 for each user whose target is among the first k, else 0; the mean is HR@k.

    >>> hit_rate(np.array([0, 4, 5, -1]), k=5).tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    return _within(ranks, k).astype(np.float64)


def ndcg(ranks: Int64[np.ndarray, " users"], k: int) -> Float64[np.ndarray, " users"]:
    """1 / log2(rank + 2) within the first k, else 0; the mean is NDCG@k (one target, so the ideal is 1).

    >>> ndcg(np.array([0, 2, 10, -1]), k=10).tolist()
    [1.0, 0.5, 0.0, 0.0]
    """
    within = _within(ranks, k)
    return np.where(within, 1 / np.log2(np.where(within, ranks, 0) + 2.0), 0.0)


def reciprocal_rank(ranks: Int64[np.ndarray, " users"], k: int) -> Float64[np.ndarray, " users"]:
    """1 / (rank + 1) within the first k, else 0; the mean is MRR@k.

    >>> reciprocal_rank(np.array([0, 3, 100, -1]), k=100).tolist()
    [1.0, 0.25, 0.0, 0.0]
    """
    within = _within(ranks, k)
    return np.where(within, 1 / (np.where(within, ranks, 0) + 1.0), 0.0)


def overlap(lists: Int64[np.ndarray, "users k"], others: Int64[np.ndarray, "users k"]) -> np.ndarray:
    """Share of items that two lists of a user have in common, order ignored and padding (0) left out.

    >>> overlap(np.array([[1, 2, 3, 4], [5, 6, 0, 0]]), np.array([[4, 3, 8, 9], [6, 5, 0, 0]])).tolist()
    [0.5, 1.0]
    """
    common = ((lists[:, :, None] == others[:, None, :]) & (lists[:, :, None] > 0)).sum(axis=(1, 2))
    longer = np.maximum((lists > 0).sum(axis=1), (others > 0).sum(axis=1))
    return np.where(longer > 0, common / np.maximum(longer, 1), 1.0)


def bootstrap_means(
    values: Float64[np.ndarray, "users columns"], *, seed: int, resamples: int = RESAMPLES
) -> Float64[np.ndarray, "resamples columns"]:
    """Column means of users drawn with replacement; all columns see the same draws, so they stay paired."""
    generator = np.random.default_rng(seed)
    users = len(values)
    means = []
    for count in _chunks(resamples, users):
        draws = generator.integers(users, size=(count, users)) + np.arange(count)[:, None] * users
        times_drawn = np.bincount(draws.ravel(), minlength=count * users).reshape(count, users)
        means.append(times_drawn @ values / users)
    return np.concatenate(means)


def mean_intervals(
    values: Float64[np.ndarray, "users columns"], *, seed: int = 0, resamples: int = RESAMPLES
) -> list[Interval]:
    """Mean of each column with its 95 % percentile-bootstrap interval over users.

    >>> mean_intervals(np.ones((5, 1)))
    [Interval(estimate=1.0, low=1.0, high=1.0)]
    """
    _require_users(values)
    means = bootstrap_means(values, seed=seed, resamples=resamples)
    return [_interval(estimate, draws) for estimate, draws in zip(values.mean(axis=0), means.T, strict=True)]


def compare(
    values: Float64[np.ndarray, " users"],
    baseline: Float64[np.ndarray, " others"],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Paired difference of means (values - baseline), bootstrap interval and two-sided sign-flip permutation p.

    >>> compare(np.array([0.5, 0.5]), np.array([0.5, 0.5])).p_value
    1.0
    """
    _require_paired(values, baseline)
    difference = values - baseline
    [interval] = mean_intervals(difference[:, None], seed=seed, resamples=resamples)
    return Comparison(interval, _sign_flip_p(difference[difference != 0], seed=seed, resamples=resamples))


def ratio_of_means(
    values: Float64[np.ndarray, " users"],
    baseline: Float64[np.ndarray, " others"],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """mean(values) / mean(baseline) with its 95 % interval, users drawn in pairs.

    An end is infinite where the baseline's mean is 0 in resamples.

    >>> ratio_of_means(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
    Interval(estimate=0.5, low=0.5, high=0.5)

    Raises:
        CheckError: the baseline's mean is 0, so a ratio says nothing.
    """
    _require_paired(values, baseline)
    if not baseline.mean() > 0:
        raise CheckError(
            f"the baseline's mean over {len(baseline)} users is {baseline.mean()}, so nothing can be relative to it",
            remedy="a baseline that hits some targets (more training, or more users)",
        )
    means = bootstrap_means(np.stack([values, baseline], axis=1), seed=seed, resamples=resamples)
    ratios = np.divide(means[:, 0], means[:, 1], out=np.full(len(means), np.inf), where=means[:, 1] > 0)
    return _interval(values.mean() / baseline.mean(), ratios)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p values that hold for all comparisons together, in the order given.

    >>> [round(p, 4) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for step, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - step)))
        corrected[index] = largest
    return corrected


def _within(ranks: np.ndarray, k: int) -> np.ndarray:
    return (ranks >= 0) & (ranks < k)


def _interval(estimate: float, draws: np.ndarray) -> Interval:
    low = np.quantile(draws, 0.025, method="lower")
    high = np.quantile(draws, 0.975, method="higher")
    return Interval(float(estimate), float(low), float(high))


def _sign_flip_p(differences: np.ndarray, *, seed: int, resamples: int) -> float:
    """Under no difference each user's sign is a coin; users without a difference cannot tell and are left out."""
    if not differences.size:
        return 1.0
    generator = np.random.default_rng(seed)
    observed = abs(differences.sum())
    rounding = 1e-9 * np.abs(differences).sum()
    as_large = 0
    for count in _chunks(resamples, differences.size):
        kept = generator.integers(2, size=(count, differences.size), dtype=np.int8).astype(np.float64)
        as_large += int((np.abs(2 * (kept @ differences) - differences.sum()) >= observed - rounding).sum())
    return (1 + as_large) / (1 + resamples)


def _chunks(resamples: int, users: int) -> Iterator[int]:
    size = max(1, CHUNK_CELLS // users)
    for start in range(0, resamples, size):
        yield min(size, resamples - start)


def _require_users(values: np.ndarray) -> None:
    if not len(values) or not np.isfinite(values).all():
        raise CheckError(
            "metrics of no user, or metrics that are not finite, have no interval",
            remedy="evaluate at least one user, with an artefact whose scores are finite",
        )


def _require_paired(values: np.ndarray, baseline: np.ndarray) -> None:
    _require_users(values)
    _require_users(baseline)
    if values.shape != baseline.shape:
        raise CheckError(
            f"{len(values)} users cannot be paired with {len(baseline)}",
            remedy="evaluate both artefacts on the same users, in the same order",
        )

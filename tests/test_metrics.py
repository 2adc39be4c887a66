import itertools
import math

import numpy as np
import pytest

from slmrec.errors import CheckError
from slmrec.metrics import (
    bootstrap_means,
    compare,
    hit_rate,
    holm,
    mean_intervals,
    ndcg,
    overlap,
    ranks_of_targets,
    ratio_of_means,
    reciprocal_rank,
)


def lists_and_targets(seed: int, users: int = 60, k: int = 20) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    lists = np.stack([generator.permutation(40)[:k] + 1 for _ in range(users)])
    return lists.astype(np.int64), generator.integers(1, 41, size=users)


@pytest.mark.parametrize("k", [1, 5, 10, 20])
def test_metrics_are_their_definitions_written_out(k: int) -> None:
    lists, targets = lists_and_targets(k)
    hits, gains, reciprocals = [], [], []
    for row, target in zip(lists.tolist(), targets.tolist(), strict=True):
        position = row[:k].index(target) + 1 if target in row[:k] else None
        hits.append(0.0 if position is None else 1.0)
        gains.append(0.0 if position is None else 1 / math.log2(position + 1))
        reciprocals.append(0.0 if position is None else 1 / position)
    ranks = ranks_of_targets(lists, targets)
    np.testing.assert_allclose(hit_rate(ranks, k), hits)
    np.testing.assert_allclose(ndcg(ranks, k), gains)
    np.testing.assert_allclose(reciprocal_rank(ranks, k), reciprocals)


def test_padding_is_never_a_hit() -> None:
    assert ranks_of_targets(np.array([[3, 0, 0]]), np.array([5])).tolist() == [-1]


def test_overlap_is_the_share_of_common_items_of_each_pair_of_lists() -> None:
    lists, _ = lists_and_targets(1, k=10)
    others, _ = lists_and_targets(2, k=10)
    expected = [len(set(a) & set(b)) / 10 for a, b in zip(lists.tolist(), others.tolist(), strict=True)]
    np.testing.assert_allclose(overlap(lists, others), expected)
    assert overlap(lists, lists[:, ::-1].copy()).tolist() == [1.0] * len(lists)


def test_the_interval_covers_the_true_mean_about_95_times_in_100() -> None:
    covered = 0
    for seed in range(200):
        values = np.random.default_rng(seed).random((200, 1))
        [interval] = mean_intervals(values, seed=seed, resamples=400)
        covered += interval.low <= 0.5 <= interval.high
    assert 0.90 <= covered / 200 <= 0.99


def test_the_intervals_width_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=(500, 1))
    [interval] = mean_intervals(values)
    half_width = 1.96 * values.std() / math.sqrt(500)
    assert interval.estimate == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(2 * half_width, rel=0.1)


def test_bootstrap_means_depend_on_the_seed_alone_and_keep_columns_paired() -> None:
    values = np.random.default_rng(0).random((50, 1))
    both = bootstrap_means(np.hstack([values, 2 * values]), seed=3)
    np.testing.assert_allclose(both[:, 1], 2 * both[:, 0])
    np.testing.assert_array_equal(both, bootstrap_means(np.hstack([values, 2 * values]), seed=3))
    assert (both != bootstrap_means(np.hstack([values, 2 * values]), seed=4)).any()


def test_chunks_do_not_change_how_many_resamples_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slmrec.metrics.CHUNK_CELLS", 100)
    assert bootstrap_means(np.ones((30, 2)), seed=0, resamples=10).shape == (10, 2)


def test_the_p_value_is_that_of_all_sign_flips() -> None:
    values = np.array([0.9, 0.5, 0.8, 0.1, 0.7, 0.6, 0.3, 0.4])
    baseline = np.array([0.4, 0.6, 0.2, 0.0, 0.1, 0.6, 0.1, 0.2])
    difference = values - baseline
    flips = [abs(np.dot(signs, difference)) for signs in itertools.product((-1, 1), repeat=8)]
    exact = np.mean(np.array(flips) >= abs(difference.sum()) - 1e-12)
    assert compare(values, baseline, resamples=20_000).p_value == pytest.approx(exact, abs=0.01)


def test_a_comparison_knows_its_direction() -> None:
    baseline = np.random.default_rng(0).random(300)
    better = compare(baseline + 0.1, baseline)
    assert better.difference.estimate == pytest.approx(0.1)
    assert better.difference.low > 0
    assert better.p_value < 0.01


def test_p_values_are_uniform_where_nothing_differs() -> None:
    p_values = []
    for seed in range(200):
        generator = np.random.default_rng(seed)
        p_values.append(compare(generator.random(40), generator.random(40), seed=seed, resamples=300).p_value)
    assert 0.01 <= np.mean(np.array(p_values) < 0.05) <= 0.10


def test_the_ratio_of_means_is_paired_by_user() -> None:
    baseline = np.random.default_rng(0).random(400)
    noise = np.random.default_rng(1).normal(0, 0.01, 400)
    ratio = ratio_of_means(0.98 * baseline + noise, baseline)
    assert ratio.estimate == pytest.approx(0.98, abs=0.01)
    assert ratio.high - ratio.low < 0.01, "unpaired users would give an interval ten times as wide"
    unpaired = ratio_of_means(np.random.default_rng(2).permutation(0.98 * baseline + noise), baseline)
    assert unpaired.high - unpaired.low > 0.05


def test_a_ratio_to_nothing_is_refused() -> None:
    with pytest.raises(CheckError, match="nothing can be relative to it"):
        ratio_of_means(np.ones(3), np.zeros(3))


@pytest.mark.parametrize("values", [np.array([0.5, np.nan]), np.array([])])
def test_users_that_are_missing_or_not_finite_are_refused(values: np.ndarray) -> None:
    with pytest.raises(CheckError):
        compare(values, values)


def test_other_users_cannot_be_paired() -> None:
    with pytest.raises(CheckError, match="3 users cannot be paired with 4"):
        compare(np.ones(3), np.ones(4))


def test_holm_is_its_definition_and_never_below_the_single_p() -> None:
    p_values = [0.04, 0.001, 0.3, 0.02]
    ordered = sorted(p_values)
    expected = [max(min(1, ordered[j] * (4 - j)) for j in range(i + 1)) for i in range(4)]
    assert sorted(holm(p_values)) == pytest.approx(expected)
    assert all(corrected >= p for corrected, p in zip(holm(p_values), p_values, strict=True))
    assert holm([]) == []

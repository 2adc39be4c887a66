from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from slmrec.errors import CheckError
from slmrec.evaluate import TEST_PROTOCOL, Accuracy, evaluate, held_out_cases
from slmrec.ragged import Ragged
from slmrec.recommender import Histories, Recommender, TopK
from slmrec.sequences import Cases, test_cases

NUM_ITEMS = 40


@dataclass
class Scorer:
    """Ranks the catalogue by a function of the history, as the protocol demands."""

    score: Callable[[np.ndarray], np.ndarray]
    num_items: int = NUM_ITEMS
    max_top_k: int = 100
    calls: list[int] = field(default_factory=list)

    def scores(self, history: np.ndarray) -> np.ndarray:
        return np.asarray(self.score(history), dtype=np.float32)

    def recommend(self, histories: Histories, k: int) -> TopK:
        self.calls.append(len(histories))
        items = np.zeros((len(histories), k), dtype=np.int64)
        best = np.full((len(histories), k), -np.inf, dtype=np.float32)
        for row, (history, excluded) in enumerate(zip(histories.item_ids, histories.exclude_ids, strict=True)):
            scores = self.scores(history)
            seen = set(history.tolist()) | set(excluded.tolist())
            ranked = sorted(
                (i for i in range(1, self.num_items + 1) if i not in seen), key=lambda i: (-scores[i - 1], i)
            )
            items[row, : len(ranked)] = ranked[:k]
            best[row, : len(ranked)] = scores[np.array(ranked[:k]) - 1]
        return TopK(items, best)


def successor_scores(history: np.ndarray) -> np.ndarray:
    """Highest for the item after the newest one, falling with distance."""
    return -((np.arange(1, NUM_ITEMS + 1) - history[-1] - 1) % NUM_ITEMS).astype(np.float32)


def noisy_scores(history: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(history.tolist()).normal(0, 8, NUM_ITEMS)
    return successor_scores(history) + noise.astype(np.float32)


def cyclic_cases(users: int = 50, seed: int = 0) -> Cases:
    generator = np.random.default_rng(seed)
    rows = [
        (np.arange(length) + start) % NUM_ITEMS + 1
        for start, length in zip(
            generator.integers(NUM_ITEMS, size=users), generator.integers(3, 20, size=users), strict=True
        )
    ]
    return test_cases(Ragged.from_rows(rows))


def reference(scorer: Scorer, cases: Cases, *, ties_against: bool) -> dict[str, float]:
    """Metrics from all scores, written out; ties go to the smaller id, or all against the target."""
    ranks = []
    for history, target in zip(cases.histories.item_ids, cases.targets.tolist(), strict=True):
        scores = scorer.scores(history)
        own = scores[target - 1]
        others = [i for i in range(1, NUM_ITEMS + 1) if i != target and i not in history]
        ahead = [i for i in others if scores[i - 1] > own or (scores[i - 1] == own and (ties_against or i < target))]
        ranks.append(None if target in history else len(ahead) + 1)
    hits = {f"hr@{k}": np.mean([r is not None and r <= k for r in ranks]) for k in (1, 5, 10)}
    gains = {f"ndcg@{k}": np.mean([1 / np.log2(r + 1) if r and r <= k else 0 for r in ranks]) for k in (5, 10)}
    return {**hits, **gains, "mrr": float(np.mean([1 / r if r else 0 for r in ranks]))}


def estimates(accuracy: Accuracy) -> dict[str, float]:
    return {name: interval.estimate for name, interval in accuracy.metrics.items()}


def test_the_fakes_here_keep_the_protocol() -> None:
    assert isinstance(Scorer(successor_scores), Recommender)


def test_a_model_that_knows_the_successor_hits_every_time() -> None:
    accuracy = evaluate(Scorer(successor_scores), cyclic_cases(), protocol=TEST_PROTOCOL)
    assert estimates(accuracy) == dict.fromkeys(["hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10", "mrr"], 1.0)


def test_metrics_are_those_of_a_reference_that_reads_all_scores() -> None:
    scorer, cases = Scorer(noisy_scores), cyclic_cases()
    accuracy = estimates(evaluate(scorer, cases, protocol=TEST_PROTOCOL))
    assert accuracy == pytest.approx(reference(scorer, cases, ties_against=False))
    assert accuracy == pytest.approx(reference(scorer, cases, ties_against=True)), "no ties, so both agree"
    assert 0 < accuracy["hr@1"] < accuracy["hr@10"] < 1


def test_a_constant_model_is_caught_by_counting_ties_against_the_target() -> None:
    scorer, cases = Scorer(lambda history: np.zeros(NUM_ITEMS)), cyclic_cases()
    kind = estimates(evaluate(scorer, cases, protocol=TEST_PROTOCOL))
    strict = reference(scorer, cases, ties_against=True)
    assert kind == pytest.approx(reference(scorer, cases, ties_against=False))
    assert strict["hr@10"] == 0.0 < kind["hr@10"]


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_batches_do_not_change_a_users_rank_or_place(batch_size: int) -> None:
    cases = cyclic_cases()
    whole = evaluate(Scorer(noisy_scores), cases, protocol=TEST_PROTOCOL)
    scorer = Scorer(noisy_scores)
    cut = evaluate(scorer, cases, protocol=TEST_PROTOCOL, batch_size=batch_size)
    np.testing.assert_array_equal(cut.ranks, whole.ranks)
    np.testing.assert_array_equal(cut.top_10, whole.top_10)
    assert max(scorer.calls) <= batch_size
    single = Scorer(noisy_scores).recommend(cases.histories.select(np.array([17])), 10)
    np.testing.assert_array_equal(whole.top_10[17], single.item_ids[0])


def test_progress_counts_every_user_once() -> None:
    done: list[int] = []
    evaluate(Scorer(noisy_scores), cyclic_cases(50), protocol=TEST_PROTOCOL, batch_size=16, progress=done.append)
    assert done == [16, 16, 16, 2]


def test_the_reciprocal_rank_is_cut_off_where_the_list_ends_and_says_so() -> None:
    cases = cyclic_cases()
    accuracy = evaluate(Scorer(noisy_scores, max_top_k=12), cases, protocol=TEST_PROTOCOL)
    assert accuracy.mrr_label == "MRR@12"
    assert accuracy.to_json()["mrr_cutoff"] == 12
    assert accuracy.ranks.max() < 12


def test_lists_too_short_for_the_metrics_are_refused() -> None:
    with pytest.raises(CheckError, match="HR@10 needs lists of 10"):
        evaluate(Scorer(noisy_scores, max_top_k=5), cyclic_cases(), protocol=TEST_PROTOCOL)


def test_a_repeated_target_is_a_miss_and_counted() -> None:
    cases = test_cases(Ragged.from_rows([[1, 2, 3, 2], [4, 5, 6, 7]]))
    accuracy = evaluate(Scorer(successor_scores), cases, protocol=TEST_PROTOCOL)
    assert accuracy.num_repeat_targets == 1
    assert accuracy.ranks.tolist() == [-1, 0]
    assert "--allow-repeats" in accuracy.to_text()


def test_repeats_are_allowed_where_nothing_is_excluded() -> None:
    sequences = Ragged.from_rows([[1, 2, 3, 2], [4, 5, 6, 7]])
    cases, protocol = held_out_cases(sequences, "test", allow_repeats=True)
    assert protocol == "leave-one-out test, full catalogue, past allowed"
    assert cases.histories.exclude_ids.lengths.tolist() == [0, 0]
    assert cases.histories.item_ids[0].tolist() == [1, 2, 3]


def test_the_splits_hold_out_the_last_and_the_second_last_item() -> None:
    sequences = Ragged.from_rows([[1, 2, 3, 4, 5]])
    for split, target, past in (("test", 5, [1, 2, 3, 4]), ("validation", 4, [1, 2, 3])):
        cases, protocol = held_out_cases(sequences, split)
        assert split in protocol
        assert cases.targets.tolist() == [target]
        assert cases.histories.exclude_ids[0].tolist() == past


def test_json_holds_the_contracts_fields_as_fractions() -> None:
    accuracy = evaluate(Scorer(noisy_scores), cyclic_cases(), protocol=TEST_PROTOCOL).to_json()
    names = {"hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10", "mrr"}
    assert names | {"num_users", "protocol"} <= accuracy.keys()
    assert accuracy["num_users"] == 50
    for name in names:
        low, high = accuracy["intervals"][name]
        assert 0 <= low <= accuracy[name] <= high <= 1


def test_a_catalogue_smaller_than_the_list_leaves_a_padded_tail() -> None:
    cases = test_cases(Ragged.from_rows([[1, 2, 3], [3, 4, 1]]))
    accuracy = evaluate(Scorer(lambda h: np.zeros(4), num_items=4), cases, protocol=TEST_PROTOCOL)
    assert accuracy.ranks.tolist() == [0, 0]
    assert accuracy.top_10.tolist() == [[3, 4, 0, 0], [1, 2, 0, 0]]


@dataclass
class Broken(Scorer):
    """Answers rightly but for one change to the lists."""

    harm: Callable[[np.ndarray, np.ndarray], None] = lambda items, scores: None

    def recommend(self, histories: Histories, k: int) -> TopK:
        answer = super().recommend(histories, k)
        self.harm(answer.item_ids, answer.scores)
        return answer


def put(array_index: int, place: tuple[int, int], value: float) -> Callable[[np.ndarray, np.ndarray], None]:
    def harm(items: np.ndarray, scores: np.ndarray) -> None:
        (items, scores)[array_index][place] = value

    return harm


def repeat_first(items: np.ndarray, scores: np.ndarray) -> None:
    items[3, 4] = items[3, 0]


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (put(1, (3, 5), np.nan), "a NaN score"),
        (put(1, (3, 0), np.inf), "infinite score"),
        (put(1, (3, 5), 1e6), "a score above the one before it"),
        (put(0, (3, 5), NUM_ITEMS + 1), "an id outside"),
        (put(0, (3, 5), -2), "an id outside"),
        (put(0, (3, 0), 0), "an item after padding"),
        (repeat_first, "an item twice"),
    ],
)
def test_a_list_that_breaks_the_promise_is_an_error(harm: Callable[..., None], what: str) -> None:
    with pytest.raises(CheckError, match=what):
        evaluate(Broken(noisy_scores, harm=harm), cyclic_cases(), protocol=TEST_PROTOCOL)


def test_an_excluded_item_in_a_list_is_an_error() -> None:
    cases = cyclic_cases()

    class Forgetful(Scorer):
        def recommend(self, histories: Histories, k: int) -> TopK:
            window = histories.item_ids.newest(1)
            return super().recommend(Histories(window, window), k)

    with pytest.raises(CheckError, match="an excluded item"):
        evaluate(Forgetful(successor_scores), cases, protocol=TEST_PROTOCOL)


def test_lists_of_another_length_are_an_error() -> None:
    class Short(Scorer):
        def recommend(self, histories: Histories, k: int) -> TopK:
            return super().recommend(histories, k - 1)

    with pytest.raises(CheckError, match="expected"):
        evaluate(Short(noisy_scores), cyclic_cases(), protocol=TEST_PROTOCOL)

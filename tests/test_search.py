"""A search's plan: the cheapest first, and nothing made that a measured fact excludes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmrec.choice import Constraints
from slmrec.config import TrainConfig
from slmrec.errors import ConfigError
from slmrec.search import (
    Base,
    Candidate,
    Outcome,
    SearchConfig,
    candidates,
    finalists,
    needless,
    none_fits,
    shortfall,
    table,
)

TRAIN = TrainConfig(epochs=1, batch_size=16, learning_rate=3e-4)
TEACHER, STUDENT = Base("teacher", 8, "llama"), Base("student", 4, "llama")
BOUNDS = Constraints(max_latency_ms={"p99": 20.0}, min_ndcg=0.99, max_size_mb=50.0)


def config(**fields):
    return SearchConfig(**{"train": TRAIN, "constraints": BOUNDS} | fields)


def row(name="one", *, kept=1.0, half_width=0.02, p50=10.0, p99=15.0, size_mb=40.0):
    return {
        "name": name, "size_bytes": size_mb * 1e6, "timed": "alone",
        "latency": {"batch_1": {"p50_ms": p50, "p99_ms": p99, "runs": 200}},
        "accuracy": {"ndcg@10": 0.1 * kept, "num_users": 943},
        "ratios": {"ndcg@10": {"ratio": kept, "low": kept - half_width, "high": kept + half_width}},
    }  # fmt: skip


def of(base=STUDENT, layers=None, **fields):
    return Candidate(base=base, num_layers=layers or base.num_layers, **fields)


def why(candidate, *known, bounds=BOUNDS):
    return needless(candidate, [Outcome(other, measured) for other, measured in known], bounds)


def test_what_is_cheap_to_make_comes_first():
    names = [one.name for one in candidates([Base("s", 2, "x")], config())]
    assert names == [
        "s", "s-items8", "s-int8", "s-int8-items8", "s-int8-keep", "s-int8-keep-items8",
        "s-l1", "s-l1-items8", "s-l1-int8", "s-l1-int8-items8", "s-l1-int8-keep", "s-l1-int8-keep-items8",
        "s-l1-heal1", "s-l1-heal1-items8", "s-l1-heal1-int8", "s-l1-heal1-int8-items8", "s-l1-heal1-int8-keep",
        "s-l1-heal1-int8-keep-items8",
    ]  # fmt: skip


def test_the_first_checkpoint_is_the_reference_and_nothing_is_trained_before_all_else_was_tried():
    plan = candidates([TEACHER, STUDENT], config(heal_epochs=3))
    assert plan[0] == of(TEACHER)
    healed = [one.heal_epochs for one in plan]
    assert healed == sorted(healed)
    assert {one.num_layers for one in plan if one.base == TEACHER} == {8, 6, 4}
    assert len({one.name for one in plan}) == len(plan) == 2 * 5 * 6
    for position, one in enumerate(plan):  # what a candidate is made from comes before it
        whole = of(one.base, int8=one.int8, int8_items=one.int8_items)
        fp32 = Candidate(base=one.base, num_layers=one.num_layers, heal_epochs=one.heal_epochs)
        assert plan.index(whole) <= position
        assert plan.index(fp32) <= position


def test_without_healing_every_candidate_is_tried_once_and_none_is_trained():
    plan = candidates([STUDENT], config(heal_epochs=0, num_layers=(3, 3, 1)))
    assert len(set(plan)) == len(plan) == 3 * 6
    assert not any(one.heal_epochs for one in plan)


def test_what_clearly_fails_the_gate_speaks_for_all_that_is_made_of_it():
    bad, unclear = row(kept=0.90), row(kept=0.98)
    for smaller in (of(int8=True), of(layers=3, heal_epochs=1), of(layers=2, int8=True)):
        assert "keeps 92.0 % of NDCG@10 at most" in why(smaller, (of(), bad))
        assert why(smaller, (of(), unclear)) is None
        assert why(smaller, (of(TEACHER), bad)) is None
    cut = (of(layers=3), bad)
    assert why(of(layers=3, int8=True), cut)
    assert why(of(layers=2), cut)
    assert why(of(layers=3, heal_epochs=1), cut) is None  # healing mends what was cut
    assert why(of(), cut) is None


def test_an_interval_without_an_upper_end_excludes_nothing():
    open_ended = row(kept=0.5)
    open_ended["ratios"]["ndcg@10"]["high"] = None
    assert why(of(int8=True), (of(), open_ended)) is None


def test_the_8_bit_item_table_is_not_tried_where_the_same_lists_fail_the_gate():
    assert "lists are those of student" in why(of(int8_items=True), (of(), row(kept=0.98)))
    assert why(of(int8_items=True), (of(), row(kept=0.991, p99=19.9))) is None


@pytest.mark.parametrize("too_much", [{"p50": 26.0, "p99": 30.0}, {"size_mb": 63.0}])
def test_nothing_is_healed_that_is_clearly_too_slow_or_too_large_unhealed(too_much):
    unhealed, healed = of(layers=3), of(layers=3, heal_epochs=1)
    assert "exceeds a bound" in why(healed, (unhealed, row(kept=0.98, **too_much)))
    barely = {name: value / 1.25 for name, value in too_much.items()}
    assert why(healed, (unhealed, row(kept=0.98, **barely))) is None
    assert why(of(layers=2, heal_epochs=1), (unhealed, row(kept=0.98, **too_much))) is None
    assert why(of(layers=3, heal_epochs=1, int8=True), (unhealed, row(kept=0.98, **too_much))) is None


def test_nothing_is_made_that_cannot_be_faster_than_what_keeps_to_every_bound():
    good = (of(layers=3), row(p50=9.0, p99=14.0))
    for larger in (of(layers=3, heal_epochs=1), of(TEACHER, 4, heal_epochs=1), of(TEACHER, 3, heal_epochs=1)):
        assert "student-l3 is no larger and keeps to every bound" in why(larger, good)
    for other in (of(layers=2), of(layers=3, int8=True), of(Base("wide", 8, "another shape"), 4)):
        assert why(other, good) is None
    near = (of(layers=3), row(p50=9.0, p99=19.0))  # a noisier minute, and it would not
    assert why(of(layers=3, heal_epochs=1), near) is None


def test_layers_are_kept_in_fp32_only_where_8_bits_in_all_of_them_are_what_fails():
    keep, plain = of(int8=True, keeps_layers=True), of(int8=True)
    good, bad, terrible = row(kept=0.995, p99=19.0), row(kept=0.985), row(kept=0.5)
    for failed in (bad, terrible):
        assert why(keep, (of(), good), (plain, failed)) is None
        assert why(of(layers=3, int8=True, keeps_layers=True), (of(), good), (plain, failed)) is None
    assert "student-int8 keeps to the gate" in why(keep, (of(), good), (plain, good))
    assert "student fails the gate before" in why(keep, (of(), bad), (plain, bad))
    assert "exceeds a bound" in why(keep, (of(), good), (plain, row(kept=0.985, p50=26.0)))
    for refused, said in ((False, "student-int8 was skipped"), (True, "student-int8 was refused")):
        unmeasured = Outcome(plain, reason="whatever", refused=refused)
        assert needless(keep, [Outcome(of(), good), unmeasured], BOUNDS) == said


def test_what_was_not_measured_excludes_nothing():
    outcome = Outcome(of(), reason="the two do not answer alike", refused=True)
    assert needless(of(int8=True), [outcome], BOUNDS) is None


rows = st.builds(
    row, kept=st.floats(0.5, 1.2), p50=st.floats(1, 60), p99=st.floats(1, 90), size_mb=st.floats(10, 90)
)  # fmt: skip


@given(rows)
def test_a_shortfall_is_nought_exactly_where_no_bound_is_broken(measured):
    assert (shortfall(measured, BOUNDS) == 0) == (not BOUNDS.broken_by(measured))


@given(st.lists(rows, max_size=6))
def test_whatever_keeps_to_the_bounds_is_a_finalist(measured):
    outcomes = [Outcome(of(), one) for one in measured if one["latency"]["batch_1"]["p50_ms"] <= 20]
    found = finalists(outcomes, BOUNDS)
    assert all(outcome in found for outcome in outcomes if not BOUNDS.broken_by(outcome.row))
    assert all(outcome.row["ratios"]["ndcg@10"]["ratio"] >= 0.99 for outcome in found)


def test_the_nearest_of_those_that_miss_is_named_with_its_distance():
    found = [row("far", p50=40, p99=90), row("near", p99=22.0), row("wrong", kept=0.7)]
    error = none_fits(found, BOUNDS)
    assert "near came nearest: p99 22.0 ms is above 20 (10.0 % off)" in str(error)
    assert "nothing was bundled" in str(error)


def test_the_table_says_of_every_candidate_what_became_of_it():
    outcomes = [
        Outcome(of(), row("student", p99=30.0)), Outcome(of(int8=True), row("student-int8") | {"timed": "in turn"}),
        Outcome(of(layers=3), reason="needless"), Outcome(of(layers=2), reason="no parity", refused=True),
    ]  # fmt: skip
    text = table(outcomes, BOUNDS, "student-int8")[2:]
    assert text == [
        "| student | 100.0 % [98.0, 102.0] | 10.00* | 30.00* | 40.0 | p99 30.0 ms is above 20 |",
        "| student-int8 | 100.0 % [98.0, 102.0] | 10.00 | 15.00 | 40.0 | **chosen** |",
        "| student-l3 | – | – | – | – | skipped: needless |",
        "| student-l2 | – | – | – | – | refused: no parity |",
    ]


@pytest.mark.parametrize("gate", [0.0, -0.1, 1.01, float("nan"), None])
def test_a_gate_that_is_no_share_is_refused(gate):
    with pytest.raises(ConfigError, match=r"accuracy_gate=|min_ndcg="):
        config(constraints=Constraints(min_ndcg=gate))


def test_depths_and_rounds_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="below 1"):
        config(num_layers=(3, 0))
    with pytest.raises(ConfigError, match="p99 of 50 rounds says nothing"):
        config(rounds=50)
    with pytest.raises(ConfigError, match="num_layers=8, but the deepest checkpoint has 8 layers"):
        candidates([STUDENT, TEACHER], config(num_layers=(8, 3)))

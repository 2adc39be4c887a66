"""Splits, windows, batches and samples: who is asked for what, given what."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmrec.config import WindowConfig
from slmrec.errors import DataError
from slmrec.ragged import Ragged
from slmrec.samples import training_samples
from slmrec.sequences import length_batches, training_sequences, training_windows, validation_cases
from slmrec.sequences import test_cases as held_out

SEQUENCES = st.lists(st.lists(st.integers(1, 99), max_size=12), min_size=1, max_size=8)


def as_lists(rows: Ragged) -> list[list[int]]:
    return [row.tolist() for row in rows]


@given(SEQUENCES)
@settings(deadline=None)
def test_leave_one_out_keeps_every_future_item_out_of_the_past(rows):
    evaluable = [row for row in rows if len(row) >= 3]
    sequences = Ragged.from_rows(rows)
    assert as_lists(training_sequences(sequences)) == [row[:-2] if len(row) >= 3 else row for row in rows]
    if not evaluable:
        with pytest.raises(DataError, match="no user can be evaluated"):
            held_out(sequences)
        return
    test, validation = held_out(sequences), validation_cases(sequences)
    assert as_lists(test.histories.item_ids) == [row[:-1] for row in evaluable]
    assert test.targets.tolist() == [row[-1] for row in evaluable]
    assert as_lists(validation.histories.item_ids) == [row[:-2] for row in evaluable]
    assert validation.targets.tolist() == [row[-2] for row in evaluable]


@given(SEQUENCES, st.integers(1, 5), st.one_of(st.none(), st.integers(1, 9)))
@settings(deadline=None)
def test_windows_ask_for_every_event_once_but_the_oldest(rows, max_history, max_events):
    kept = [row if max_events is None else row[-max_events:] for row in rows]
    windows = as_lists(training_windows(Ragged.from_rows(rows), max_history=max_history, max_events=max_events))
    assert [target for row in kept for target in row[1:]] == [target for window in windows for target in window[1:]]
    assert all(2 <= len(window) <= max_history + 1 for window in windows)
    assert sum(len(window) <= max_history for window in windows) <= len(rows), "one short window a user, the oldest"


@given(st.lists(st.integers(1, 50), min_size=1, max_size=300), st.integers(1, 16), st.integers(0, 99))
@settings(deadline=None)
def test_batches_hold_every_sample_once_and_depend_on_the_seed_alone(lengths, batch_size, seed):
    batches = list(length_batches(np.array(lengths), batch_size, seed=seed))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert max(map(len, batches)) <= batch_size
    again = list(length_batches(np.array(lengths), batch_size, seed=seed))
    assert [rows.tolist() for rows in batches] == [rows.tolist() for rows in again]


def test_batches_of_like_length_pad_little():
    lengths = np.random.default_rng(0).geometric(0.1, size=5000)
    padded = sum(lengths[rows].max() * len(rows) for rows in length_batches(lengths, 16, seed=0))
    random = lengths.reshape(-1, 20).max(axis=1).sum() * 20
    assert padded < 1.1 * lengths.sum() < 0.5 * random


ROWS = Ragged.from_rows([[1, 2, 3, 4, 5, 6], [7, 8], [9]])
WINDOW = WindowConfig(max_history=2, max_events=None)


@pytest.mark.parametrize(
    ("supervision", "after_suffix", "items", "targets"),
    [
        ("last", False, [[2, 3], [0, 7]], [[0, 4], [0, 8]]),
        ("last", True, [[2, 3], [0, 7]], [[4], [8]]),
        ("prefixes", True, [[0, 1], [1, 2], [2, 3], [0, 7]], [[2], [3], [4], [8]]),
        ("all", False, [[0, 1], [2, 3], [0, 7]], [[0, 2], [3, 4], [0, 8]]),
    ],
)
def test_supervision_says_which_events_are_targets(supervision, after_suffix, items, targets):
    samples = training_samples(ROWS, WINDOW, supervision, after_suffix=after_suffix)
    batch = samples.batch(np.arange(len(samples.lengths)))
    assert batch.item_ids.tolist() == items, "the two newest events of the first user are held out"
    assert batch.targets.tolist() == targets
    assert samples.num_targets.sum() == (batch.targets != 0).sum()


def test_nothing_to_learn_is_refused():
    with pytest.raises(DataError, match="nothing to learn"):
        training_samples(Ragged.from_rows([[1, 2, 3], [4]]), WINDOW, "all", after_suffix=False)

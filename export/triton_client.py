#!/usr/bin/env python3
"""Ask the models of this Triton repository; needs numpy, and tritonclient to send.

    python client.py localhost:8000 recommend "12,7,45" "3,9"      # histories of internal ids, oldest first

Requests are padded here to the buckets the graph was made for, by each user's own length: a user's list does not depend
on who shares the batch, and Triton can batch, since it joins requests of equal shapes alone.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Padded = tuple[list[int], dict[str, np.ndarray]]
"""Rows of the users, and the inputs: item_ids and exclude_ids, int64 [users, width]."""


def padded(
    histories: Sequence[Sequence[int]], excluded: Sequence[Sequence[int]], buckets: Sequence[int], exclude_step: int,
    *, keep_history: bool,
) -> list[Padded]:  # fmt: skip
    """Requests of equal shape, each with the users it is for.

    Args:
        histories: internal ids, oldest first, one row a user; the newest are kept where a row is too long.
        excluded: further ids that must not be recommended.
        buckets: widths of `item_ids`, ascending.
        exclude_step: widths of `exclude_ids` are multiples of this.
        keep_history: whether items of the history may be recommended; else they are excluded, beyond the window too.
    """
    users: dict[tuple[int, int], list[int]] = {}
    gone = []
    for row, (history, others) in enumerate(zip(histories, excluded, strict=True)):
        if not len(history):
            raise ValueError(f"row {row} has no history; recommend it what is popular")
        gone.append(sorted({*others, *(() if keep_history else history)}))
        length = min(len(history), buckets[-1])
        width = next(bucket for bucket in buckets if bucket >= length)
        masked = max(exclude_step, -(-len(gone[-1]) // exclude_step) * exclude_step)
        users.setdefault((width, masked), []).append(row)
    found = []
    for (width, masked), rows in users.items():
        item_ids = np.zeros((len(rows), width), dtype=np.int64)
        exclude_ids = np.zeros((len(rows), masked), dtype=np.int64)
        for place, row in enumerate(rows):
            newest = list(histories[row])[-width:]
            item_ids[place, width - len(newest) :] = newest
            exclude_ids[place, masked - len(gone[row]) :] = gone[row]
        found.append((rows, {"item_ids": item_ids, "exclude_ids": exclude_ids}))
    return found


def recommend(
    url: str,
    model: str,
    histories: Sequence[Sequence[int]],
    excluded: Sequence[Sequence[int]],
    padding: Mapping[str, Any],
) -> list[list[int]]:
    """Internal ids of the best items of each user, best first."""
    from tritonclient.http import InferenceServerClient, InferInput

    client = InferenceServerClient(url)
    lists: list[list[int]] = [[] for _ in histories]
    for rows, arrays in padded(
        histories, excluded, padding["buckets"], padding["exclude_step"], keep_history=padding["keep_history"]
    ):
        inputs = [InferInput(name, list(array.shape), "INT64") for name, array in arrays.items()]
        for tensor, array in zip(inputs, arrays.values(), strict=True):
            tensor.set_data_from_numpy(array)
        found = client.infer(model, inputs).as_numpy("top_items")
        for row, items in zip(rows, found, strict=True):
            lists[row] = [int(item) for item in items if item]
    return lists


def main() -> int:
    """Ask for the histories on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("history", nargs="+")
    arguments = parser.parse_args()
    padding = json.loads((Path(__file__).parent / "padding.json").read_text(encoding="ascii"))
    histories = [[int(item) for item in history.split(",")] for history in arguments.history]
    for items in recommend(arguments.url, arguments.model, histories, [[] for _ in histories], padding):
        print(" ".join(map(str, items)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

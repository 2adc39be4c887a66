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
    histories: Sequence[Sequence[int]], excluded: Sequence[Sequence[int]], padding: Mapping[str, Any]
) -> list[Padded]:
    """Requests of equal shape, each with the users it is for.

    Args:
        histories: internal ids, oldest first, one row a user; the newest are kept where a row is too long.
        excluded: further ids that must not be recommended.
        padding: `padding.json`: widths of `item_ids` (buckets, ascending), of what `exclude_ids`' are multiples,
            whether items of the history may be recommended (else they are excluded, beyond the window too), the
            number of items, and the users of a request at most.

    Raises:
        ValueError: a user without history, or ids that do not exist.
    """
    users: dict[tuple[int, int], list[int]] = {}
    gone = []
    for row, (history, others) in enumerate(zip(histories, excluded, strict=True)):
        _check(row, history, others, padding["num_items"])
        gone.append(sorted({*others, *(() if padding["keep_history"] else history)}))
        length = min(len(history), padding["buckets"][-1])
        width = next(bucket for bucket in padding["buckets"] if bucket >= length)
        step = padding["exclude_step"]
        users.setdefault((width, max(step, -(-len(gone[-1]) // step) * step)), []).append(row)
    found = []
    for (width, masked), rows in users.items():
        for start in range(0, len(rows), padding["max_batch"]):
            part = rows[start : start + padding["max_batch"]]
            inputs = {
                "item_ids": _left_padded([list(histories[row])[-width:] for row in part], width),
                "exclude_ids": _left_padded([gone[row] for row in part], masked),
            }
            found.append((part, inputs))
    return found


def _check(row: int, history: Sequence[int], others: Sequence[int], num_items: int) -> None:
    if not len(history):
        raise ValueError(f"row {row} has no history; recommend it what is popular")
    unknown = [item for item in (*history, *others) if not 1 <= item <= num_items]
    if unknown:
        raise ValueError(f"row {row} has the id {unknown[0]}; items are 1 to {num_items}")


def _left_padded(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    found = np.zeros((len(rows), width), dtype=np.int64)
    for place, row in enumerate(rows):
        found[place, width - len(row) :] = row
    return found


def recommend(
    url: str,
    model: str,
    histories: Sequence[Sequence[int]],
    excluded: Sequence[Sequence[int]],
    padding: Mapping[str, Any],
) -> list[list[int]]:
    """Internal ids of the best items of each user, best first.

    Raises:
        ValueError: as `padded`, an answer that is an error, or NaN scores, which are no list.
        OSError: nobody answers there.
    """
    from tritonclient.http import InferenceServerClient, InferInput
    from tritonclient.utils import InferenceServerException

    lists: list[list[int]] = [[] for _ in histories]
    with InferenceServerClient(url) as client:
        for rows, arrays in padded(histories, excluded, padding):
            inputs = [InferInput(name, list(array.shape), "INT64") for name, array in arrays.items()]
            for tensor, array in zip(inputs, arrays.values(), strict=True):
                tensor.set_data_from_numpy(array)
            try:
                answer = client.infer(model, inputs)
            except InferenceServerException as error:
                raise ValueError(f"{model} at {url}: {error}") from None
            if np.isnan(answer.as_numpy("top_scores")).any():
                raise ValueError("the model gave NaN scores")
            for row, items in zip(rows, answer.as_numpy("top_items"), strict=True):
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
    try:
        histories = [[int(item) for item in history.split(",")] for history in arguments.history]
        lists = recommend(arguments.url, arguments.model, histories, [[] for _ in histories], padding)
    except ImportError:
        print("error: tritonclient is not installed; try: pip install 'tritonclient[http]'", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for items in lists:
        print(" ".join(map(str, items)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

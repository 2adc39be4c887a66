"""Whether a graph gives every test user the checkpoint's top ten, asked alone and in the company of others.

    python benchmarks/graph_lists.py runs/demo/student-int8 runs/demo/export -d runs/demo/data

Lists count as equal where they differ only among items whose scores are within 1e-5 of the largest score.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from recording import record

from slmrec.artifact import open_artifact
from slmrec.cli.loading import load_recommender
from slmrec.dataset import load_dataset
from slmrec.recommender import TopK
from slmrec.sequences import test_cases

NEAR_TIE = 1e-5
LIST = 10


def differences(expected: TopK, actual: TopK, scale: float) -> tuple[int, int, float]:
    """Users whose first ten differ, those of them where near-ties do not explain it, and the largest score gap.

    Args:
        expected: at least one item more than ten, so that what stands just below the list is known.
        actual: of the same users.
        scale: the largest score.
    """
    differ = (expected.item_ids[:, :LIST] != actual.item_ids[:, :LIST]).any(axis=1)
    unexplained = 0
    for row in np.flatnonzero(differ):
        known = dict(zip(expected.item_ids[row].tolist(), expected.scores[row].tolist(), strict=True))
        pairs = zip(expected.item_ids[row, :LIST].tolist(), actual.item_ids[row, :LIST].tolist(), strict=True)
        gaps = [abs(known[a] - known.get(b, -np.inf)) for a, b in pairs if a != b]
        unexplained += not max(gaps) <= NEAR_TIE * scale
    gap = np.abs(expected.scores - actual.scores).max() / scale
    return int(differ.sum()), unexplained, float(gap)


def main() -> None:
    """Compare, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("graph", type=Path)
    parser.add_argument("-d", "--data", type=Path, required=True)
    arguments = parser.parse_args()
    histories = test_cases(load_dataset(arguments.data).sequences).histories
    checkpoint, graph = (
        load_recommender(open_artifact(path), "cpu") for path in (arguments.checkpoint, arguments.graph)
    )
    expected = checkpoint.recommend(histories, 2 * LIST)
    together = graph.recommend(histories, 2 * LIST)
    singles = [graph.recommend(histories.select(np.array([row])), 2 * LIST) for row in range(len(histories))]
    alone = TopK(np.concatenate([s.item_ids for s in singles]), np.concatenate([s.scores for s in singles]))
    scale = float(np.abs(expected.scores).max())
    pairs = {
        "graph in a batch, checkpoint": (expected, together),
        "graph alone, checkpoint": (expected, alone),
        "graph alone, graph in a batch": (together, alone),
    }
    result = {"num_users": len(histories)}
    for name, (one, other) in pairs.items():
        differ, unexplained, gap = differences(one, other, scale)
        result[name] = {"lists_that_differ": differ, "not_by_near_ties": unexplained, "largest_gap": gap}
    result["bits_equal_alone_and_in_a_batch"] = bool(
        (together.scores == alone.scores).all() and (together.item_ids == alone.item_ids).all()
    )
    record(f"graph_lists_{arguments.graph.name}", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

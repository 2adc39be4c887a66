"""Golden requests of a bundle and their expected answers."""

from pathlib import Path

import numpy as np

from slmrec.ragged import Ragged
from slmrec.recommender import Histories, TopK

GOLDEN_FILE = "golden.npz"


def save_golden(folder: Path, histories: Histories, answer: TopK) -> None:
    """Write requests and answers: arrays only, no user ids, no pickles."""
    np.savez(
        folder / GOLDEN_FILE,
        item_ids=histories.item_ids.values,
        item_offsets=histories.item_ids.offsets,
        exclude_ids=histories.exclude_ids.values,
        exclude_offsets=histories.exclude_ids.offsets,
        top_items=answer.item_ids,
        top_scores=answer.scores,
    )


def stored_golden(folder: Path) -> tuple[Histories, TopK]:
    """Requests and answers as `save_golden` wrote them."""
    with np.load(folder / GOLDEN_FILE, allow_pickle=False) as stored:
        golden = dict(stored)
    histories = Histories(
        Ragged(golden["item_ids"], golden["item_offsets"]), Ragged(golden["exclude_ids"], golden["exclude_offsets"])
    )
    return histories, TopK(golden["top_items"], golden["top_scores"])

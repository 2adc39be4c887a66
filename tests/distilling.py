"""What tests of distillation start from: settings, sequences, and features by their definition."""

import torch

from compress.blocks import block_ends, state_index
from compress.features import StoreSpec
from compress.objective import with_teacher
from slmrec.compress_config import DistillConfig
from slmrec.config import TrainConfig
from slmrec.ragged import Ragged

TRAIN = TrainConfig(epochs=1, batch_size=4, learning_rate=1e-3)
SEQUENCES = Ragged.from_rows([[1, 2, 3, 4, 5, 6, 7], [9, 8, 7, 6, 5], [3, 4, 5, 6], [11, 12, 13, 14, 15, 16]])

NO_FEATURES = {"direction_weight": 0.0, "magnitude_weight": 0.0}


def config(**changes):
    return DistillConfig(**{"num_layers": 2, "num_blocks": 2, "train": TRAIN} | changes)


def batch_with_features(teacher, samples, rows, num_blocks):
    """Features by the definition: run the teacher on each sample alone and read the ends of its blocks."""
    features = []
    for row in rows:
        window = samples.windows[int(row)]
        states = teacher(torch.from_numpy(window[:-1])[None])
        ends = block_ends(teacher.num_layers, num_blocks)
        features.append(torch.stack([states[state_index(end)][0] for end in ends], dim=1))
    return with_teacher(samples.batch(rows), {"features": torch.cat(features).detach()}, has_prefix=False)


def spec(teacher, **changes):
    return StoreSpec(
        **{"num_blocks": 2, "hidden_size": teacher.hidden_size, "dtype": "bfloat16", "list_size": 0} | changes
    )

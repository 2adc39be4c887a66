"""The teacher's features at every target, computed once: distillation then costs the student alone."""

import errno
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import BFloat16
from torch import Tensor

from compress.blocks import block_ends, state_index
from slmrec.errors import ConfigError
from slmrec.models.decoder import DecoderModel
from slmrec.progress import progress_bar
from slmrec.samples import Samples

BATCH_SIZE = 64
SAVE_EVERY_BATCHES = 8


class FeatureStore:
    """Rows of features, one per target, in the order of the samples; bfloat16, memory-mapped.

    Row `offsets[s] + p` belongs to the p-th target of sample s and holds [blocks, hidden].
    """

    def __init__(self, path: Path, samples: Samples, shape: tuple[int, int]) -> None:
        self.path = path
        self.offsets = np.concatenate([[0], np.cumsum(samples.num_targets)])
        self.shape = (int(self.offsets[-1]), *shape)

    @property
    def size_bytes(self) -> int:
        """Bytes on disk, 2 per value."""
        return 2 * int(np.prod(self.shape))

    def read(self, rows: np.ndarray) -> BFloat16[Tensor, "targets blocks hidden"]:
        """Features of the samples' targets, samples in the order named."""
        stored = np.memmap(self.path, dtype=np.int16, mode="r", shape=self.shape)
        wanted = np.concatenate([np.arange(self.offsets[row], self.offsets[row + 1]) for row in rows])
        return torch.from_numpy(stored[wanted]).view(torch.bfloat16)


def build_features(teacher: DecoderModel, samples: Samples, num_blocks: int, folder: Path, key: str) -> FeatureStore:
    """Run the teacher once over all samples; a killed run goes on where it was.

    Args:
        teacher: in evaluation mode on its device; it is not trained.
        samples: what the student will be trained on.
        num_blocks: features are read at the last layer of each of these blocks.
        folder: where the store lies.
        key: of the run: another key rebuilds the store.

    Raises:
        ConfigError: the disk has too little room for the store.
    """
    store = FeatureStore(folder / "features.bin", samples, (num_blocks, teacher.hidden_size))
    batches = _batches(samples)
    done = _batches_done(store, folder / "features.json", key)
    if done == len(batches):
        return store
    if not done:
        _reserve(store)
    rows = np.memmap(store.path, dtype=np.int16, mode="r+", shape=store.shape)
    with progress_bar("features", len(batches), done=done) as bar:
        for number in range(done, len(batches)):
            _write_batch(teacher, samples, batches[number], rows, store.offsets)
            if (number + 1) % SAVE_EVERY_BATCHES == 0 or number + 1 == len(batches):
                rows.flush()
                _note_done(folder / "features.json", key, number + 1)
            bar(1)
    return store


@torch.inference_mode()
def _write_batch(
    teacher: DecoderModel, samples: Samples, batch_rows: np.ndarray, rows: np.memmap, offsets: np.ndarray
) -> None:
    device = next(teacher.parameters()).device
    batch = samples.batch(batch_rows)
    states = teacher(batch.item_ids.to(device))
    ends = block_ends(teacher.num_layers, rows.shape[1])
    wanted = batch.targets != 0
    features = torch.stack([states[state_index(end)][wanted] for end in ends], dim=1)
    places = np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in batch_rows])
    rows[places] = features.to(torch.bfloat16).cpu().view(torch.int16).numpy()


def _batches(samples: Samples) -> Sequence[np.ndarray]:
    """Samples of like length together: a fixed order, so that a resumed run computes the same batches."""
    order = np.argsort(samples.lengths, kind="stable")
    return [order[start : start + BATCH_SIZE] for start in range(0, len(order), BATCH_SIZE)]


def _batches_done(store: FeatureStore, note: Path, key: str) -> int:
    if not note.exists() or not store.path.exists() or store.path.stat().st_size != store.size_bytes:
        return 0
    recorded = json.loads(note.read_text(encoding="utf-8"))
    return int(recorded["batches"]) if recorded["key"] == key else 0


def _note_done(note: Path, key: str, batches: int) -> None:
    partial = note.with_suffix(".partial")
    partial.write_text(json.dumps({"key": key, "batches": batches}), encoding="utf-8")
    partial.rename(note)


def _reserve(store: FeatureStore) -> None:
    """Take the whole room on disk at once: a page that finds no room later would kill the process."""
    with store.path.open("wb") as stream:
        try:
            os.posix_fallocate(stream.fileno(), 0, store.size_bytes)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            stream.truncate(0)
            free = shutil.disk_usage(store.path.parent).free
            raise ConfigError(
                f"the teacher's features need {store.size_bytes / 1e6:.0f} MB, {store.path.parent} has "
                f"{free / 1e6:.0f} MB free",
                remedy="another --output, fewer --num-blocks, or a smaller --max-events for the teacher",
            ) from None

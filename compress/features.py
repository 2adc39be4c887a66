"""What a frozen teacher says at every target, computed once: distillation then costs the student alone."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compress.blocks import block_ends, state_index
from slmrec.artifact import canonical_hash, replace_json
from slmrec.errors import ConfigError
from slmrec.models.decoder import DecoderModel
from slmrec.models.ranking import top_k
from slmrec.progress import progress_bar
from slmrec.samples import Samples
from slmrec.train import Batch

BATCH_SIZE = 64
SAVE_EVERY_BATCHES = 8
NOTE_FILE = "store.json"

Reader = Callable[[np.ndarray], dict[str, Tensor]]
"""Sample numbers -> fields of a `Batch` that hold what the teacher says at the samples' targets."""


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """What is read from a teacher at each target."""

    num_blocks: int
    """Features at the end of each of these blocks; 0 reads none."""
    hidden_size: int
    dtype: str
    """Of features: bfloat16 or float32."""
    list_size: int
    """Best items and their scores; 0 reads none."""

    def columns(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Field of `Batch` -> type on disk and shape of one target's row; bfloat16 lies in int16."""
        columns: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        if self.num_blocks:
            stored = np.dtype(np.int16 if self.dtype == "bfloat16" else np.float32)
            columns["features"] = (stored, (self.num_blocks, self.hidden_size))
        if self.list_size:
            columns["best"] = (np.dtype(np.int32), (self.list_size,))
            columns["best_scores"] = (np.dtype(np.float32), (self.list_size,))
        return columns

    def size_bytes(self, num_targets: int) -> int:
        """Bytes on disk.

        >>> StoreSpec(num_blocks=4, hidden_size=576, dtype="bfloat16", list_size=0).size_bytes(100_000)
        460800000
        """
        return sum(num_targets * stored.itemsize * int(np.prod(shape)) for stored, shape in self.columns().values())

    def key(self, teacher_hash: str, samples: Samples) -> str:
        """Changes with the teacher, with what is read from it, and with the positions it is read at."""
        positions = [samples.windows.values, samples.windows.offsets, samples.num_targets]
        read_at = canonical_hash([hashlib.sha256(part.tobytes()).hexdigest() for part in positions])
        return canonical_hash({"teacher": teacher_hash, "samples": read_at, "spec": vars(self)})


class FeatureStore:
    """Rows of one target each, in the order of the samples, memory-mapped: `offsets[s] + p` is sample s's p-th."""

    def __init__(self, folder: Path, samples: Samples, spec: StoreSpec) -> None:
        self.folder, self.spec = folder, spec
        self.offsets = np.concatenate([[0], np.cumsum(samples.num_targets)])
        self.num_targets = int(self.offsets[-1])

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        return self.spec.size_bytes(self.num_targets)

    def column(self, name: str, mode: str) -> np.memmap:
        """One field of every target, [targets, ...]."""
        stored, shape = self.spec.columns()[name]
        path = self.folder / f"{name}.bin"
        return np.memmap(path, dtype=stored, mode=mode, shape=(self.num_targets, *shape))  # type: ignore[call-overload, no-any-return]

    def rows_of(self, samples: np.ndarray) -> np.ndarray:
        """Rows of the samples' targets, samples in the order named."""
        return np.concatenate([np.arange(self.offsets[row], self.offsets[row + 1]) for row in samples])

    def read(self, samples: np.ndarray) -> dict[str, Tensor]:
        """Fields of a `Batch` of these samples: features [targets, blocks, hidden], best and best_scores."""
        rows = self.rows_of(samples)
        found = {name: torch.from_numpy(self.column(name, "r")[rows]) for name in self.spec.columns()}
        if "features" in found and self.spec.dtype == "bfloat16":
            found["features"] = found["features"].view(torch.bfloat16)
        return found


def build_store(teacher: DecoderModel, samples: Samples, spec: StoreSpec, folder: Path, key: str) -> FeatureStore:
    """Run the teacher once over all samples; a killed run goes on where it was.

    Args:
        teacher: in evaluation mode on its device; it is not trained.
        samples: what the student will be trained on.
        spec: what is read.
        folder: where the store lies; made if need be.
        key: of teacher, samples and spec: another key rebuilds the store.

    Raises:
        ConfigError: the disk has too little room for the store.
    """
    folder.mkdir(parents=True, exist_ok=True)
    store = FeatureStore(folder, samples, spec)
    batches = _batches(samples)
    done = _batches_done(store, key)
    if done == len(batches):
        return store
    if not done:
        replace_json(folder / NOTE_FILE, {"key": key, "batches": 0})
        _reserve(store)
    columns = {name: store.column(name, "r+") for name in spec.columns()}
    with progress_bar("features", len(batches), done=done) as bar:
        for number in range(done, len(batches)):
            _write_batch(teacher, samples, batches[number], store, columns)
            if (number + 1) % SAVE_EVERY_BATCHES == 0 or number + 1 == len(batches):
                for column in columns.values():
                    column.flush()
                replace_json(folder / NOTE_FILE, {"key": key, "batches": number + 1})
            bar(1)
    return store


def drop_store(folder: Path, *, keep: bool) -> None:
    """Remove a store that no run asked to keep; one that is kept says so, to the next run as well."""
    note = folder / NOTE_FILE
    if not note.exists():
        return
    recorded = json.loads(note.read_text(encoding="utf-8"))
    if keep:
        replace_json(note, recorded | {"keep": True})
    elif not recorded.get("keep"):
        shutil.rmtree(folder, ignore_errors=True)


def live_reader(teacher: DecoderModel, samples: Samples, spec: StoreSpec) -> Reader:
    """Ask the teacher at every step, as the published code does; what a store is measured against."""

    def read(rows: np.ndarray) -> dict[str, Tensor]:
        return {name: value.cpu() for name, value in teacher_says(teacher, samples.batch(rows), spec).items()}

    return read


@torch.no_grad()
def teacher_says(teacher: DecoderModel, batch: Batch, spec: StoreSpec) -> dict[str, Tensor]:
    """The fields of `spec` for one batch, in fp32: what a store holds and what a live teacher answers.

    The best items are ranked over the whole catalogue, seen items included: they are what the teacher would score.
    """
    device = next(teacher.parameters()).device
    states = teacher(batch.item_ids.to(device))
    wanted = (batch.targets != 0).to(device)
    found: dict[str, Tensor] = {}
    if spec.num_blocks:
        ends = block_ends(teacher.num_layers, spec.num_blocks)
        found["features"] = torch.stack([states[state_index(end)][wanted] for end in ends], dim=1).float()
    if spec.list_size:
        best, scores = top_k(teacher.logits(states[-1][wanted]), spec.list_size)
        found |= {"best": best.int(), "best_scores": scores}
    return found


def _write_batch(
    teacher: DecoderModel, samples: Samples, numbers: np.ndarray, store: FeatureStore, columns: Mapping[str, np.memmap]
) -> None:
    rows = store.rows_of(numbers)
    for name, value in teacher_says(teacher, samples.batch(numbers), store.spec).items():
        packed = name == "features" and store.spec.dtype == "bfloat16"
        stored = value.to(torch.bfloat16).view(torch.int16) if packed else value
        columns[name][rows] = stored.cpu().numpy()


def _batches(samples: Samples) -> Sequence[np.ndarray]:
    """Samples of like length together: a fixed order, so that a resumed run computes the same batches."""
    order = np.argsort(samples.lengths, kind="stable")
    return [order[start : start + BATCH_SIZE] for start in range(0, len(order), BATCH_SIZE)]


def _batches_done(store: FeatureStore, key: str) -> int:
    note = store.folder / NOTE_FILE
    sizes = {name: stored.itemsize * int(np.prod(shape)) for name, (stored, shape) in store.spec.columns().items()}
    files = {name: store.folder / f"{name}.bin" for name in sizes}
    whole = all(files[n].exists() and files[n].stat().st_size == size * store.num_targets for n, size in sizes.items())
    if not note.exists() or not whole:
        return 0
    recorded = json.loads(note.read_text(encoding="utf-8"))
    return int(recorded["batches"]) if recorded["key"] == key else 0


def _reserve(store: FeatureStore) -> None:
    """Take the whole room on disk at once: a page that finds no room later would kill the process."""
    for name, (stored, shape) in store.spec.columns().items():
        with (store.folder / f"{name}.bin").open("wb") as stream:
            try:
                os.posix_fallocate(stream.fileno(), 0, store.num_targets * stored.itemsize * int(np.prod(shape)))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                for written in store.folder.glob("*.bin"):
                    os.truncate(written, 0)
                free = shutil.disk_usage(store.folder).free
                raise ConfigError(
                    f"the teacher's features need {store.size_bytes / 1e6:.0f} MB, {store.folder} has "
                    f"{free / 1e6:.0f} MB free",
                    remedy="another --output, fewer --num-blocks, or a smaller --max-events for the teacher",
                ) from None

"""data: raw logs become a dataset, streamed: only integer codes and timestamps stay in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float64, Int32

from slmrec.artifact import Artifact, Stage, file_sha256, is_up_to_date, open_artifact, publish, write_json
from slmrec.catalogue import Catalogue
from slmrec.config import DataConfig, settings_of
from slmrec.dataset import DATASET_FILE, INTERACTIONS_FILE
from slmrec.errors import DataError
from slmrec.formats.item_files import find_item_file, read_item_file
from slmrec.formats.readers import detect_format, read_log
from slmrec.formats.rows import BadRows, Block
from slmrec.locks import one_run_at_a_time
from slmrec.sequences import MIN_EVALUABLE
from slmrec.writing import write_parquet


@dataclass(frozen=True, eq=False)
class Interactions:
    """A whole log in memory, 16 bytes a row, with codes for ids."""

    users: Int32[np.ndarray, " rows"]
    items: Int32[np.ndarray, " rows"]
    """Positions in `user_ids` and `item_ids`."""
    timestamps: Float64[np.ndarray, " rows"]
    user_ids: Sequence[str]
    item_ids: Sequence[str]
    """External ids, in the order they were first met."""

    def __len__(self) -> int:
        return len(self.users)

    def select(self, rows: np.ndarray) -> "Interactions":
        """The named rows, in the order named; the codes stay."""
        return Interactions(self.users[rows], self.items[rows], self.timestamps[rows], self.user_ids, self.item_ids)


class _Codes:
    """Dense codes for external ids, given out in the order ids are met."""

    def __init__(self) -> None:
        self.known = pl.DataFrame(schema={"id": pl.String, "code": pl.Int32})

    @property
    def ids(self) -> list[str]:
        """External ids, the one of code 0 first."""
        return self.known["id"].to_list()

    def encode(self, ids: pl.Series) -> np.ndarray:
        """Codes of some ids, int32."""
        codes = self._look_up(ids)
        if codes.null_count():
            new = ids.filter(codes.is_null()).unique(maintain_order=True)
            numbers = pl.int_range(len(self.known), len(self.known) + len(new), dtype=pl.Int32, eager=True)
            self.known = pl.concat([self.known, pl.DataFrame({"id": new, "code": numbers})], rechunk=True)
            codes = self._look_up(ids)
        return codes.to_numpy()

    def _look_up(self, ids: pl.Series) -> pl.Series:
        return ids.to_frame("id").join(self.known, on="id", how="left", maintain_order="left")["code"]


@one_run_at_a_time
def prepare_dataset(
    files: Sequence[Path], output: Path, config: DataConfig, *, force: bool = False
) -> tuple[Artifact, bool]:
    """Read logs and write a dataset artefact; gives it and whether it was there already.

    Events are sorted by user and time, ties by input order; exact duplicates are dropped; users and items are
    numbered in the order they first appear.

    Raises:
        DataError: nothing to read, malformed rows beyond the limit, or no user that can be evaluated.
    """
    formats, items_file = _formats(files, config), _items_file(files, config)
    inputs = {
        "files": [[file.name, file_sha256(file)] for file in files],
        "items_file": None if items_file is None else [items_file.name, file_sha256(items_file)],
    }
    stage = Stage(name="data", kind="dataset", settings=settings_of(config, hashed=["items_file"]) | {"inputs": inputs})
    if is_up_to_date(output, stage, force=force):
        return open_artifact(output), True
    raw, bad = _read(files, config)
    kept = drop_duplicates(sort_events(raw))
    num_duplicates = len(raw) - len(kept)
    cored = k_core(kept, config.min_events)
    counts = {
        "num_rows_read": len(raw) + bad.count,
        "num_bad_rows": bad.count,
        "bad_rows_shown": bad.shown,
        "num_duplicates": num_duplicates,
        "num_filtered": len(kept) - len(cored),
        "format": ", ".join(sorted(formats)),
        "items_file": None if items_file is None else items_file.name,
        "sources": inputs["files"],
    }
    final = renumber(cored)
    titles = read_item_file(items_file, config) if items_file else {}
    with publish(output, stage) as folder:
        _write(folder, final, titles, counts)
    return open_artifact(output), False


def _formats(files: Sequence[Path], config: DataConfig) -> set[str]:
    """Formats of the files; places in sequences and times cannot be put in one order."""
    for file in files:
        if not file.is_file():
            raise DataError(f"{file} is not a file", remedy="a log file, or the named source ml-100k")
    formats = {detect_format(file) for file in files} if config.format == "auto" else {config.format}
    others = " and ".join(sorted(formats - {"sequences"}))
    if "sequences" in formats and others:
        raise DataError(
            f"sequences have places instead of times, {others} files have times: they cannot be put in one order",
            remedy="files of sequences alone, or of interactions alone",
        )
    return formats


def _items_file(files: Sequence[Path], config: DataConfig) -> Path | None:
    """The table of titles asked for, or the one published with the first log."""
    items_file = Path(config.items_file) if config.items_file else find_item_file(files)
    if items_file is not None and not items_file.is_file():
        raise DataError(f"{items_file} is not a file", remedy="--items-file FILE with columns item_id and title")
    return items_file


def _read(files: Sequence[Path], config: DataConfig) -> tuple[Interactions, BadRows]:
    """All files, one after the other, and what was malformed in them."""
    bad = BadRows(config.max_bad_rows)
    raw = collect(block for file in files for block in read_log(file, config, bad))
    if not len(raw):
        raise DataError(f"{files[0]} holds no interaction", remedy="a file with one interaction per line")
    return raw, bad


def collect(blocks: Iterator[Block]) -> Interactions:
    """Keep a log as codes; nothing else of a block stays."""
    users, items = _Codes(), _Codes()
    parts = [(users.encode(b.users), items.encode(b.items), b.timestamps) for b in blocks if len(b.timestamps)]
    if not parts:
        empty = np.zeros(0, np.int32)
        return Interactions(empty, empty, np.zeros(0), [], [])
    user_codes, item_codes, timestamps = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Interactions(user_codes, item_codes, timestamps, users.ids, items.ids)


def sort_events(log: Interactions) -> Interactions:
    """By user (first met first), then time, ties in input order."""
    return log.select(np.lexsort((log.timestamps, log.users)))  # lexsort is stable


def drop_duplicates(log: Interactions) -> Interactions:
    """The first of each set of rows equal in user, item and timestamp, of a sorted log."""
    follows = np.zeros(len(log), dtype=bool)
    follows[1:] = (log.users[1:] == log.users[:-1]) & (log.timestamps[1:] == log.timestamps[:-1])
    tie = np.cumsum(~follows)  # rows of one user at one time share a number
    tied = np.flatnonzero(follows | np.append(follows[1:], False))
    order = tied[np.lexsort((log.items[tied], tie[tied]))]  # stable: the first met comes first
    repeated = (tie[order][1:] == tie[order][:-1]) & (log.items[order][1:] == log.items[order][:-1])
    kept = np.ones(len(log), dtype=bool)
    kept[order[1:][repeated]] = False
    return log if kept.all() else log.select(np.flatnonzero(kept))


def k_core(log: Interactions, min_events: int) -> Interactions:
    """Drop users and items with fewer events, again and again until none is left that has fewer."""
    while min_events > 1 and len(log):
        users = np.bincount(log.users, minlength=len(log.user_ids))
        items = np.bincount(log.items, minlength=len(log.item_ids))
        kept = (users[log.users] >= min_events) & (items[log.items] >= min_events)
        if kept.all():
            break
        log = log.select(np.flatnonzero(kept))
    return log


def renumber(log: Interactions) -> Interactions:
    """Codes without gaps, after users or items were filtered out."""
    users, user_ids = _without_gaps(log.users, log.user_ids)
    items, item_ids = _without_gaps(log.items, log.item_ids)
    return Interactions(users, items, log.timestamps, user_ids, item_ids)


def _without_gaps(codes: np.ndarray, ids: Sequence[str]) -> tuple[np.ndarray, Sequence[str]]:
    used = np.bincount(codes, minlength=len(ids)) > 0
    if used.all():
        return codes, ids
    numbers = (np.cumsum(used) - 1).astype(np.int32)
    return numbers[codes], [ids[code] for code in np.flatnonzero(used).tolist()]


def statistics(log: Interactions) -> dict[str, Any]:
    """Counts of a sorted log: what the leave-one-out split will find."""
    lengths = np.bincount(log.users, minlength=len(log.user_ids))
    ends = np.cumsum(lengths)
    evaluable = lengths >= MIN_EVALUABLE
    last, before = ends[evaluable] - 1, ends[evaluable] - 2
    is_last = np.zeros(len(log), dtype=bool)
    is_last[ends - 1] = True
    is_target = log.items == log.items[ends - 1][log.users]
    repeats = np.bincount(log.users[is_target & ~is_last], minlength=len(lengths))[evaluable] > 0
    return {
        "num_users": len(log.user_ids),
        "num_items": len(log.item_ids),
        "num_interactions": len(log),
        "mean_length": float(lengths.mean()) if len(lengths) else 0.0,
        "num_evaluable_users": int(evaluable.sum()),
        "num_train_only_users": int((~evaluable).sum()),
        "num_tied_targets": int((log.timestamps[last] == log.timestamps[before]).sum()),
        "num_repeat_targets": int(repeats.sum()),
        "split": "leave-one-out: test = last item, validation = second last",
    }


def training_counts(log: Interactions) -> np.ndarray:
    """Interactions of each item in the training split of a sorted log: all but the last two of users who have three."""
    lengths = np.bincount(log.users, minlength=len(log.user_ids))
    from_the_end = np.cumsum(lengths)[log.users] - np.arange(len(log))  # 1 = the last
    is_training = (from_the_end > 2) | (lengths < MIN_EVALUABLE)[log.users]
    return np.bincount(log.items[is_training], minlength=len(log.item_ids))


def _write(
    folder: Path, log: Interactions, titles: dict[str, tuple[str | None, str | None]], counts: dict[str, Any]
) -> None:
    found = statistics(log)
    if not found["num_evaluable_users"]:
        raise DataError(
            f"of {found['num_users']} users{' that --min-events kept' if counts['num_filtered'] else ''} none has "
            f"{MIN_EVALUABLE} interactions, so no user can be evaluated",
            remedy="data with longer sequences, or a smaller --min-events where that was set",
        )
    frame = pl.DataFrame(
        {
            "user": pl.Series(log.users.astype(np.int64)),
            "user_id": pl.Series(log.user_ids, dtype=pl.String).gather(log.users),
            "item": pl.Series(log.items.astype(np.int64) + 1),
            "timestamp": pl.Series(log.timestamps),
        }
    )
    write_parquet(folder / INTERACTIONS_FILE, frame)
    known = [titles.get(item_id, (None, None)) for item_id in log.item_ids]
    Catalogue(
        log.item_ids, [title for title, _ in known], [category for _, category in known], training_counts(log).tolist()
    ).save(folder)
    num_titles = sum(title is not None for title, _ in known)
    write_json(folder / DATASET_FILE, found | counts | {"num_titles": num_titles})

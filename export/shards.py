"""Parquet files of requests as shards: pieces of row groups, each of which becomes one output file."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from export.requests import CHUNK, FIELDS, Request, empty, parse_request, readable
from slmrec.errors import DataError

HASHES = 2**23
"""Users whose hashes are compared at once, 64 MB of them; more users take more passes over their column."""
REQUEST_COLUMNS = "columns user (text or whole numbers) and history (a list of ids, oldest first)"


@dataclass(frozen=True)
class Shard:
    """`rows` requests from the `start`-th on of a row group whose first one is the file's row `offset`."""

    number: int
    file: Path
    group: int
    offset: int
    start: int
    rows: int

    @property
    def name(self) -> str:
        """Of its output file."""
        return f"shard-{self.number:06d}.parquet"

    def requests(self) -> Iterator[Request]:
        """Its requests in their order; lines are rows of the file, from 1."""
        with readable(self.file), pq.ParquetFile(self.file) as parquet:
            names, row = [name for name in FIELDS if name in parquet.schema_arrow.names], 0
            for batch in parquet.iter_batches(CHUNK, row_groups=[self.group], columns=names):
                first, last = max(row, self.start), min(row + len(batch), self.start + self.rows)
                if first < last:
                    part = batch.slice(first - row, last - first)
                    users = _texts(part["user"]).to_pylist()
                    for line, user, record in zip(
                        count(self.offset + first + 1), users, part.to_pylist(), strict=False
                    ):
                        yield parse_request(record | {"user": user}, line, self.file)
                row += len(batch)
                if row >= self.start + self.rows:
                    return


def request_files(source: Path) -> list[Path]:
    """The Parquet file named, or those below the folder named, by name; hidden ones and `_...` are left out.

    Raises:
        DataError: there is none.
    """
    if source.is_file() and source.suffix == ".parquet":
        return [source]
    files = [
        path
        for path in sorted(source.rglob("*.parquet"))
        if not any(part.startswith((".", "_")) for part in path.relative_to(source).parts)
    ]
    if not files:
        what = "is no Parquet file, nor a folder of any" if source.exists() else "does not exist"
        raise DataError(f"{source} {what}", remedy=f"--input of .parquet, with {REQUEST_COLUMNS}")
    return files


def plan_shards(source: Path, files: Sequence[Path], shard_users: int) -> list[Shard]:
    """Every request in exactly one shard, in order: each row group in pieces of at most `shard_users`.

    Raises:
        DataError: a file is not readable, lacks a column, or there is no request at all.
    """
    shards: list[Shard] = []
    for file in files:
        with readable(file), pq.ParquetFile(file) as parquet:
            _check_columns(parquet.schema_arrow, file)
            offset = 0
            for group in range(parquet.num_row_groups):
                rows = parquet.metadata.row_group(group).num_rows
                for start in range(0, rows, shard_users):
                    piece = min(shard_users, rows - start)
                    shards.append(Shard(len(shards), file, group, offset, start, piece))
                offset += rows
    if not shards:
        raise empty(source)
    return shards


def refuse_duplicates(files: Sequence[Path], num_users: int, at_once: int = HASHES) -> None:
    """Refuse a user who is there twice: hashes are compared first, and names where two hashes are equal.

    Raises:
        DataError: which user, and where; or a row without one.
    """
    passes = -(-num_users // at_once)
    for turn in range(passes):
        parts = [hashes[hashes % passes == turn] for _, _, _, hashes in _users(files)]
        hashes = np.sort(np.concatenate(parts))
        suspects = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        if len(suspects):
            _refuse_equal_names(files, suspects)


def _refuse_equal_names(files: Sequence[Path], suspects: np.ndarray) -> None:
    seen: dict[str, str] = {}
    for file, row, users, hashes in _users(files):
        for place in np.flatnonzero(np.isin(hashes, suspects)).tolist():
            user, here = str(users[place]), f"{file.name}:{row + place + 1}"
            if user in seen:
                raise DataError(
                    f"the user {user!r} is there twice, {seen[user]} and {here}", remedy="one row for each user"
                )
            seen[user] = here


def _users(files: Sequence[Path]) -> Iterator[tuple[Path, int, Any, np.ndarray]]:
    """File, row of the file, users from there on, and their hashes, uint64."""
    for file in files:
        row = 0
        with readable(file), pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(2**16, columns=["user"]):
                users = _texts(batch["user"])
                if users.null_count:
                    line = row + users.is_null().to_pylist().index(True) + 1
                    raise DataError(
                        f"{file.name}:{line}: the user is null", remedy="leave the row out, or name its user"
                    )
                yield file, row, users, pl.Series(pl.from_arrow(users)).hash().to_numpy()
                row += len(batch)


def _texts(users: Any) -> Any:
    """Users as text, whether text or whole numbers."""
    return users.cast(pa.string())


def _check_columns(schema: Any, file: Path) -> None:
    for name in ("user", "history"):
        if name not in schema.names:
            raise DataError(f"{file} has no column {name!r}, but {', '.join(schema.names)}", remedy=REQUEST_COLUMNS)
    kind = schema.field("user").type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_integer)
    if not any(fits(kind) for fits in texts):
        raise DataError(f"users in {file} are of type {kind}", remedy=REQUEST_COLUMNS)
    parse_request(dict.fromkeys(schema.names) | {"user": ""}, 1, file)

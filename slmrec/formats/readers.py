"""Raw interaction logs, whatever their format, as blocks of users, items and timestamps."""

import gzip
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from io import BufferedIOBase
from pathlib import Path

import numpy as np
import polars as pl

from slmrec.config import DataConfig
from slmrec.errors import DataError
from slmrec.formats.delimited import read_delimited, read_movielens
from slmrec.formats.json_lines import read_jsonl
from slmrec.formats.rows import BadRows, Block, checked, find_columns, line_blocks

BLOCK_BYTES = 1 << 24
SAMPLED_LINES = 20
EARLIEST_RATING = 1e8
"""Seconds since 1970 (the year 1973): what tells the last column of a ratings file from an item id."""


def read_log(path: Path, config: DataConfig, bad: BadRows, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Rows of one file in their order, a block at a time; malformed rows are left out and told to `bad`.

    Raises:
        DataError: the file is missing, empty, cannot be unpacked, is of an unknown format, lacks a column, or has too
            many malformed rows.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file", remedy="a log file, or the named source ml-100k")
    form = config.format if config.format != "auto" else detect_format(path)
    try:
        if form == "parquet":
            yield from _read_parquet(path, config, bad)
        else:
            with open_bytes(path) as stream:
                yield from FORMATS[form](path, stream, config, bad, block_bytes)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _not_gzip(path, error) from None
    bad.check()


def detect_format(path: Path) -> str:
    """The format by the file's name and first lines."""
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".parquet", ".pq")):
        return "parquet"
    if name.endswith(".inter"):
        return "recbole"
    if name in ("u.data", "ratings.dat"):
        return "movielens"
    lines = _first_lines(path)
    if name.endswith((".csv", ".tsv")):
        return "csv"
    return _format_of(lines)


def open_bytes(path: Path) -> BufferedIOBase:
    """Open a file, unpacked where it is gzipped."""
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _first_lines(path: Path) -> list[bytes]:
    try:
        with open_bytes(path) as stream:
            lines = [line.strip() for line in itertools.islice(stream, SAMPLED_LINES)]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _not_gzip(path, error) from None
    if not lines or not lines[0]:
        raise DataError(f"{path} is empty", remedy="a file with one interaction per line")
    return lines


def _format_of(lines: Sequence[bytes]) -> str:
    first = lines[0]
    if first.startswith(b"{"):
        return "amazon" if b"reviewerID" in first or b"asin" in first else "jsonl"
    if all(_is_rating(line) for line in lines):
        return "movielens"
    if b":token" in first:
        return "recbole"
    is_table = b"," in first or (b"\t" in first and not first.replace(b"\t", b"").isdigit())
    return "csv" if is_table else "sequences"


def _is_rating(line: bytes) -> bool:
    """Whether a line is user, item, rating, seconds with tabs or double colons between."""
    fields = line.replace(b"::", b"\t").split(b"\t")
    return len(fields) == 4 and fields[3].isdigit() and float(fields[3]) >= EARLIEST_RATING


def _not_gzip(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be unpacked: {error}", remedy="fetch it again; gzip -t tells whether it is whole")


def _read_parquet(path: Path, config: DataConfig, bad: BadRows) -> Iterator[Block]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise DataError(f"{path} is not Parquet: {error}", remedy="--format csv or another") from None
    names = file.schema_arrow.names
    columns = find_columns(path, names, config)
    chosen = {"user": names[columns.user], "item": names[columns.item], "time": names[columns.time]}
    row = 1
    for batch in file.iter_batches(batch_size=1 << 20, columns=list(chosen.values())):
        table = pl.DataFrame(pl.from_arrow(pa.Table.from_batches([batch])))
        frame = table.select(pl.col(name).alias(role) for role, name in chosen.items())
        if frame["time"].dtype.is_temporal():
            frame = frame.with_columns(pl.col("time").cast(pl.Datetime("us")).dt.timestamp("us") / 1e6)
        try:
            frame = frame.with_columns(pl.col("user", "item").cast(pl.String))
        except pl.exceptions.PolarsError:
            raise DataError(
                f"{path}: columns {chosen['user']} and {chosen['item']} are {frame['user'].dtype} and "
                f"{frame['item'].dtype}, expected text or numbers",
                remedy="--user-column NAME --item-column NAME",
            ) from None
        yield checked(path, frame, range(row, row + len(frame)), bad)
        row += len(frame)


def _read_sequences(
    path: Path, stream: BufferedIOBase, _: DataConfig, bad: BadRows, block_bytes: int
) -> Iterator[Block]:
    """`user item item ...`, oldest first: an item's timestamp is its place in the line."""
    line = 1
    for block in line_blocks(stream, block_bytes):
        users, items, places = [], [], []
        for at, raw in enumerate(block.split(b"\n"), start=line):
            text = raw.decode("utf-8", errors="replace")
            user, *sequence = text.split() or [""]
            if not user:
                continue
            if not sequence or "\ufffd" in text:
                bad.add(path, at, "not UTF-8" if "\ufffd" in text else "no items")
                continue
            users.append(itertools.repeat(user, len(sequence)))
            items.append(sequence)
            places.append(np.arange(len(sequence), dtype=np.float64))
        line += block.count(b"\n")
        yield Block(_flat(users), _flat(items), np.concatenate(places) if places else np.zeros(0))


def _flat(parts: "list[itertools.repeat[str]] | list[list[str]]") -> pl.Series:
    return pl.Series(list(itertools.chain.from_iterable(parts)), dtype=pl.String)


FORMATS: dict[str, Callable[[Path, BufferedIOBase, DataConfig, BadRows, int], Iterator[Block]]] = {
    "csv": read_delimited,
    "recbole": read_delimited,
    "movielens": read_movielens,
    "jsonl": read_jsonl,
    "amazon": read_jsonl,
    "sequences": _read_sequences,
}

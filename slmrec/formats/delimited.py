"""CSV, TSV, RecBole and MovieLens: whole blocks by Polars, or row by row where a block has anything unusual."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import polars as pl

from slmrec.config import DataConfig
from slmrec.errors import DataError
from slmrec.formats.rows import BadRows, Block, Columns, checked, find_columns, line_blocks

MAX_RECORD_LINES = 200
"""Lines that one quoted record may span; a quote open for longer is a stray one."""


@dataclass(frozen=True)
class Dialect:
    """How the rows of one file are written."""

    path: Path
    columns: Columns
    separator: str
    quoted: bool

    @property
    def schema(self) -> dict[str, Any]:
        """Column name -> pl.String."""
        return dict.fromkeys((f"column_{number}" for number in range(self.columns.width)), pl.String)


def read_delimited(
    path: Path, stream: BufferedIOBase, config: DataConfig, bad: BadRows, block_bytes: int
) -> Iterator[Block]:
    """A header, then rows; RecBole's `name:type` headers are CSV with tabs."""
    header_line = stream.readline().decode("utf-8-sig", errors="replace").rstrip("\r\n")
    if not header_line.strip():
        raise DataError(f"{path} is empty", remedy="a header and one interaction per line")
    separator = max("\t,;|", key=header_line.count)
    header = [name.split(":")[0].strip() for name in next(csv.reader([header_line], delimiter=separator))]
    dialect = Dialect(path, find_columns(path, header, config), separator, quoted=separator != "\t")
    yield from _rows(dialect, line_blocks(stream, block_bytes), bad, first_line=2)


def read_movielens(
    path: Path, stream: BufferedIOBase, _: DataConfig, bad: BadRows, block_bytes: int
) -> Iterator[Block]:
    """u.data (tabs) and ratings.dat (two colons): user, item, rating, timestamp, no header."""
    blocks = (block.replace(b"::", b"\t") for block in line_blocks(stream, block_bytes))
    yield from _rows(Dialect(path, Columns(0, 1, 3, 4), "\t", quoted=False), blocks, bad, first_line=1)


def _rows(dialect: Dialect, blocks: Iterable[bytes], bad: BadRows, *, first_line: int) -> Iterator[Block]:
    line, rest = first_line, b""
    for lines in blocks:
        block, rest = rest + lines, b""
        frame = _whole(dialect, block)
        at: Sequence[int] = range(line, line + block.count(b"\n") + 1)
        if frame is None:
            frame, at, rest = _row_by_row(dialect, block, bad, line, last=False)
        yield _picked(dialect, frame, at, bad)
        line += block.count(b"\n") - rest.count(b"\n")
    if rest:
        frame, at, _ = _row_by_row(dialect, rest, bad, line, last=True)
        yield _picked(dialect, frame, at, bad)


def _picked(dialect: Dialect, frame: pl.DataFrame, lines: Sequence[int], bad: BadRows) -> Block:
    names, columns = frame.columns, dialect.columns
    chosen = {"user": names[columns.user], "item": names[columns.item], "time": names[columns.time]}
    picked = frame.select(pl.col(name).alias(role) for role, name in chosen.items())
    return checked(dialect.path, picked, lines, bad)


def _whole(dialect: Dialect, block: bytes) -> pl.DataFrame | None:
    """A block in one go; None unless every line is one row with every field."""
    rows = block.count(b"\n") + (not block.endswith(b"\n"))
    separator = dialect.separator
    try:
        frame = pl.read_csv(
            io.BytesIO(block), has_header=False, separator=separator, quote_char='"' if dialect.quoted else None,
            schema=dialect.schema,
        )  # fmt: skip
    except pl.exceptions.PolarsError:  # too many fields, broken UTF-8, an open quote
        return None
    if len(frame) != rows:
        return None
    plain = not (dialect.quoted and b'"' in block)
    complete = (
        block.count(separator.encode()) == rows * (dialect.columns.width - 1)
        if plain
        else not frame.to_series(-1).null_count()
    )
    return frame if complete else None


def _row_by_row(
    dialect: Dialect, block: bytes, bad: BadRows, first_line: int, *, last: bool
) -> tuple[pl.DataFrame, list[int], bytes]:
    """Rows of a block with their line numbers, and its end where that is a quoted record not yet closed."""
    texts = block.decode("utf-8", errors="replace").splitlines(keepends=True)
    width = dialect.columns.width
    rows, lines, at = [], [], 0
    while at < len(texts):
        record, used = _record(dialect, texts[at : at + MAX_RECORD_LINES])
        if not record and not last and len(texts) - at < MAX_RECORD_LINES:
            break
        if not record:
            bad.add(dialect.path, first_line + at, "a quote that is never closed")
        elif any("\ufffd" in value for value in record):
            bad.add(dialect.path, first_line + at, "not UTF-8")
        elif len(record) != width and "".join(record).strip():
            bad.add(dialect.path, first_line + at, f"{len(record)} fields, expected {width}")
        elif len(record) == width:
            rows.append(record)
            lines.append(first_line + at)
        at += used
    rest = "".join(texts[at:]).encode()
    return pl.DataFrame(rows, schema=dialect.schema, orient="row"), lines, rest


def _record(dialect: Dialect, texts: Sequence[str]) -> tuple[list[str], int]:
    """The record that begins with the first line, and the lines it takes; no field where its quote stays open."""
    if not dialect.quoted:
        return texts[0].rstrip("\r\n").split(dialect.separator), 1
    text = ""
    for used, line in enumerate(texts, start=1):
        text += line
        if text.count('"') % 2 == 0 or not _opens_quote(dialect, text):
            record = next(csv.reader(io.StringIO(text, newline=""), delimiter=dialect.separator), [])
            return record or [""], used
    return [], 1


def _opens_quote(dialect: Dialect, text: str) -> bool:
    """Whether some field begins with a quote: one inside a field is only a character."""
    return text.startswith('"') or f'{dialect.separator}"' in text

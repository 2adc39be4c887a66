"""JSON lines and Amazon reviews."""

import io
import json
from collections.abc import Iterator, Sequence
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import polars as pl

from slmrec.config import DataConfig
from slmrec.errors import DataError
from slmrec.formats.rows import BadRows, Block, checked, find_columns, line_blocks

ROLES = ("user", "item", "time")


def read_jsonl(
    path: Path, stream: BufferedIOBase, config: DataConfig, bad: BadRows, block_bytes: int
) -> Iterator[Block]:
    """One object per line; the first line names the fields."""
    names: list[str] | None = None
    line = 1
    for block in line_blocks(stream, block_bytes):
        if names is None:
            names = _field_names(path, block.splitlines()[0], config)
        frame = _whole(block, names)
        lines: Sequence[int] = range(line, line + block.count(b"\n") + 1)
        if frame is None:
            frame, lines = _one_by_one(path, block, names, bad, line)
        yield checked(path, frame, lines, bad)
        line += block.count(b"\n")


def _field_names(path: Path, first: bytes, config: DataConfig) -> list[str]:
    try:
        record = json.loads(first)
    except ValueError as error:
        raise DataError(f"{path}:1 is not JSON: {error}", remedy="one JSON object per line") from None
    if not isinstance(record, dict):
        raise DataError(f"{path}:1 is no JSON object", remedy="one JSON object per line")
    fields = list(record)
    columns = find_columns(path, fields, config)
    return [fields[columns.user], fields[columns.item], fields[columns.time]]


def _whole(block: bytes, names: Sequence[str]) -> pl.DataFrame | None:
    """A block in one go; None unless every line is one flat object."""
    rows = block.count(b"\n") + (not block.endswith(b"\n"))
    try:
        frame = pl.read_ndjson(io.BytesIO(block), schema=dict.fromkeys(names, pl.String))
    except pl.exceptions.PolarsError:
        return None
    if len(frame) != rows:
        return None
    frame = frame.select(pl.col(name).alias(role) for role, name in zip(ROLES, names, strict=True))
    nested = frame.select(pl.any_horizontal(pl.col("user", "item").str.contains(r"^[\[{]").any())).item()
    return None if nested else frame


def _one_by_one(
    path: Path, block: bytes, names: Sequence[str], bad: BadRows, first_line: int
) -> tuple[pl.DataFrame, list[int]]:
    rows, lines = [], []
    for line, text in enumerate(block.split(b"\n"), start=first_line):
        if not text.strip():
            continue
        try:
            values = _values(json.loads(text), names)
        except ValueError as error:
            bad.add(path, line, "not JSON" if isinstance(error, json.JSONDecodeError) else str(error))
            continue
        rows.append(values)
        lines.append(line)
    return pl.DataFrame(rows, schema=dict.fromkeys(ROLES, pl.String), orient="row"), lines


def _values(record: Any, names: Sequence[str]) -> list[str]:
    if not isinstance(record, dict):
        raise ValueError("no JSON object")
    values = [record.get(name) for name in names]
    for name, value in zip(names, values, strict=True):
        if isinstance(value, dict | list | bool):
            raise ValueError(f"{name} is no text and no number")
    return ["" if value is None else str(value) for value in values]

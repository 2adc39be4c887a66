"""Which row of a foreign item table belongs to which item of a dataset."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
from jaxtyping import Int64
from polars.exceptions import PolarsError

from slmrec.catalogue import Catalogue
from slmrec.errors import DataError

REMEDY = "--items FILE (csv, parquet or jsonl) with the columns row (of the table, from 0) and item_id (external)"


def rows_by_order(
    items: Catalogue, num_rows: int, first_row: int, *, padding_optional: bool = False
) -> Int64[np.ndarray, " items"]:
    """Row of each item, where nobody says which: the table must have exactly the catalogue's items.

    The codes number items in their files by the table's own rows. So where the dataset's external ids are numbers
    without gaps from 0 or 1, rows follow these numbers; else they follow the internal ids: item i has row i where row
    0 is padding (`first_row` 1, E4SRec), and row i - 1 where it is an item (`first_row` 0, SLMRec).

    Raises:
        DataError: the table has more or fewer rows.
    """
    if num_rows - first_row != len(items):
        expected = f"{len(items) + first_row} ({len(items)} items{' and a row 0 of padding' if first_row else ''})"
        expected += f" or {len(items)}" if first_row and padding_optional else ""
        padding = "a row of zeros before them, in score too, or " if first_row and num_rows == len(items) else ""
        raise DataError(
            f"the item table has {num_rows} rows, expected for this dataset are {expected}",
            remedy=f"{padding}the dataset the teacher was trained on (-d/--data), or {REMEDY}",
        )
    return _order(items) + first_row


def rows_by_file(items: Catalogue, num_rows: int, first_row: int, path: Path) -> Int64[np.ndarray, " items"]:
    """Row of each item by a file with the columns row and item_id; rows of items the dataset lacks are left out.

    Raises:
        DataError: the file cannot be read, names a row or an item twice or a row that is none, or lacks an item.
    """
    frame = _read(path)
    rows = dict(zip(frame["item_id"].to_list(), frame["row"].to_list(), strict=True))
    problem = None
    if frame["row"].null_count() or frame["item_id"].null_count():
        problem = "lines without a row or an item"
    elif len(rows) < len(frame) or frame["row"].n_unique() < len(frame):
        problem = "a row or an item twice"
    elif not frame["row"].is_between(first_row, num_rows - 1).all():
        problem = f"rows outside {first_row}..{num_rows - 1}, the item table's"
    if problem is not None:
        raise DataError(f"{path} holds {problem}", remedy=REMEDY)
    missing = [item_id for item_id in items.item_ids if item_id not in rows]
    if missing:
        raise DataError(
            f"{path} has no row for {len(missing)} of {len(items)} items, such as {missing[0]!r}", remedy=REMEDY
        )
    return np.array([rows[item_id] for item_id in items.item_ids], dtype=np.int64)


def _order(items: Catalogue) -> Int64[np.ndarray, " items"]:
    """Place of each item, 0 = first."""
    internal = np.arange(len(items), dtype=np.int64)
    if not all(re.fullmatch("0|[1-9][0-9]{0,17}", item_id) for item_id in items.item_ids):
        return internal
    numbers = np.array([int(item_id) for item_id in items.item_ids], dtype=np.int64)
    smallest = int(numbers.min())
    if smallest not in (0, 1) or not np.array_equal(np.sort(numbers), internal + smallest):
        return internal
    return numbers - smallest


def _read(path: Path) -> pl.DataFrame:
    readers: dict[str, Callable[[Path], pl.DataFrame]] = {
        ".csv": lambda file: pl.read_csv(file, infer_schema=False),  # 007 is no number but an id
        ".parquet": pl.read_parquet,
        ".jsonl": pl.read_ndjson,
    }
    if path.suffix not in readers or not path.is_file():
        raise DataError(f"{path} is no file of rows and items", remedy=REMEDY)
    try:
        frame = readers[path.suffix](path)
        return frame.select(pl.col("row").cast(pl.Int64), pl.col("item_id").cast(pl.String))
    except PolarsError as error:
        raise DataError(f"{path} is not readable: {str(error).splitlines()[0]}", remedy=REMEDY) from None

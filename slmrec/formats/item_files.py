"""Titles and categories of items, from the tables that data sets ship beside their logs."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from slmrec.config import DataConfig
from slmrec.errors import DataError
from slmrec.formats.rows import column_position

Titles = dict[str, tuple[str | None, str | None]]
"""External item id -> title, categories."""

BESIDE = {"u.data": "u.item", "ratings.dat": "movies.dat", "ratings.csv": "movies.csv", "sequences.txt": "titles.tsv"}
"""Name of a published log -> name of the table of titles published with it."""
ID_NAMES = ("item_id", "item", "id", "movieid", "movie_id", "asin", "parent_asin", "itemid")
TITLE_NAMES = ("title", "movie_title", "name", "product_title", "item_name")
CATEGORY_NAMES = ("categories", "category", "class", "genres", "genre")
GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
"""Columns 5 and on of MovieLens 100K's u.item."""


def find_item_file(files: Sequence[Path]) -> Path | None:
    """The table of titles published with the first log, beside it: X.item of X.inter, movies.dat of ratings.dat."""
    first = files[0]
    if first.suffix == ".inter" and first.with_suffix(".item").is_file():
        return first.with_suffix(".item")
    beside = first.with_name(BESIDE.get(first.name, "")) if first.name in BESIDE else None
    return beside if beside is not None and beside.is_file() else None


def read_item_file(path: Path, config: DataConfig) -> Titles:
    """Titles by external id.

    Raises:
        DataError: the file is missing or has no column of ids or titles.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file", remedy="--items-file FILE with columns item_id and title")
    if path.name == "u.item":
        rows = (line.split("|") for line in path.read_text(encoding="latin-1").splitlines())
        return {
            row[0]: (row[1], " ".join(g for g, flag in zip(GENRES, row[5:], strict=False) if flag == "1"))
            for row in rows
        }
    if path.name == "movies.dat":
        rows = (line.split("::") for line in path.read_text(encoding="latin-1").splitlines())
        return {row[0]: (row[1], row[2].replace("|", " ")) for row in rows}
    names, table = _table(path)
    ids = _column(path, names, config.item_id_column, ID_NAMES)
    titles = _column(path, names, config.title_column, TITLE_NAMES)
    categories = column_position(names, CATEGORY_NAMES)
    return {
        row[ids]: (row[titles] or None, row[categories] or None if categories is not None else None) for row in table
    }


def _column(path: Path, names: list[str], given: str | None, usual: Sequence[str]) -> int:
    position = column_position(names, [given] if given else usual)
    if position is None:
        raise DataError(
            f"{path} has no column {given or usual[0]!r}; its columns are {', '.join(names)}",
            remedy="--item-id-column NAME --title-column NAME",
        )
    return position


def _table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of text, whatever the format."""
    if path.suffix in (".parquet", ".pq"):
        frame = pl.read_parquet(path).cast(pl.String).fill_null("")
        return frame.columns, [list(row) for row in frame.iter_rows()]
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix in (".jsonl", ".json"):
        records = [json.loads(line) for line in text.splitlines() if line.strip()]
        names = list(records[0]) if records else []
        return names, [[_text(record.get(name)) for name in names] for record in records]
    separator = "," if path.suffix == ".csv" else "\t"
    lines = text.splitlines()
    rows = list(csv.reader(lines)) if separator == "," else [line.split(separator) for line in lines]
    if path.name == "titles.tsv" and rows and rows[0][0].isdigit():
        rows = [["id", "title", "categories"], *rows]
    if not rows:
        raise DataError(f"{path} is empty", remedy="--items-file FILE with columns item_id and title")
    width = len(rows[0])
    return [name.split(":")[0] for name in rows[0]], [[*row, *[""] * width][:width] for row in rows[1:]]


def _text(value: object) -> str:
    if value is None:
        return ""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)

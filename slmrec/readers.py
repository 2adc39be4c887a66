"""Raw interaction logs, whatever their format, as blocks of users, items and timestamps."""

import csv
import gzip
import io
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import polars as pl

from slmrec.config import DataConfig
from slmrec.errors import DataError

BLOCK_BYTES = 1 << 24
SHOWN_BAD_ROWS = 5

ALIASES = {
    "user": ("user", "user_id", "userid", "reviewerid", "uid", "customer_id", "session_id", "visitorid"),
    "item": ("item", "item_id", "itemid", "movieid", "movie_id", "asin", "parent_asin", "product_id", "productid", "iid"),
    "time": ("timestamp", "time", "unixreviewtime", "ts", "datetime", "date", "event_time"),
}  # fmt: skip
"""Names that columns go by, compared in lower case."""


@dataclass(frozen=True)
class Block:
    """Some rows of a log: three columns of equal length."""

    users: pl.Series
    items: pl.Series
    """External ids, String."""
    timestamps: np.ndarray
    """Float64: seconds, or the position in a sequence; NaN never."""


@dataclass
class BadRows:
    """Malformed rows met so far: counted, the first few kept."""

    limit: int
    count: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, path: Path, line: int, reason: str) -> None:
        """Count one row; above the limit the run ends."""
        self.count += 1
        if len(self.shown) < SHOWN_BAD_ROWS:
            self.shown.append(f"{path.name}:{line}: {reason}")

    def check(self) -> None:
        """Refuse when there are more than the limit."""
        if self.count > self.limit:
            raise DataError(
                f"{self.count} malformed rows, {self.limit} are allowed:\n  " + "\n  ".join(self.shown),
                remedy=f"mend the file, or --max-bad-rows {self.count} to drop them",
            )


@dataclass(frozen=True)
class Columns:
    """Positions of the three columns in a row."""

    user: int
    item: int
    time: int
    width: int


def read_log(path: Path, config: DataConfig, bad: BadRows, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Rows of one file in their order, a block at a time; malformed rows are left out and told to `bad`.

    Raises:
        DataError: the file is missing, empty, of an unknown format, lacks a column, or has too many malformed rows.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file", remedy="a log file, or the named source ml-100k")
    form = config.format if config.format != "auto" else detect_format(path)
    if form == "parquet":
        yield from _read_parquet(path, config, bad)
        return
    with open_bytes(path) as stream:
        yield from FORMATS[form](path, stream, config, bad, block_bytes)
    bad.check()


def detect_format(path: Path) -> str:
    """The format by the file's name and first line."""
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".parquet", ".pq")):
        return "parquet"
    if name.endswith(".inter"):
        return "recbole"
    if name in ("u.data", "ratings.dat"):
        return "movielens"
    with open_bytes(path) as stream:
        first = stream.readline().strip()
    if not first:
        raise DataError(f"{path} is empty", remedy="a file with one interaction per line")
    if first.startswith(b"{"):
        return "amazon" if b"reviewerID" in first or b"asin" in first else "jsonl"
    if name.endswith((".csv", ".tsv")) or b"," in first or (b"\t" in first and not first.replace(b"\t", b"").isdigit()):
        return "recbole" if b":token" in first else "csv"
    return "sequences"


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file, unpacked where it is gzipped."""
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def line_blocks(stream: IO[bytes], block_bytes: int, *, quoted: bool = False) -> Iterator[bytes]:
    """Whole lines in blocks; where fields may be quoted, a block never ends inside quotes."""
    rest = b""
    while chunk := stream.read(block_bytes):
        block = rest + chunk
        end = block.rfind(b"\n") + 1
        while quoted and end and block.count(b'"', 0, end) % 2:
            end = block.rfind(b"\n", 0, end - 1) + 1
        rest = block[end:]
        if end:
            yield block[:end]
    if rest:
        yield rest


def _read_delimited(
    path: Path, stream: IO[bytes], config: DataConfig, bad: BadRows, block_bytes: int
) -> Iterator[Block]:
    """CSV, TSV and RecBole: a header, then rows."""
    header_line = stream.readline().decode("utf-8-sig", errors="replace").rstrip("\r\n")
    if not header_line:
        raise DataError(f"{path} is empty", remedy="a header and one interaction per line")
    separator = max("\t,;|", key=header_line.count)
    header = [name.split(":")[0] for name in next(csv.reader([header_line], delimiter=separator))]
    columns = find_columns(path, header, config)
    quoted = separator != "\t"
    line = 2
    for block in line_blocks(stream, block_bytes, quoted=quoted):
        yield _delimited_block(path, block, columns, bad, (separator, quoted, line))
        line += block.count(b"\n")


def _read_movielens(
    path: Path, stream: IO[bytes], config: DataConfig, bad: BadRows, block_bytes: int
) -> Iterator[Block]:
    """u.data (tabs) and ratings.dat (two colons): user, item, rating, timestamp, no header."""
    line = 1
    for block in line_blocks(stream, block_bytes):
        rows = block.replace(b"::", b"\t")
        yield _delimited_block(path, rows, Columns(0, 1, 3, 4), bad, ("\t", False, line))
        line += block.count(b"\n")
    if line == 1:
        raise DataError(f"{path} is empty", remedy="lines of user, item, rating, timestamp")


def _delimited_block(path: Path, block: bytes, columns: Columns, bad: BadRows, shape: tuple[str, bool, int]) -> Block:
    separator, quoted, first_line = shape
    names = [f"column_{number}" for number in range(columns.width)]
    try:
        frame = pl.read_csv(
            io.BytesIO(block), has_header=False, separator=separator, quote_char='"' if quoted else None,
            schema=dict.fromkeys(names, pl.String),
        )  # fmt: skip
        lines = range(first_line, first_line + len(frame))
        exact = len(frame) == block.count(b"\n") + (not block.endswith(b"\n"))
    except pl.exceptions.PolarsError:
        exact = False
    if not exact:  # ragged rows, quoted line breaks or broken UTF-8: slowly, row by row
        frame, lines = _rows_one_by_one(path, block, columns, bad, shape)
    picked = frame.select(
        pl.col(names[columns.user]).alias("user"), pl.col(names[columns.item]).alias("item"),
        pl.col(names[columns.time]).alias("time"),
    )  # fmt: skip
    return _checked(path, picked, lines, bad)


def _rows_one_by_one(
    path: Path, block: bytes, columns: Columns, bad: BadRows, shape: tuple[str, bool, int]
) -> tuple[pl.DataFrame, Sequence[int]]:
    separator, quoted, first_line = shape
    text = block.decode("utf-8", errors="replace")
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    )
    rows, lines, line = [], [], first_line
    for row in reader:
        at, line = line, first_line + reader.line_num
        if len(row) != columns.width or any("\ufffd" in value for value in row):
            reason = "not UTF-8" if len(row) == columns.width else f"{len(row)} fields, expected {columns.width}"
            bad.add(path, at, reason)
        else:
            rows.append(row)
            lines.append(at)
    names = [f"column_{number}" for number in range(columns.width)]
    return pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row"), lines


def _checked(path: Path, frame: pl.DataFrame, lines: Sequence[int], bad: BadRows) -> Block:
    """Leave out rows with an empty id or a timestamp that is no number and no date."""
    time = frame["time"]
    numbers = (
        time.str.strip_chars().cast(pl.Float64, strict=False) if time.dtype == pl.String else time.cast(pl.Float64)
    )
    if time.dtype == pl.String and numbers.null_count():
        dates = time.str.to_datetime(strict=False, time_zone="UTC", time_unit="us", ambiguous="earliest")
        numbers = numbers.fill_null(dates.dt.timestamp("us").cast(pl.Float64) / 1e6)
    values = numbers.fill_null(math.nan).to_numpy()
    users, items = frame["user"].fill_null(""), frame["item"].fill_null("")
    no_user, no_item = (users == "").to_numpy(), (items == "").to_numpy()
    good = ~no_user & ~no_item & np.isfinite(values)
    if not good.all():
        for row in np.flatnonzero(~good).tolist():
            what = (
                "no user" if no_user[row] else "no item" if no_item[row] else f"timestamp {time[row]!r} is not a number"
            )
            bad.add(path, lines[row], what)
        mask = pl.Series(good)
        users, items, values = users.filter(mask), items.filter(mask), values[good]
    return Block(users, items, values)


def _read_parquet(path: Path, config: DataConfig, bad: BadRows) -> Iterator[Block]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise DataError(f"{path} is not Parquet: {error}", remedy="--format csv or another") from None
    columns = find_columns(path, file.schema_arrow.names, config)
    names = [file.schema_arrow.names[index] for index in (columns.user, columns.item, columns.time)]
    if not file.metadata.num_rows:
        raise DataError(f"{path} is empty", remedy="a file with one interaction per row")
    row = 1
    for batch in file.iter_batches(batch_size=1 << 20, columns=names):
        frame = pl.DataFrame(pl.from_arrow(pa.Table.from_batches([batch]))).select(names)
        frame.columns = ["user", "item", "time"]
        if frame["time"].dtype.is_temporal():
            frame = frame.with_columns(pl.col("time").cast(pl.Datetime("us")).dt.timestamp("us") / 1e6)
        frame = frame.with_columns(pl.col("user").cast(pl.String), pl.col("item").cast(pl.String))
        yield _checked(path, frame, range(row, row + len(frame)), bad)
        row += len(frame)
    bad.check()


def _read_jsonl(path: Path, stream: IO[bytes], config: DataConfig, bad: BadRows, block_bytes: int) -> Iterator[Block]:
    """JSON lines and Amazon reviews: the first line names the fields."""
    names: list[str] | None = None
    line = 1
    for block in line_blocks(stream, block_bytes):
        if names is None:
            names = _json_names(path, block.splitlines()[0], config)
        try:
            frame = pl.read_ndjson(io.BytesIO(block), schema=dict.fromkeys(names, pl.String))
            lines: Sequence[int] = range(line, line + len(frame))
            exact = len(frame) == block.count(b"\n") + (not block.endswith(b"\n"))
        except pl.exceptions.PolarsError:
            exact = False
        if not exact:
            frame, lines = _json_one_by_one(path, block, names, bad, line)
        frame.columns = ["user", "item", "time"]
        yield _checked(path, frame, lines, bad)
        line += block.count(b"\n")
    if names is None:
        raise DataError(f"{path} is empty", remedy="a file with one JSON object per line")


def _json_names(path: Path, first: bytes, config: DataConfig) -> list[str]:
    try:
        fields = list(json.loads(first))
    except ValueError as error:
        raise DataError(f"{path}:1 is not JSON: {error}", remedy="one JSON object per line") from None
    columns = find_columns(path, fields, config)
    return [fields[columns.user], fields[columns.item], fields[columns.time]]


def _json_one_by_one(
    path: Path, block: bytes, names: Sequence[str], bad: BadRows, first_line: int
) -> tuple[pl.DataFrame, Sequence[int]]:
    rows, lines = [], []
    for line, text in enumerate(block.splitlines(), start=first_line):
        try:
            record: Any = json.loads(text)
        except ValueError:
            bad.add(path, line, "not JSON")
            continue
        if not isinstance(record, dict):
            bad.add(path, line, "not a JSON object")
            continue
        rows.append(["" if record.get(name) is None else str(record[name]) for name in names])
        lines.append(line)
    return pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row"), lines


def _read_sequences(
    path: Path, stream: IO[bytes], config: DataConfig, bad: BadRows, block_bytes: int
) -> Iterator[Block]:
    """`user item item ...`, oldest first: an item's timestamp is its place in the line."""
    line = 1
    for block in line_blocks(stream, block_bytes):
        users, items, places = [], [], []
        for at, text in enumerate(block.decode("utf-8", errors="replace").splitlines(), start=line):
            user, *sequence = text.split() or [""]
            if not sequence or "\ufffd" in text:
                bad.add(path, at, "not UTF-8" if "\ufffd" in text else "no items")
                continue
            users.append(itertools.repeat(user, len(sequence)))
            items.append(sequence)
            places.append(np.arange(len(sequence), dtype=np.float64))
        line += block.count(b"\n")
        flat = (pl.Series(list(itertools.chain.from_iterable(part)), dtype=pl.String) for part in (users, items))
        yield Block(*flat, np.concatenate(places) if places else np.zeros(0))


def find_columns(path: Path, names: Sequence[str], config: DataConfig) -> Columns:
    """Positions of user, item and time by the names given, else by the names they usually go by."""
    wanted = {"user": config.user_column, "item": config.item_column, "time": config.time_column}
    found = {}
    for role, name in wanted.items():
        lower = [column.lower() for column in names]
        options = [name] if name is not None else [alias for alias in ALIASES[role] if alias in lower]
        position = next((_position(names, lower, option) for option in options), None)
        if position is None:
            raise DataError(
                f"{path} has no column {name or role!r}; its columns are {', '.join(names)}",
                remedy=f"--{role}-column NAME",
            )
        found[role] = position
    return Columns(found["user"], found["item"], found["time"], len(names))


def _position(names: Sequence[str], lower: Sequence[str], option: str) -> int | None:
    if option in names:
        return list(names).index(option)
    return list(lower).index(option.lower()) if option.lower() in lower else None


FORMATS: dict[str, Callable[[Path, IO[bytes], DataConfig, BadRows, int], Iterator[Block]]] = {
    "csv": _read_delimited,
    "recbole": _read_delimited,
    "movielens": _read_movielens,
    "jsonl": _read_jsonl,
    "amazon": _read_jsonl,
    "sequences": _read_sequences,
}

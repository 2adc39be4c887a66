"""What every format gives: blocks of checked rows, and a count of the malformed ones."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BufferedIOBase
from pathlib import Path

import numpy as np
import polars as pl

from slmrec.config import DataConfig
from slmrec.errors import DataError

SHOWN_BAD_ROWS = 5
LARGEST_EXACT = 2.0**53

ALIASES = {
    "user": ("user", "user_id", "userid", "reviewerid", "uid", "customer_id", "session_id", "visitorid"),
    "item": (
        "item", "item_id", "itemid", "movieid", "movie_id", "asin", "parent_asin", "product_id", "productid", "iid",
    ),
    "time": ("timestamp", "time", "unixreviewtime", "ts", "datetime", "date", "event_time"),
}  # fmt: skip
"""Names that columns go by, compared in lower case."""

DATE_FORMATS = ("%Y-%m-%d %H:%M:%S%.f%#z", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%d")
"""ISO 8601 after T became a space; a day first or a month first is never guessed at."""


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
        """Count one row."""
        self.count += 1
        if len(self.shown) < SHOWN_BAD_ROWS:
            self.shown.append(f"{path.name}:{line}: {reason}")

    def check(self) -> None:
        """Refuse when there are more than the limit."""
        if self.count > self.limit:
            more = f"\n  and {self.count - len(self.shown)} more" if self.count > len(self.shown) else ""
            raise DataError(
                f"{self.count} malformed rows, {self.limit} are allowed:\n  " + "\n  ".join(self.shown) + more,
                remedy=f"mend the file, or --max-bad-rows {self.count} to drop them",
            )


@dataclass(frozen=True)
class Columns:
    """Positions of the three columns in a row."""

    user: int
    item: int
    time: int
    width: int


def find_columns(path: Path, names: Sequence[str], config: DataConfig) -> Columns:
    """Positions of user, item and time by the names given, else by the names they usually go by."""
    wanted = {"user": config.user_column, "item": config.item_column, "time": config.time_column}
    found = {}
    for role, name in wanted.items():
        position = column_position(names, [name] if name is not None else ALIASES[role])
        if position is None:
            raise DataError(
                f"{path} has no column {name or role!r}; its columns are {', '.join(map(_printable, names))}",
                remedy=f"--{role}-column NAME",
            )
        found[role] = position
    return Columns(found["user"], found["item"], found["time"], len(names))


def _printable(name: str) -> str:
    """A column's name as a terminal may show it."""
    return "".join(character if character.isprintable() else "?" for character in name)[:40]


def column_position(names: Sequence[str], options: Sequence[str]) -> int | None:
    """Where the first of some names stands, as spelled or else in lower case."""
    lower = [name.lower() for name in names]
    for option in options:
        if option in names:
            return list(names).index(option)
        if option.lower() in lower:
            return lower.index(option.lower())
    return None


def line_blocks(stream: BufferedIOBase, block_bytes: int) -> Iterator[bytes]:
    """Whole lines, about `block_bytes` at a time."""
    rest = b""
    while chunk := stream.read(block_bytes):
        end = chunk.rfind(b"\n") + 1
        if end:
            yield rest + chunk[:end]
            rest = chunk[end:]
        else:
            rest += chunk
    if rest:
        yield rest


def checked(path: Path, frame: pl.DataFrame, lines: Sequence[int], bad: BadRows) -> Block:
    """Rows of columns user, item and time, without those that lack an id or a timestamp."""
    time = frame["time"]
    values = _seconds(time)
    users, items = frame["user"].fill_null(""), frame["item"].fill_null("")
    no_user, no_item = (users == "").to_numpy(), (items == "").to_numpy()
    good = ~no_user & ~no_item & np.isfinite(values)
    inexact = good & (np.abs(np.where(good, values, 0.0)) > LARGEST_EXACT)
    if inexact.any():
        _require_few(path, time, inexact, good)
        good &= ~inexact
    if not good.all():
        for row in np.flatnonzero(~good).tolist():
            unread = "no timestamp" if time[row] in (None, "") else f"timestamp {time[row]!r} is no number or ISO date"
            unread = f"timestamp {time[row]} is beyond 2^53" if inexact[row] else unread
            bad.add(path, lines[row], "no user" if no_user[row] else "no item" if no_item[row] else unread)
        mask = pl.Series(good)
        users, items, values = users.filter(mask), items.filter(mask), values[good]
    return Block(users, items, values)


def _require_few(path: Path, time: pl.Series, inexact: np.ndarray, good: np.ndarray) -> None:
    """Refuse times that 64-bit floats cannot tell apart, such as nanoseconds: their order would be lost silently.

    A few among others are malformed rows like any.
    """
    if 2 * inexact.sum() > good.sum():
        raise DataError(
            f"{path} holds the timestamp {time[int(np.argmax(inexact))]}; above 2^53 neighbours cannot be told apart",
            remedy="seconds, milliseconds or microseconds: divide nanoseconds by 1,000",
        )


def _seconds(time: pl.Series) -> np.ndarray:
    """Numbers as they are, dates as seconds since 1970 (UTC where no zone is named), NaN for anything else."""
    if time.dtype != pl.String:
        return time.cast(pl.Float64).fill_null(math.nan).to_numpy()
    numbers = time.str.strip_chars().cast(pl.Float64, strict=False)
    unread = numbers.is_null() & time.is_not_null()
    if unread.any():
        numbers = numbers.zip_with(~unread, _dates(time))
    return numbers.fill_null(math.nan).to_numpy()


def _dates(text: pl.Series) -> pl.Series:
    name = text.name
    plain = pl.col(name).str.strip_chars().str.replace(r"^(\d{4}-\d\d-\d\d)[Tt]", "$1 ").str.replace(r"[Zz]$", "+0000")
    parsed = [
        plain.str.to_datetime(form, strict=False, time_unit="us").dt.timestamp("us").cast(pl.Float64) / 1e6
        for form in DATE_FORMATS
    ]
    return text.to_frame().select(pl.coalesce(parsed)).to_series()

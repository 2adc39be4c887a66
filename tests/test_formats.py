"""Every format gives the same events; what is malformed is counted, named, and refused above the limit."""

import gzip
import json
from pathlib import Path

import polars as pl
import pytest

from slmrec.config import DataConfig
from slmrec.errors import DataError
from slmrec.formats.readers import detect_format, read_log
from slmrec.formats.rows import BadRows

EVENTS = [("ann", "B01", 978300760.0), ("bob", "B02", 978302109.0), ("ann", "B03", 978301968.0)]


def events(path: Path, *, max_bad_rows: int = 0, block_bytes: int = 1 << 20, **settings: object) -> list[tuple]:
    config = DataConfig(max_bad_rows=max_bad_rows, **settings)
    blocks = list(read_log(path, config, BadRows(max_bad_rows), block_bytes))
    return [row for b in blocks for row in zip(b.users, b.items, b.timestamps.tolist(), strict=True)]


def bad_rows(path: Path, text: str, **settings: object) -> tuple[list[tuple], list[str]]:
    path.write_text(text)
    bad = BadRows(100)
    blocks = list(read_log(path, DataConfig(max_bad_rows=100, **settings), bad))
    return [row for b in blocks for row in zip(b.users, b.items, b.timestamps.tolist(), strict=True)], bad.shown


def json_lines(user: str, item: str, time: str) -> str:
    return "".join(json.dumps({user: u, item: i, "overall": 5.0, time: int(t)}) + "\n" for u, i, t in EVENTS)


TEXTS = {
    "log.csv": ("csv", "user_id,item_id,rating,timestamp\n" + "".join(f"{u},{i},5,{t:.0f}\n" for u, i, t in EVENTS)),
    "quoted.csv": ("csv", "item,user,time\r\n" + "".join(f'"{i}","{u}",{t:.0f}\r\n' for u, i, t in EVENTS)),
    "log.tsv": ("csv", "uid\tiid\tts\n" + "".join(f"{u}\t{i}\t{t:.1f}\n" for u, i, t in EVENTS)),
    "semicolons.txt": ("csv", "user;item;x,y;time\n" + "".join(f"{u};{i};0,1;{t:.0f}\n" for u, i, t in EVENTS)),
    "u.data": ("movielens", "".join(f"{u}\t{i}\t4\t{t:.0f}\n" for u, i, t in EVENTS)),
    "ratings.dat": ("movielens", "".join(f"{u}::{i}::4::{t:.0f}\n" for u, i, t in EVENTS)),
    "copied_ratings.txt": ("movielens", "".join(f"{u}::{i}::4::{t:.0f}\n" for u, i, t in EVENTS)),
    "ua.base": ("movielens", "".join(f"{u}\t{i}\t4\t{t:.0f}\n" for u, i, t in EVENTS)),
    "log.inter": (
        "recbole",
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        + "".join(f"{u}\t{i}\t4\t{t:.0f}\n" for u, i, t in EVENTS),
    ),
    "log.jsonl": ("jsonl", json_lines("user", "item", "timestamp")),
    "reviews_Beauty_5.json": ("amazon", json_lines("reviewerID", "asin", "unixReviewTime")),
    "iso.csv": (
        "csv",
        "user,item,time\nann,B01,2000-12-31T22:12:40Z\nbob,B02,2000-12-31 22:35:09\n"
        "ann,B03,2000-12-31T23:32:48.0+01:00\n",
    ),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("name", TEXTS)
def test_every_format_gives_the_same_events(tmp_path: Path, name: str, packed: bool) -> None:
    form, text = TEXTS[name]
    path = tmp_path / (name + ".gz" if packed else name)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    assert detect_format(path) == form
    assert events(path) == EVENTS
    assert events(path, block_bytes=40) == EVENTS, "however the file is cut into blocks"


def test_parquet_gives_the_same_events(tmp_path: Path) -> None:
    users, items, times = zip(*EVENTS, strict=True)
    frame = pl.DataFrame({"USER_ID": users, "item": items, "ts": [int(t) for t in times]})
    frame.write_parquet(tmp_path / "log.parquet")
    assert events(tmp_path / "log.parquet") == EVENTS
    dated = frame.with_columns(pl.from_epoch("ts", time_unit="s"))
    dated.write_parquet(tmp_path / "dated.parquet")
    assert events(tmp_path / "dated.parquet") == EVENTS


def test_sequences_take_their_order_for_time(tmp_path: Path) -> None:
    path = tmp_path / "beauty.txt"
    path.write_text("1 5 6 7\n\n2 8\n")
    assert detect_format(path) == "sequences"
    assert events(path, block_bytes=5) == [("1", "5", 0), ("1", "6", 1), ("1", "7", 2), ("2", "8", 0)]


def test_columns_by_name(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user,who,what,when\nx,ann,B01,1\n")
    assert events(path, user_column="who", item_column="what", time_column="WHEN") == [("ann", "B01", 1.0)]
    with pytest.raises(DataError, match=r"has no column 'item'.*user, who, what, when"):
        events(path)


HEADER = "user,item,time\n"


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("log.csv", HEADER + "a,b,1\na,c\na,d,3\n", "log.csv:3: 2 fields, expected 3"),
        ("log.csv", HEADER + "a,b,1\na,c,2,9\na,d,3\n", "log.csv:3: 4 fields, expected 3"),
        ("log.csv", HEADER + 'a,b,1\n"a,c,2\na,d,3\n', "log.csv:3: a quote that is never closed"),
        ("log.csv", HEADER + "a,b,1\na,,2\na,d,3\n", "log.csv:3: no item"),
        ("log.csv", HEADER + "a,b,1\n,c,2\na,d,3\n", "log.csv:3: no user"),
        ("log.csv", HEADER + "a,b,1\na,c,\na,d,3\n", "log.csv:3: no timestamp"),
        ("log.csv", HEADER + "a,b,1\na,c,01/02/2003\na,d,3\n", "'01/02/2003' is no number or ISO date"),
        ("log.csv", HEADER + "a,b,1\na,c,nan\na,d,3\n", "'nan' is no number or ISO date"),
        ("log.csv", HEADER + "a,b,1\na,c,inf\na,d,3\n", "'inf' is no number or ISO date"),
        ("u.data", "a\tb\t5\t1\na\tc\t2\na\td\t5\t3\n", "u.data:2: 3 fields, expected 4"),
        ("l.jsonl", '{"user":"a","item":"b","time":1}\n{"user":\n{"user":"a","item":"d","time":3}\n', ":2: not JSON"),
        (
            "l.jsonl",
            '{"user":"a","item":"b","time":1}\n{"user":"a","time":2}\n{"user":"a","item":"d","time":3}\n',
            "no item",
        ),
        (
            "l.jsonl",
            '{"user":"a","item":"b","time":1}\n{"user":{"id":"a"},"item":"c","time":2}\n{"user":"a","item":"d","time":3}\n',
            ":2: user is no text and no number",
        ),
    ],
)  # fmt: skip
def test_a_malformed_row_is_named_and_its_neighbours_kept(tmp_path: Path, name: str, text: str, reason: str) -> None:
    kept, shown = bad_rows(tmp_path / name, text)
    assert kept == [("a", "b", 1.0), ("a", "d", 3.0)]
    assert len(shown) == 1
    assert reason in shown[0]
    with pytest.raises(DataError, match="1 malformed rows, 0 are allowed") as refusal:
        events(tmp_path / name)
    assert reason in refusal.value.problem
    assert "--max-bad-rows 1" in str(refusal.value)


def test_one_stray_quote_costs_one_row_and_little_memory(tmp_path: Path) -> None:
    rows = [f"u{n},i{n},{n}\n" for n in range(5000)]
    rows[7] = '"u7,i7,7\n'
    kept, shown = bad_rows(tmp_path / "log.csv", HEADER + "".join(rows))
    assert len(kept) == 4999
    assert shown == ["log.csv:9: a quote that is never closed"]


def test_quoted_text_may_hold_separators_and_line_breaks(tmp_path: Path) -> None:
    text = 'user,review,item,time\na,"good, very\n""good""\nindeed",b,1\na,so so,c,2\na,5" wide,d,3\n'
    path = tmp_path / "log.csv"
    path.write_text(text)
    assert events(path) == events(path, block_bytes=8) == [("a", "b", 1.0), ("a", "c", 2.0), ("a", "d", 3.0)]


def test_bytes_that_are_not_utf8_are_malformed(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(b"user,item,time\na,b,1\n\xff,c,2\n")
    with pytest.raises(DataError, match=r"log\.csv:3: not UTF-8"):
        events(path)


def test_only_the_first_malformed_rows_are_shown(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(HEADER + "a,b,x\n" * 8)
    with pytest.raises(DataError, match=r"(?s)8 malformed rows.*and 3 more"):
        events(tmp_path / "log.csv")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.csv", b"", "is empty"),
        ("log.txt", b"\n", "is empty"),
        ("u.data.gz", b"no gzip at all", "cannot be unpacked"),
        ("log.csv.gz", gzip.compress(b"user,item,time\n" + b"a,b,1\n" * 99, mtime=0)[:-20], "cannot be unpacked"),
        ("log.parquet", b"PAR1 and no more", "is not Parquet"),
        ("log.jsonl", b"{not json}\n", ":1 is not JSON"),
    ],
)
def test_files_that_cannot_be_read_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        events(tmp_path / name)
    with pytest.raises(DataError, match="is not a file"):
        events(tmp_path / "absent.csv")

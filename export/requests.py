"""Files of requests in, files of recommendations out, a chunk at a time (JSON lines, CSV, Parquet)."""

import csv
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from slmrec.catalogue import Catalogue
from slmrec.checks import is_unicode
from slmrec.errors import DataError
from slmrec.ragged import Ragged
from slmrec.recommender import PAD, Histories, Recommender, TopK

CHUNK = 4096
LONGEST_CELL = 1 << 27
"""Characters of a CSV cell: a history of millions."""
FIELDS = ("user", "history", "exclude")
FORMATS = (".jsonl", ".csv", ".parquet")
SCHEMA = pa.schema([("user", pa.string()), ("items", pa.list_(pa.string())), ("scores", pa.list_(pa.float32()))])
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet takes a cell that starts with one of these for a formula."""


@dataclass(frozen=True)
class Request:
    """One line of the input: external ids, oldest first."""

    source: Path
    line: int
    user: str
    history: Sequence[str]
    exclude: Sequence[str]


def recommend_file(
    recommender: Recommender, items: Catalogue, source: Path, target: Path, k: int, *, force: bool = False
) -> int:
    """Answer every request of a file in its order; gives the number of users. Memory does not grow with the file.

    Earlier answers in `target` are replaced, another file only with `force`.

    Raises:
        DataError: the file is missing, malformed, or names an item that is not in the catalogue; or `target` is a file
            of something else.
    """
    for path in (source, target):
        if path.suffix not in FORMATS:
            raise DataError(
                f"{path.name} ends in none of {', '.join(FORMATS)}",
                remedy="such as users.jsonl; an --output without an ending is a folder",
            )
    if source.resolve() == target.resolve():
        raise DataError(f"the answers would replace the requests in {source}", remedy="another --output file")
    if not source.is_file():
        raise DataError(f"{source} is not a file", remedy='lines such as {"user": "1", "history": ["50", "172"]}')
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        foreign = target.exists() and not force and not _holds_answers(target)
    except OSError as error:
        raise DataError(f"{target} cannot be written: {error.strerror}", remedy="another --output") from None
    try:
        if foreign:
            raise DataError(f"{target} is there and holds no recommendations", remedy="another --output, or --force")
        with readable(source), AnswerWriter(partial, target.suffix) as writer:
            done = answer_all(recommender, items, _read(source), writer, k)
        if not done:
            raise empty(source)
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)
    return done


def answer_all(
    recommender: Recommender, items: Catalogue, requests: Iterable[Request], writer: "AnswerWriter", k: int
) -> int:
    """Answer requests in their order, a chunk at a time; gives their number."""
    done = 0
    for chunk in _chunks(requests):
        writer.write(chunk, recommender.recommend(_histories(chunk, items), k), items)
        done += len(chunk)
    return done


@contextmanager
def readable(source: Path) -> Iterator[None]:
    """A reader's complaint about a file's content as one message; faults of the machine stay what they are."""
    try:
        yield
    except (pa.ArrowException, csv.Error, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{source} is not readable as {source.suffix}: {error}", remedy="mend the file") from None


def empty(source: Path) -> DataError:
    """What a file or folder without any request is."""
    return DataError(f"{source} is empty", remedy='lines such as {"user": "1", "history": ["50", "172"]}')


def named_items(answer: TopK, row: int, items: Catalogue) -> tuple[list[str], list[float]]:
    """External ids and scores of one list, without the padding at its end."""
    kept = answer.item_ids[row] != PAD
    ids = [items.item_ids[item - 1] for item in answer.item_ids[row][kept].tolist()]
    return ids, answer.scores[row][kept].tolist()


def _histories(chunk: Sequence[Request], items: Catalogue) -> Histories:
    histories, excluded = [], []
    for request in chunk:
        where = f"{request.source.name}:{request.line}"
        try:
            histories.append(items.to_internal(request.history))
            excluded.append(items.to_internal(request.exclude))
        except DataError as error:
            raise DataError(f"{where}: {error.problem}", remedy=error.remedy) from None
        if not len(histories[-1]) and items.num_interactions is None:
            raise DataError(
                f"{where}: the history is empty, and this artefact does not know what is popular",
                remedy="leave out users without a history, or make the artefact again from newly prepared data",
            )
    return Histories(Ragged.from_rows(histories), Ragged.from_rows(excluded))


def _chunks(requests: Iterable[Request]) -> Iterator[list[Request]]:
    chunk: list[Request] = []
    for request in requests:
        chunk.append(request)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _read(source: Path) -> Iterator[Request]:
    if source.suffix == ".jsonl":
        with source.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    yield parse_request(json.loads(line), number, source)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise _malformed(source, number, f"not JSON ({error})") from None
    elif source.suffix == ".parquet":
        number = 0
        for batch in pq.ParquetFile(source).iter_batches(batch_size=CHUNK):
            for record in batch.to_pylist():
                number += 1
                yield parse_request(record, number, source)
    else:
        with source.open(encoding="utf-8-sig", newline="") as lines:
            csv.field_size_limit(LONGEST_CELL)
            reader = csv.DictReader(lines, strict=True)
            names = reader.fieldnames or []
            if len(set(names)) < len(names):
                raise _malformed(source, 1, f"the columns {', '.join(names)}, one of them twice")
            for number, record in enumerate(reader, 2):
                if None in record.values():
                    raise _malformed(source, number, "fewer cells than the header")
                yield parse_request(record, number, source)


def parse_request(record: Any, line: int, source: Path) -> Request:
    """One record as it was read: a field `history`, and `user` and `exclude` where there are any."""
    if not isinstance(record, dict) or "history" not in record:
        raise _malformed(source, line, "no record with a field 'history'")
    for name in record:
        meant = [] if name in FIELDS else difflib.get_close_matches(str(name), FIELDS)
        if name is None or meant:  # None holds the cells of a CSV row that has more of them than its header
            what = "more cells than the header" if name is None else f"the field {name!r}; is it {meant[0]!r}?"
            raise _malformed(source, line, what)
    lists = [_ids(record.get(name), line, source) for name in ("history", "exclude")]
    user = record.get("user", line)
    if not isinstance(user, str | int) or isinstance(user, bool) or not is_unicode(str(user)):
        raise _malformed(source, line, f"the user is {user!r}, expected is text or a whole number")
    return Request(source, line, str(user), *lists)


def _ids(value: Any, line: int, source: Path) -> list[str]:
    """A list of ids; in CSV ids with spaces between them, or a JSON list."""
    if value is None:
        return []
    if isinstance(value, str) and source.suffix == ".csv":
        if not value.startswith("["):
            return value.split()
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            raise _malformed(source, line, f"not a JSON list ({error})") from None
    if isinstance(value, list) and all(isinstance(item, str | int) and not isinstance(item, bool) for item in value):
        return [str(item) for item in value]
    raise _malformed(source, line, f"{value!r} is no list of item ids")


def _malformed(source: Path, line: int, what: str) -> DataError:
    return DataError(
        f"{source.name}:{line}: {what}",
        remedy='{"user": "1", "history": ["50", "172"], "exclude": []}, or these columns',
    )


def _holds_answers(path: Path) -> bool:
    """Whether a file looks like what `AnswerWriter` makes, or is empty."""
    if path.suffix == ".parquet":
        try:
            names: list[str] = pq.read_schema(path).names
        except pa.ArrowException:
            return False
        return bool(names == SCHEMA.names)
    with path.open("rb") as stream:
        first = stream.readline(LONGEST_CELL)
    if path.suffix == ".csv":
        return first in (b"", b"user,items,scores\n")
    try:
        return not first or set(json.loads(first)) == set(SCHEMA.names)
    except (ValueError, TypeError, RecursionError):
        return False


class AnswerWriter:
    """Writes chunks of answers to one open file; notes go into the metadata of a Parquet file."""

    def __init__(self, path: Path, suffix: str, notes: Mapping[str, str] | None = None) -> None:
        schema = SCHEMA.with_metadata(dict(notes)) if notes else SCHEMA
        self.parquet = pq.ParquetWriter(path, schema) if suffix == ".parquet" else None
        self.text = None if self.parquet else path.open("w", encoding="utf-8", newline="")
        self.csv = csv.writer(self.text, lineterminator="\n") if self.text is not None and suffix == ".csv" else None
        if self.csv is not None:
            self.csv.writerow(["user", "items", "scores"])

    def __enter__(self) -> "AnswerWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.parquet, self.text):
            if stream is not None:
                stream.close()

    def write(self, chunk: Sequence[Request], answer: TopK, items: Catalogue) -> None:
        """Append the answers of a chunk."""
        lists = [named_items(answer, row, items) for row in range(len(chunk))]
        users = [request.user for request in chunk]
        if self.parquet is not None:
            columns = [users, [ids for ids, _ in lists], [scores for _, scores in lists]]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
            self.parquet.write_table(pa.table(arrays, self.parquet.schema))
            return
        assert self.text is not None
        for user, (ids, scores) in zip(users, lists, strict=True):
            if self.csv is None:
                self.text.write(json.dumps({"user": user, "items": ids, "scores": scores}) + "\n")
            else:
                plain = all(len(item.split()) == 1 for item in ids) and not "".join(ids[:1]).startswith("[")
                cell = " ".join(ids) if plain else json.dumps(ids)
                self.csv.writerow([_cell(user), _cell(cell), " ".join(f"{score:.6g}" for score in scores)])


def _cell(text: str) -> str:
    return f"'{text}" if text.startswith(FORMULA) else text

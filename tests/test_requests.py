"""Files of requests: every format alike, in their order, and one message for what is wrong with a line."""

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from export.requests import recommend_file
from slmrec.catalogue import Catalogue
from slmrec.errors import DataError
from slmrec.recommender import TopK

ITEMS = Catalogue(["a", "b", "=c", "d e"], ["Alien", "Brazil", "Brazil", None], [None] * 4)


class Successor:
    """Recommends the items that follow the newest one, unless they were seen or are excluded."""

    num_items, max_top_k = 4, 3840

    def recommend(self, histories, k):
        item_ids = np.zeros((len(histories), k), dtype=np.int64)
        for row, (history, excluded) in enumerate(zip(histories.item_ids, histories.exclude_ids, strict=True)):
            ring = [(int(history[-1]) + step - 1) % 4 + 1 for step in range(1, 4)]
            kept = [item for item in ring if item not in excluded and item not in history][:k]
            item_ids[row, : len(kept)] = kept
        return TopK(item_ids, np.where(item_ids > 0, 1.0 / (1 + np.arange(k)), -np.inf).astype(np.float32))


REQUESTS = [
    {"user": "u1", "history": ["a"], "exclude": []},
    {"user": "=u2", "history": ["b", "=c"], "exclude": ["a"]},
]


def write(path, requests):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    else:
        frame = pl.DataFrame(
            requests, schema={"user": pl.String, "history": pl.List(pl.String), "exclude": pl.List(pl.String)}
        )
        if path.suffix == ".parquet":
            frame.write_parquet(path)
        else:
            frame.with_columns(pl.col("history", "exclude").list.join(" ")).write_csv(path)
    return path


@pytest.mark.parametrize("source", ["in.jsonl", "in.csv", "in.parquet"])
def test_every_input_format_gives_the_same_answers(tmp_path, source):
    done = recommend_file(Successor(), ITEMS, write(tmp_path / source, REQUESTS), tmp_path / "out.jsonl", 3)
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert done == 2
    assert [answer["user"] for answer in answers] == ["u1", "=u2"]
    assert [answer["items"] for answer in answers] == [["b", "=c", "d e"], ["d e"]]
    assert answers[0]["scores"] == pytest.approx([1, 1 / 2, 1 / 3])
    assert sorted(path.name for path in tmp_path.iterdir()) == [source, "out.jsonl"]


def test_output_formats_hold_the_same_and_csv_no_formula(tmp_path):
    source = write(tmp_path / "in.jsonl", REQUESTS)
    recommend_file(Successor(), ITEMS, source, tmp_path / "out.parquet", 2)
    assert pl.read_parquet(tmp_path / "out.parquet")["items"].to_list() == [["b", "=c"], ["d e"]]
    recommend_file(Successor(), ITEMS, source, tmp_path / "out.csv", 2)
    frame = pl.read_csv(tmp_path / "out.csv")
    assert frame["user"].to_list() == ["u1", "'=u2"]
    assert frame["items"].to_list() == ["b =c", '["d e"]'], "an id with a space in it stands in a JSON list"


def test_csv_takes_ids_with_spaces_as_a_json_list(tmp_path):
    (tmp_path / "in.csv").write_text('user,history\nu1,"[""d e"", ""a""]"\nu2,b =c\n')
    assert recommend_file(Successor(), ITEMS, tmp_path / "in.csv", tmp_path / "out.jsonl", 1) == 2
    answers = [json.loads(line)["items"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert answers == [["b"], ["d e"]]


class Counting:
    """Notes whose histories are empty."""

    num_items, max_top_k = 4, 4

    def __init__(self):
        self.lengths = []

    def recommend(self, histories, k):
        self.lengths += histories.item_ids.lengths.tolist()
        return TopK(np.full((len(histories), k), 2), np.zeros((len(histories), k), np.float32))


def test_a_user_without_history_is_asked_for_where_popularity_is_known(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"history": []}\n{"history": ["a"]}\n')
    known, recommender = replace(ITEMS, num_interactions=[3, 1, 2, 0]), Counting()
    assert recommend_file(recommender, known, tmp_path / "in.jsonl", tmp_path / "out.jsonl", 1) == 2
    assert recommender.lengths == [0, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.jsonl", b'{"history": ["a"]}\n{"history": ["zzz"]}\n', r"in\.jsonl:2: the item 'zzz' is not among the 4"),
        ("in.jsonl", b'{"history": ["Brazil"]}\n', "the title 'Brazil' names 2 items: b, =c"),
        ("in.jsonl", b'{"history": []}\n', "in.jsonl:1: the history is empty"),
        ("in.jsonl", b'{"user": "x"}\n', "in.jsonl:1: no record with a field 'history'"),
        ("in.jsonl", b'{"history": ["a"], "excluded": ["b"]}\n', "the field 'excluded'; is it 'exclude'?"),
        ("in.csv", b"usr,history\n1,a\n", "in.csv:2: the field 'usr'; is it 'user'?"),
        ("in.csv", b"user,history\n1,a,b\n", "in.csv:2: more cells than the header"),
        ("in.csv", b"user,history\n1,a\n2\n", "in.csv:3: fewer cells than the header"),
        ("in.csv", b"user,history,history\n1,a,b\n", "in.csv:1: the columns user, history, history, one of them twice"),
        ("in.csv", b'user,history\n"x,a\ny,b\n', "is not readable as .csv: unexpected end of data"),
        ("in.jsonl", b'{"history": [["a"]]}\n', "is no list of item ids"),
        ("in.jsonl", b'{"history": ["a", null]}\n', "is no list of item ids"),
        ("in.jsonl", b'{"history": 5}\n', "in.jsonl:1: 5 is no list of item ids"),
        ("in.jsonl", b'{"history": "d e"}\n', "in.jsonl:1: 'd e' is no list of item ids"),
        ("in.jsonl", b"[1, 2]\n", "in.jsonl:1: no record with a field 'history'"),
        ("in.jsonl", b"{history}\n", "in.jsonl:1: not JSON"),
        ("in.jsonl", b'{"history": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "in.jsonl:1: not JSON"),
        ("in.jsonl", b'{"history": ["\xff"]}\n', "is not readable as .jsonl"),
        ("in.jsonl", b"", "in.jsonl is empty"),
        ("in.csv", b"", "in.csv is empty"),
        ("in.csv", b'user,history\n1,"[""a"\n', "in.csv:2: not a JSON list"),
        ("in.parquet", b"PAR1", "in.parquet is not readable as .parquet"),
        ("in.txt", b"a b c\n", "in.txt ends in none of .jsonl, .csv, .parquet"),
    ],
)
def test_a_bad_request_is_named_and_no_answer_is_written(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        recommend_file(Successor(), ITEMS, tmp_path / name, tmp_path / "out.jsonl", 2)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["in.jsonl", "in.csv"])
def test_a_byte_order_mark_and_a_new_folder_are_no_trouble(tmp_path, name):
    source = write(tmp_path / name, REQUESTS[:1])
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes())
    assert recommend_file(Successor(), ITEMS, source, tmp_path / "new" / "out.jsonl", 1) == 1


def test_a_csv_cell_may_hold_a_long_history(tmp_path):
    (tmp_path / "in.csv").write_text("user,history\nu," + "a " * 200_000 + "b\n")
    assert recommend_file(Successor(), ITEMS, tmp_path / "in.csv", tmp_path / "out.jsonl", 1) == 1


def test_answers_never_replace_their_requests(tmp_path):
    source = write(tmp_path / "in.jsonl", REQUESTS)
    before = source.read_bytes()
    with pytest.raises(DataError, match="would replace the requests"):
        recommend_file(Successor(), ITEMS, source, tmp_path / "." / "in.jsonl", 2)
    assert source.read_bytes() == before


def test_a_title_is_matched_whole_whatever_its_case():
    assert ITEMS.to_internal(["alien", "ALIEN", "d e"]).tolist() == [1, 1, 4]
    with pytest.raises(DataError, match="'Alie' is not among"):
        ITEMS.to_internal(["Alie"])


@pytest.mark.parametrize("user", [None, True, 1.5, {"a": 1}, "\ud800"])
def test_a_user_is_text_or_a_whole_number(tmp_path, user):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"user": user, "history": ["a"]}) + "\n")
    with pytest.raises(DataError, match=r"in\.jsonl:1: the user is"):
        recommend_file(Successor(), ITEMS, source, tmp_path / "out.jsonl", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_answers_that_cannot_be_written_are_one_message(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(REQUESTS[0]) + "\n")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"out\.jsonl cannot be written"):
        recommend_file(Successor(), ITEMS, source, tmp_path / "file" / "out.jsonl", 2)


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.parquet"])
def test_answers_replace_earlier_ones_and_nothing_else(tmp_path, name):
    source, target = write(tmp_path / "in.jsonl", REQUESTS), tmp_path / name
    for _ in range(2):
        assert recommend_file(Successor(), ITEMS, source, target, 2) == 2
    for foreign in (b"a diary\n", b'["user", "items"]\n', b"7\n"):
        target.write_bytes(foreign)
        with pytest.raises(DataError, match="holds no recommendations"):
            recommend_file(Successor(), ITEMS, source, target, 2)
        assert target.read_bytes() == foreign
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", name]
    assert recommend_file(Successor(), ITEMS, source, target, 2, force=True) == 2
    assert target.read_bytes() != foreign


def test_blank_lines_are_no_requests_and_count_as_lines(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"history": ["a"]}\n\n  \n{"history": ["b"]}\n\n')
    assert recommend_file(Successor(), ITEMS, source, tmp_path / "out.jsonl", 1) == 2
    assert [json.loads(line)["user"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == ["1", "4"]

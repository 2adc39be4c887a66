"""From events to a dataset: order, duplicates, k-core, numbering, and the counts that are shown."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmrec.catalogue import load_catalogue
from slmrec.config import DataConfig
from slmrec.dataset import load_dataset
from slmrec.errors import ArtifactError, DataError
from slmrec.interactions import Interactions, drop_duplicates, k_core, prepare_dataset, sort_events


def log_of(rows: list[tuple[int, int, float]]) -> Interactions:
    users, items, times = zip(*rows, strict=True) if rows else ((), (), ())
    return Interactions(
        np.array(users, np.int32), np.array(items, np.int32), np.array(times, np.float64),
        [str(n) for n in range(9)], [str(n) for n in range(9)],
    )  # fmt: skip


def rows_of(log: Interactions) -> list[tuple[int, int, float]]:
    return list(zip(log.users.tolist(), log.items.tolist(), log.timestamps.tolist(), strict=True))


ROWS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 6).map(float)), max_size=40)


@given(ROWS)
@settings(deadline=None)
def test_sorting_is_by_user_and_time_with_ties_in_input_order(rows):
    assert rows_of(sort_events(log_of(rows))) == sorted(rows, key=lambda row: (row[0], row[2]))


@given(ROWS)
@settings(deadline=None)
def test_duplicates_lose_all_but_their_first_row(rows):
    assert rows_of(drop_duplicates(sort_events(log_of(rows)))) == list(
        dict.fromkeys(rows_of(sort_events(log_of(rows))))
    )


@given(ROWS, st.integers(0, 4))
@settings(deadline=None)
def test_a_k_core_is_the_largest_set_in_which_all_have_k_events(rows, k):
    expected = rows
    while True:
        users, items = [row[0] for row in expected], [row[1] for row in expected]
        kept = [row for row in expected if users.count(row[0]) >= k and items.count(row[1]) >= k]
        if kept == expected:
            break
        expected = kept
    assert rows_of(k_core(log_of(rows), k)) == expected


def write(folder: Path, text: str, name: str = "log.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_log_becomes_sequences_in_the_order_of_time(tmp_path):
    text = "user,item,time\nz,c,3\nz,a,1\ny,a,5\nz,b,2\nz,b,2\ny,c,5\ny,d,5\nx,d,9\n"
    artifact, up_to_date = prepare_dataset([write(tmp_path, text)], tmp_path / "data", DataConfig())
    data = load_dataset(artifact.path)
    assert not up_to_date
    assert data.items.item_ids == ["c", "a", "b", "d"], "numbered from 1 in the order they were first met"
    assert [row.tolist() for row in data.sequences] == [[2, 3, 1], [2, 1, 4], [4]]
    counts = {name: data.info[name] for name in ("num_rows_read", "num_duplicates", "num_users", "num_items",
              "num_interactions", "num_evaluable_users", "num_train_only_users", "num_tied_targets")}  # fmt: skip
    assert list(counts.values()) == [8, 1, 3, 4, 7, 2, 1, 1]


def test_popularity_counts_training_interactions_alone(tmp_path):
    rows = [("u", "a", 1), ("u", "b", 2), ("u", "a", 3), ("u", "c", 4), ("v", "c", 1), ("v", "c", 2)]
    path = tmp_path / "log.csv"
    path.write_text("user,item,timestamp\n" + "".join(f"{user},{item},{time}\n" for user, item, time in rows))
    prepare_dataset([path], tmp_path / "data", DataConfig(min_events=1))
    found = load_catalogue(tmp_path / "data")
    counts = dict(zip(found.item_ids, found.num_interactions, strict=True))
    assert counts == {"a": 1, "b": 1, "c": 2}  # u's last two are held out, v has too few to be


def test_titles_are_kept_where_they_are_known(tmp_path):
    log = write(tmp_path, "user,item,time\na,1,1\na,2,2\na,3,3\n")
    titles = write(tmp_path, 'item_id,title,genres\n2,"Twelve, Monkeys",Sci-Fi\n9,Unseen,Drama\n', "films.csv")
    prepare_dataset([log], tmp_path / "data", DataConfig(items_file=str(titles)))
    items = load_dataset(tmp_path / "data").items
    assert items.titles == [None, "Twelve, Monkeys", None]
    assert items.categories == [None, "Sci-Fi", None]


def test_a_table_of_titles_is_known_by_its_content_wherever_it_lies(tmp_path, monkeypatch):
    log = write(tmp_path, "user,item,time\na,1,1\na,2,2\na,3,3\n")
    titles = write(tmp_path, "item_id,title\n2,Brazil\n", "films.csv")
    made, _ = prepare_dataset([log], tmp_path / "data", DataConfig(items_file=str(titles)))
    assert str(tmp_path) not in (made.path / "manifest.json").read_text()
    monkeypatch.chdir(tmp_path)
    assert prepare_dataset([log], tmp_path / "data", DataConfig(items_file="films.csv"))[1]
    titles.write_text("item_id,title\n2,Alien\n")
    with pytest.raises(ArtifactError, match="other settings or inputs"):
        prepare_dataset([log], tmp_path / "data", DataConfig(items_file="films.csv"))


LOGS = {
    "log.inter": "user_id:token\titem_id:token\ttimestamp:float\na\t1\t1\na\t2\t2\na\t3\t3\n",
    "u.data": "".join(f"1\t{n}\t5\t97830076{n}\n" for n in (1, 2, 3)),
    "ratings.dat": "".join(f"1::{n}::5::97830076{n}\n" for n in (1, 2, 3)),
    "sequences.txt": "1 1 2 3\n",
}


@pytest.mark.parametrize(
    ("log", "name", "text", "titles"),
    [
        ("u.data", "u.item", "1|Toy Story (1995)|d||u|0|0|0|1|1\n", ("Toy Story (1995)", "Animation Children's")),
        ("ratings.dat", "movies.dat", "1::Toy Story (1995)::Animation|Comedy\n",
         ("Toy Story (1995)", "Animation Comedy")),
        ("log.inter", "log.item", "item_id:token\tmovie_title:token_seq\tclass:token_seq\n1\tToy Story\tComedy\n",
         ("Toy Story", "Comedy")),
        ("sequences.txt", "titles.tsv", "1\tToy Story\tComedy\n", ("Toy Story", "Comedy")),
    ],
)  # fmt: skip
def test_the_table_of_titles_published_with_a_log_is_found_beside_it(tmp_path, log, name, text, titles):
    write(tmp_path, text, name)
    prepare_dataset([write(tmp_path, LOGS[log], log)], tmp_path / "data", DataConfig())
    items = load_dataset(tmp_path / "data").items
    assert (items.titles[0], items.categories[0]) == titles


def test_no_user_to_evaluate_is_refused_and_nothing_is_written(tmp_path):
    log = write(tmp_path, "user,item,time\na,1,1\na,2,2\nb,1,1\n")
    with pytest.raises(DataError, match="of 2 users none has 3 interactions"):
        prepare_dataset([log], tmp_path / "data", DataConfig())
    with pytest.raises(DataError, match="holds no interaction"):
        prepare_dataset([write(tmp_path, "user,item,time\n")], tmp_path / "data", DataConfig())
    with pytest.raises(DataError, match="so no user can be evaluated"):
        prepare_dataset([write(tmp_path, "user,item,time\na,1,1\n")], tmp_path / "data", DataConfig(min_events=3))
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def test_a_changed_log_is_no_longer_up_to_date(tmp_path):
    log = write(tmp_path, "user,item,time\na,1,1\na,2,2\na,3,3\n")
    prepare_dataset([log], tmp_path / "data", DataConfig())
    assert prepare_dataset([log], tmp_path / "data", DataConfig())[1]
    write(tmp_path, "user,item,time\na,1,1\na,2,2\na,3,4\n")
    with pytest.raises(ArtifactError, match="--force"):
        prepare_dataset([log], tmp_path / "data", DataConfig())
    assert not prepare_dataset([log], tmp_path / "data", DataConfig(), force=True)[1]


def test_several_logs_are_one(tmp_path):
    first = write(tmp_path, "user,item,time\na,1,1\na,2,2\n", "one.csv")
    second = write(tmp_path, "a\t3\t5\t978300760\n", "u.data")
    prepare_dataset([first, second], tmp_path / "data", DataConfig())
    assert [row.tolist() for row in load_dataset(tmp_path / "data").sequences] == [[1, 2, 3]]


def test_a_table_of_titles_of_another_data_set_is_not_taken(tmp_path):
    write(tmp_path, "1::Toy Story (1995)::Comedy\n", "movies.dat")
    log = write(tmp_path, "user,item,timestamp\n" + "".join(f"u,{n},{n}\n" for n in range(4)))
    prepare_dataset([log], tmp_path / "data", DataConfig())
    assert not load_dataset(tmp_path / "data").items.has_titles
    with pytest.raises(DataError, match=r"nope\.csv is not a file"):
        prepare_dataset([log], tmp_path / "other", DataConfig(items_file=str(tmp_path / "nope.csv")))


def test_times_that_floats_cannot_tell_apart_are_refused(tmp_path):
    log = write(tmp_path, "user,item,timestamp\n" + "".join(f"u,{n},{10**18 - n}\n" for n in range(4)))
    with pytest.raises(DataError, match=r"timestamp 10{18}; above 2\^53"):
        prepare_dataset([log], tmp_path / "data", DataConfig())


def test_a_few_times_beyond_that_are_malformed_rows_like_any(tmp_path):
    log = write(tmp_path, "user,item,timestamp\n" + "".join(f"u,{n},{n}\n" for n in range(4)) + "u,9,1e300\n")
    with pytest.raises(DataError, match=r"log\.csv:6: timestamp 1e300 is beyond 2\^53"):
        prepare_dataset([log], tmp_path / "data", DataConfig())
    prepare_dataset([log], tmp_path / "data", DataConfig(max_bad_rows=1))
    assert load_dataset(tmp_path / "data").info["num_bad_rows"] == 1


def test_files_of_one_name_and_files_in_another_order_are_other_inputs(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    first = write(tmp_path / "x", "user,item,time\na,1,1\na,2,1\na,3,1\n")
    second = write(tmp_path / "y", "user,item,time\nb,3,1\nb,2,1\nb,1,1\n")
    prepare_dataset([first, second], tmp_path / "data", DataConfig())
    with pytest.raises(ArtifactError, match="--force"):
        prepare_dataset([second, first], tmp_path / "data", DataConfig())
    write(tmp_path / "x", "user,item,time\na,1,1\na,2,1\na,3,2\n")
    with pytest.raises(ArtifactError, match="--force"):
        prepare_dataset([first, second], tmp_path / "data", DataConfig())


def test_files_whose_times_cannot_be_compared_are_refused(tmp_path):
    log = write(tmp_path, "user,item,timestamp\n" + "".join(f"u,{n},{n}\n" for n in range(4)))
    sequences = write(tmp_path, "v 1 2 3\n", "s.txt")
    with pytest.raises(DataError, match="places instead of times, csv files have times"):
        prepare_dataset([sequences, log], tmp_path / "data", DataConfig())

"""The studies' own arithmetic: what an interval allows to say, and what a new item is given."""

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from served import make_bundle

from slmrec.catalogue import Catalogue
from slmrec.config import DataConfig
from slmrec.interactions import prepare_dataset
from slmrec.models.decoder import DecoderModel
from slmrec.synthetic import write_log

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def study(monkeypatch):
    """Import a script of `benchmarks/`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_a_seed_is_kept_as_a_whole_with_the_commit_and_machine_that_filled_it(study, tmp_path, monkeypatch):
    kept, orthogonality = study("kept"), study("orthogonality")
    monkeypatch.setattr(kept, "RESULTS", tmp_path)
    monkeypatch.setattr(kept, "commit", lambda: "c0ffee")
    rows = [f"{name}, {c}" for name in orthogonality.MODELS for c in ("fp32", *orthogonality.COMPRESSIONS)]
    for seed, rank in ((0, 5), (1, 0), (0, 2)):  # the second time that seed 0 is filled it replaces the first
        kept.keep("orthogonality", "toys", seed, {row: np.array([rank, -1, 99]) for row in rows})
    kept.keep("orthogonality", "other", 0, {"one": np.array([1])})
    assert kept.kept("orthogonality", "toys", 0)["CE, pruned, 8-bit"].tolist() == [2, -1, 99]
    assert kept.kept("orthogonality", "toys", 2) == {}
    seeds = kept.kept_seeds("orthogonality")
    assert [(one["dataset"], one["seed"]) for one in seeds] == [("other", 0), ("toys", 0), ("toys", 1)]
    assert {one["commit"] for one in seeds} == {"c0ffee"}
    assert all(one["machine"]["versions"]["numpy"] == np.__version__ for one in seeds)
    users = orthogonality.averaged([orthogonality.users_of("toys", seed) for seed in (0, 1)])
    assert users["CE", "8-bit"].tolist() == [0.75, 0, 0]


def test_a_change_that_student_and_teacher_share_is_no_interaction(study):
    orthogonality = study("orthogonality")
    generator = np.random.default_rng(0)
    student, teacher = generator.random((2, 5000))
    users = {
        ("SLMRec", "fp32"): student, ("SLMRec", "8-bit"): 0.9 * student,
        ("teacher", "fp32"): teacher, ("teacher", "8-bit"): 0.9 * teacher,
    }  # fmt: skip
    found = orthogonality.interaction(users, "SLMRec", "8-bit")
    assert found["estimate"] == pytest.approx(0, abs=1e-12)
    assert found["verdict"] == "orthogonal"


@pytest.mark.parametrize(("spread", "verdict"), [(0.01, "not orthogonal"), (3.0, "undecided")])
def test_a_student_that_loses_more_is_told_where_users_resolve_it(study, spread, verdict):
    orthogonality = study("orthogonality")
    generator = np.random.default_rng(0)
    student, teacher = generator.random((2, 5000))
    users = {
        ("SLMRec", "fp32"): student, ("SLMRec", "8-bit"): 0.95 * student + spread * generator.normal(size=5000) / 2,
        ("teacher", "fp32"): teacher, ("teacher", "8-bit"): teacher,
    }  # fmt: skip
    found = orthogonality.interaction(users, "SLMRec", "8-bit")
    assert found["verdict"] == verdict
    assert (found["users_to_decide"] is None) == (verdict == "not orthogonal")
    if verdict == "undecided":
        assert found["users_to_decide"] > 5000
    else:
        assert found["estimate"] == pytest.approx(-0.05, abs=0.01)


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [((-0.002, 0.004), "orthogonal"), ((0.001, 0.009), "orthogonal"), ((0.002, 0.03), "not orthogonal"),
     ((-0.03, -0.001), "not orthogonal"), ((-0.02, 0.005), "undecided"), ((-0.01, 0.0), "undecided")],
)  # fmt: skip
def test_verdicts_are_those_fixed_beforehand(study, interval, verdict):
    assert study("orthogonality").verdict(*interval) == verdict


@pytest.fixture
def known(tiny_model, monkeypatch, study):
    """A model of four titled items, catalogues of four and of six, and title vectors that are what is asked for."""
    unseen = study("unseen_items")
    plain = tiny_model(num_layers=1, num_items=4, prompt="none")
    torch.manual_seed(0)
    model = DecoderModel(replace(plain.spec, has_titles=True)).eval()
    vectors = torch.nn.functional.normalize(torch.randn(7, model.hidden_size), dim=1)
    with torch.no_grad():
        model.titles.copy_(torch.cat([torch.zeros(1, model.hidden_size), vectors[[1, 2, 4, 6]]]))
        for part in (model.item_table, model.title_input, model.title_table):
            part.weight.copy_(torch.randn_like(part.weight))
    monkeypatch.setattr(unseen, "load_backbone", lambda *_: SimpleNamespace(folder=None, embeddings=None))
    monkeypatch.setattr(unseen, "title_vectors", lambda *_: vectors)
    monkeypatch.setattr(unseen, "NEIGHBOURS", 2)
    catalogues = [Catalogue(ids, [None] * len(ids), [None] * len(ids)) for ids in (list("abdf"), list("abcdef"))]
    few, whole = (SimpleNamespace(items=items, num_items=len(items)) for items in catalogues)
    return unseen, model, few, whole, vectors


@pytest.mark.parametrize("way", ["title", "title + neighbours", "chance"])
def test_items_that_join_leave_the_known_ones_as_they_were(known, way):
    unseen, model, few, whole, _ = known
    if way == "chance":
        model.titles.zero_()
    joined = unseen.joined(model, whole, few, "backbone", way)
    with torch.inference_mode():
        before = model.score(torch.tensor([[1, 3, 4]]))
        after = joined.score(torch.tensor([[1, 4, 6]]))  # the same items by their new numbers
    torch.testing.assert_close(after[:, [0, 1, 3, 5]], before, rtol=1e-5, atol=1e-5)


def test_a_new_item_is_its_title_and_the_mean_of_the_known_or_of_its_neighbours(known):
    unseen, model, few, whole, vectors = known
    with torch.inference_mode():
        for way in ("title", "title + neighbours"):
            joined = unseen.joined(model, whole, few, "backbone", way)
            for item in (3, 5):
                near = (model.titles[1:] @ vectors[item]).topk(2).indices + 1
                own = model.item_table.weight[1:] if way == "title" else model.item_table.weight[near]
                expected = own.mean(dim=0) + model.title_table(vectors[item])
                torch.testing.assert_close(joined.item_outputs()[item - 1], expected, rtol=1e-4, atol=1e-4)


def test_a_cell_is_computed_once_by_a_key_and_anew_by_another(study, tmp_path, monkeypatch):
    cell, made, path = study("cells").cell, [], tmp_path / "seed" / "row.json"

    def compute():
        made.append({"test": {"ndcg@10": 0.1 + len(made)}})
        return made[-1]

    assert [cell(path, key, compute)["test"]["ndcg@10"] for key in ("a", "a", "b", "b")] == [0.1, 0.1, 1.1, 1.1]
    assert len(made) == 2

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        cell(path, "c", compute)
    assert cell(path, "b", killed)["test"]["ndcg@10"] == 1.1, "what was there is whole"


def test_a_table_is_put_together_from_cells_made_elsewhere_and_lacks_none_silently(study, tmp_path):
    table, readme, cells = study("slmrec_table"), study("readme"), study("cells")
    generator = np.random.default_rng(0)
    for seed in (0, 1):
        for row in ("SASRec-CE", "teacher", "CE"):
            ranks = generator.integers(-1, 20, size=300).tolist()
            metrics = dict.fromkeys(cells.METRICS, 0.1 * (seed + 1))
            path = tmp_path / f"seed-{seed}" / "cells" / f"{row}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            content = {"ranks": ranks, "test": metrics, "validation": metrics, "seconds": 1, "hash": f"{row} {seed}"}
            parent = {"teacher": {"items": f"SASRec-CE {seed}"}, "CE": {"teacher": f"teacher {seed}"}}.get(row, {})
            settings = {"train": {"seed": seed}, **(table.WEIGHTS | table.STUDENTS.get(row, {}))}
            path.write_text(json.dumps(content | {"settings": settings, "parents": {"data": "known"} | parent}))
    data = SimpleNamespace(hash="known")
    rows = table.finished(tmp_path, [0, 1], ["CE"], data)
    found = {row: [one["test"]["mrr"] for one in cells_of] for row, cells_of in rows.items()}
    assert found == {row: [0.1, 0.2] for row in ("SASRec-CE", "teacher", "CE")}
    lines = [line | {"p50_ms": None} for line in cells.summarize(rows, against="CE", teacher="teacher")]
    known = {"estimate": 0.002, "low": 0.001, "high": 0.003, "p": 0.012}
    users = {"num_users": 1300, "num_tied_targets": 7}
    shown = readme.slmrec({"result": {"dataset": users, "rows": lines, "teacher_against_sasrec": known}})
    assert "Test split, 1,300 users, of whom 7 have" in shown
    assert "; 2 seeds; " in shown
    assert "p50" not in shown
    assert "The teacher against SASRec-CE: +0.0020 (+0.0010 to +0.0030), p = 0.012." in shown
    assert shown.count("0.1000, 0.2000") == 3
    with pytest.raises(FileNotFoundError):
        table.finished(tmp_path, [0, 1, 2], ["CE"], data)
    with pytest.raises(SystemExit, match=r"expected are .*'another'"):
        table.finished(tmp_path, [0, 1], ["CE"], SimpleNamespace(hash="another"))
    made = tmp_path / "seed-1" / "cells"
    other = json.loads((made / "CE.json").read_text())
    for row in ("SLMRec", "SLMRec + list", "CE + shared table"):  # whose settings are not those of the row CE
        (made / f"{row}.json").write_text(json.dumps(other))
        with pytest.raises(SystemExit, match="not as the row " + row.replace("+", r"\+")):
            table.finished(tmp_path, [1], ["CE", row], data)
    longer = other | {"settings": other["settings"] | table.STUDENTS["SLMRec + list"] | {"num_layers": 6}}
    (made / "SLMRec + list.json").write_text(json.dumps(longer))
    with pytest.raises(SystemExit, match=r"not as the row SLMRec \+ list"):
        table.finished(tmp_path, [1], ["CE", "SLMRec + list"], data)
    (made / "CE.json").write_text(json.dumps(other | {"parents": other["parents"] | {"teacher": "a later one"}}))
    with pytest.raises(SystemExit, match=r"'a later one'.* expected are .*'teacher 1'"):
        table.finished(tmp_path, [1], ["CE"], data)
    (made / "CE.json").write_text((tmp_path / "seed-0" / "cells" / "CE.json").read_text())
    with pytest.raises(SystemExit, match=r"expected are .* and seed 1"):
        table.finished(tmp_path, [1], ["CE"], data)


def test_the_ideal_queue_is_lindleys_where_batches_are_of_one_and_joins_what_waits_where_not(study):
    load = study("serve_load")
    arrivals = np.cumsum(np.random.default_rng(0).exponential(1.0, 500))
    alone, wait = load.ideal_queue(arrivals, {1: np.array([0.7])}, seed=0), 0.0
    for number, gap in enumerate(np.diff(arrivals, prepend=0.0)):
        wait = max(0.0, wait + 0.7 - gap) if number else 0.0
        assert alone[number] == pytest.approx(wait + 0.7)
    together = load.ideal_queue(np.array([0.0, 0.1, 0.2, 5.0]), {1: np.array([1.0]), 4: np.array([2.0])}, seed=0)
    np.testing.assert_allclose(together, [1.0, 2.9, 2.8, 1.0])


def test_a_memory_that_grows_is_told_from_one_that_does_not(study):
    load, generator = study("serve_load"), np.random.default_rng(0)
    seconds = np.arange(0, 300, 1.5)
    noise = generator.normal(size=len(seconds)) / 10
    still, growing = (load.slope(seconds, 100 + rate * seconds / 3600 + noise) for rate in (0, 60))
    assert still["interval_95"][0] < 0 < still["interval_95"][1]
    assert growing["interval_95"][0] > 0
    assert growing["mb_per_hour"] == pytest.approx(60, abs=2)


@pytest.mark.slow
def test_the_load_study_runs_on_a_small_bundle(tiny_model, tmp_path):
    prepare_dataset([write_log(tmp_path / "log.txt", num_items=40, num_users=60)], tmp_path / "data", DataConfig())
    path = make_bundle(tiny_model, tmp_path, "one")
    command = [sys.executable, str(BENCHMARKS / "serve_load.py"), str(path), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=BENCHMARKS.parent)
    found = json.loads(done.stdout)
    assert found["saturation"]["all_answered"]
    assert found["saturation"]["per_second"] > 0
    for share in ("load_0.4", "load_0.6"):
        assert found[share]["all_answered"]
        assert found[share]["p99_ms"] >= found[share]["p50_ms"] > 0
    assert (found["overload"]["other"], found["overload"]["unanswered"]) == (0, 0)
    assert found["overload"]["afterwards"]["all_answered"]
    assert found["memory"]["rss_mb"] > 10


def test_tables_of_the_reviewers_questions_say_what_was_measured(study):
    tables = study("study_tables")
    exits = {"with the final norm": [0.01, 0.02, 0.03], "without": [0.04, 0.05, 0.06]}
    trained = [{"num_layers": 1, "test_ndcg@10": [0.1, 0.2]}, {"num_layers": 3, "test_ndcg@10": [0.3, 0.5]}]
    trained = [line | {"interval": [0.12, 0.18]} for line in trained]
    result = {"trained": trained, "exits": exits, "sasrec": 0.07}
    result["closest_to_apart"] = {"num_layers": [1, 3], "p_holm": 0.22}
    shown = tables.depth_study({"result": result}).splitlines()
    assert shown[2:4] == [
        "| 1 | 0.1500 (0.120 to 0.180) | 0.1000, 0.2000 | 0.0100 | 0.0400 |",
        "| 3 | 0.4000 (0.120 to 0.180) | 0.3000, 0.5000 | 0.0300 | 0.0600 |",
    ]
    assert shown[-1].startswith("SASRec-CE: 0.0700; 2 seeds, exits those of the first.")
    assert "1 and 3 are the closest to being told apart, p = 0.22 after Holm." in shown[-1]
    line = {
        "row": "CE", "ndcg@10_interval": [0.1, 0.3], "ndcg@10_by_seed": [0.2, 0.21], "test": {"ndcg@10": 0.205},
        "of_teacher": [0.9], "p": None,
    }  # fmt: skip
    inside = [{"CE": {"cosine": [0.5, c], "linear_cka": [0.25, c], "overlap@10": c}} for c in (0.5, 1.0)]
    difference = {"estimate": 0.004, "low": -0.001, "high": 0.009}
    pair = {"row": "SLMRec", "against": "CE", "difference": difference, "p_holm": 0.12}
    result = {"rows": [line], "answers": [pair], "likeness_by_seed": inside}
    shown = tables.reviewers({"result": result}).splitlines()
    assert "| 4 layers, SLMRec | 4 layers, CE | +0.0040 (-0.0010 to +0.0090) | 0.12 |" in shown
    assert shown[2] == "| 4 layers, CE | 0.2050 (0.100 to 0.300) | 0.2000, 0.2100 | 0.900 |  |"
    assert shown[-1] == "| 4 layers, CE | 0.50, 0.75 | 0.25, 0.75 | 0.750 |"
    tested = line | {"row": "no titles", "p": 0.01, "p_holm": 0.02, "difference": {"estimate": -0.005}}
    shown = tables.controls({"result": {"rows": [tested]}}).splitlines()
    row = "items by their ids alone | 0.2050 (0.100 to 0.300) | 0.2000, 0.2100 | 0.900 | -0.0050, 0.02"
    assert shown[2:] == [f"| {row} |"]
    rows = {
        "teacher, graph": {"users_per_second": {"batch_8": 10.0, "batch_32": 20.0}, "price_per_million": 3.0},
        "SLMRec, graph": {"users_per_second": {"batch_8": 40.0, "batch_32": 30.0}, "price_per_million": 1.5},
    }
    machine = {"usable_cores": 2, "cpu": "X"}
    shown = tables.prices({"result": {"rows": rows, "hour_price": 0.1}, "machine": machine}).splitlines()
    assert shown[3] == "| SLMRec, graph | 40 | 1.500 | 2.0 |"
    times = {"result": {"p50_ms": {"SASRec": 2.96, "8 layers": 30}}, "machine": machine}
    assert tables.request_times(times).endswith("models in turn: SASRec 3.0 ms, 8 layers 30.0 ms.")

"""Two reports compared: what is worse beyond its interval, and nothing else, ends with 1."""

import copy
import json

import pytest
from benchmarked import CONFIG, make_data, make_entrants
from click.testing import CliRunner

from slmrec.benchmark import run_benchmark
from slmrec.cli.main import main
from slmrec.compare import compare_reports
from slmrec.errors import ArtifactError, ConfigError, DataError


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    place = tmp_path_factory.mktemp("report")
    made = run_benchmark(make_entrants(place), make_data(place / "d"), CONFIG)
    return json.loads(json.dumps(made.benchmark))


def changed(report, row, path, factor):
    """The report with one figure of one row multiplied."""
    other = copy.deepcopy(report)
    place = other["rows"][row]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] *= factor
    return other


def regressions(old, new, tolerance=0.01):
    return [(one.name, one.figure) for one in compare_reports(old, new, tolerance) if one.is_regression]


def test_a_report_is_no_regression_of_itself(report):
    assert regressions(report, report) == []
    assert regressions(report, report, tolerance=0.0) == []
    assert len(compare_reports(report, report, 0.0)) == 3 * len(report["rows"])


@pytest.mark.parametrize(
    ("path", "figure", "worse", "better"),
    [
        (("accuracy", "ndcg@10"), "NDCG@10", 0.3, 1.5),
        (("ratios", "speedup_batch_1", "median"), "speed-up", 0.01, 50.0),
        (("size_bytes",), "MB", 1.02, 0.5),
    ],
)
def test_one_worse_figure_is_named_and_a_better_one_is_not(report, path, figure, worse, better):
    name = report["rows"][1]["name"]
    assert regressions(report, changed(report, 1, path, worse)) == [(name, figure)]
    assert regressions(report, changed(report, 1, path, better)) == []


def test_what_the_old_interval_allows_is_no_regression(report):
    old = copy.deepcopy(report)
    old["rows"][2]["accuracy"] |= {"ndcg@10": 0.2, "intervals": {"ndcg@10": [0.15, 0.25]}}
    new = copy.deepcopy(old)
    for value, found in ((0.151, []), (0.149, [(old["rows"][2]["name"], "NDCG@10")]), (float("nan"), None)):
        new["rows"][2]["accuracy"]["ndcg@10"] = value
        expected = [(old["rows"][2]["name"], "NDCG@10")] if found is None else found
        assert regressions(old, new) == expected


def test_an_artefact_that_is_gone_is_a_regression_and_a_new_one_is_not(report):
    fewer = report | {"rows": report["rows"][:-1]}
    assert regressions(report, fewer) == [(report["rows"][-1]["name"], "all")]
    assert regressions(fewer, report) == []


def test_accuracy_that_is_no_longer_measured_is_a_regression(report):
    new = copy.deepcopy(report)
    new["rows"][1]["accuracy"] = None
    assert regressions(report, new) == [(report["rows"][1]["name"], "NDCG@10")]
    assert regressions(new, report) == []


def test_reports_of_other_data_are_not_compared(report):
    with pytest.raises(DataError, match="different datasets"):
        compare_reports(report, report | {"dataset": {"hash": "0"}}, 0.01)
    with pytest.raises(DataError, match="different baselines"):
        compare_reports(report, report | {"baseline": "student"}, 0.01)


@pytest.mark.parametrize("value", ["fast", None, True, float("nan"), float("inf"), -1])
@pytest.mark.parametrize("path", [("size_bytes",), ("ratios", "speedup_batch_1", "p10"), ("accuracy", "ndcg@10")])
def test_a_figure_that_is_no_number_is_one_message(report, tmp_path, path, value):
    other = copy.deepcopy(report)
    place = other["rows"][1]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    for name, content in (("good.json", report), ("bad.json", other)):
        (tmp_path / name).write_text(json.dumps(content))
    for names in (("good.json", "bad.json"), ("bad.json", "good.json")):
        result = CliRunner().invoke(main, ["compare", *(str(tmp_path / name) for name in names)])
        assert isinstance(result.exception, ArtifactError)
        assert f"{path[-1]} of {report['rows'][1]['name']} is {value!r}, no finite number" in str(result.exception)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda one: one.update(rows=[]), r"its rows are \[\]"),
        (lambda one: one["rows"].append(one["rows"][1]), "each of a name of its own"),
        (lambda one: one["rows"][1].pop("name"), "the field 'name' is missing"),
        (lambda one: one["rows"][1].update(name=[1]), "each of a name of its own"),
        (lambda one: one["rows"].append(3), "is no benchmark"),
        (lambda one: one.update(rows=None), "is no benchmark"),
        (lambda one: one.update(schema=99), "its schema is 99, this version compares 1"),
        (lambda one: one["rows"][1]["accuracy"].update({"ndcg@10": 7}), "no finite number from 0 to 1"),
        (lambda one: one["rows"][1]["accuracy"]["intervals"].update({"ndcg@10": [0.5]}), "not enough values"),
        (lambda one: one.pop("dataset"), "the field 'dataset' is missing"),
    ],
)
def test_a_report_that_cannot_be_is_one_message_in_either_place(report, tmp_path, harm, message):
    other = copy.deepcopy(report)
    harm(other)
    for name, content in (("good.json", report), ("bad.json", other)):
        (tmp_path / name).write_text(json.dumps(content))
    for names in (("good.json", "bad.json"), ("bad.json", "good.json")):
        with pytest.raises(ArtifactError, match=message):
            CliRunner().invoke(main, ["compare", *(str(tmp_path / name) for name in names)], catch_exceptions=False)


def test_the_command_ends_with_1_on_a_regression_alone(report, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "benchmark.json").write_text(json.dumps(report))
    (tmp_path / "new.json").write_text(json.dumps(changed(report, 0, ("size_bytes",), 2)))

    def call(*arguments):
        return CliRunner().invoke(main, ["compare", *map(str, arguments)])

    assert call(tmp_path / "old", tmp_path / "old").exit_code == 0
    worse = call(tmp_path / "old", tmp_path / "new.json")
    assert worse.exit_code == 1
    assert "REGRESSION  teacher, MB" in worse.stdout
    assert call(tmp_path / "old", tmp_path / "new.json", "--tolerance", 0.999).exit_code == 1
    assert json.loads(call(tmp_path / "new.json", tmp_path / "old", "--json").stdout)["regression"] is False
    broken = copy.deepcopy(report)
    del broken["rows"][0]["ratios"]["speedup_batch_1"]
    for content in ([], {"rows": []}, broken):
        (tmp_path / "none.json").write_text(json.dumps(content))
        assert isinstance(call(tmp_path / "old", tmp_path / "none.json").exception, ArtifactError)
    assert isinstance(call(tmp_path / "old", tmp_path / "gone").exception, ArtifactError)
    assert isinstance(call(tmp_path / "old", tmp_path / "old", "--tolerance", 2).exception, ConfigError)

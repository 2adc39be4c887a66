"""The page of a benchmark: self-contained, safe against names, readable."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarked import CONFIG, EVIL, MEMORY, check_page, make_data, make_entrants, renamed

from slmrec.benchmark import Entrant, run_benchmark
from slmrec.dataset import Dataset
from slmrec.report import Example, ExampleItem, Report
from slmrec.report_html import to_html
from slmrec.report_plots import Point, pareto
from slmrec.report_sections import term_groups


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return make_data(tmp_path)


@pytest.fixture
def entrants(tmp_path: Path) -> list[Entrant]:
    return make_entrants(tmp_path)


@pytest.fixture
def report(entrants: list[Entrant], data: Dataset) -> Report:
    return run_benchmark(entrants, data, CONFIG, memory=lambda _: MEMORY)


def test_the_page_is_balanced_and_loads_nothing(report: Report) -> None:
    page = check_page(to_html(report))
    assert page.tags.count("svg") > 4
    assert page.tags.count("script") == 2


def test_untrusted_names_and_titles_stay_text(report: Report) -> None:
    item = [ExampleItem(EVIL, is_target=True)]
    example = Example(user=EVIL, history=[EVIL], num_history=1, target=EVIL, lists={EVIL: item})
    evil = replace(renamed(report, EVIL), example=example)
    evil = replace(evil, curves={EVIL: [{"step": 1, EVIL: 1.0}]}, benchmark={**evil.benchmark, "commands": [EVIL]})
    page = check_page(to_html(evil))
    assert json.loads(page.scripts[0])["rows"][1]["name"] == EVIL, "the embedded JSON holds the name unchanged"
    assert "alert" not in page.scripts[1]


def test_the_page_is_styled_for_dark_mode_and_phones(report: Report) -> None:
    html = to_html(report)
    assert "prefers-color-scheme:dark" in html
    assert 'name="viewport"' in html
    assert html.count('class="wide"') == html.count('class="narrow"') == 1


def test_headers_sort_by_keyboard_too(report: Report) -> None:
    page = check_page(to_html(report))
    assert page.tags.count("button") == 11
    assert ("aria-sort", "none") in page.attributes


def test_labels_of_points_on_one_spot_do_not_cover_each_other(report: Report) -> None:
    rows = []
    for index in range(5):
        row = json.loads(json.dumps(report.benchmark["rows"][0]))
        row["latency"]["batch_1"] |= {"p50_ms": 10.0 + index / 100, "p90_ms": 11.0}
        rows.append(row | {"name": f"artefact-{index}"})
    html = to_html(replace(report, benchmark={**report.benchmark, "rows": rows, "baseline": "artefact-0"}))
    wide = html.split('class="wide"')[1].split("</svg>")[0]
    places = [(float(x), float(y)) for x, y in re.findall(r'class="name" x="([\d.]+)" y="([\d.]+)"', wide)]
    assert len(places) == 5
    for index, (x, y) in enumerate(places):
        for other_x, other_y in places[index + 1 :]:
            assert abs(y - other_y) >= 14 or abs(x - other_x) >= 70


def test_the_pareto_line_holds_what_nothing_beats() -> None:
    def point(name: str, latency_ms: float, accuracy: float) -> Point:
        return Point(name, "graph", latency_ms, latency_ms, accuracy, accuracy, accuracy)

    points = [
        point("slow", 9, 0.5),
        point("fast", 1, 0.3),
        point("beaten", 5, 0.2),
        point("mid", 4, 0.4),
        point("tie", 4, 0.1),
    ]
    front = pareto(points)
    assert [p.name for p in front] == ["fast", "mid", "slow"]
    for p in points:
        beaten = any(q.latency_ms <= p.latency_ms and q.accuracy > p.accuracy for q in points)
        assert (p in front) == (not beaten)


def test_distillation_terms_are_drawn_together_by_block() -> None:
    records: list[dict[str, float]] = [
        {"step": step, "epoch": 0, "gradient_norm": 9.0, "loss": 3.0, "ce": 1.0}
        | {f"{term}_block_{block}": step * block for term in ("direction", "magnitude") for block in (2, 10, 1)}
        for step in (1, 2, 3)
    ]
    groups = term_groups([*records, {"step": 3, "epoch": 0, "validation_ndcg@10": 0.1}])
    assert list(groups) == ["loss", "ce", "direction", "magnitude", "validation_ndcg@10"]
    assert [series.label for series in groups["direction"]] == ["1", "2", "10"]
    assert groups["direction"][2].points == [(1, 10), (2, 20), (3, 30)]
    assert groups["direction"][0].shade < groups["direction"][2].shade == 1


def test_a_single_term_is_not_drawn_twice_as_the_loss() -> None:
    assert list(term_groups([{"step": 1, "loss": 2.0, "ce": 2.0}])) == ["ce"]

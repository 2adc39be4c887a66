"""The page of a benchmark in a real browser: what a person sees, does and prints, whatever things are called."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarked import CONFIG, MEMORY, make_data, make_entrants

from slmrec.benchmark import run_benchmark
from slmrec.report import Example, ExampleItem, write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser here: none of {', '.join(BROWSERS)} (Debian: apt-get install chromium)"
)

HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "=cmd()|' /C calc'!A0 \"'`&lt;",
    "long" * 60 + "\u202egnol<img src=//evil.example onerror=alert(1)>",
]
LOSSES = [{"step": step, "loss": 9.0 / step, "ce": 8.0 / step, HOSTILE[0]: 1.0} for step in range(1, 300)]
ANALYSES = {
    "sensitivity": {
        "of": HOSTILE[0], "num_users": 40, "split": "validation",
        "layers": [
            {"layer": f"layers.{layer}.mlp.{part}_proj", "ndcg_loss": 0.01, "overlap_loss": 0.02 * layer}
            for layer in range(30) for part in ("up", "gate", "down", "q", "k", "v", "o")
        ],
    },
    "importance": {
        "of": HOSTILE[2], "num_users": 40, "split": "validation",
        "layers": [{"layer": layer, "angular": 0.1, "influence": 0.2, "damage": -0.1} for layer in range(30)],
        "angular_distance": [[0.1 if size < 30 - first else None for size in range(30)] for first in range(30)],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report in which every name and title is hostile."""
    tmp_path = tmp_path_factory.mktemp("hostile")
    report = run_benchmark(make_entrants(tmp_path), make_data(tmp_path), CONFIG, memory=lambda _: MEMORY)
    text = json.dumps(report.benchmark)
    for name, hostile in zip(("teacher", "student", "student-int8"), HOSTILE, strict=True):
        text = text.replace(f'"{name}"', json.dumps(hostile))
    benchmark = json.loads(text)
    for place, row in enumerate(benchmark["rows"]):
        row["latency"]["batch_1"] |= {"p50_ms": 40.0 / 4**place, "p90_ms": 50.0 / 4**place}
    lists = {name: [ExampleItem(title) for title in HOSTILE] for name in HOSTILE}
    write_report(
        replace(
            report,
            benchmark={**benchmark, "commands": HOSTILE},
            curves=dict.fromkeys(HOSTILE, LOSSES),
            analyses=ANALYSES,
            example=Example(HOSTILE[2], HOSTILE, 3, HOSTILE[0], lists),
        ),
        tmp_path,
    )
    return tmp_path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, folder: Path) -> Iterator[Any]:
    """The report, opened; at the end nothing must have been complained of or fetched."""
    page = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
    troubles: list[str] = []
    address = (folder / "report.html").as_uri()
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: troubles.append(dialog.message))
    page.on("request", lambda request: troubles.append(request.url) if request.url != address else None)
    page.goto(address)
    yield page
    page.close()
    assert troubles == []


def background(page: Any) -> str:
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


def names_in_table(page: Any) -> list[str]:
    return [
        str(name) for name in page.locator(".figures tbody th").evaluate_all("all => all.map(e => e.dataset.value)")
    ]


def test_hostile_names_are_shown_as_they_are_and_run_nothing(page: Any) -> None:
    assert page.title() == "Accuracy against latency"
    assert page.locator("img, iframe").count() == 0
    assert page.locator("script").count() == 2
    assert names_in_table(page) == HOSTILE
    embedded = page.evaluate("JSON.parse(document.getElementById('benchmark').textContent)")
    assert [row["name"] for row in embedded["rows"]] == HOSTILE


def test_points_are_drawn_in_view_and_apart(page: Any) -> None:
    boxes = [mark.bounding_box() for mark in page.locator("svg.wide .marker").all()]
    frame = page.locator("svg.wide").bounding_box()
    assert len(boxes) == 3
    for box in boxes:
        assert box["width"] >= 20
        assert frame["x"] < box["x"] < box["x"] + box["width"] < frame["x"] + frame["width"]
        assert frame["y"] < box["y"] < box["y"] + box["height"] < frame["y"] + frame["height"]
    lefts = sorted(box["x"] for box in boxes)
    assert lefts[1] - lefts[0] == pytest.approx(lefts[2] - lefts[1], abs=1), "equal factors are equal steps"


def test_a_tooltip_follows_the_mouse_and_the_keyboard(page: Any) -> None:
    tip, marks = page.locator(".tip"), page.locator("svg.wide .marker")
    assert tip.is_hidden()
    marks.nth(1).hover()
    assert tip.inner_text().startswith(HOSTILE[1])
    assert "p50 10 ms, p90 12.5 ms" in tip.inner_text()
    page.mouse.move(0, 0)
    assert tip.is_hidden()
    page.evaluate("scrollTo(0, 0)")
    page.keyboard.press("Tab")
    assert tip.inner_text().startswith(HOSTILE[2]), "the fastest comes first"
    page.keyboard.press("Tab")
    assert tip.inner_text().startswith(HOSTILE[1])
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == tip.inner_text()
    box = tip.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 1200
    page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_the_table_sorts_by_a_click_and_by_the_keyboard(page: Any) -> None:
    header = page.locator(".figures thead th", has_text="p50 ms")
    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "descending"
    assert names_in_table(page) == HOSTILE
    page.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "ascending"
    assert names_in_table(page) == HOSTILE[::-1]
    page.locator(".figures thead button").first.focus()
    page.keyboard.press("Space")
    assert names_in_table(page) == HOSTILE, "by name: < before = before letters"
    page.keyboard.press("Space")
    assert names_in_table(page) == HOSTILE[::-1]
    assert header.get_attribute("aria-sort") == "none"


@pytest.mark.parametrize("width", [375, 640, 1200])
def test_the_page_is_never_wider_than_the_screen(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shown = page.locator("svg.narrow" if width <= 640 else "svg.wide")
    assert shown.is_visible()
    assert shown.bounding_box()["width"] <= width


def test_dark_mode_darkens_the_screen_and_not_the_paper(page: Any) -> None:
    light = background(page)
    page.emulate_media(color_scheme="dark")
    assert background(page) != light
    page.emulate_media(color_scheme="dark", media="print")
    assert background(page) == light


def test_paper_holds_the_plot_and_tables_and_nothing_to_click(page: Any) -> None:
    page.locator("svg.wide .marker").first.focus()
    page.locator("summary").click()
    page.locator(".figures thead button").first.click()
    page.emulate_media(media="print")
    assert page.locator("details").is_hidden()
    assert page.locator(".tip").is_hidden()
    arrow = "getComputedStyle(document.querySelector('[aria-sort$=ing] button'), '::after').display"
    assert page.evaluate(arrow) == "none"
    assert page.locator("svg.wide").is_visible()
    assert page.locator(".figures").is_visible()
    assert page.pdf(format="A4").startswith(b"%PDF")

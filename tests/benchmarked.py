"""A small benchmark that tests of reports start from: three artefacts with recommenders whose answers are known."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from slmrec.artifact import Artifact, Stage, open_artifact, publish, write_json
from slmrec.benchmark import Entrant
from slmrec.catalogue import Catalogue
from slmrec.config import BenchmarkConfig
from slmrec.dataset import Dataset, load_dataset
from slmrec.latency import Memory
from slmrec.recommender import Histories, TopK
from slmrec.report import Report

NUM_ITEMS = 30
EVIL = '</script><img src=x onerror="alert(1)">|`=1+1'
CONFIG = BenchmarkConfig(rounds=20, batch_sizes=(4,), batch_rounds=3)
MEMORY = Memory(peak_bytes=300_000_000, baseline_bytes=100_000_000, load_ms=500.0, first_answer_ms=20.0)


class Cyclic:
    """Item i is followed by i + 1; `blur` users in ten are served another order."""

    num_items = NUM_ITEMS
    max_top_k = NUM_ITEMS

    def __init__(self, blur: int = 0) -> None:
        self.blur = blur

    def recommend(self, histories: Histories, k: int) -> TopK:
        items = np.zeros((len(histories), k), dtype=np.int64)
        for row, history in enumerate(histories.item_ids):
            skip = 4 if history[-1] % 10 < self.blur else 0
            following = [(int(history[-1]) + skip + step) % NUM_ITEMS + 1 for step in range(NUM_ITEMS)]
            kept = [item for item in following if item not in history][:k]
            items[row, : len(kept)] = kept
        scores = np.where(items > 0, -np.arange(k, dtype=np.float32), -np.inf).astype(np.float32)
        return TopK(items, scores)


def catalogue(prefix: str = "i") -> Catalogue:
    names = [f"{prefix}{item}" for item in range(1, NUM_ITEMS + 1)]
    return Catalogue(names, [f"{EVIL} {name}" for name in names], [None] * NUM_ITEMS)


def make_data(tmp_path: Path) -> Dataset:
    generator = np.random.default_rng(0)
    rows = [
        {"user": user, "user_id": f"u{user}", "item": int((start + step) % NUM_ITEMS + 1), "timestamp": step}
        for user, start in enumerate(generator.integers(NUM_ITEMS, size=40))
        for step in range(int(generator.integers(4, 15)))
    ]
    with publish(tmp_path / "data", Stage(name="data", kind="dataset", settings={})) as folder:
        pl.DataFrame(rows).write_parquet(folder / "interactions.parquet")
        catalogue().save(folder)
        write_json(folder / "dataset.json", {"name": EVIL, "num_users": 40, "num_tied_targets": 0})
    return load_dataset(tmp_path / "data")


def artifact(path: Path, stage: str = "distill", *, items: str = "i", **parents: Artifact) -> Artifact:
    with publish(path, Stage(name=stage, kind="checkpoint", settings={}, parents=parents)) as folder:
        catalogue(items).save(folder)
        (folder / "weights").write_bytes(path.name.encode() * 1000)
        (folder / "training.jsonl").write_text('{"step": 1, "ce": 3.0}\n{"step": 2, "ce": 2.0}\n')
    return open_artifact(path)


def make_entrants(tmp_path: Path) -> list[Entrant]:
    teacher = artifact(tmp_path / "teacher", "train-teacher")
    student = artifact(tmp_path / "student", teacher=teacher)
    blurred = artifact(tmp_path / "student-int8", "quantize", student=student)
    return [
        Entrant("teacher", teacher, Cyclic()),
        Entrant("student", student, Cyclic(blur=2)),
        Entrant("student-int8", blurred, Cyclic(blur=4)),
    ]


def row_of(report: Report, name: str) -> dict[str, Any]:
    return next(row for row in report.benchmark["rows"] if row["name"] == name)


def renamed(report: Report, name: str) -> Report:
    """The student under an untrusted name, wherever it stands."""
    text = json.dumps(report.benchmark).replace('"student"', json.dumps(name))
    return replace(report, benchmark=json.loads(text), curves={name: report.curves["student"]})


class Page(HTMLParser):
    """Checks that tags are balanced and collects what a page would load or run."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)


def check_page(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    assert not {"img", "iframe", "link", "object"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {name for name in names if name.startswith("on")} | ({"src", "href", "srcset"} & names)
    assert not re.search(r"https?://|@import|url\(", html)
    return page

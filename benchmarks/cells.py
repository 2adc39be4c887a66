"""Long tables, cell by cell: a cell is computed once, kept as JSON, and found again by the next run."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slmrec.artifact import Artifact
from slmrec.cli.loading import load_recommender
from slmrec.dataset import Dataset
from slmrec.evaluate import evaluate, held_out_cases
from slmrec.metrics import compare, holm, mean_intervals, ndcg, ratio_of_means

METRICS = ("hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10", "mrr")


def cell(path: Path, key: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The cell's content, computed unless it is there by the same key; written beside its place and renamed.

    The key names all that the content depends on, such as an artefact's hash or a stage's key.
    """
    if path.exists():
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content.get("key") == key:
            return content
    start = time.perf_counter()
    content = {**compute(), "key": key}
    content["seconds"] = round(time.perf_counter() - start, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content), encoding="utf-8")
    partial.rename(path)
    print(f"{path.stem}: {content['seconds']:.0f} s, test NDCG@10 {content['test']['ndcg@10']:.4f}", flush=True)
    return content


def measured(artifact: Artifact, data: Dataset) -> dict[str, Any]:
    """Accuracy on both splits, and the rank of every test user's target (-1 = not among 100)."""
    found: dict[str, Any] = {"hash": artifact.hash, "settings": artifact.settings}
    found["parents"] = {name: entry["hash"] for name, entry in artifact.manifest["parents"].items()}
    recommender = load_recommender(artifact)
    for split in ("validation", "test"):
        cases, protocol = held_out_cases(data.sequences, split)
        accuracy = evaluate(recommender, cases, protocol=protocol)
        found[split] = {name: accuracy.metrics[name].estimate for name in METRICS}
        found["protocol"] = protocol
    found["ranks"] = accuracy.ranks.tolist()
    return found


def user_ndcg(cells: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """NDCG@10 of each test user, averaged over seeds."""
    return np.mean([ndcg(np.array(one["ranks"]), 10) for one in cells], axis=0)


def summarize(rows: Mapping[str, Sequence[Mapping[str, Any]]], *, against: str, teacher: str) -> list[dict[str, Any]]:
    """One line a row: means over seeds, interval over users, ratio to the teacher, paired test against a row.

    p values are Holm-corrected over the rows of the table; `rank` is the mean rank over the six metrics, 1 = best.
    """
    users = {name: user_ndcg(cells) for name, cells in rows.items()}
    others = [name for name in rows if name != against]
    comparisons = {name: compare(users[name], users[against]) for name in others}
    corrected = dict(zip(others, holm([comparisons[name].p_value for name in others]), strict=True))
    lines = []
    for name, cells in rows.items():
        [interval] = mean_intervals(users[name][:, None])
        seeds = [one["test"]["ndcg@10"] for one in cells]
        ratio = ratio_of_means(users[name], users[teacher])
        lines.append(
            {
                "row": name,
                "seeds": len(cells),
                "test": {metric: float(np.mean([one["test"][metric] for one in cells])) for metric in METRICS},
                "validation_ndcg@10": float(np.mean([one["validation"]["ndcg@10"] for one in cells])),
                "ndcg@10_interval": [interval.low, interval.high],
                "ndcg@10_by_seed": seeds,
                "of_teacher": [ratio.estimate, ratio.low, ratio.high],
                "against": against,
                "difference": None if name == against else vars(comparisons[name].difference),
                "p": None if name == against else comparisons[name].p_value,
                "p_holm": corrected.get(name),
                "seconds": [one["seconds"] for one in cells],
            }
        )
    for metric_ranks in [_ranks([line["test"][metric] for line in lines]) for metric in METRICS]:
        for line, rank in zip(lines, metric_ranks, strict=True):
            line["rank"] = line.get("rank", 0.0) + rank / len(METRICS)
    return lines


def _ranks(values: Sequence[float]) -> list[float]:
    """Rank of each value, 1 = largest; equal values share the mean of their ranks."""
    array = np.array(values)
    return [float((array > value).sum() + ((array == value).sum() + 1) / 2) for value in array]

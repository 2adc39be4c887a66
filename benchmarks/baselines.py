"""Baselines through RecBole on our split, ranked over the full catalogue and evaluated by our metrics.

    python benchmarks/baselines.py ml-100k
    python benchmarks/baselines.py beauty --data ../shared/data/beauty --models GRU4Rec,SASRec

Each model runs in RecBole's own environment (benchmarks/peers/recbole, made on first use) on a folder without any test
item. Of a model's settings the one with the best validation NDCG@10 is taken, and that one alone is read on test.
Finished runs are kept below --runs, and an interrupted table goes on where it was.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cells import METRICS, cell
from recording import record
from slmrec_table import prepared

from slmrec.artifact import canonical_hash, file_sha256
from slmrec.dataset import Dataset
from slmrec.evaluate import Accuracy, evaluate, held_out_cases
from slmrec.recommender import Histories, TopK
from slmrec.sequences import test_cases, training_sequences

PEER = Path(__file__).parent / "peers" / "recbole"
RECBOLE = "recbole==1.2.1"
PUBLISHED = PEER.parent / "published.json"

WINDOWS = {"rows": "windows", "epochs": 40, "patience": 6}
"""Rows of 50 events that share one with their neighbour; causal models learn from every position."""
TRANSFORMER = {"hidden_size": 64, "inner_size": 256, "n_layers": 2, "n_heads": 2}
SMALL_BATCHES = {"train_batch_size": 32, "learning_rate": 2e-3}
SELDOM_THE_LAST = {"eval_step": 4, "ft_ratio": 0.1, "learning_rate": 1e-3}
"""RecBole's BERT4Rec masks the last item alone in half of its batches; of a window that is always the same item."""


def _dropout(rate: float) -> dict[str, float]:
    return {"hidden_dropout_prob": rate, "attn_dropout_prob": rate}


GRIDS: dict[str, list[dict[str, Any]]] = {
    "SASRec": [WINDOWS | {"config": TRANSFORMER | SMALL_BATCHES | _dropout(0.4)}],
    "GRU4Rec": [
        WINDOWS | {"config": {"hidden_size": 64, "embedding_size": 64, "dropout_prob": rate} | SMALL_BATCHES}
        for rate in (0.3, 0.5)
    ],
    "BERT4Rec": [
        WINDOWS | {"epochs": 80, "config": TRANSFORMER | SMALL_BATCHES | _dropout(0.2) | {"eval_step": 2}},
        WINDOWS | {"epochs": 60, "config": TRANSFORMER | SMALL_BATCHES | _dropout(0.2) | SELDOM_THE_LAST},
    ],
    "S3Rec": [
        WINDOWS | {"pretrain_epochs": 10, "epochs": 30, "config": TRANSFORMER | SMALL_BATCHES | _dropout(0.4)},
    ],
    "LightSANs": [
        {"rows": "prefixes", "max_targets": 50, "epochs": 7, "patience": 2}
        | {"config": TRANSFORMER | _dropout(0.2) | {"k_interests": 5, "train_batch_size": 128}},
    ],
}
"""Settings tried for each model; the loss is cross-entropy over the full catalogue everywhere."""


@dataclass(frozen=True, eq=False)
class StoredLists:
    """A recommender that was asked beforehand: it knows the lists of the histories it was made for, by row."""

    num_items: int
    item_ids: np.ndarray
    rows: Mapping[tuple[int, ...], int]
    """History -> row of `item_ids`."""

    @classmethod
    def of(cls, num_items: int, histories: Histories, item_ids: np.ndarray) -> "StoredLists":
        """Lists in the order of the histories; equal histories have equal lists."""
        rows = {tuple(history.tolist()): row for row, history in enumerate(histories.item_ids)}
        return cls(num_items, item_ids, rows)

    @property
    def max_top_k(self) -> int:
        """As long as the lists are."""
        return self.item_ids.shape[1]

    def recommend(self, histories: Histories, k: int) -> TopK:
        """The stored lists; scores are the negated ranks."""
        found = self.item_ids[[self.rows[tuple(history.tolist())] for history in histories.item_ids], :k]
        scores = np.where(found > 0, -np.arange(k, dtype=np.float32), -np.inf).astype(np.float32)
        return TopK(found, scores)


def write_folder(data: Dataset, folder: Path) -> None:
    """The plain files that `peers/recbole/run.py` reads; users are rows of the dataset, test items are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    cases = test_cases(data.sequences)
    known = cases.histories.item_ids
    files = {
        "train": enumerate(training_sequences(data.sequences)),
        "validation": zip(cases.users.tolist(), known.without_last(1), strict=True),
        "test": zip(cases.users.tolist(), known, strict=True),
        "items": ((row + 1, (genres or "").split()) for row, genres in enumerate(data.items.categories)),
    }
    for name, rows in files.items():
        (folder / f"{name}.txt").write_text("".join(_lines(rows)), encoding="utf-8")


def _lines(rows: Iterable[tuple[int, Any]]) -> Iterable[str]:
    return (" ".join(map(str, [key, *values])) + "\n" for key, values in rows)


def environment() -> Path:
    """The Python of RecBole's environment, which is made where it is missing."""
    python = PEER / ".venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", PEER / ".venv"], check=True)
        pip = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "-r", PEER / "requirements.txt"], check=True)
        subprocess.run([*pip, "--no-deps", RECBOLE], check=True)
    return python


def run(settings: dict[str, Any], folder: Path, output: Path) -> dict[str, Any]:
    """One training, in RecBole's environment; done once for the same settings."""
    if not (output / "run.json").exists():
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        (output / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        command = [environment().absolute(), PEER / "run.py", folder.absolute(), "settings.json", "."]
        subprocess.run(command, check=True, cwd=output, env=os.environ | {"PYTHONPATH": ""})
        shutil.rmtree(output / "work")
    return settings | json.loads((output / "run.json").read_text(encoding="utf-8"))


def accuracy(data: Dataset, output: Path, split: str) -> Accuracy:
    """Our evaluator on the lists that a run wrote; it refuses lists with an item twice or one of the past."""
    cases, protocol = held_out_cases(data.sequences, split)
    recommender = StoredLists.of(data.num_items, cases.histories, np.load(output / f"{split}.npy"))
    return evaluate(recommender, cases, protocol=protocol)


def _estimates(found: Accuracy) -> dict[str, float]:
    return {name: found.metrics[name].estimate for name in METRICS}


def measured(model: str, data: Dataset, runs: Path, seed: int) -> dict[str, Any]:
    """All settings of a model, and the test metrics of the one that is best on validation."""
    tried = []
    for number, settings in enumerate(GRIDS[model]):
        wanted = {"model": model, "seed": seed} | settings
        made_of = canonical_hash([wanted, data.hash, file_sha256(PEER / "run.py"), RECBOLE])
        output = runs / f"{model}-{seed}-{number}-{made_of[:12]}"
        outcome = run(wanted, runs / "folder", output)
        tried.append((output, outcome, _estimates(accuracy(data, output, "validation"))))
    output, outcome, validation = max(tried, key=lambda one: one[2]["ndcg@10"])
    test = accuracy(data, output, "test")
    interval = test.metrics["ndcg@10"]
    return {
        "model": model,
        "test": _estimates(test),
        "ndcg@10_interval": [interval.low, interval.high],
        "validation": validation,
        "protocol": test.protocol,
        "ranks": test.ranks.tolist(),
        "run": outcome,
        "tried": [
            {
                "config": outcome["config"],
                "validation_ndcg@10": metrics["ndcg@10"],
                "cpu_seconds": outcome["cpu_seconds"],
            }
            for _, outcome, metrics in tried
        ],
    }


def main() -> None:
    """Fill the cells and record them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["ml-100k", "beauty", "ml-1m"])
    parser.add_argument("--data", type=Path, help="folder with sequences.txt and titles.tsv; not for ml-100k")
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", default=",".join(GRIDS), help="comma-separated; default all")
    arguments = parser.parse_args()
    runs = arguments.runs or Path("runs") / f"baselines-{arguments.name}"
    data = prepared(arguments.name, arguments.data, runs)
    write_folder(data, runs / "folder")
    rows = []
    for model in arguments.models.split(","):
        path = runs / "cells" / f"{model}-{arguments.seed}.json"
        key = canonical_hash([data.hash, *(file_sha256(script) for script in (PEER / "run.py", Path(__file__)))])
        rows.append(cell(path, key, lambda m=model: measured(m, data, runs, arguments.seed)))
    info = {key: data.info[key] for key in ("num_users", "num_items", "num_interactions", "num_tied_targets")}
    result = {
        "dataset": info | {"hash": data.hash},
        "seed": arguments.seed,
        "library": RECBOLE,
        "rows": [{key: value for key, value in row.items() if key != "ranks"} for row in rows],
        "published": json.loads(PUBLISHED.read_text(encoding="utf-8"))["rows"],
    }
    record(f"baselines_{arguments.name.replace('-', '_')}", result)


if __name__ == "__main__":
    main()

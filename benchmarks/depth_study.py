"""How deep a teacher has to be: teachers trained at several depths, and early exits of the deepest one.

    python benchmarks/depth_study.py --depths 1,2,4,8,16,24,30 --seeds 0

SLMRec's Figure 2 shows early exits of a deep teacher (worst in the middle, and poor at the last layer but one), and
its reviewers asked why. Here exits are read with the final norm and without it, beside teachers trained at each depth.
ML-100K; exits are those of the first seed; cells are kept below --runs and found again.
"""

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from cells import cell, measured, user_ndcg
from recording import RESULTS, record
from slmrec_table import prepared, recipes

from slmrec.artifact import Artifact
from slmrec.dataset import Dataset
from slmrec.metrics import compare, holm, mean_intervals, ndcg, ranks_of_targets
from slmrec.models.checkpoint import load_decoder
from slmrec.models.decoder import DecoderModel
from slmrec.models.ranking import TorchRecommender
from slmrec.sequences import test_cases
from slmrec.train_items import train_items
from slmrec.train_teacher import train_teacher

mpl.use("Agg")
from matplotlib import pyplot as plt


class LayerStates:
    """What each layer says at the user-vector position; a batch that was asked before is not computed again."""

    def __init__(self, model: DecoderModel) -> None:
        self.model = model
        self.known: dict[tuple[torch.Size, bytes], torch.Tensor] = {}

    def __call__(self, item_ids: torch.Tensor) -> torch.Tensor:
        """States after every layer, none normed, [layers, batch, hidden]."""
        key = item_ids.shape, item_ids.cpu().numpy().tobytes()
        if key not in self.known:
            held: list[torch.Tensor] = []
            hook = self.model.decoder.layers[-1].register_forward_hook(
                lambda _, __, output: held.append(output[0] if isinstance(output, tuple) else output)
            )
            states = self.model(item_ids)  # of the last layer after the final norm: the hook has it before
            hook.remove()
            self.known[key] = torch.stack([state[:, -1] for state in (*states[1:-1], held[-1])])
        return self.known[key]


class EarlyExit(torch.nn.Module):
    """The user vector after one layer, normed by the final norm or as it is."""

    def __init__(self, states: LayerStates, layer: int, *, normed: bool) -> None:
        super().__init__()
        self.states, self.layer, self.normed = states, layer, normed
        self.model = states.model
        self.num_items, self.max_history = self.model.num_items, self.model.max_history

    def score(self, item_ids: torch.Tensor) -> torch.Tensor:
        """Scores of the items 1..num_items after the newest item of each history."""
        state = self.states(item_ids)[self.layer]
        return self.model.logits(self.model.decoder.norm(state) if self.normed else state)


def exits(artifact: Artifact, data: Dataset) -> dict[str, Any]:
    """Test NDCG@10 after every layer, with the final norm and without."""
    model, cases = load_decoder(artifact).eval(), test_cases(data.sequences)
    states = LayerStates(model)
    found: dict[str, list[float]] = {"with the final norm": [], "without": []}
    for name, values in found.items():
        for layer in range(model.num_layers):
            recommender = TorchRecommender(EarlyExit(states, layer, normed=name != "without"))
            answer = recommender.recommend(cases.histories, 10)
            values.append(float(ndcg(ranks_of_targets(answer.item_ids, cases.targets), 10).mean()))
    return {"exits": found, "test": {"ndcg@10": found["with the final norm"][-1]}}


def accuracy(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Test NDCG@10 by seed, and the 95 % interval over users of its mean."""
    [interval] = mean_intervals(user_ndcg(cells)[:, None])
    return {"test_ndcg@10": [one["test"]["ndcg@10"] for one in cells], "interval": [interval.low, interval.high]}


def closest_to_apart(trained: Mapping[int, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The pair of depths with the smallest p, paired by user and Holm-corrected over all pairs."""
    pairs = list(itertools.combinations(trained, 2))
    users = {depth: user_ndcg(cells) for depth, cells in trained.items()}
    found = [compare(users[one], users[other]) for one, other in pairs]
    p_holm, first = min(zip(holm([one.p_value for one in found]), range(len(pairs)), strict=True))
    return {"num_layers": pairs[first], "difference": found[first].difference.estimate, "p_holm": p_holm}


def draw(result: dict[str, Any], path: Path) -> None:
    """Accuracy against depth: one line of trained teachers with their intervals over users, two of exits."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    depths = [row["num_layers"] for row in result["trained"]]
    means = np.array([np.mean(row["test_ndcg@10"]) for row in result["trained"]])
    intervals = np.array([row["interval"] for row in result["trained"]])
    axes.errorbar(
        depths, means, yerr=np.abs(intervals.T - means), marker="o", capsize=3, color="#0072B2",
        label="trained at this depth (95 % over users)",
    )  # fmt: skip
    for (name, values), colour in zip(result["exits"].items(), ("#D55E00", "#999999"), strict=True):
        axes.plot(range(1, len(values) + 1), values, marker=".", color=colour, label=f"early exit, {name}")
    axes.axhline(result["sasrec"], color="black", linewidth=0.8, linestyle="--", label="SASRec-CE")
    axes.set(xlabel="decoder layers", ylabel="test NDCG@10, full catalogue", ylim=(0, None))
    axes.legend(frameon=False)
    for suffix in (".svg", ".png"):
        figure.savefig(path.with_suffix(suffix), dpi=120, metadata={"Date": None} if suffix == ".svg" else None)


def main() -> None:
    """Train, exit, draw and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", default="1,2,4,8,16,24,30")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--runs", type=Path, default=Path("runs/depth-study"))
    arguments = parser.parse_args()
    depths, seeds = ([int(n) for n in text.split(",")] for text in (arguments.depths, arguments.seeds))
    data = prepared("ml-100k", None, arguments.runs)
    trained: dict[int, list[dict[str, Any]]] = {depth: [] for depth in depths}
    sasrec, deepest = [], None
    for seed in seeds:
        items_config, teacher_config, _ = recipes("ml-100k", seed)
        at = arguments.runs / f"seed-{seed}"
        items, _ = train_items(data, at / "items", items_config)
        sasrec.append(
            cell(at / "cells" / "SASRec-CE.json", items.hash, lambda i=items: measured(i, data))["test"]["ndcg@10"]
        )
        for depth in depths:
            config = replace(teacher_config, num_layers=depth)
            teacher, _ = train_teacher(items, data, at / f"teacher-{depth}", config)
            found = cell(at / "cells" / f"teacher-{depth}.json", teacher.hash, lambda t=teacher: measured(t, data))
            if depth == max(depths) and seed == seeds[0]:
                deepest = teacher
            trained[depth].append(found)
    assert deepest is not None
    early = cell(arguments.runs / "exits.json", deepest.hash, lambda: exits(deepest, data))["exits"]
    result = {
        "dataset": "ml-100k",
        "sasrec": float(np.mean(sasrec)),
        "trained": [{"num_layers": depth} | accuracy(cells) for depth, cells in trained.items()],
        "closest_to_apart": closest_to_apart(trained),
        "exits": early,
    }
    record("depth_study", result)
    draw(result, RESULTS / "depth_study.svg")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

"""Is distillation orthogonal to 8 bits and to pruning? Measured on the models of `slmrec_table.py` (same --runs).

    python benchmarks/orthogonality.py runs/table-ml-100k runs/table-beauty --seeds 0,1,2
    python benchmarks/orthogonality.py runs/table-beauty --seeds 2     # fill one more seed; the others are kept

{teacher, CE student, SLMRec student} x {fp32, 8-bit} x {whole, one layer pruned and healed}. What a compression changes
in NDCG@10 of a student, relative to what it was, minus the same of the teacher: the interaction. The margin is fixed
beforehand: 1 %. Orthogonal if the 95 % interval over users lies within it; not orthogonal if the interval excludes 0
and is not within it; else undecided. User metrics are averaged over seeds first; no gate is applied. Seeds that were
filled earlier, or on other machines, are kept in `results/orthogonality_ranks.parquet` and count with those filled now.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from cells import cell
from graphs import as_graph
from kept import keep, kept, kept_seeds
from recording import RESULTS, record
from slmrec_table import recipes

from compress.int8 import prepare, quantize_model
from compress.prune import prune
from slmrec.artifact import Artifact, canonical_hash, open_artifact
from slmrec.compress_config import CalibrationConfig, ImportanceConfig, PruneConfig
from slmrec.config import settings_of
from slmrec.dataset import Dataset, load_dataset
from slmrec.evaluate import TEST_PROTOCOL, evaluate
from slmrec.metrics import bootstrap_means, ndcg
from slmrec.models.checkpoint import load_decoder
from slmrec.models.decoder import DecoderModel
from slmrec.sequences import test_cases, validation_cases

mpl.use("Agg")
from matplotlib import pyplot as plt

MODELS = ("teacher", "CE", "SLMRec")
COMPRESSIONS = ("8-bit", "pruned", "pruned, 8-bit")
MARGIN = 0.01
Users = dict[tuple[str, str], np.ndarray]


def ranked(model: DecoderModel, data: Dataset) -> dict[str, Any]:
    """Ranks of the test users' targets, by the model's graph."""
    with as_graph(model) as graph:
        accuracy = evaluate(graph, test_cases(data.sequences), protocol=TEST_PROTOCOL)
    return {"test": {"ndcg@10": accuracy.metrics["ndcg@10"].estimate}, "ranks": accuracy.ranks.tolist()}


def in_8_bits(artifact: Artifact, data: Dataset, seed: int) -> dict[str, Any]:
    """The same of the 8-bit model, calibrated on validation users."""
    config = CalibrationConfig(seed=seed)
    prepared = prepare(load_decoder(artifact), validation_cases(data.sequences), config)
    return ranked(quantize_model(prepared.model), data)


def pruning(artifact: Artifact, name: str, seed: int) -> PruneConfig:
    """One layer less, chosen by ranking damage, healed for an epoch as students of this data set are trained."""
    train = replace(recipes(name, seed)[2].train, epochs=1)
    return PruneConfig(
        num_layers=load_decoder(artifact).num_layers - 1, importance=ImportanceConfig(seed=seed), train=train
    )


def measure(runs: Path, data: Dataset, seed: int) -> dict[str, np.ndarray]:
    """Rank of each test user's target by model and compression, "MODEL, COMPRESSION", of one seed."""
    at = runs / f"seed-{seed}"
    found: dict[str, np.ndarray] = {}
    for name in MODELS:
        artifact, cells = open_artifact(at / name), at / "cells"
        config = pruning(artifact, runs.name.removeprefix("table-"), seed)
        smaller, _ = prune(artifact, data, at / f"{name} pruned", config)
        jobs = {
            "fp32": (artifact, False), "8-bit": (artifact, True),
            "pruned": (smaller, False), "pruned, 8-bit": (smaller, True),
        }  # fmt: skip
        for compression, (source, rounded) in jobs.items():
            key = canonical_hash(
                [source.hash, "graph", rounded, settings_of(CalibrationConfig(seed=seed)) if rounded else {}]
            )
            made = cell(
                cells / f"{name} {compression}.json",
                key,
                lambda s=source, r=rounded: in_8_bits(s, data, seed) if r else ranked(load_decoder(s).eval(), data),
            )
            found[f"{name}, {compression}"] = np.array(made["ranks"])
    return found


def users_of(dataset: str, seed: int) -> Users:
    """NDCG@10 of each test user by model and compression, as it is kept of one seed."""
    ranks = kept("orthogonality", dataset, seed)
    return {(name, c): ndcg(ranks[f"{name}, {c}"], 10) for name in MODELS for c in ("fp32", *COMPRESSIONS)}


def averaged(by_seed: Sequence[Users]) -> Users:
    """Each user's NDCG@10, averaged over seeds."""
    return {name: np.mean([users[name] for users in by_seed], axis=0) for name in by_seed[0]}


def columns(users: Users, student: str, compression: str) -> np.ndarray:
    """NDCG@10 of student and teacher, each after the compression and before it, [users, 4]."""
    pairs = [(name, kind) for name in (student, "teacher") for kind in (compression, "fp32")]
    return np.stack([users[pair] for pair in pairs], axis=1)


def contrast(means: np.ndarray) -> np.ndarray:
    """What the compression changes of the student, relative to what it was, minus the same of the teacher."""
    return np.asarray(means[..., 0] / means[..., 1] - means[..., 2] / means[..., 3])


def interaction(users: Users, student: str, compression: str) -> dict[str, Any]:
    """Relative change of the student minus that of the teacher, with interval and verdict."""
    values = columns(users, student, compression)
    low, high = np.quantile(contrast(bootstrap_means(values, seed=0, resamples=4000)), [0.025, 0.975]).tolist()
    estimate = float(contrast(values.mean(axis=0)))
    return {
        "student": student, "compression": compression, "estimate": estimate, "interval": [low, high],
        "verdict": verdict(low, high), "users_to_decide": users_to_decide(estimate, low, high, len(values)),
    }  # fmt: skip


def verdict(low: float, high: float) -> str:
    """What an interval allows to say.

    >>> verdict(-0.002, 0.004), verdict(0.012, 0.03), verdict(-0.02, 0.01)
    ('orthogonal', 'not orthogonal', 'undecided')
    """
    if max(-low, high) < MARGIN:
        return "orthogonal"
    return "undecided" if low <= 0 <= high else "not orthogonal"


def by_seed(per_seed: Sequence[Users], student: str, compression: str, room: float) -> dict[str, Any]:
    """The interaction of each seed, their standard error, and seeds at which two of these would be within `room`."""
    estimates = [float(contrast(columns(users, student, compression).mean(axis=0))) for users in per_seed]
    if len(estimates) < 2:
        return {"by_seed": estimates, "seed_error": None, "seeds_to_decide": None}
    spread = float(np.std(estimates, ddof=1))
    return {
        "by_seed": estimates,
        "seed_error": spread / len(estimates) ** 0.5,
        "seeds_to_decide": max(2, int(np.ceil((2 * spread / room) ** 2))),
    }


def room_of(estimate: float) -> float:
    """Half of an interval around the estimate that lies within the margin, or excludes 0."""
    return max(MARGIN - abs(estimate), abs(estimate))


def users_to_decide(estimate: float, low: float, high: float, num_users: int) -> int | None:
    """Users at which an interval around the same estimate would lie within the margin, or exclude 0."""
    half, room = (high - low) / 2, room_of(estimate)
    return None if verdict(low, high) != "undecided" else int(np.ceil(num_users * (half / room) ** 2))


def table(users: Users, per_seed: Sequence[Users]) -> list[dict[str, Any]]:
    """NDCG@10 of every combination, mean over seeds, and relative to the same model in fp32."""
    lines = []
    for name in MODELS:
        for compression in ("fp32", *COMPRESSIONS):
            mean, plain = users[name, compression].mean(), users[name, "fp32"].mean()
            seeds = [float(one[name, compression].mean()) for one in per_seed]
            lines.append(
                {"model": name, "compression": compression, "ndcg@10": float(mean), "by_seed": seeds,
                 "change": float(mean / plain - 1)}
            )  # fmt: skip
    return lines


def recorded() -> dict[str, Any]:
    """Data sets of the record as it is; those with seeds that are kept are made anew."""
    path = RESULTS / "orthogonality.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["result"]["datasets"] if path.exists() else {}
    return found


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Interactions with their intervals, and the margin."""
    rows = [(name, one) for name, result in results.items() for one in result["interactions"]]
    figure, axes = plt.subplots(figsize=(7.5, 1.2 + 0.32 * len(rows)), layout="constrained")
    colours = {"orthogonal": "#009E73", "not orthogonal": "#D55E00", "undecided": "#777777"}
    for place, (_, one) in enumerate(rows):
        low, high = (100 * end for end in one["interval"])
        axes.plot([low, high], [place, place], color=colours[one["verdict"]], linewidth=2)
        axes.plot(100 * one["estimate"], place, marker="o", color=colours[one["verdict"]])
    axes.axvspan(-100 * MARGIN, 100 * MARGIN, color="#009E73", alpha=0.12, label="margin, 1 %")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{name}: {one['student']}, {one['compression']}" for name, one in rows])
    axes.invert_yaxis()
    axes.set_xlabel("change of the student's NDCG@10 minus change of the teacher's, %\n(95 % interval over users)")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1))  # above: intervals may lie anywhere
    for suffix in (".svg", ".png"):
        figure.savefig(path.with_suffix(suffix), dpi=120, metadata={"Date": None} if suffix == ".svg" else None)


def main() -> None:
    """Fill the cells, judge, draw and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*", help="folders that slmrec_table.py filled")
    parser.add_argument("--seeds", default="0,1,2", help="that are filled now")
    arguments = parser.parse_args()
    for runs in arguments.runs:
        data = load_dataset(runs / "data")
        for seed in map(int, arguments.seeds.split(",")):
            keep("orthogonality", runs.name.removeprefix("table-"), seed, measure(runs, data, seed))
    filled = kept_seeds("orthogonality")
    results = recorded()
    for name in sorted({one["dataset"] for one in filled}, reverse=True):
        per_seed = [users_of(name, one["seed"]) for one in filled if one["dataset"] == name]
        users, found = averaged(per_seed), []
        for student in ("SLMRec", "CE"):
            for compression in COMPRESSIONS:
                one = interaction(users, student, compression)
                found.append(one | by_seed(per_seed, student, compression, room_of(one["estimate"])))
        results[name] = {
            "num_users": len(users["teacher", "fp32"]),
            "filled": [one for one in filled if one["dataset"] == name],
            "table": table(users, per_seed),
            "interactions": found,
        }
    record("orthogonality", {"margin": MARGIN, "datasets": results})
    draw(results, RESULTS / "orthogonality")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

"""What two of a teacher's eight layers are worth: chosen by one of three criteria, healed, on test users.

    python benchmarks/pruning.py runs/table-ml-100k --seeds 0,1,2

Models of `slmrec_table.py` (same folder). All choices start from the same teacher and are healed alike. "damage" is the
product's: validation NDCG@10 lost, one layer after the other; "likelihood" drops those without which the validation
items' cross-entropy is least, which varies less from user to user.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from cells import cell
from graphs import as_graph
from orthogonality import ranked
from recording import record
from slmrec_table import recipes

from compress.calibrate import some_cases
from compress.importance import keep_layers
from compress.prune import prune, read_pruning
from slmrec.artifact import Artifact, open_artifact
from slmrec.compress_config import ImportanceConfig, PruneConfig
from slmrec.dataset import Dataset, load_dataset
from slmrec.metrics import ndcg, ratio_of_means
from slmrec.models.checkpoint import load_decoder
from slmrec.models.decoder import DecoderModel
from slmrec.sequences import Cases, validation_cases

CRITERIA = ("damage", "likelihood", "angular")


def cross_entropy(model: DecoderModel, cases: Cases) -> float:
    """Mean cross-entropy of the cases' next items over the whole catalogue, by the model's graph."""
    with as_graph(model) as graph:
        users = torch.from_numpy(graph.user_vectors(cases.histories))
    with torch.inference_mode():
        scores = users @ model.item_outputs().T
        return float(torch.nn.functional.cross_entropy(scores.double(), torch.from_numpy(cases.targets - 1)))


def least_surprised(teacher: Artifact, data: Dataset, count: int, seed: int) -> tuple[int, ...]:
    """Layers to drop, one after the other, each the one without which cross-entropy is least; never the last."""
    model, config = load_decoder(teacher).eval(), ImportanceConfig(seed=seed)
    cases = some_cases(validation_cases(data.sequences), config.max_users, config.seed)
    dropped: list[int] = []
    for _ in range(count):
        left = [layer for layer in range(model.num_layers - 1) if layer not in dropped]
        kept = [[one for one in range(model.num_layers) if one not in (*dropped, layer)] for layer in left]
        losses = [cross_entropy(keep_layers(model, rest).eval(), cases) for rest in kept]
        print({layer: round(loss, 4) for layer, loss in zip(left, losses, strict=True)}, flush=True)
        dropped.append(left[int(np.argmin(losses))])
    return tuple(sorted(dropped))


def asked(runs: Path, data: Dataset, seed: int, num_layers: int) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    """NDCG@10 of each test user by the whole teacher and by criterion, and the layers that each criterion keeps."""
    at, name = runs / f"seed-{seed}", runs.name.removeprefix("table-")
    teacher = open_artifact(at / "teacher")
    train = replace(recipes(name, seed)[2].train, epochs=2)
    models, kept = {"whole": teacher}, {}
    for criterion in CRITERIA:
        if criterion == "likelihood":
            count = load_decoder(teacher).num_layers - num_layers
            config = PruneConfig(drop=least_surprised(teacher, data, count, seed), train=train)
        else:
            config = PruneConfig(
                num_layers=num_layers, criterion=criterion, importance=ImportanceConfig(seed=seed), train=train
            )
        models[criterion], _ = prune(teacher, data, at / f"teacher {num_layers} by {criterion}", config)
        kept[criterion] = read_pruning(models[criterion])[0]["kept_layers"]
    users = {}
    for row, model in models.items():
        place = at / "cells" / ("teacher whole.json" if row == "whole" else f"{model.path.name}.json")
        made = cell(place, model.hash, lambda one=model: ranked(load_decoder(one), data))
        users[row] = ndcg(np.array(made["ranks"]), 10)
    return users, kept


def main() -> None:
    """Prune, ask, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--num-layers", type=int, default=6)
    arguments = parser.parse_args()
    data, name = load_dataset(arguments.runs / "data"), arguments.runs.name.removeprefix("table-")
    by_seed = [asked(arguments.runs, data, int(seed), arguments.num_layers) for seed in arguments.seeds.split(",")]
    means = {row: np.mean([users[row] for users, _ in by_seed], axis=0) for row in ("whole", *CRITERIA)}
    seeds = {row: [float(users[row].mean()) for users, _ in by_seed] for row in means}
    rows = {}
    for criterion in CRITERIA:
        ratio = ratio_of_means(means[criterion], means["whole"])
        rows[criterion] = {
            "ndcg@10": float(means[criterion].mean()), "of_whole": [ratio.estimate, ratio.low, ratio.high],
            "by_seed": seeds[criterion], "kept_layers": [kept[criterion] for _, kept in by_seed],
        }  # fmt: skip
    between = {row: ratio_of_means(means[row], means["angular"]) for row in CRITERIA if row != "angular"}
    result = {
        "dataset": name, "num_users": len(means["whole"]), "num_layers": arguments.num_layers,
        "whole": {"ndcg@10": float(means["whole"].mean()), "by_seed": seeds["whole"]},
        "rows": rows,
        "over_angular": {row: [ratio.estimate, ratio.low, ratio.high] for row, ratio in between.items()},
    }  # fmt: skip
    record(f"pruning_{name.replace('-', '_')}", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

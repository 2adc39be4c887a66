"""What two of a teacher's eight layers are worth: chosen by ranking damage or by angle, healed, on test users.

    python benchmarks/pruning.py runs/table-ml-100k --seeds 0,1,2

Models of `slmrec_table.py` (same folder). Both choices start from the same teacher and are healed alike.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from cells import cell
from orthogonality import ranked
from recording import record
from slmrec_table import recipes

from compress.prune import prune, read_pruning
from slmrec.artifact import open_artifact
from slmrec.compress_config import ImportanceConfig, PruneConfig
from slmrec.dataset import load_dataset
from slmrec.metrics import ndcg, ratio_of_means
from slmrec.models.checkpoint import load_decoder

CRITERIA = ("damage", "angular")


def main() -> None:
    """Prune, ask, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--num-layers", type=int, default=6)
    arguments = parser.parse_args()
    data, name = load_dataset(arguments.runs / "data"), arguments.runs.name.removeprefix("table-")
    users: dict[str, list[np.ndarray]] = {}
    kept: dict[str, list[Any]] = {criterion: [] for criterion in CRITERIA}
    for seed in map(int, arguments.seeds.split(",")):
        at = arguments.runs / f"seed-{seed}"
        teacher = open_artifact(at / "teacher")
        whole = cell(at / "cells" / "teacher whole.json", teacher.hash, lambda t=teacher: ranked(load_decoder(t), data))
        users.setdefault("whole", []).append(ndcg(np.array(whole["ranks"]), 10))
        train = replace(recipes(name, seed)[2].train, epochs=2)
        for criterion in CRITERIA:
            config = PruneConfig(
                num_layers=arguments.num_layers,
                criterion=criterion,
                importance=ImportanceConfig(seed=seed),
                train=train,
            )
            smaller, _ = prune(teacher, data, at / f"teacher {arguments.num_layers} by {criterion}", config)
            place = at / "cells" / f"{smaller.path.name}.json"
            made = cell(place, smaller.hash, lambda one=smaller: ranked(load_decoder(one), data))
            users.setdefault(criterion, []).append(ndcg(np.array(made["ranks"]), 10))
            kept[criterion].append(read_pruning(smaller)[0]["kept_layers"])
    means = {row: np.mean(seeds, axis=0) for row, seeds in users.items()}
    rows = {}
    for criterion in CRITERIA:
        ratio = ratio_of_means(means[criterion], means["whole"])
        rows[criterion] = {
            "ndcg@10": float(means[criterion].mean()), "of_whole": [ratio.estimate, ratio.low, ratio.high],
            "by_seed": [float(one.mean()) for one in users[criterion]], "kept_layers": kept[criterion],
        }  # fmt: skip
    between = ratio_of_means(means["damage"], means["angular"])
    result = {
        "dataset": name, "num_users": len(means["whole"]), "num_layers": arguments.num_layers,
        "whole": {"ndcg@10": float(means["whole"].mean()), "by_seed": [float(one.mean()) for one in users["whole"]]},
        "rows": rows, "damage_over_angular": [between.estimate, between.low, between.high],
    }  # fmt: skip
    record(f"pruning_{name.replace('-', '_')}", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

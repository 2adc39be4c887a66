"""Is it the learning rate? Students at several, each loss at the one that validation chooses.

    python benchmarks/learning_rates.py ml-100k
    python benchmarks/learning_rates.py ml-1m --data ../shared/data/ml-1m

The rates of decoder and items are the table's (`slmrec_table.py`) times each of --factors, all else is the table's, and
so are its SASRec, teacher and cells where they are below --runs. Finished cells are kept, and an interrupted run goes
on where it was.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from cells import user_ndcg
from recording import record
from slmrec_table import STUDENTS, fill_students, fill_teacher, prepared, recipes, student_cell, table_parser

from slmrec.compress_config import DistillConfig
from slmrec.metrics import compare

Cells = Sequence[Mapping[str, Any]]
"""One row's cells, one a seed."""


def at_rate(config: DistillConfig, factor: float) -> DistillConfig:
    """The settings with the learning rates of decoder and items times a factor."""
    rates = {name: getattr(config.train, name) * factor for name in ("learning_rate", "item_learning_rate")}
    return replace(config, train=replace(config.train, **rates))


def chosen(grid: Mapping[float, Cells]) -> float:
    """The factor whose students have the highest NDCG@10 on validation, averaged over seeds."""
    return max(grid, key=lambda factor: np.mean([one["validation"]["ndcg@10"] for one in grid[factor]]))


def compared(grids: Mapping[str, Mapping[float, Cells]], against: str) -> list[dict[str, Any]]:
    """Each loss at each rate, and at its chosen one the paired test against another loss at that one's."""
    baseline = user_ndcg(grids[against][chosen(grids[against])])
    lines = []
    for row, grid in grids.items():
        for factor, cells in sorted(grid.items()):
            line = {"row": row, "factor": factor, "chosen": factor == chosen(grid), "seeds": len(cells)}
            for split in ("validation", "test"):
                line[split] = float(np.mean([one[split]["ndcg@10"] for one in cells]))
            if line["chosen"] and row != against:
                tested = compare(user_ndcg(cells), baseline)
                line |= {"against": against, "difference": vars(tested.difference), "p": tested.p_value}
            lines.append(line)
    return lines


def main() -> None:
    """Fill the cells, choose, compare and record."""
    parser = table_parser(__doc__)
    parser.add_argument("--rows", default="CE,SLMRec", help="losses; CE is what the others are tested against")
    parser.add_argument("--factors", default="0.5,2", help="of the table's rate, besides 1")
    arguments = parser.parse_args()
    runs = arguments.runs or Path("runs") / f"table-{arguments.name}"
    data = prepared(arguments.name, arguments.data, runs)
    grids: dict[str, dict[float, list[dict[str, Any]]]] = {row: {} for row in arguments.rows.split(",")}
    for seed in (int(text) for text in arguments.seeds.split(",")):
        at, config = runs / f"seed-{seed}", recipes(arguments.name, seed)[2]
        teacher, _ = fill_teacher(arguments.name, data, at, seed, ["teacher"])
        assert teacher is not None
        for row, made in fill_students(arguments.name, data, teacher, at, seed, list(grids)).items():
            grids[row].setdefault(1.0, []).append(made)
        for row, grid in grids.items():
            for factor in (float(text) for text in arguments.factors.split(",")):
                student = at_rate(replace(config, **STUDENTS[row]), factor)
                made = student_cell(data, teacher, at, f"{row} x {factor:g}", student)
                grid.setdefault(factor, []).append(made)
    lines = compared(grids, "CE")
    train = config.train
    rates = {"learning_rate": train.learning_rate, "item_learning_rate": train.item_learning_rate}
    info = {key: data.info[key] for key in ("num_users", "num_items", "num_interactions")}
    record(f"learning_rates_{arguments.name.replace('-', '_')}", {"dataset": info, "rates": rates, "rows": lines})
    print(json.dumps(lines, indent=2))


if __name__ == "__main__":
    main()

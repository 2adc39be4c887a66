"""SLMRec's table on one data set: SASRec, teacher, and the student with one term after the other.

    python benchmarks/slmrec_table.py ml-100k --seeds 0,1,2
    python benchmarks/slmrec_table.py beauty --data ../shared/data/beauty --seeds 0,1,2 --one-teacher --repeat CE,SLMRec

Seeds can be filled by processes of their own, each with its own --runs (and rows, in copies of a seed's folder once its
teacher is there); their cells, copied into the folders of one --runs, are put together with --from-cells.
With --one-teacher the students of all seeds follow the first seed's teacher, and --repeat names the rows that are
made for every seed where the others have the first's alone. Every student row has the same initialisation, item table,
batches, steps and learning rate; validation chooses the epoch, test is read once. Finished cells are kept below
--runs, and an interrupted table goes on where it was. The tables of docs/method.md name their rows by --rows.
"""

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from cells import cell, measured, summarize, user_ndcg
from recording import record

from compress.distill import distill, distill_stage
from slmrec.artifact import Artifact
from slmrec.cli.loading import load_recommender
from slmrec.compress_config import DistillConfig, FeatureConfig
from slmrec.config import (
    BenchmarkConfig,
    DataConfig,
    RecipeConfig,
    SasrecConfig,
    TeacherConfig,
    TrainConfig,
    WindowConfig,
)
from slmrec.dataset import Dataset, load_dataset
from slmrec.interactions import prepare_dataset
from slmrec.latency import measure_latency
from slmrec.metrics import compare
from slmrec.sequences import test_cases
from slmrec.sources import source_files
from slmrec.train_items import train_items
from slmrec.train_teacher import train_teacher

NONE = {"direction_weight": 0.0, "magnitude_weight": 0.0, "supervision_weight": 0.0}
STUDENTS: dict[str, dict[str, Any]] = {
    "CE": NONE,
    "CE + supervision": NONE | {"supervision_weight": 0.1},
    "cosine": NONE | {"direction_weight": 1.0},
    "cosine + norm": NONE | {"direction_weight": 1.0, "magnitude_weight": 0.1},
    "SLMRec": {},
    "SLMRec + list": {"list_weight": 1.0},
    "CE + shared table": NONE | {"item_table": "frozen"},
    "SLMRec + shared table": {"item_table": "frozen"},
    "SLMRec + list x 5 + shared table": {"item_table": "frozen", "list_weight": 5.0},
    "SLMRec by the published code's sums": {"loss": "repo"},
    "SLMRec by unscaled distances": {"magnitude_scale": "none"},
    "SLMRec from the teacher's first layers": {"init": "teacher-first"},
    "CE from the backbone": NONE | {"init": "backbone"},
    "SLMRec from the backbone": {"init": "backbone"},
    "features x 20": {"direction_weight": 20.0, "magnitude_weight": 2.0, "supervision_weight": 0.0},
    "features x 20 + list x 5": {
        "direction_weight": 20.0,
        "magnitude_weight": 2.0,
        "supervision_weight": 0.0,
        "list_weight": 5.0,
    },
}
"""The teacher is the row "teacher", SASRec the row "SASRec-CE"; the others differ in their loss alone, or in the layers
they start from where they say so. On Beauty the paper's weights give the feature terms 2 % of cross-entropy's gradient
norm, hence the last two."""

_NAMES = {name for row in STUDENTS.values() for name in row}
WEIGHTS = {one.name: one.default for one in fields(DistillConfig) if one.name in _NAMES}
"""What rows differ in, and what it is where a row does not say."""


def recipes(name: str, seed: int) -> tuple[SasrecConfig, TeacherConfig, DistillConfig]:
    """Settings of a data set; those of ML-100K are the demo's."""
    decoder = {"learning_rate": 3e-4, "item_learning_rate": 1e-3, "seed": seed}
    if name == "ml-100k":
        items = TrainConfig(epochs=27, batch_size=32, learning_rate=2e-3, precision="fp32", seed=seed)
        train = TrainConfig(epochs=3, batch_size=16, warmup_steps=20, **decoder)  # type: ignore[arg-type]
        return (
            SasrecConfig(dropout=0.4, train=items),
            TeacherConfig(
                num_layers=8, recipe=RecipeConfig(prompt="none"), train=train,
                window=WindowConfig(max_history=50, max_events=100),
            ),
            DistillConfig(num_layers=4, train=replace(train, epochs=4)),
        )  # fmt: skip
    window = WindowConfig(max_history=50, max_events=200 if name == "ml-1m" else 50)
    if name == "ml-1m":
        items = TrainConfig(epochs=60, batch_size=128, learning_rate=1e-3, precision="fp32", seed=seed)
        train = TrainConfig(epochs=3, batch_size=32, warmup_steps=50, **decoder)  # type: ignore[arg-type]
        return (
            SasrecConfig(dropout=0.3, window=window, train=items),
            TeacherConfig(num_layers=8, recipe=RecipeConfig(prompt="none"), window=window, train=train),
            DistillConfig(num_layers=4, train=train),
        )
    items = TrainConfig(epochs=40, batch_size=512, learning_rate=1e-3, weight_decay=0.0, precision="fp32", seed=seed)
    gentle = decoder | {"learning_rate": 2e-4, "item_learning_rate": 3e-4}  # sparse items are soon known by heart
    train = TrainConfig(epochs=3, batch_size=64, warmup_steps=50, weight_decay=0.05, **gentle)  # type: ignore[arg-type]
    return (
        SasrecConfig(dropout=0.6, supervision="prefixes", window=window, train=items),
        TeacherConfig(num_layers=8, recipe=RecipeConfig(prompt="none", dropout=0.6), window=window, train=train),
        DistillConfig(num_layers=4, train=train),
    )


def prepared(name: str, folder: Path | None, runs: Path) -> Dataset:
    """The dataset artefact of a named source or of a folder with sequences.txt and titles.tsv."""
    if folder is None:
        prepare_dataset(source_files(name), runs / "data", DataConfig())
    else:
        prepare_dataset([folder / "sequences.txt"], runs / "data", DataConfig(items_file=str(folder / "titles.tsv")))
    return load_dataset(runs / "data")


def fill_teacher(
    name: str, data: Dataset, at: Path, seed: int, wanted: list[str]
) -> tuple[Artifact | None, dict[str, dict[str, Any]]]:
    """A seed's SASRec and, where any row wants it, its teacher; what is there is not made again."""
    items_config, teacher_config, _ = recipes(name, seed)
    items, _ = train_items(data, at / "items", items_config)
    found = {"SASRec-CE": cell(at / "cells" / "SASRec-CE.json", items.hash, lambda: measured(items, data))}
    if wanted == ["SASRec-CE"]:
        return None, found
    teacher, _ = train_teacher(items, data, at / "teacher", teacher_config)
    found["teacher"] = cell(at / "cells" / "teacher.json", teacher.hash, lambda: measured(teacher, data))
    return teacher, found


def fill_students(
    name: str, data: Dataset, teacher: Artifact, at: Path, seed: int, wanted: list[str]
) -> dict[str, dict[str, Any]]:
    """The wanted student rows of one seed."""
    student_config = recipes(name, seed)[2]
    return {
        row: student_cell(data, teacher, at, row, replace(student_config, **weights))
        for row, weights in STUDENTS.items()
        if row in wanted
    }


def student_cell(data: Dataset, teacher: Artifact, at: Path, row: str, config: DistillConfig) -> dict[str, Any]:
    """One student's cell, the teacher's features kept for the next."""
    config = replace(config, features=FeatureConfig(keep=True))
    key = distill_stage(teacher, data, config).key
    return cell(at / "cells" / f"{row}.json", key, lambda: measured(distill(teacher, data, at / row, config)[0], data))


def fill(
    name: str, data: Dataset, runs: Path, wanted_by_seed: dict[int, list[str]], *, one_teacher: bool
) -> dict[str, list[dict[str, Any]]]:
    """Row -> its cells, one a seed; with one teacher SASRec and teacher have the first seed's alone."""
    rows: dict[str, list[dict[str, Any]]] = {}
    teacher = None
    for seed, wanted in wanted_by_seed.items():
        at = runs / f"seed-{seed}"
        if teacher is None or not one_teacher:
            teacher, found = fill_teacher(name, data, at, seed, wanted)
            for row, made in found.items():
                rows.setdefault(row, []).append(made)
        if teacher is not None:
            for row, made in fill_students(name, data, teacher, at, seed, wanted).items():
                rows.setdefault(row, []).append(made)
    return rows


def finished(runs: Path, seeds: list[int], wanted: list[str], data: Dataset) -> dict[str, list[dict[str, Any]]]:
    """Row -> its cells as processes elsewhere left them, one a seed; the models need not be here.

    Raises:
        SystemExit: a cell is of another seed, data set, teacher or row.
    """
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed in seeds:
        made: dict[str, dict[str, Any]] = {}
        for row in dict.fromkeys(["SASRec-CE", "teacher", *wanted]):
            path = runs / f"seed-{seed}" / "cells" / f"{row}.json"
            made[row] = json.loads(path.read_text(encoding="utf-8"))
            settings = made[row]["settings"]
            parent = {"SASRec-CE": {}, "teacher": {"items": "SASRec-CE"}}.get(row, {"teacher": "teacher"})
            expected = {"data": data.hash} | {name: made[other]["hash"] for name, other in parent.items()}
            if made[row]["parents"] != expected or settings["train"]["seed"] != seed:
                found = made[row]["parents"] | {"seed": settings["train"]["seed"]}
                raise SystemExit(f"{path} is of {found}; expected are {expected} and seed {seed}")
            if row in STUDENTS:
                first = made[next(other for other in made if other in STUDENTS)]["settings"]
                if settings != first | WEIGHTS | STUDENTS[row]:
                    raise SystemExit(f"{path} was trained with {settings}, not as the row {row}")
            rows.setdefault(row, []).append(made[row])
    return rows


def speeds(data: Dataset, at: Path, rows: list[str]) -> dict[str, float]:
    """Milliseconds at p50 of one request, PyTorch, rows in turn."""
    from slmrec.artifact import open_artifact

    folders = {row: at / {"SASRec-CE": "items", "teacher": "teacher"}.get(row, row) for row in rows}
    recommenders = {row: load_recommender(open_artifact(folder)) for row, folder in folders.items()}
    timings = measure_latency(
        recommenders, test_cases(data.sequences).histories, BenchmarkConfig(rounds=100, batch_sizes=(), batch_rounds=2)
    )
    return {row: timing.latency()["p50_ms"] for row, timing in timings.items()}


def table_parser(description: str | None) -> argparse.ArgumentParser:
    """What every script asks that works on a table's data set: its name and files, where its runs lie, the seeds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["ml-100k", "beauty", "ml-1m"])
    parser.add_argument("--data", type=Path, help="folder with sequences.txt and titles.tsv; not for ml-100k")
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--seeds", default="0")
    return parser


def main() -> None:
    """Fill the cells, summarize and record."""
    parser = table_parser(__doc__)
    parser.add_argument("--rows", help="comma-separated; default all", default=",".join(["teacher", *STUDENTS]))
    parser.add_argument("--one-teacher", action="store_true", help="students of all seeds follow the first's teacher")
    parser.add_argument("--repeat", help="rows that every seed has; default all of --rows")
    parser.add_argument("--record", help="name of the record; default slmrec_NAME")
    parser.add_argument("--from-cells", metavar="WHERE", help="where the cells below --runs were filled: no times then")
    arguments = parser.parse_args()
    runs = arguments.runs or Path("runs") / f"table-{arguments.name}"
    seeds, wanted = [int(seed) for seed in arguments.seeds.split(",")], arguments.rows.split(",")
    data = prepared(arguments.name, arguments.data, runs)
    repeated = (arguments.repeat or arguments.rows).split(",")
    later = [row for row in wanted if row in repeated]
    wanted_by_seed = {seed: wanted if seed == seeds[0] else later for seed in seeds}
    if arguments.from_cells:
        if arguments.one_teacher or arguments.repeat:
            parser.error("--from-cells takes every row of every seed: no --one-teacher, no --repeat")
        rows = finished(runs, seeds, wanted, data)
    else:
        rows = fill(arguments.name, data, runs, wanted_by_seed, one_teacher=arguments.one_teacher)
    if "CE" not in rows:
        print(json.dumps({row: cells[0]["test"] for row, cells in rows.items()}, indent=2))
        return
    lines = summarize(rows, against="CE", teacher="teacher")
    milliseconds = {} if arguments.from_cells else speeds(data, runs / f"seed-{seeds[0]}", list(rows))
    for line in lines:
        line["p50_ms"] = milliseconds.get(line["row"])
    known = compare(user_ndcg(rows["teacher"]), user_ndcg(rows["SASRec-CE"]))
    info = {key: data.info[key] for key in ("num_users", "num_items", "num_interactions", "num_tied_targets")}
    result = {"dataset": info | {"hash": data.hash}, "one_teacher": arguments.one_teacher, "rows": lines}
    result["teacher_against_sasrec"] = vars(known.difference) | {"p": known.p_value}
    if arguments.from_cells:
        result["cells_filled_on"] = arguments.from_cells
    shared = {row: cells for row, cells in rows.items() if row == "teacher" or row.endswith("shared table")}
    if "CE + shared table" in shared:  # the comparison of equals among those that train no item vectors
        result["shared_table"] = summarize(shared, against="CE + shared table", teacher="teacher")
    record(arguments.record or f"slmrec_{arguments.name.replace('-', '_')}", result)
    print(json.dumps(lines, indent=2))


if __name__ == "__main__":
    main()

"""What the teacher's parts are worth: the table's teacher beside one without each of them, all else alike.

    python benchmarks/controls.py ml-100k --seeds 0,1,2
    python benchmarks/controls.py beauty --data ../shared/data/beauty --rows "no titles"

no titles: items are their ids alone. frozen table: SASRec's item vectors are not trained on. random decoder: layers
that were never pretrained, under the pretrained token embeddings, from which titles have their vectors. The SASRec
and teacher that `slmrec_table.py` left in --runs are used again, and finished cells are found again.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cells import cell, measured, summarize
from recording import record
from slmrec_table import fill_teacher, prepared, recipes, table_parser

from slmrec.artifact import open_artifact
from slmrec.config import TeacherConfig
from slmrec.train_teacher import load_backbone, train_teacher


def random_backbone(output: Path, config: TeacherConfig) -> Path:
    """A Hugging Face folder of the teacher's backbone, its layers drawn anew."""
    from transformers import AutoModel

    backbone = load_backbone(config.backbone, config.num_layers)
    torch.manual_seed(config.train.seed)
    fresh = AutoModel.from_config(backbone.decoder.config)
    fresh.embed_tokens.load_state_dict(backbone.decoder.embed_tokens.state_dict())
    shutil.rmtree(output, ignore_errors=True)
    fresh.save_pretrained(output)
    for file in backbone.folder.glob("tokenizer*"):
        shutil.copy(file, output)
    return output


def variants(config: TeacherConfig, at: Path) -> dict[str, TeacherConfig]:
    """Row -> the teacher's settings with one part taken away."""
    return {
        "no titles": replace(config, recipe=replace(config.recipe, titles="none")),
        "frozen table": replace(config, recipe=replace(config.recipe, item_table="frozen")),
        "random decoder": replace(config, backbone=str(at / "random-backbone")),
    }


def main() -> None:
    """Fill the cells, compare and record."""
    parser = table_parser(__doc__)
    parser.add_argument("--rows", default="no titles,frozen table,random decoder")
    arguments = parser.parse_args()
    runs = arguments.runs or Path("runs") / f"table-{arguments.name}"
    data = prepared(arguments.name, arguments.data, runs)
    rows: dict[str, list[dict[str, Any]]] = {}
    for seed in (int(text) for text in arguments.seeds.split(",")):
        at, config = runs / f"seed-{seed}", recipes(arguments.name, seed)[1]
        for row, known in fill_teacher(arguments.name, data, at, seed, ["teacher"])[1].items():
            rows.setdefault(row, []).append(known)
        for row in arguments.rows.split(","):
            if row == "random decoder":
                random_backbone(at / "random-backbone", config)
            teacher, _ = train_teacher(
                open_artifact(at / "items"), data, at / f"teacher, {row}", variants(config, at)[row]
            )
            made = cell(at / "cells" / f"teacher, {row}.json", teacher.hash, lambda t=teacher: measured(t, data))
            rows.setdefault(row, []).append(made)
    lines = summarize(rows, against="teacher", teacher="teacher")
    record(f"controls_{arguments.name.replace('-', '_')}", {"dataset": arguments.name, "rows": lines})
    print(json.dumps(lines, indent=2))


if __name__ == "__main__":
    main()

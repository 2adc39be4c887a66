"""The questions of SLMRec's reviewers, asked of ML-100K (what `slmrec_table.py ml-100k` left in --runs is used again).

    python benchmarks/reviewers.py --seeds 0,1,2

likeness: how alike student and teacher are inside, distilled and not: cosine and linear CKA (Kornblith et al.,
arXiv:1905.00414) of each block's features, and overlap of the top ten. untrained: a student that follows a teacher
whose layers never saw an interaction (its item table is SASRec's, as every row's), beside one that starts from the
same layers and follows nobody: is it knowledge of the task that is transferred? single: students of one layer. online:
teacher and student trained together. Depths and early exits are in `depth_study.py`, prices in `prices.py`.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import cell, measured, summarize, user_ndcg
from recording import record
from slmrec_table import NONE, fill_students, fill_teacher, prepared, recipes

from compress.blocks import block_ends, state_index
from compress.distill import distill, distill_stage
from slmrec.artifact import Artifact, Stage, is_up_to_date, open_artifact, publish
from slmrec.cli.loading import load_recommender
from slmrec.compress_config import DistillConfig, FeatureConfig, OnlineConfig
from slmrec.config import settings_of
from slmrec.dataset import Dataset
from slmrec.metrics import compare, holm, overlap
from slmrec.models.checkpoint import load_decoder, save_checkpoint
from slmrec.models.decoder import DecoderModel
from slmrec.sequences import test_cases
from slmrec.train_teacher import build_teacher

BLOCKS = 4
ASKED = (
    ("untrained teacher", "CE, the same start"),
    ("SLMRec", "untrained teacher"),
    ("1 layer, SLMRec", "1 layer, CE"),
    ("online, features", "untrained teacher"),
    ("online, logits", "online, features"),
    ("online, trained teacher", "SLMRec"),
)
"""Pairs of rows whose difference answers a question."""


def untrained_teacher(items: Artifact, data: Dataset, output: Path, seed: int) -> Artifact:
    """The teacher before its first step: pretrained layers, SASRec's table, an untrained head."""
    _, config, _ = recipes("ml-100k", seed)
    stage = Stage(
        name="train-teacher", kind="checkpoint", settings=settings_of(config) | {"steps": 0},
        parents={"items": items, "data": data.artifact},
    )  # fmt: skip
    if not is_up_to_date(output, stage, force=False):
        with publish(output, stage) as folder:
            save_checkpoint(folder, build_teacher(config, items, data))
            data.items.save(folder)
    return open_artifact(output)


def variants(seed: int) -> dict[str, tuple[str, DistillConfig]]:
    """Row -> the teacher's folder, and the settings."""
    base = recipes("ml-100k", seed)[2]
    kept = replace(base, features=FeatureConfig(keep=True))
    no_features = {"direction_weight": 0.0, "magnitude_weight": 0.0}
    one = {"num_layers": 1, "num_blocks": 1, "supervision_weight": 0.0}
    return {
        "untrained teacher": ("untrained", kept),
        "CE, the same start": ("untrained", replace(kept, **NONE)),
        "1 layer, CE": ("teacher", replace(kept, **NONE | one)),
        "1 layer, SLMRec": ("teacher", replace(kept, **one)),
        "online, features": ("untrained", replace(base, online=OnlineConfig())),
        "online, logits": ("untrained", replace(base, online=OnlineConfig(signal="logits"), **no_features)),
        "online, trained teacher": ("teacher", replace(base, online=OnlineConfig())),
    }


def answers(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Differences of NDCG@10 between the pairs of `ASKED`, paired by user; p values are Holm-corrected over them."""
    found = [compare(user_ndcg(rows[one]), user_ndcg(rows[other])) for one, other in ASKED]
    corrected = holm([one.p_value for one in found])
    return [
        {"row": row, "against": other, "difference": vars(one.difference), "p": one.p_value, "p_holm": p_holm}
        for (row, other), one, p_holm in zip(ASKED, found, corrected, strict=True)
    ]


def linear_cka(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Linear centred kernel alignment of two sets of features, [users, hidden] each; in [0, 1]."""
    ours, theirs = ours - ours.mean(axis=0), theirs - theirs.mean(axis=0)
    cross = np.linalg.norm(ours.T @ theirs) ** 2
    return float(cross / (np.linalg.norm(ours.T @ ours) * np.linalg.norm(theirs.T @ theirs)))


@torch.inference_mode()
def block_features(model: DecoderModel, data: Dataset) -> np.ndarray:
    """Features of each test user at the user-vector position, [users, blocks, hidden]."""
    histories = test_cases(data.sequences).histories.item_ids.newest(model.max_history)
    found = np.zeros((len(histories), BLOCKS, model.hidden_size), dtype=np.float32)
    ends = [state_index(end) for end in block_ends(model.num_layers, BLOCKS)]
    for length in np.unique(histories.lengths):
        rows = np.flatnonzero(histories.lengths == length)
        states = model(torch.from_numpy(histories.select(rows).pad_left(int(length))))
        found[rows] = torch.stack([states[end][:, -1] for end in ends], dim=1).numpy()
    return found


def likeness(at: Path, data: Dataset, rows: list[str]) -> dict[str, Any]:
    """How alike each student is to the teacher: by block, and in what it recommends."""
    histories = test_cases(data.sequences).histories
    teacher = open_artifact(at / "teacher")
    theirs = block_features(load_decoder(teacher).eval(), data)
    lists = load_recommender(teacher, "cpu").recommend(histories, 10).item_ids
    found = {}
    for row in rows:
        student = open_artifact(at / row)
        ours = block_features(load_decoder(student).eval(), data)
        cosines = (ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)
        own = load_recommender(student, "cpu").recommend(histories, 10).item_ids
        found[row] = {
            "cosine": cosines.mean(axis=0).tolist(),
            "linear_cka": [linear_cka(ours[:, block], theirs[:, block]) for block in range(BLOCKS)],
            "overlap@10": float(overlap(own, lists).mean()),
        }
    return found


def main() -> None:
    """Fill the cells, compare and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--runs", type=Path, default=Path("runs/table-ml-100k"))
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    data = prepared("ml-100k", None, arguments.runs)
    rows: dict[str, list[dict[str, Any]]] = {}
    inside = []
    for seed in seeds:
        at = arguments.runs / f"seed-{seed}"
        trained, found = fill_teacher("ml-100k", data, at, seed, ["teacher"])
        assert trained is not None
        found |= fill_students("ml-100k", data, trained, at, seed, ["CE", "SLMRec"])
        for row in ("teacher", "CE", "SLMRec"):
            rows.setdefault(row, []).append(found[row])
        untrained_teacher(open_artifact(at / "items"), data, at / "untrained", seed)
        for row, (teacher, config) in variants(seed).items():
            parent = open_artifact(at / teacher)
            key = distill_stage(parent, data, config).key
            made = cell(
                at / "cells" / f"{row}.json",
                key,
                lambda p=parent, c=config, o=at / row: measured(distill(p, data, o, c)[0], data),
            )
            rows.setdefault(row, []).append(made)
        inside.append(likeness(at, data, ["CE", "SLMRec", "untrained teacher"]))
    lines = summarize(rows, against="CE", teacher="teacher")
    result = {"dataset": "ml-100k", "rows": lines, "answers": answers(rows), "likeness_by_seed": inside}
    record("reviewers", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

"""Items that nobody had met in training: how well their titles alone place them.

    python benchmarks/unseen_items.py ml-100k
    python benchmarks/unseen_items.py beauty --data ../shared/data/beauty

A tenth of the items is taken out of every sequence; SASRec and a teacher are trained on the rest, whose catalogue lacks
them. Then they join it with a vector made of their titles, and the users whose last item is one of them are asked:
among all items, and among the new ones alone. `title` gives a new item its title's share and the mean of the known
items' own vectors; `title + neighbours` the mean of the ten known items with the most alike titles instead; `chance`,
in a model without titles, the vector of a known item drawn at random. Other users' ranks show what newcomers cost.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recording import record
from slmrec_table import prepared, recipes
from torch import Tensor, nn

from slmrec.config import DataConfig
from slmrec.dataset import Dataset, load_dataset
from slmrec.evaluate import LIST_LENGTH
from slmrec.interactions import prepare_dataset
from slmrec.metrics import hit_rate, mean_intervals, ndcg, ranks_of_targets
from slmrec.models.checkpoint import load_decoder
from slmrec.models.decoder import DecoderModel
from slmrec.models.ranking import TorchRecommender
from slmrec.models.titles import title_vectors
from slmrec.sequences import Cases, test_cases
from slmrec.train_items import train_items
from slmrec.train_teacher import load_backbone, train_teacher

SHARE, NEIGHBOURS = 0.1, 10


class Among(nn.Module):
    """A model that can recommend the marked items alone."""

    def __init__(self, model: DecoderModel, marked: np.ndarray) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("closed", torch.from_numpy(~marked))
        self.closed: Tensor
        self.num_items, self.max_history = model.num_items, model.max_history

    def score(self, item_ids: Tensor) -> Tensor:
        """Scores, -inf for the others."""
        return self.model.score(item_ids).masked_fill(self.closed, -torch.inf)


def known_data(data: Dataset, known: np.ndarray, runs: Path) -> Dataset:
    """The dataset without the events of items that are not known (bool, [num_items])."""
    lines = []
    for user, sequence in zip(data.user_ids, data.sequences, strict=True):
        kept = [data.items.item_ids[item - 1] for item in sequence if known[item - 1]]
        if kept:
            lines.append(" ".join([user, *kept]) + "\n")
    runs.mkdir(parents=True, exist_ok=True)
    source = runs / "known.txt"
    source.write_text("".join(lines), encoding="utf-8")
    titles = runs / "titles.parquet"
    described = ["item_id", "title", *(["categories"] if any(data.items.categories) else [])]
    data.items.to_frame().select(described).write_parquet(titles)
    prepare_dataset([source], runs / "data-known", DataConfig(items_file=str(titles)))
    return load_dataset(runs / "data-known")


@torch.no_grad()
def joined(model: DecoderModel, data: Dataset, known: Dataset, backbone: str, way: str) -> DecoderModel:
    """The model with the whole catalogue: known items as they were, new ones as `way` has it."""
    rows = torch.tensor([known.items.internal_ids.get(item, 0) for item in data.items.item_ids])
    is_new = rows == 0
    whole = DecoderModel(replace(model.spec, num_items=data.num_items)).eval()
    kept = {name: value for name, value in model.state_dict().items() if name not in ("item_table.weight", "titles")}
    whole.load_state_dict(kept, strict=False)
    own = model.item_table.weight
    table = own[rows]
    if way == "chance":
        drawn = torch.randint(1, len(own), (int(is_new.sum()),), generator=torch.Generator().manual_seed(0))
        table[is_new] = own[drawn]
    else:
        table[is_new] = own[1:].mean(dim=0)
        assert model.titles is not None
        assert whole.titles is not None
        source = load_backbone(backbone, 1)
        whole.titles[1:] = model.titles[rows]
        new_titles = title_vectors(data.items, source.folder, source.embeddings, known.items)[1:][is_new]
        whole.titles[1:][is_new] = new_titles
        if way == "title + neighbours":
            nearest = (new_titles @ model.titles[1:].T).topk(NEIGHBOURS, dim=1).indices + 1
            table[is_new] = own[nearest].mean(dim=1)
    whole.item_table.weight[1:] = table
    return whole


def asked(model: nn.Module, cases: Cases) -> dict[str, Any]:
    """HR@10 and NDCG@10 with their intervals."""
    answer = TorchRecommender(model).recommend(cases.histories, LIST_LENGTH)
    ranks = ranks_of_targets(answer.item_ids, cases.targets)
    found = mean_intervals(np.stack([hit_rate(ranks, 10), ndcg(ranks, 10)], axis=1))
    return {name: vars(interval) for name, interval in zip(("hr@10", "ndcg@10"), found, strict=True)}


def main() -> None:
    """Train without the new items, let them join, ask and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["ml-100k", "beauty", "ml-1m"])
    parser.add_argument("--data", type=Path, help="folder with sequences.txt and titles.tsv; not for ml-100k")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--runs", type=Path)
    arguments = parser.parse_args()
    runs = arguments.runs or Path("runs") / f"unseen-{arguments.name}"
    data = prepared(arguments.name, arguments.data, runs)
    is_known = np.random.default_rng(arguments.seed).random(data.num_items) >= SHARE
    known = known_data(data, is_known, runs)
    items_config, config, _ = recipes(arguments.name, arguments.seed)
    items, _ = train_items(known, runs / "items", items_config)
    config = replace(config, num_layers=arguments.num_layers)
    teachers = {
        "title": train_teacher(items, known, runs / "teacher", config)[0],
        "chance": train_teacher(
            items, known, runs / "teacher-no-titles", replace(config, recipe=replace(config.recipe, titles="none"))
        )[0],
    }
    cases = test_cases(data.sequences)
    is_new = ~is_known[cases.targets - 1]
    known_events = np.array([is_known[data.sequences[user] - 1].sum() for user in cases.users])
    is_held_out = known_events >= 3  # users with fewer known events were trained on whole
    new_cases, other_cases = cases.select(np.flatnonzero(is_new)), cases.select(np.flatnonzero(~is_new & is_held_out))
    rows = {}
    for way in ("title", "title + neighbours", "chance"):
        model = load_decoder(teachers["chance" if way == "chance" else "title"])
        whole = joined(model, data, known, config.backbone, way)
        rows[way] = {
            "all items": asked(whole, new_cases),
            "new items alone": asked(Among(whole, ~is_known), new_cases),
            "users of known items, all items": asked(whole, other_cases),
            "users of known items, known items alone": asked(Among(whole, is_known), other_cases),
        }
    result = {
        "dataset": arguments.name,
        "num_new_items": int((~is_known).sum()),
        "num_items": data.num_items,
        "num_users": {"of new items": len(new_cases), "of known items": len(other_cases)},
        "rows": rows,
    }
    record(f"unseen_items_{arguments.name.replace('-', '_')}", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

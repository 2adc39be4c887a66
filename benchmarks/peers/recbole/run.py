"""One RecBole model on a prepared folder: trained, stopped by validation NDCG@10, its lists written.

    .venv/bin/python run.py FOLDER SETTINGS.json OUTPUT

Run with the Python of the environment of `requirements.txt`; nothing of slmcompress is imported. Ids are 1..N.

FOLDER holds lines of integers and names:
    train.txt        user item item ...   oldest first; all that may be learned from
    validation.txt   user item item ...   the past of each evaluable user, before the validation item
    test.txt         user item item ...   the same users in the same order: that past plus the validation item
    items.txt        item genre genre ... the whole catalogue, one line an item
Test items are nowhere in it.

SETTINGS.json: model, seed, epochs, patience (validations without a better one), rows (`windows` or `prefixes`, see
`rows_to_train`), max_targets, pretrain_epochs (S3Rec) and `config`, which RecBole gets as it is.

OUTPUT gets validation.npy and test.npy, the 100 best ids of each user (int64; the past is excluded, ties go to the
smaller id, 0 pads), and run.json, the course of training.
"""

import json
import os
import sys
import time
import types
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from recbole.config import Config
    from recbole.data.dataset import SequentialDataset
    from recbole.data.interaction import Interaction

LIST_LENGTH = 100
WINDOW = 50
NAME = "prepared"
CAUSAL = ("GRU4Rec", "SASRec", "S3Rec")
REMOVED_FROM_NUMPY = {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_}


def add_what_recbole_misses() -> None:
    """Settle what RecBole 1.2.1 takes for granted. Nothing that is computed depends on it.

    * numpy 2 removed three scalar aliases that RecBole's `Config` copies to other names.
    * TensorBoard is imported wherever a trainer is; a writer that writes nothing takes its place.
    * torch.load refuses pickled objects since 2.6. RecBole's checkpoints hold its configuration; the only ones loaded
      here were written by this very process.
    """
    for name, scalar in REMOVED_FROM_NUMPY.items():
        setattr(np, name, scalar)
    writer = type("SummaryWriter", (), {"__init__": _nothing, "__getattr__": lambda self, name: _nothing})
    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = writer
    sys.modules["torch.utils.tensorboard"] = board
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD.*")
    del sys.argv[1:]  # RecBole reads settings there


def _nothing(*args: object, **options: object) -> None:
    """Do nothing, whatever is asked."""


def read_rows(path: Path) -> dict[int, list[int]]:
    """User -> items, in the order of the file."""
    rows = (list(map(int, line.split())) for line in path.read_text(encoding="utf-8").splitlines())
    return {row[0]: row[1:] for row in rows}


def write_atomic_files(folder: Path, work: Path) -> None:
    """RecBole's `.inter` and `.item`. A user's position is the time, so that order is kept where clocks tie.

    The validation item is the last of each user with two training items or more; of the others RecBole could not hold
    it out, so it is left away.
    """
    train, known = read_rows(folder / "train.txt"), read_rows(folder / "test.txt")
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user, items in train.items():
        held_out = known[user][-1:] if user in known and len(items) > 1 else []
        lines += [f"{user}\t{item}\t{position}" for position, item in enumerate(items + held_out)]
    items = [line.split(maxsplit=1) for line in (folder / "items.txt").read_text(encoding="utf-8").splitlines()]
    described = ["item_id:token\tclass:token_seq", *("\t".join([*item, ""][:2]) for item in items)]
    target = work / NAME
    target.mkdir(parents=True, exist_ok=True)
    (target / f"{NAME}.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (target / f"{NAME}.item").write_text("\n".join(described) + "\n", encoding="utf-8")


def configuration(settings: dict, work: Path, **more: object) -> "Config":
    """Our protocol, then the settings of this run."""
    from recbole.config import Config

    columns = ["item_id", "class"] if settings["model"] == "S3Rec" else ["item_id"]
    ours = {
        "data_path": str(work),
        "checkpoint_dir": str(work / "saved"),
        "seed": settings["seed"],
        "use_gpu": torch.cuda.is_available(),
        "state": "WARNING",
        "show_progress": False,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": columns},
        "MAX_ITEM_LIST_LENGTH": WINDOW,
        "train_neg_sample_args": None,
        "eval_args": {"split": {"LS": "valid_only"}, "order": "TO", "group_by": "user", "mode": "full"},
        "metrics": ["NDCG", "Hit"],
        "topk": [10],
        "valid_metric": "NDCG@10",
        "epochs": settings["epochs"],
        "stopping_step": settings["patience"],
        "eval_batch_size": 512,
    }
    return Config(model=settings["model"], dataset=NAME, config_dict=ours | settings["config"] | more)


def rows_to_train(users: np.ndarray, settings: dict) -> np.ndarray:
    """Which of RecBole's rows (one per prefix, by user and time) are learned from.

    `windows` keeps every 50th from a user's newest on: together they hold each event once. `prefixes` keeps the newest
    `max_targets` of each user.
    """
    counts = np.unique(users, return_counts=True)[1]
    age = np.concatenate([np.arange(count)[::-1] for count in counts])
    return np.flatnonzero(age % WINDOW == 0 if settings["rows"] == "windows" else age < settings["max_targets"])


def loaders(config: "Config", dataset: "SequentialDataset", settings: dict, past: dict) -> tuple:
    """Training rows (a past and its next item each) and the validation rows, whose past is never recommended."""
    from recbole.data.dataloader import FullSortEvalDataLoader, TrainDataLoader

    class PastExcluded(FullSortEvalDataLoader):
        """RecBole ranks the items that a user already has as well; our protocol does not."""

        def collate_fn(self, index: list[int]) -> tuple:
            interaction, _, rows, targets = super().collate_fn(index)
            seen = [past[user] for user in interaction["user_id"].tolist()]
            users = np.repeat(np.arange(len(seen)), [len(items) for items in seen])
            return interaction, (torch.from_numpy(users), torch.from_numpy(np.concatenate(seen))), rows, targets

    train, validation, _ = dataset.build()
    train = train.copy(train.inter_feat[rows_to_train(train.inter_feat["user_id"].numpy(), settings)])
    return TrainDataLoader(config, train, None, shuffle=True), PastExcluded(config, validation, None)


def at_every_position(base: type) -> type:
    """A causal model of RecBole that learns from every position of a row, as its paper does, not from the last alone.

    The layers are RecBole's and so is the loss, cross-entropy over the catalogue; one pass then gives up to 50 targets.
    """

    class EveryPosition(base):
        def gather_indexes(self, output: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return output if self.training else super().gather_indexes(output, index)

        def calculate_loss(self, interaction: "Interaction") -> torch.Tensor:
            stage = getattr(self, "train_stage", None)
            if stage == "pretrain":
                return super().calculate_loss(interaction)
            items, lengths = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
            states = self.forward(items, bidirectional=False) if stage else self.forward(items, lengths)
            following = torch.nn.functional.pad(items[:, 1:], (0, 1))
            following[torch.arange(len(items)), lengths - 1] = interaction[self.POS_ITEM_ID]
            real = following > 0
            logits = states[real] @ self.item_embedding.weight.T
            return torch.nn.functional.cross_entropy(logits, following[real])

    return EveryPosition


@torch.no_grad()
def lists(model: torch.nn.Module, histories: dict, to_peer: np.ndarray, config: "Config") -> np.ndarray:
    """The best items of the whole catalogue for each history, as our ids; `to_peer[id]` is RecBole's id."""
    from recbole.data.interaction import Interaction

    model.eval()
    rows, width, found = list(histories.values()), config["MAX_ITEM_LIST_LENGTH"], []
    for start in range(0, len(rows), 256):
        batch = rows[start : start + 256]
        items = np.zeros((len(batch), width), dtype=np.int64)
        for row, history in enumerate(batch):
            newest = history[-width:]
            items[row, : len(newest)] = to_peer[newest]
        lengths = torch.tensor([min(len(history), width) for history in batch])
        asked = Interaction({"item_id_list": torch.from_numpy(items), "item_length": lengths})
        scores = model.full_sort_predict(asked.to(config["device"])).cpu().numpy()[:, to_peer]
        scores[:, 0] = -np.inf
        for row, history in enumerate(batch):
            scores[row, history] = -np.inf
        best = np.argsort(-scores, axis=1, kind="stable")[:, :LIST_LENGTH]
        found.append(np.where(np.isfinite(np.take_along_axis(scores, best, axis=1)), best, 0))
    return np.concatenate(found)


def stages(settings: dict) -> list[dict[str, Any]]:
    """S3Rec is pretrained on items and genres first; every other model is trained once."""
    if settings["model"] != "S3Rec":
        return [{}]
    epochs = settings["pretrain_epochs"]
    return [{"train_stage": "pretrain", "pretrain_epochs": epochs, "save_step": epochs}, {"train_stage": "finetune"}]


def train(settings: dict, work: Path, past: dict[int, list[int]], num_items: int) -> tuple:
    """The model of the best validation epoch, its configuration, the map of ids, and the course of training."""
    from recbole.data import create_dataset
    from recbole.utils import get_model, get_trainer, init_seed

    model_class = get_model(settings["model"])
    if settings["model"] in CAUSAL:
        model_class = at_every_position(model_class)
    course: dict = {"validation": [], "stage_seconds": []}
    saved = ""
    for stage in stages(settings):
        config = configuration(settings, work, pre_model_path=saved, **stage)
        init_seed(config["seed"], True)
        dataset = create_dataset(config)
        ids, users = dataset.field2token_id["item_id"], dataset.field2token_id["user_id"]
        to_peer = np.array([0] + [ids[str(item)] for item in range(1, num_items + 1)])
        seen = {users[str(user)]: to_peer[items] for user, items in past.items()}
        train_data, validation_data = loaders(config, dataset, settings, seen)
        model = model_class(config, train_data.dataset).to(config["device"])
        trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
        start = time.perf_counter()
        trainer.fit(
            train_data, validation_data, verbose=False,
            callback_fn=lambda epoch, score: course["validation"].append(round(float(score), 4)),
        )  # fmt: skip
        course["stage_seconds"].append(round(time.perf_counter() - start, 1))
        saved = trainer.saved_model_file
    best = torch.load(saved, map_location=config["device"])
    model.load_state_dict(best["state_dict"])
    course |= {"best_epoch": best["epoch"] + 1, "best_validation": float(best["best_valid_score"])}
    course["training_rows"] = len(train_data.dataset)
    course["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    return model, config, to_peer, course


def main(folder: Path, settings_file: Path, output: Path) -> None:
    """Train, rank, write."""
    add_what_recbole_misses()
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    work = output / "work"
    write_atomic_files(folder, work)
    validation, test = read_rows(folder / "validation.txt"), read_rows(folder / "test.txt")
    num_items = len((folder / "items.txt").read_text(encoding="utf-8").splitlines())
    start, cpu = time.perf_counter(), time.process_time()
    model, config, to_peer, course = train(settings, work, validation, num_items)
    for split, histories in (("validation", validation), ("test", test)):
        np.save(output / f"{split}.npy", lists(model, histories, to_peer, config))
    course |= {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "device": str(config["device"]),
    }
    (output / "run.json").write_text(json.dumps(course), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))

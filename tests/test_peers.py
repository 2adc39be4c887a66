"""Other people's models: what they are given, what they learn from, and how their lists are read."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from slmrec.config import DataConfig
from slmrec.dataset import load_dataset
from slmrec.evaluate import evaluate, held_out_cases
from slmrec.interactions import prepare_dataset

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ROWS = [[1, 2, 3, 4, 5], [5, 4, 3, 2, 1], [2, 4, 1, 3], [3, 1]]


@pytest.fixture
def baselines(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return _module(BENCHMARKS / "baselines.py")


@pytest.fixture(scope="module")
def peer():
    return _module(BENCHMARKS / "peers" / "recbole" / "run.py")


def _module(path):
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _dataset(folder, rows):
    log = folder / "log.txt"
    log.write_text("".join(f"{user} {' '.join(map(str, row))}\n" for user, row in enumerate(rows)))
    prepare_dataset([log], folder / "data", DataConfig())
    return load_dataset(folder / "data")


def _folder(baselines, target, rows):
    target.mkdir()
    baselines.write_folder(_dataset(target, rows), target / "folder")
    return {path.name: path.read_text() for path in sorted((target / "folder").iterdir())}


def test_a_peers_folder_does_not_depend_on_the_test_items(baselines, tmp_path):
    others = [[*row[:-1], row[0]] if len(row) > 2 else row for row in ROWS]
    first, second = (_folder(baselines, tmp_path / name, rows) for name, rows in (("a", ROWS), ("b", others)))
    assert first.pop("items.txt").split()[:4] == second.pop("items.txt").split()[:4]
    assert first == second
    assert first["train.txt"].splitlines()[-1].split()[0] == "3", "a user with two events is train only, whole"
    assert [len(line.split()) for line in first["test.txt"].splitlines()] == [5, 5, 4]


def test_stored_lists_are_found_in_whatever_order_users_are_asked_for(baselines, tmp_path):
    data = _dataset(tmp_path, [[*ROWS[0], *range(6, 16)], *ROWS[1:3]])
    cases, protocol = held_out_cases(data.sequences, "test")
    cases = cases.select(np.array([1, 2]))
    lists = []
    for row, (history, target) in enumerate(zip(cases.histories.item_ids, cases.targets, strict=True)):
        others = [item for item in range(1, data.num_items + 1) if item not in {*history, target}][:9]
        lists.append([*others[:row], target, *others[row:]])
    stored = baselines.StoredLists.of(data.num_items, cases.histories, np.array(lists))
    assert evaluate(stored, cases, protocol=protocol).ranks.tolist() == [0, 1]
    assert evaluate(stored, cases.select(np.array([1, 0])), protocol=protocol).ranks.tolist() == [1, 0]


def test_windows_hold_every_fiftieth_row_from_a_users_newest_on(peer):
    users = np.repeat([1, 2], [101, 3])
    assert peer.rows_to_train(users, {"rows": "windows"}).tolist() == [0, 50, 100, 103]
    assert peer.rows_to_train(users, {"rows": "prefixes", "max_targets": 2}).tolist() == [99, 100, 102, 103]


class _SumOfThePast(torch.nn.Module):
    """The smallest causal model with the methods that RecBole's have."""

    ITEM_SEQ, ITEM_SEQ_LEN, POS_ITEM_ID = "items", "lengths", "target"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.item_embedding = torch.nn.Embedding(9, 4)

    def gather_indexes(self, output, index):
        return output[torch.arange(len(output)), index]

    def forward(self, items, lengths):
        return self.gather_indexes(self.item_embedding(items).cumsum(dim=1), lengths - 1)


def test_the_loss_at_every_position_is_the_mean_over_all_prefixes(peer):
    model = peer.at_every_position(_SumOfThePast)()
    batch = {
        "items": torch.tensor([[3, 1, 4, 0], [5, 8, 2, 6]]),
        "lengths": torch.tensor([3, 4]),
        "target": torch.tensor([7, 5]),
    }
    losses = []
    for items, length, target in zip(batch["items"], batch["lengths"], batch["target"], strict=True):
        known = [*items[:length].tolist(), int(target)]
        for cut in range(1, len(known)):
            logits = model.item_embedding.weight @ model.item_embedding.weight[known[:cut]].sum(dim=0)
            losses.append(-torch.log_softmax(logits, dim=0)[known[cut]])
    assert len(losses) == 7
    torch.testing.assert_close(model.calculate_loss(batch), torch.stack(losses).mean())
    model.eval()
    assert model(batch["items"], batch["lengths"]).shape == (2, 4), "asked for a list, the last position alone answers"


def test_published_figures_say_so_and_where_they_are_from():
    rows = json.loads((BENCHMARKS / "peers" / "published.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {"DuoRec", "MAERec", "Open-P5", "FMLP-Rec-CE", "LlamaRec", "E4SRec-7B"}
    for row in rows:
        assert row["published"] is True
        assert all(row[key] for key in ("dataset", "protocol", "source", "metrics"))

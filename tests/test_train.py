"""The training loop: it learns, stops in time, keeps the best epoch, and says when numbers break."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from slmrec.config import TrainConfig
from slmrec.errors import TrainingError
from slmrec.progress import progress_bar
from slmrec.train import Batch, Task, train

CPU = torch.device("cpu")


class Regression(nn.Module):
    """Fit y = 2x; the loss may be spoiled from some step on."""

    def __init__(self, spoiled_at: float = float("inf")) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1))
        self.table = nn.Parameter(torch.zeros(1))
        self.spoiled_at, self.calls = spoiled_at, 0

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        x = batch.item_ids.float()
        gap = (x * self.weight + self.table - 2 * x).pow(2).mean()
        self.calls += 1
        return {"ce": gap * (float("nan") if self.calls > self.spoiled_at else 1.0), "extra": 0.0 * gap}


def task(objective: nn.Module, metrics: list[float] | None = None, **settings: object) -> Task:
    remaining = iter(metrics or [])
    return Task(
        title="test",
        objective=objective,
        lengths=np.arange(1, 33),
        batch=lambda rows: Batch(torch.from_numpy(rows)[:, None] % 5 + 1, torch.ones(len(rows), 1, dtype=torch.int64)),
        validate=lambda: next(remaining, 0.0),
        **settings,
    )


def config(**settings: object) -> TrainConfig:
    return TrainConfig(**{"epochs": 3, "batch_size": 4, "learning_rate": 0.1, "precision": "fp32"} | settings)


def test_it_minimises_the_objective_and_logs_every_term(tmp_path: Path) -> None:
    objective = Regression()
    progress = train(task(objective, [0.1, 0.2, 0.3]), config(epochs=20, warmup_steps=0), tmp_path, "key", CPU)
    losses = [record["ce"] for record in progress.log if "ce" in record]
    assert losses[-1] < 0.05 * losses[0]
    steps = [record for record in progress.log if "loss" in record]
    assert {"step", "epoch", "loss", "gradient_norm", "ce", "extra"} == set(steps[0])
    assert sum("validation_ndcg@10" in record for record in progress.log) == 20


def test_it_stops_when_validation_stops_improving_and_keeps_the_best_epoch(tmp_path: Path) -> None:
    objective, weights = Regression(), []
    metrics = iter([0.1, 0.3, 0.2, 0.2, 0.9])

    def validate() -> float:
        weights.append(objective.weight.item())
        return next(metrics)

    one = task(objective)
    one.validate = validate
    progress = train(one, config(epochs=9, patience=2), tmp_path, "key", CPU)
    assert (progress.best_epoch, progress.best_metric, len(weights)) == (1, 0.3, 4)
    assert objective.weight.item() == weights[1]


@pytest.mark.parametrize("spoiled_at", [0, 5])
def test_a_loss_that_is_not_finite_stops_with_a_message(tmp_path: Path, spoiled_at: int) -> None:
    with pytest.raises(TrainingError, match=f"the loss is nan.*at step {spoiled_at}") as stopped:
        train(task(Regression(spoiled_at)), config(), tmp_path, "key", CPU)
    assert "--learning-rate" in stopped.value.remedy


def test_gradients_are_clipped(tmp_path: Path) -> None:
    objective = Regression()
    norms: list[float] = []
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *args: object, **kwargs: object) -> object:
        values = [p.grad.norm() for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.stack(values).norm()))
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        progress = train(task(objective), config(clip_norm=0.5, epochs=1), tmp_path, "key", CPU)
    assert max(norms) == pytest.approx(0.5, rel=1e-4)
    first = next(record for record in progress.log if "gradient_norm" in record)
    assert first["gradient_norm"] > 0.5, "the log shows the norm before clipping"


def test_items_learn_at_their_own_rate(tmp_path: Path) -> None:
    objective = Regression()
    settings = config(item_learning_rate=1e-4, epochs=1, warmup_steps=0)
    train(task(objective, item_parameters=("table",)), settings, tmp_path, "key", CPU)
    assert 0 < abs(objective.table.item()) <= 1e-4 * 8
    assert objective.weight.item() > 0.1


def test_a_state_of_another_run_is_not_used(tmp_path: Path) -> None:
    train(task(Regression(), [0.5]), config(epochs=1), tmp_path, "one", CPU)
    again, other = Regression(), Regression()
    assert train(task(again), config(epochs=1), tmp_path, "one", CPU).best_metric == 0.5
    assert again.calls == 0, "that run was finished"
    assert train(task(other, [0.25]), config(epochs=1), tmp_path, "other", CPU).best_metric == 0.25
    assert other.calls == 8


@pytest.mark.parametrize("done", [0, 4, 10])
def test_a_resumed_run_says_where_it_goes_on(capsys: pytest.CaptureFixture[str], done: int) -> None:
    with progress_bar("distill", 10, done=done) as bar:
        bar(10 - done)
    said = capsys.readouterr()
    assert ("distill: goes on after 4 of 10" in said.err) == (done == 4)
    assert ("goes on" in said.err) == (done == 4)
    assert not said.out

"""How strongly each term pulls at the weights, and the warning when one drowns the others."""

import pytest
import torch

from slmrec.config import TrainConfig
from slmrec.gradients import dominant_term, term_norms
from slmrec.train import Batch, Task, train


def test_norms_are_those_of_each_kinds_own_gradient():
    weight, bias = torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor(2.0, requires_grad=True)
    terms = {"ce": (weight**2).sum(), "pull_block_1": 5 * weight[0], "pull_block_2": 12 * bias, "flat": bias * 0}
    norms = term_norms(terms, [weight, bias])
    assert norms == pytest.approx({"ce": 10.0, "pull": 13.0, "flat": 0.0})
    assert weight.grad is None
    sum(terms.values()).backward()
    assert weight.grad.tolist() == [11.0, 8.0]


def records(*shares):
    return [{"gradient_norms": {"ce": 1 - share, "magnitude": share}} for share in shares]


@pytest.mark.parametrize(
    ("shares", "term"),
    [((0.95,), None), ((0.95, 0.92), "magnitude"), ((0.95, 0.5), None), ((0.02, 0.99), None), ((0.01, 0.05), "ce")],
)
def test_a_term_dominates_when_it_holds_nine_tenths_twice_running(shares, term):
    assert dominant_term(records(*shares)) == term


class Swamped(torch.nn.Module):
    """Two terms, one of them a hundred times the other."""

    def __init__(self, scale):
        super().__init__()
        self.weight, self.scale = torch.nn.Parameter(torch.ones(4)), scale

    def forward(self, batch):
        return {"ce": (self.weight - 1.5).pow(2).sum(), "magnitude": self.scale * (self.weight - 3).pow(2).sum()}


@pytest.mark.parametrize(("scale", "warned"), [(100.0, True), (0.5, False)])
def test_training_logs_the_norms_and_warns_once(tmp_path, capsys, scale, warned):
    lengths = torch.ones(40).long().numpy()
    batch = Batch(torch.ones(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int64))
    task = Task(title="swamped", objective=Swamped(scale), lengths=lengths, batch=lambda _: batch, validate=lambda: 0.5)
    config = TrainConfig(epochs=3, batch_size=1, learning_rate=1e-4, precision="fp32")
    progress = train(task, config, tmp_path, "key", torch.device("cpu"))
    measured = {r["step"]: r["gradient_norms"] for r in progress.log if "gradient_norms" in r}
    assert list(measured) == [0, 20, 50, 100]
    assert measured[0] == pytest.approx({"ce": 2.0, "magnitude": 8 * scale})
    assert capsys.readouterr().err.count("magnitude holds") == int(warned)

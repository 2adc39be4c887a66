"""The terms of the distillation objective, against their definitions."""

import math

import pytest
import torch

from compress.losses import direction_loss, divergence_loss, magnitude_loss


def mean_squared_norm(features):
    return (features**2).sum(dim=1).mean()


def test_direction_loss_of_a_known_pair():
    assert direction_loss(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])) == pytest.approx(1.0)
    assert direction_loss(torch.tensor([[3.0, 0.0]]), torch.tensor([[-2.0, 0.0]])) == pytest.approx(2.0)


def test_magnitude_loss_of_a_known_pair():
    student, teacher = torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 2.0]])
    assert magnitude_loss(student, teacher) == pytest.approx((25 + 4) / 2)
    assert magnitude_loss(student, teacher, norm=mean_squared_norm(teacher)) == pytest.approx((25 + 4) / (16 + 4))


@pytest.mark.parametrize("squared", [True, False])
def test_equal_features_cost_nothing(squared):
    features = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert direction_loss(features, features) == pytest.approx(0.0, abs=1e-6)
    assert magnitude_loss(features, features, squared=squared) == 0.0


def test_the_direction_term_ignores_length_and_the_magnitude_term_does_not():
    features = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert direction_loss(2 * features, features) == pytest.approx(0.0, abs=1e-6)
    assert magnitude_loss(2 * features, features, norm=mean_squared_norm(features)) == pytest.approx(1.0)


def test_the_scaled_magnitude_does_not_depend_on_the_decoders_scale():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 8, generator=generator)
    small, large = (magnitude_loss(student * s, teacher * s, norm=mean_squared_norm(teacher * s)) for s in (1.0, 300.0))
    assert small == pytest.approx(float(large), rel=1e-5)


def test_the_plain_distance_of_a_known_pair():
    student, teacher = torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 2.0]])
    assert magnitude_loss(student, teacher, squared=False) == pytest.approx((5 + 2) / 2)
    scaled = magnitude_loss(student, teacher, norm=mean_squared_norm(teacher), squared=False)
    assert scaled == pytest.approx(3.5 / 10**0.5)


def test_the_plain_distance_of_equal_features_is_zero_and_so_is_its_slope():
    student = torch.ones(3, 4, requires_grad=True)
    loss = magnitude_loss(student, torch.ones(3, 4), squared=False)
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()


def test_divergence_of_a_known_pair():
    teacher, student = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[0.0, 0.0]])
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert divergence_loss(student, teacher) == pytest.approx(expected)
    assert divergence_loss(teacher + 7, teacher) == pytest.approx(0.0, abs=1e-6)


LOSSES = {
    "direction": direction_loss,
    "magnitude": magnitude_loss,
    "plain magnitude": lambda s, t: magnitude_loss(s, t, squared=False),
    "divergence": divergence_loss,
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_small_steps(name):
    student, teacher = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).unbind()
    student.requires_grad_()
    LOSSES[name](student, teacher).backward()
    step = 1e-2
    for row, column in ((0, 0), (2, 4)):
        sides = []
        for sign in (1, -1):
            moved = student.detach().clone()
            moved[row, column] += sign * step
            sides.append(LOSSES[name](moved, teacher).item())
        assert student.grad[row, column].item() == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=0.02, abs=1e-3)


def test_scores_of_a_teacher_are_never_moved():
    student, teacher = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)).unbind()
    student.requires_grad_()
    teacher.requires_grad_()
    divergence_loss(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None

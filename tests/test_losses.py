"""The terms of the distillation objective, against their definitions."""

import pytest
import torch

from compress.losses import direction_loss, magnitude_loss


def test_direction_loss_of_a_known_pair():
    assert direction_loss(torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]])) == pytest.approx(1.0)
    assert direction_loss(torch.tensor([[3.0, 0.0]]), torch.tensor([[-2.0, 0.0]])) == pytest.approx(2.0)


def test_magnitude_loss_of_a_known_pair():
    student, teacher = torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 2.0]])
    assert magnitude_loss(student, teacher, scale="none") == pytest.approx((25 + 4) / 2)
    assert magnitude_loss(student, teacher, scale="hidden") == pytest.approx((25 + 4) / (16 + 4))


@pytest.mark.parametrize("scale", ["hidden", "none"])
def test_equal_features_cost_nothing(scale):
    features = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert direction_loss(features, features) == pytest.approx(0.0, abs=1e-6)
    assert magnitude_loss(features, features, scale=scale) == 0.0


def test_the_direction_term_ignores_length_and_the_magnitude_term_does_not():
    features = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert direction_loss(2 * features, features) == pytest.approx(0.0, abs=1e-6)
    assert magnitude_loss(2 * features, features, scale="hidden") == pytest.approx(1.0)


def test_the_scaled_magnitude_does_not_depend_on_the_decoders_scale():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 8, generator=generator)
    small, large = (magnitude_loss(student * s, teacher * s, scale="hidden") for s in (1.0, 300.0))
    assert small == pytest.approx(float(large), rel=1e-5)


@pytest.mark.parametrize("loss", [direction_loss, lambda s, t: magnitude_loss(s, t, scale="hidden")])
def test_gradients_reach_the_student_and_never_the_teacher(loss):
    student, teacher = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)).unbind()
    student.requires_grad_()
    teacher.requires_grad_()
    loss(student, teacher).backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None

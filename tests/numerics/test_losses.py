"""Distillation losses against formulas written out with numpy, values and gradients."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from ghosttrain.config.schema import Distill
from ghosttrain.distill.losses import LOSSES, kl, soft_ce

B, K = 6, 11


def logits(scale: float = 3.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, B, K, generator=generator, dtype=torch.float64) * scale
    return student.to(dtype).requires_grad_(), teacher.to(dtype).requires_grad_()


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def reference(
    name: str, student: Tensor, teacher: Tensor, temperature: float
) -> tuple[float, np.ndarray]:
    """Return the loss and its gradient to the student's logits."""
    log_q = log_softmax(student.detach().double().numpy() / temperature)
    log_p = log_softmax(teacher.detach().double().numpy() / temperature)
    p, q, b = np.exp(log_p), np.exp(log_q), len(log_p)
    if name == "soft_ce":
        return -(p * log_q).sum() / b, (q - p) / (temperature * b)
    value = (p * (log_p - log_q)).sum() / b * temperature**2
    return value, (q - p) / b * temperature


@pytest.mark.parametrize("temperature", [1.0, 2.5, 4.0, 20.0])
@pytest.mark.parametrize("name", ["soft_ce", "kl"])
def test_values_and_gradients(name: str, temperature: float) -> None:
    student, teacher = logits()
    loss = LOSSES[name](student, teacher, temperature)
    loss.backward()
    value, gradient = reference(name, student, teacher, temperature)
    assert loss.dtype == torch.float64 and loss.shape == ()
    assert loss.item() == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(student.grad.numpy(), gradient, rtol=1e-10, atol=1e-15)
    assert teacher.grad is None


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("name", ["soft_ce", "kl"])
def test_autograd_agrees_with_finite_differences(name: str, temperature: float) -> None:
    student, teacher = logits()
    teacher = teacher.detach()
    assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, teacher, temperature), (student,))


def test_how_the_two_differ() -> None:
    student, teacher = logits()
    p = (teacher / 3.0).softmax(dim=1)
    entropy = -(p * p.log()).sum(dim=1).mean()
    expected = 9 * (soft_ce(student, teacher, 3.0) - entropy)
    assert kl(student, teacher, 3.0).item() == pytest.approx(expected.item(), rel=1e-12)
    assert kl(teacher, teacher, 3.0).item() == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("temperature", [1.0, 20.0])
@pytest.mark.parametrize("scale", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("name", ["soft_ce", "kl"])
def test_extreme_logits_stay_finite_and_right(name: str, scale: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(1)
    student = (torch.rand(B, K, generator=generator) * 2 - 1) * scale
    teacher = (torch.rand(B, K, generator=generator) * 2 - 1) * scale
    student[0, 0], student[0, 1], teacher[0, 0], teacher[0, 1] = scale, -scale, -scale, scale
    student.requires_grad_()
    loss = LOSSES[name](student, teacher, temperature)
    loss.backward()
    value, gradient = reference(name, student, teacher, temperature)
    assert loss.item() == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(student.grad.numpy(), gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["soft_ce", "kl"])
def test_half_precision_logits_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    student, teacher = logits(dtype=dtype)
    loss = LOSSES[name](student, teacher, 4.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference(name, student, teacher, 4.0)[0], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["soft_ce", "kl"])
def test_autocast_changes_nothing(name: str, dtype: torch.dtype) -> None:
    student, teacher = logits(dtype=torch.float32)
    expected = LOSSES[name](student, teacher, 4.0)
    with torch.autocast("cpu", dtype=dtype):
        loss = LOSSES[name](student, teacher, 4.0)
    assert loss.dtype == torch.float32 and loss.item() == expected.item()


@pytest.mark.parametrize("name", ["soft_ce", "kl"])
@pytest.mark.parametrize("shape", [(B, 1), (B, K + 1), (1, K), (B, K, 1), (K,)])
def test_shapes_that_differ_are_refused(name: str, shape: tuple[int, ...]) -> None:
    student, _ = logits()
    with pytest.raises(ValueError, match=r"\(B, K\)"):
        LOSSES[name](student, torch.zeros(shape), 1.0)


@pytest.mark.parametrize("name", ["soft_ce", "kl"])
def test_only_rows_of_logits_are_taken(name: str) -> None:
    with pytest.raises(ValueError, match=r"\(B, K\)"):
        LOSSES[name](torch.zeros(B, K, 2), torch.zeros(B, K, 2), 1.0)


def test_the_registry_holds_what_the_settings_allow() -> None:
    names = set(get_args(Distill.model_fields["name"].annotation))
    assert names == {"none", *LOSSES}

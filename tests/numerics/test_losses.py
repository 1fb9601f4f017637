"""Distillation losses against formulas written out with numpy, and against torchdistill's.

Gradients of the formulas are taken by complex step: f(x + ih).imag / h has no cancellation, so that
it is exact to rounding, and knows nothing of autograd.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from torchdistill.losses import mid_level

from ghosttrain.config.losses import settings_of, signatures
from ghosttrain.config.schema import DistillConfig
from ghosttrain.distill import losses
from ghosttrain.distill.losses import (
    LOSSES,
    LossInputs,
    agreement,
    at,
    dist,
    dkd,
    evaluate_loss,
    feature_cosine,
    hard,
    kl,
    logit_std,
    soft_ce,
)

B, K = 6, 11
NAMES = [name for name, loss in signatures().items() if not loss.compares_features]
TEMPERATURES = [1.0, 2.0, 4.0, 20.0]
ALPHA, BETA = 1.5, 0.5
SETTINGS = DistillConfig(alpha=ALPHA, beta=BETA)
LABELS = torch.tensor([0, 3, 10, 7, 3, 5])
FILES = sorted((Path(__file__).parents[2] / "conf" / "distill").glob("*.yaml"))


def logits(scale: float = 3.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, B, K, generator=generator, dtype=torch.float64) * scale
    return student.to(dtype).requires_grad_(), teacher.to(dtype).requires_grad_()


def loss_of(
    name: str, student: Tensor, teacher: Tensor, temperature: float, labels: Tensor = LABELS
) -> Tensor:
    inputs = LossInputs(student, teacher, labels, temperature)
    return evaluate_loss(name, inputs, settings_of(SETTINGS, name))


# --- The formulas, in numpy; x is the student and may be complex ----------------------------------


def logsumexp(x: np.ndarray) -> np.ndarray:
    top = x.real.max(axis=1, keepdims=True)
    return top + np.log(np.exp(x - top).sum(axis=1, keepdims=True))


def divergence(log_p: np.ndarray, log_q: np.ndarray) -> Any:
    return (np.exp(log_p) * (log_p - log_q)).sum() / len(log_p)


def soft_ce_formula(x: np.ndarray, t: np.ndarray, y: np.ndarray, T: float) -> Any:
    x, t = x / T, t / T
    return -(np.exp(t - logsumexp(t)) * (x - logsumexp(x))).sum() / len(x)


def kl_formula(x: np.ndarray, t: np.ndarray, y: np.ndarray, T: float) -> Any:
    x, t = x / T, t / T
    return divergence(t - logsumexp(t), x - logsumexp(x)) * T**2


def dkd_formula(x: np.ndarray, t: np.ndarray, y: np.ndarray, T: float) -> Any:
    total = 0.0
    for x_K, t_K, label in zip(x / T, t / T, y, strict=True):
        parts = []
        for z_K in (t_K, x_K):
            rest = np.delete(z_K, label)[None]
            whole = logsumexp(z_K[None]).item()
            log_label, log_rest = z_K[label] - whole, logsumexp(rest).item() - whole
            parts.append((log_label, log_rest, rest - logsumexp(rest)))
        (p, not_p, p_rest), (q, not_q, q_rest) = parts
        total += ALPHA * (np.exp(p) * (p - q) + np.exp(not_p) * (not_p - not_q))
        total += BETA * divergence(p_rest, q_rest)
    return total / len(x) * T**2


def dist_formula(x: np.ndarray, t: np.ndarray, y: np.ndarray, T: float) -> Any:
    q, p = np.exp(x / T - logsumexp(x / T)), np.exp(t / T - logsumexp(t / T))

    def correlation(a: np.ndarray, b: np.ndarray) -> Any:
        a, b = a - a.mean(), b - b.mean()
        return (a * b).sum() / (np.sqrt((a * a).sum()) * np.sqrt((b * b).sum()) + 1e-8)

    inter = np.mean([1 - correlation(a, b) for a, b in zip(q, p, strict=True)])
    intra = np.mean([1 - correlation(a, b) for a, b in zip(q.T, p.T, strict=True)])
    return (ALPHA * inter + BETA * intra) * T**2


def hard_formula(x: np.ndarray, t: np.ndarray, y: np.ndarray, T: float) -> Any:
    return -(x - logsumexp(x))[np.arange(len(x)), t.argmax(axis=1)].mean()


def logit_std_formula(x: np.ndarray, t: np.ndarray, y: np.ndarray, T: float) -> Any:
    def standardised(z: np.ndarray) -> np.ndarray:
        z = z - z.mean(axis=1, keepdims=True)
        return z / (np.sqrt((z * z).sum(axis=1, keepdims=True) / (z.shape[1] - 1)) + 1e-7)

    return kl_formula(standardised(x), standardised(t), y, T)


FORMULAS: dict[str, Callable[..., Any]] = {
    "soft_ce": soft_ce_formula,
    "kl": kl_formula,
    "dkd": dkd_formula,
    "dist": dist_formula,
    "hard": hard_formula,
    "logit_std": logit_std_formula,
}


def complex_step(formula: Callable[[np.ndarray], Any], x: np.ndarray) -> np.ndarray:
    gradient, h = np.zeros_like(x), 1e-30
    for i in np.ndindex(x.shape):
        moved = x.astype(complex)
        moved[i] += 1j * h
        gradient[i] = formula(moved).imag / h
    return gradient


def reference(
    name: str, student: Tensor, teacher: Tensor, temperature: float, labels: Tensor = LABELS
) -> tuple[float, np.ndarray]:
    """Return the loss and its gradient to the student's logits."""
    x, t = student.detach().double().numpy(), teacher.detach().double().numpy()

    def formula(moved: np.ndarray) -> Any:
        return FORMULAS[name](moved, t, labels.numpy(), temperature)

    return float(formula(x)), complex_step(formula, x)


# --- Every loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name: str, temperature: float) -> None:
    student, teacher = logits()
    loss = loss_of(name, student, teacher, temperature)
    loss.backward()
    value, gradient = reference(name, student, teacher, temperature)
    assert loss.dtype == torch.float64 and loss.shape == ()
    assert loss.item() == pytest.approx(value, rel=1e-11)
    np.testing.assert_allclose(student.grad.numpy(), gradient, rtol=1e-9, atol=1e-14)
    assert np.abs(gradient).max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_gets_no_gradient(name: str) -> None:
    student, teacher = logits()
    loss_of(name, student, teacher, 2.0).backward()
    assert teacher.grad is None
    loss = loss_of(name, student.detach(), teacher, 2.0)
    assert not loss.requires_grad


@pytest.mark.parametrize("temperature", [1.0, 20.0])
@pytest.mark.parametrize("scale", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits_stay_finite_and_right(name: str, scale: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(1)
    student = (torch.rand(B, K, generator=generator) * 2 - 1) * scale
    teacher = (torch.rand(B, K, generator=generator) * 2 - 1) * scale
    student[0, 0], student[0, 1], teacher[0, 0], teacher[0, 1] = scale, -scale, -scale, scale
    # The teacher is certain of the label, or certain that it is another class.
    labels = torch.where(torch.arange(B) % 2 == 0, teacher.argmax(dim=1), teacher.argmin(dim=1))
    student.requires_grad_()
    loss = loss_of(name, student, teacher, temperature, labels)
    loss.backward()
    value, gradient = reference(name, student, teacher, temperature, labels)
    rounding = 1e-7 * temperature**2  # of log-probabilities, then multiplied by T^2
    assert loss.item() == pytest.approx(value, rel=1e-5, abs=rounding)
    np.testing.assert_allclose(student.grad.numpy(), gradient, rtol=1e-3, atol=1e-5)


CONSTANT = torch.full((4, 5), 0.1)
CERTAIN = torch.eye(5)[:4] * 2e4 - 1e4
PLAIN = torch.randn(4, 5, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (CONSTANT, PLAIN),
        (PLAIN, CONSTANT),
        (CONSTANT, CONSTANT),
        (CONSTANT + 1e4, PLAIN),
        (torch.zeros(4, 5), CERTAIN),
        (CERTAIN, CONSTANT),
        (CERTAIN, CERTAIN),
        (CERTAIN, -CERTAIN),
        (PLAIN[:, :2], CERTAIN[:, :2]),
        (CONSTANT[:, :2], PLAIN[:, :2]),
        (PLAIN[:1], CERTAIN[:1]),
        (CONSTANT[:1, :2], PLAIN[:1, :2]),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 20.0])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_where_formulas_degenerate(
    name: str, temperature: float, student: Tensor, teacher: Tensor
) -> None:
    for labels in (teacher.argmax(dim=1), teacher.argmin(dim=1), teacher.argmax(dim=1) * 0):
        moved = student.clone().requires_grad_()
        loss = loss_of(name, moved, teacher, temperature, labels)
        loss.backward()
        assert loss.isfinite() and moved.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_logits_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    student, teacher = logits(dtype=dtype)
    loss = loss_of(name, student, teacher, 4.0)
    loss.backward()
    value, gradient = reference(name, student, teacher, 4.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(value, rel=1e-5)
    rounding = torch.finfo(dtype).eps
    np.testing.assert_allclose(student.grad.double().numpy(), gradient, rtol=rounding, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name: str, dtype: torch.dtype) -> None:
    student, teacher = logits(dtype=torch.float32)
    expected = loss_of(name, student, teacher, 4.0)
    (gradient,) = torch.autograd.grad(expected, student)
    with torch.autocast("cpu", dtype=dtype):
        loss = loss_of(name, student, teacher, 4.0)
        loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == expected.item()
    assert torch.equal(student.grad, gradient)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(B, 1), (B, K + 1), (1, K), (B, K, 1), (K,)])
def test_shapes_that_differ_are_refused(name: str, shape: tuple[int, ...]) -> None:
    student, _ = logits()
    with pytest.raises(ValueError, match=r"must both be \(B, K\)"):
        loss_of(name, student, torch.zeros(shape), 1.0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(B, K, 2), (B,), (B, 1)])
def test_only_rows_of_two_logits_or_more_are_taken(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(B, K\), K of 2 or more"):
        loss_of(name, torch.zeros(shape), torch.zeros(shape), 1.0)


# --- Against torchdistill -------------------------------------------------------------------------


def torchdistill_loss(kind: type, student: Tensor, teacher: Tensor, **settings: float) -> Tensor:
    loss = kind("logits", "output", "logits", "output", **settings)
    return loss({"logits": {"output": student}}, {"logits": {"output": teacher.detach()}})


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", ["kl", "logit_std", "dist"])
def test_torchdistill_computes_the_same(name: str, temperature: float) -> None:
    student, teacher = logits()
    if name == "dist":
        expected = torchdistill_loss(
            mid_level.DISTLoss, student, teacher, beta=ALPHA, gamma=BETA, tau=temperature
        )
    else:
        kind = {"kl": mid_level.KDLoss, "logit_std": mid_level.LogitStdKDLoss}[name]
        expected = torchdistill_loss(kind, student, teacher, temperature=temperature, alpha=0.0)
        expected = expected * temperature**2  # which it leaves out when alpha is 0
    (gradient,) = torch.autograd.grad(expected, student)
    loss = loss_of(name, student, teacher, temperature)
    loss.backward()
    # Its DIST bounds each length from below where the official code adds to their product.
    tolerance = 1e-4 if name == "dist" else 1e-10
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    torch.testing.assert_close(student.grad, gradient, rtol=tolerance, atol=tolerance)


# --- Each loss's own properties -------------------------------------------------------------------


def test_soft_ce_and_kl_differ_by_the_entropy_and_t_squared() -> None:
    student, teacher = logits()
    p = (teacher / 3.0).softmax(dim=1)
    entropy = -(p * p.log()).sum(dim=1).mean()
    expected = 9 * (soft_ce(student, teacher, 3.0) - entropy)
    assert kl(student, teacher, 3.0).item() == pytest.approx(expected.item(), rel=1e-12)
    assert kl(teacher, teacher, 3.0).item() == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_dkd_with_beta_1_minus_p_is_kl(temperature: float) -> None:
    student, teacher = logits()
    p = (teacher / temperature).softmax(dim=1)
    for i, label in enumerate(LABELS):
        row = slice(i, i + 1)
        beta = 1 - p[i, label].item()
        loss = dkd(student[row], teacher[row], LABELS[row], temperature, alpha=1.0, beta=beta)
        expected = kl(student[row], teacher[row], temperature)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-11)


def test_dkd_weighs_its_two_parts_apart() -> None:
    student, teacher = logits()
    moved = student.detach().clone()
    # Other classes in another order: the label's class against the rest stays as it was.
    for row, label in zip(moved, LABELS, strict=True):
        others = torch.arange(K) != label
        row[others] = row[others].flip(0)
    target, others = {"alpha": 1.0, "beta": 0.0}, {"alpha": 0.0, "beta": 1.0}
    unchanged = dkd(student, teacher, LABELS, 2.0, **target).item()
    assert dkd(moved, teacher, LABELS, 2.0, **target).item() == pytest.approx(unchanged, rel=1e-12)
    # The label's class moved: the order among the rest stays as it was.
    lifted = student.detach() + 5 * torch.eye(K)[LABELS]
    unchanged = dkd(student, teacher, LABELS, 2.0, **others).item()
    assert dkd(lifted, teacher, LABELS, 2.0, **others).item() == pytest.approx(unchanged, rel=1e-12)
    assert dkd(moved, teacher, LABELS, 2.0, **others).item() != pytest.approx(unchanged, rel=1e-2)


@pytest.mark.parametrize("shape", [(B, 1), (B, K), (B - 1,), ()])
def test_dkd_refuses_labels_that_are_not_one_for_each_image(shape: tuple[int, ...]) -> None:
    student, teacher = logits()
    with pytest.raises(ValueError, match=r"labels must be \(B,\) = \(6,\), got"):
        dkd(student, teacher, torch.zeros(shape, dtype=torch.int64), 1.0)


def test_dist_forgives_probabilities_that_are_a_linear_function_of_the_teachers() -> None:
    _, teacher = logits()
    student = (0.3 * teacher.softmax(dim=1) + 0.7 / K).log()
    assert dist(student, teacher, 1.0, alpha=ALPHA, beta=BETA).item() == pytest.approx(
        0.0, abs=1e-3
    )
    assert dist(student.flip(0), teacher, 1.0, alpha=1.0, beta=0.0).item() > 0.1
    assert dist(student.flip(0), teacher, 1.0, alpha=0.0, beta=1.0).item() > 0.1
    assert kl(student, teacher, 1.0).item() > 0.1


def test_dist_of_a_single_image_has_no_relation_between_images() -> None:
    student, teacher = (x[:1].detach().requires_grad_() for x in logits())
    loss = dist(student, teacher, 2.0, alpha=ALPHA, beta=BETA)
    inter = dist(student, teacher, 2.0, alpha=ALPHA, beta=0.0)
    assert loss.item() == pytest.approx(inter.item() + BETA * 4, rel=1e-12)
    (gradient,), (expected,) = (torch.autograd.grad(x, student) for x in (loss, inter))
    assert torch.equal(gradient, expected)


def test_hard_reads_the_teachers_best_class_only() -> None:
    student, teacher = logits()
    best = torch.nn.functional.one_hot(teacher.argmax(dim=1), K).double()
    assert torch.equal(hard(student, best), hard(student, teacher))
    assert torch.equal(loss_of("hard", student, teacher, 20.0), hard(student, teacher))
    first = torch.nn.functional.cross_entropy(student, torch.zeros(B, dtype=torch.int64))
    assert torch.equal(hard(student, torch.zeros(B, K)), first)


@pytest.mark.parametrize("side", [0, 1])
def test_logit_std_ignores_scale_and_shift_of_either(side: int) -> None:
    pair = [x.detach() for x in logits()]
    expected = logit_std(*pair, 2.0).item()
    scale, shift = torch.rand(2, B, 1, generator=torch.Generator().manual_seed(3)) * 9 + 1
    pair[side] = pair[side] * scale - shift
    assert logit_std(*pair, 2.0).item() == pytest.approx(expected, rel=1e-6)
    assert kl(*pair, 2.0).item() != pytest.approx(expected, rel=0.1)


# --- Schedules, features, agreement ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "progress", "expected"),
    [
        (0.7, 0.0, 0.7),
        (0.7, 1.0, 0.7),
        (((0.5, 3.0),), 0.0, 3.0),
        (((0.5, 3.0),), 1.0, 3.0),
        (((0.2, 1.0), (0.6, 5.0)), 0.0, 1.0),
        (((0.2, 1.0), (0.6, 5.0)), 0.2, 1.0),
        (((0.2, 1.0), (0.6, 5.0)), 0.3, 2.0),
        (((0.2, 1.0), (0.6, 5.0)), 0.6, 5.0),
        (((0.2, 1.0), (0.6, 5.0)), 1.0, 5.0),
        (((0.0, 4.0), (0.5, 4.0), (1.0, 1.0)), 0.25, 4.0),
        (((0.0, 4.0), (0.5, 4.0), (1.0, 1.0)), 0.75, 2.5),
        (((0.0, 4.0), (0.5, 4.0), (1.0, 1.0)), 1.0, 1.0),
    ],
)
def test_a_schedule_is_linear_between_its_points(
    value: Any, progress: float, expected: float
) -> None:
    assert type(at(value, progress)) is float
    assert at(value, progress) == pytest.approx(expected, rel=1e-12)


def test_a_schedule_as_it_is_written_in_the_settings() -> None:
    settings = DistillConfig(temperature=[[0, 4], [1, 1]], weight=2)
    assert at(settings.temperature, 0.25) == 3.25
    assert at(settings.weight, 0.25) == 2.0


def test_features_is_one_minus_the_cosine() -> None:
    projected, teacher = logits()
    loss = feature_cosine(projected, teacher)
    loss.backward()
    t = teacher.detach().numpy()

    def formula(x: np.ndarray) -> Any:
        norms = np.sqrt((x * x).sum(axis=1) * (t * t).sum(axis=1))
        return (1 - (x * t).sum(axis=1) / norms).mean()

    x = projected.detach().numpy()
    assert loss.item() == pytest.approx(formula(x), rel=1e-12)
    np.testing.assert_allclose(projected.grad.numpy(), complex_step(formula, x), rtol=1e-9)
    assert teacher.grad is None
    scaled = feature_cosine(projected * 7, teacher / 3)
    assert scaled.item() == pytest.approx(loss.item(), rel=1e-12)
    assert feature_cosine(-2 * teacher, teacher).item() == pytest.approx(2.0, rel=1e-12)


def test_features_of_length_zero_have_bounded_gradients() -> None:
    student, teacher = (x.detach().float() for x in logits())
    student[0] = 0
    teacher[1] = 0
    student[2] = teacher[2] = 0
    student.requires_grad_()
    loss = feature_cosine(student, teacher)
    loss.backward()
    expected = feature_cosine(student[3:], teacher[3:]) / 2 + 0.5
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert student.grad.isfinite().all() and student.grad.abs().max() <= 1e4 / B
    assert not student.grad[1:3].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_are_compared_in_float32(dtype: torch.dtype) -> None:
    student, teacher = logits(dtype=dtype)
    expected = feature_cosine(student.float(), teacher.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = feature_cosine(student, teacher)
    assert loss.dtype == torch.float32 and loss.item() == expected.item()


def test_features_of_different_widths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"features must both be \(B, F\), F of 1 or more, got"):
        feature_cosine(torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agreement_is_the_share_of_equal_best_classes(dtype: torch.dtype) -> None:
    student = torch.tensor([[1, 2, 0], [5, 1, 1], [0, 0, 3], [2, 1, 0]], dtype=dtype)
    teacher = torch.tensor([[0, 9, 1], [1, 5, 1], [1, 0, 2], [0, 1, 2]], dtype=dtype)
    share = agreement(student.requires_grad_(), teacher)
    assert share.item() == 0.5 and share.shape == () and not share.requires_grad
    assert agreement(teacher, teacher).item() == 1.0
    with pytest.raises(ValueError, match=r"\(B, K\)"):
        agreement(student, teacher[:, :2])


# --- The registry ---------------------------------------------------------------------------------


def test_the_registry_holds_what_the_settings_allow() -> None:
    names = set(get_args(DistillConfig.model_fields["name"].annotation))
    assert names == {"none", *LOSSES, "pkd"}  # of detectors: detect/pkd.py


def test_every_loss_has_a_file_of_settings() -> None:
    assert {file.stem for file in FILES} == {"none", *LOSSES, "pkd"}
    assert list(signatures()) == list(LOSSES)  # the reader of the text finds what is registered
    for file in FILES:
        settings = DistillConfig(**yaml.safe_load(file.read_text()))
        assert settings.name == file.stem
        if settings.name in LOSSES:
            student, teacher = logits()
            temperature = at(settings.temperature, 0.5)
            inputs = LossInputs(student, teacher, LABELS, temperature, student, teacher)
            loss = evaluate_loss(settings.name, inputs, settings_of(settings, settings.name))
            assert 0 < loss.item() < 100


def test_a_loss_of_features_says_that_there_are_none() -> None:
    student, teacher = logits()
    with pytest.raises(ValueError, match="feature_cosine compares student_BF, and there is none"):
        evaluate_loss("feature_cosine", LossInputs(student, teacher, LABELS, 1.0), {})


def test_the_example_of_the_module_works() -> None:
    paragraphs = inspect.getsource(losses).split("\n\n")
    (example,) = (p for p in paragraphs[:6] if p.startswith("    @loss"))
    names: dict[str, Any] = dict(vars(losses))
    try:
        exec(textwrap.dedent(example), names)
        student, teacher = logits()
        inputs = LossInputs(student, teacher, LABELS, 1.0)
        loss = evaluate_loss("logit_mse", inputs, {"scale": 3.0})
    finally:
        LOSSES.pop("logit_mse", None)
    assert loss.item() == pytest.approx(3 * ((student - teacher) ** 2).mean().item())

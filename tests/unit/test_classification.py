"""Every term of the training loss against a formula in numpy; what Mixup does to targets and
views."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ghosttrain.config.losses import settings_of
from ghosttrain.config.schema import AugmentConfig, Config, DistillConfig, TrainConfig
from ghosttrain.data.augment import mix_batch
from ghosttrain.data.loader import Batch
from ghosttrain.distill.features import StudentOutput
from ghosttrain.distill.losses import LossInputs, evaluate_loss
from ghosttrain.distill.teacher_output import TeacherOutput
from ghosttrain.engine.classification import mixed, objective
from ghosttrain.engine.train import mixed_precision

B, K, F = 6, 5, 4
RNG = np.random.default_rng(0)
STUDENT, TEACHER = 3 * RNG.normal(size=(B, K)), 3 * RNG.normal(size=(B, K))
LABELS = RNG.integers(0, K, B)
HARD = np.eye(K)[LABELS]
SOFT = 0.7 * HARD + 0.3 * np.roll(HARD, 1, axis=0)
PROJECTED, TEACHERS = RNG.normal(size=(B, F)), RNG.normal(size=(B, F))


class Fixed(nn.Module):
    """Returns what it was given, whatever the images."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, images: Tensor) -> Any:
        return self.output if isinstance(self.output, tuple) else StudentOutput(self.output)


def terms(
    distill: DistillConfig,
    output: Any = STUDENT,
    teacher_output: TeacherOutput | None = None,
    smoothing: float = 0.1,
    targets: np.ndarray = SOFT,
    progress: float = 0.5,
) -> dict[str, float]:
    config = Config(distill=distill, train=TrainConfig(label_smoothing=smoothing))
    if isinstance(output, np.ndarray):
        output = torch.from_numpy(output)
    images = torch.zeros(B, 3, 8, 8)
    forward, targets_BK = Fixed(output), torch.from_numpy(targets).float()
    losses = objective(config, progress, forward, teacher_output, images, targets_BK)
    return {name: value.item() for name, value in losses.items()}


def teacher(features: np.ndarray | None = None) -> TeacherOutput:
    logits = torch.from_numpy(TEACHER)
    return TeacherOutput(logits, None if features is None else torch.from_numpy(features))


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - x.max(1, keepdims=True) - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1))[:, None]


def label_term(targets: np.ndarray, smoothing: float) -> float:
    targets = (1 - smoothing) * targets + smoothing / K
    return float(-(targets * log_softmax(STUDENT)).sum(1).mean())


def divergence(q: np.ndarray, p: np.ndarray) -> np.ndarray:
    """KL(softmax p || softmax q) of each image."""
    return (np.exp(log_softmax(p)) * (log_softmax(p) - log_softmax(q))).sum(1)


def soft_ce(t: float) -> float:
    return float(-(np.exp(log_softmax(TEACHER / t)) * log_softmax(STUDENT / t)).sum(1).mean())


def kl(t: float, student: np.ndarray = STUDENT, teacher: np.ndarray = TEACHER) -> float:
    return float(divergence(student / t, teacher / t).mean() * t**2)


def dkd(t: float, alpha: float, beta: float) -> float:
    """Both parts by their definition, from probabilities."""
    q, p = np.exp(log_softmax(STUDENT / t)), np.exp(log_softmax(TEACHER / t))
    own_q, own_p = q[range(B), LABELS], p[range(B), LABELS]
    target = own_p * np.log(own_p / own_q) + (1 - own_p) * np.log((1 - own_p) / (1 - own_q))
    rest = np.arange(K) != LABELS[:, None]
    rest_q = (q / (1 - own_q)[:, None])[rest].reshape(B, K - 1)
    rest_p = (p / (1 - own_p)[:, None])[rest].reshape(B, K - 1)
    others = (rest_p * np.log(rest_p / rest_q)).sum(1)
    return float((alpha * target + beta * others).mean() * t**2)


def dist(t: float, alpha: float, beta: float) -> float:
    q, p = np.exp(log_softmax(STUDENT / t)), np.exp(log_softmax(TEACHER / t))
    inter = np.mean([1 - np.corrcoef(q[i], p[i])[0, 1] for i in range(B)])
    intra = np.mean([1 - np.corrcoef(q[:, k], p[:, k])[0, 1] for k in range(K)])
    return float((alpha * inter + beta * intra) * t**2)


def hard() -> float:
    return float(-log_softmax(STUDENT)[range(B), TEACHER.argmax(1)].mean())


def standardised(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(1, keepdims=True)) / x.std(1, ddof=1, keepdims=True)


LOSSES = {
    "soft_ce": soft_ce(2.0),
    "kl": kl(2.0),
    "dkd": dkd(2.0, 0.5, 3.0),
    "dist": dist(2.0, 0.5, 3.0),
    "hard": hard(),
    "logit_std": kl(2.0, standardised(STUDENT), standardised(TEACHER)),
}


def close(value: float) -> Any:
    return pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("targets", [HARD, SOFT], ids=["hard", "soft"])
def test_without_a_teacher_there_is_the_term_of_the_labels(smoothing, targets) -> None:
    losses = terms(DistillConfig(label_weight=0.25), smoothing=smoothing, targets=targets)
    expected = 0.25 * label_term(targets, smoothing)
    assert losses == {"label": close(expected), "loss": close(expected)}


@pytest.mark.parametrize("name", LOSSES)
def test_every_distillation_loss_with_its_weights_and_temperature(name: str) -> None:
    parts = {"alpha": 0.5, "beta": 3.0} if name in ("dkd", "dist") else {}
    distill = DistillConfig(name=name, temperature=2.0, weight=7.0, label_weight=0.25, **parts)
    losses = terms(distill, teacher_output=teacher())
    label, term = 0.25 * label_term(SOFT, 0.1), 7 * LOSSES[name]
    agreement = (STUDENT.argmax(1) == TEACHER.argmax(1)).mean()
    assert losses == {
        "label": close(label),
        name: close(term),
        "loss": close(label + term),
        "agreement": close(agreement),
    }


def test_the_features_term_is_one_minus_the_mean_cosine() -> None:
    output = (torch.from_numpy(STUDENT), torch.from_numpy(PROJECTED))
    distill = DistillConfig(name="kl", temperature=2.0, features_weight=5.0)
    losses = terms(distill, output, teacher(TEACHERS))
    norms = np.linalg.norm(PROJECTED, axis=1) * np.linalg.norm(TEACHERS, axis=1)
    term = 5 * (1 - ((PROJECTED * TEACHERS).sum(1) / norms).mean())
    assert losses["feature_cosine"] == close(term)
    assert losses["loss"] == close(label_term(SOFT, 0.1) + LOSSES["kl"] + term)
    with pytest.raises(ValueError, match="compares teacher_BF"):
        terms(distill, output, teacher())  # an output without features


def test_short_features_count_as_of_length_1e_4() -> None:
    """So that the gradient stays bounded as their direction vanishes."""
    distill = DistillConfig(name="kl", features_weight=1.0)
    for length in (1e-3, 1e-6):
        short = PROJECTED / np.linalg.norm(PROJECTED, axis=1, keepdims=True) * length
        output = (torch.from_numpy(STUDENT), torch.from_numpy(short))
        cosines = (short * TEACHERS).sum(1) / np.linalg.norm(TEACHERS, axis=1) / max(length, 1e-4)
        losses = terms(distill, output, teacher(TEACHERS))
        assert losses["feature_cosine"] == close(1 - cosines.mean())


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_computed_where_its_logits_are(name: str) -> None:
    """Whatever the default device: here one that computes nothing."""
    parts = {"alpha": 0.5, "beta": 3.0} if name in ("dkd", "dist") else {}
    distill = DistillConfig(name=name, temperature=2.0, **parts)
    student, labels = torch.from_numpy(STUDENT), torch.from_numpy(LABELS)
    with torch.device("meta"):
        inputs = LossInputs(student, teacher().logits, labels, 2.0)
        loss = evaluate_loss(name, inputs, settings_of(distill, name))
    assert loss.item() == close(LOSSES[name])


def test_weights_and_temperature_follow_the_run() -> None:
    distill = DistillConfig(
        name="soft_ce",
        label_weight=((0.0, 1.0), (1.0, 0.0)),
        weight=((0.2, 0.0), (0.6, 4.0)),
        temperature=((0.0, 1.0), (0.5, 3.0)),
        features_weight=((0.0, 2.0), (1.0, 6.0)),
    )
    output = (torch.from_numpy(STUDENT), torch.from_numpy(PROJECTED))
    whole = terms(DistillConfig(name="soft_ce", features_weight=1.0), output, teacher(TEACHERS))
    for progress, label, weight, temperature, features in [
        (0.0, 1.0, 0.0, 1.0, 2.0),
        (0.25, 0.75, 0.5, 2.0, 3.0),
        (0.75, 0.25, 4.0, 3.0, 5.0),
    ]:
        losses = terms(distill, output, teacher(TEACHERS), progress=progress)
        assert losses["label"] == close(label * label_term(SOFT, 0.1))
        assert losses["soft_ce"] == close(weight * soft_ce(temperature))
        assert losses["feature_cosine"] == close(features * whole["feature_cosine"])


def test_terms_are_widened_before_they_are_computed() -> None:
    """Bfloat16 logits give the loss of their float32 values, float64 ones lose nothing."""
    narrow = torch.from_numpy(STUDENT).bfloat16()
    for distill, output in [(DistillConfig(), None), (DistillConfig(name="kl"), teacher())]:
        wide = terms(distill, narrow.float(), output)
        assert terms(distill, narrow, output) == wide
    config = Config(train=TrainConfig(label_smoothing=0.0))
    targets = torch.from_numpy(HARD).float()
    forward = Fixed(torch.from_numpy(STUDENT))
    loss = objective(config, 0.0, forward, None, torch.zeros(B, 3, 8, 8), targets)["loss"]
    assert loss.item() == pytest.approx(label_term(HARD, 0.0), rel=1e-14)


def test_the_teacher_gets_no_gradient_and_the_student_gets_all_of_it() -> None:
    student = torch.from_numpy(STUDENT).float().requires_grad_()
    output = torch.from_numpy(TEACHER).float().requires_grad_()
    config = Config(
        distill=DistillConfig(name="kl", weight=2.0), train=TrainConfig(label_smoothing=0.0)
    )
    targets = torch.from_numpy(HARD).float()
    losses = objective(config, 0.0, Fixed(student), TeacherOutput(output), torch.zeros(B), targets)
    losses["loss"].backward()
    q, p = np.exp(log_softmax(STUDENT)), np.exp(log_softmax(TEACHER))
    expected = ((q - HARD) + 2 * (q - p)) / B
    np.testing.assert_allclose(student.grad.numpy(), expected, rtol=1e-5, atol=1e-7)
    assert output.grad is None


# --- what comes before it -------------------------------------------------------------------------


def batch() -> Batch:
    images = torch.randn(B, 3, 8, 8)
    views = {(16, "bicubic"): torch.randint(0, 256, (B, 3, 16, 16), dtype=torch.uint8)}
    return Batch(images, torch.from_numpy(LABELS), torch.arange(10, 10 + B), views, None)


def test_without_mixup_targets_are_the_labels_and_all_else_is_as_it_was() -> None:
    given = batch()
    images, views, targets = mixed(given, K, AugmentConfig(), 3)
    assert images is given.images and views is given.views
    assert targets.numpy().tolist() == HARD.tolist()


@pytest.mark.parametrize("kind", ["mixup_alpha", "cutmix_alpha"])
def test_images_targets_and_views_are_mixed_by_one_draw(kind: str) -> None:
    augment = AugmentConfig(policy="with_mixup", **{kind: 0.8})
    given = batch()
    images, views, targets = mixed(given, K, augment, 3)
    numbers = list(range(10, 10 + B))
    expected = mix_batch(given.images, given.labels, K, augment, 3, numbers)
    assert torch.equal(images, expected[0]) and torch.equal(targets, expected[1])
    (view,) = views.values()
    whole = given.views[16, "bicubic"] / 255
    assert torch.equal(view, mix_batch(whole, given.labels, K, augment, 3, numbers)[0])
    assert not torch.equal(view, whole)
    other = mixed(given, K, augment, 4)[2]
    assert not torch.equal(other, targets)  # each epoch draws anew


@pytest.mark.parametrize(
    ("setting", "on_cpu", "on_cuda"),
    [("auto", False, True), ("bf16", True, True), ("fp32", False, False)],
)
def test_mixed_precision(setting: str, on_cpu: bool, on_cuda: bool) -> None:
    with mixed_precision(setting, torch.device("cpu"))():
        assert torch.is_autocast_enabled("cpu") == on_cpu
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    if torch.cuda.is_available():
        with mixed_precision(setting, torch.device("cuda"))():
            assert torch.is_autocast_enabled("cuda") == on_cuda

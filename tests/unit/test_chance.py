"""Whether a teacher knows the classes: the test against chance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import refusal
from scipy.stats import binom
from teachers import build, network, only, saved
from torch import Tensor, nn
from torch.nn import functional as F

from ghosttrain.distill.chance import binomial_tail, score, validate_above_chance
from ghosttrain.distill.pretrained import PretrainedNetwork
from ghosttrain.distill.teacher import Member, Teacher, measure_teacher
from ghosttrain.errors import UserError


class Oracle(nn.Module):
    """Reads the output from the image."""

    def forward(self, x: Tensor) -> Tensor:
        return F.one_hot(x[:, 0, 0, 0].round().long(), 10).float()


def oracle() -> Teacher:
    loaded = PretrainedNetwork(Oracle(), 2, "bilinear", [0.0], [1.0], None, "")
    return Teacher({"oracle": Member(loaded, student_mean=(0.0,), student_std=(1.0,))})


def test_check_teacher_counts() -> None:
    outputs = torch.tensor([0, 1, 2, 3, 4, 5, 6])
    labels = torch.tensor([0, 1, 2, 3, 9, 9, 9])
    images = outputs.view(-1, 1, 1, 1).expand(-1, 1, 2, 2).float()
    batches = zip(images.split(4), labels.split(4), ({}, {}), strict=True)
    (found,) = measure_teacher(oracle(), batches)
    assert found[:3] == (4, 7, 3) and found.top1 == 4 / 7
    (found,) = measure_teacher(oracle(), [])
    assert found[:3] == (0, 0, 0) and found.top1 == 0


def test_outputs_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    built = build(weights=saved(tmp_path, network()), input_size=48)
    with torch.no_grad():
        only(built).network.fc.weight.fill_(1e38)
    batch = (torch.rand(2, 3, 48, 48), torch.zeros(2, dtype=torch.long), {})
    assert "not finite" in refusal(lambda: measure_teacher(built, [batch]))


@pytest.mark.parametrize(
    ("hits", "n", "p"),
    [(0, 10, 0.1), (1, 1, 0.5), (3, 10, 0.5), (10, 10, 0.1), (64, 512, 0.1), (69, 512, 0.1)]
    + [(4, 512, 0.001), (300, 512, 0.5), (5200, 50_000, 0.1), (60, 50_000, 0.001)],
)
def test_binomial_tail(hits: int, n: int, p: float) -> None:
    assert binomial_tail(hits, n, p) == pytest.approx(binom.sf(hits - 1, n, p), rel=1e-8)


def test_binomial_tail_by_hand() -> None:
    assert binomial_tail(2, 2, 0.25) == pytest.approx(1 / 16)
    assert binomial_tail(1, 2, 0.25) == pytest.approx(7 / 16)
    assert binomial_tail(1, 3, 1.0) == 1.0


def sample(sizes: list[int], right: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return outputs and labels of a sample with so many images a class: a share of the outputs is
    right, the others are drawn from all classes.
    """
    draw = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    guesses = torch.randint(0, len(sizes), labels.shape, generator=draw)
    knows = torch.rand(labels.shape, generator=draw) < right
    return torch.where(knows, labels, guesses), labels


IMBALANCED = [353, 99, 60]  # 68.9 % of 512 images


@pytest.mark.parametrize("sizes", [IMBALANCED, [507, 5], [51] * 10, [256, 256], [500, 4, 4, 4]])
def test_a_teacher_that_always_says_the_same_never_passes(sizes: list[int]) -> None:
    labels = sample(sizes, 1.0)[1]
    for label in range(len(sizes)):
        found = score(torch.full_like(labels, label), labels)
        assert found.chance == pytest.approx(sizes[label] / sum(sizes))
        assert f"class ({max(sizes)} right)" in refusal(
            lambda f=found: validate_above_chance(f, len(sizes))
        )
    almost = torch.full_like(labels, 0)
    almost[-1] = labels[-1]  # one image more than the constant output
    assert "no better than guessing" in refusal(
        lambda: validate_above_chance(score(almost, labels), len(sizes))
    )


@pytest.mark.parametrize(
    ("sizes", "right"),
    [
        (IMBALANCED, 0.9),
        ([507, 5], 1.0),
        ([500, 4, 4, 4], 0.99),
        ([51] * 10, 0.2),
        ([2] * 250, 0.1),
    ],
)
def test_a_teacher_that_knows_the_classes_passes(sizes: list[int], right: float) -> None:
    validate_above_chance(score(*sample(sizes, right)), len(sizes))


def test_outputs_without_a_relation_to_the_labels_are_refused() -> None:
    passed = 0
    for seed in range(200):
        outputs, labels = sample([51] * 10, 0.0, seed)
        try:
            validate_above_chance(score(outputs, labels), 10)
            passed += 1
        except UserError:
            pass
    assert passed <= 6  # expected: at most 1 %; P(X > 6) of 200 is .0045
    worse = score(
        *sample(IMBALANCED, 0.45)
    )  # it knows something, but a constant is right more often
    assert worse.chance + 0.1 < worse.top1 < 353 / 512
    message = refusal(lambda: validate_above_chance(worse, 3))
    assert "more than guesses are, but it is no better than always" in message
    assert "most frequent class (353 right)" in message and "normalisation" not in message
    outputs, labels = sample(IMBALANCED, 1.0)
    shifted = (outputs + 1) % 3  # the classes in another order
    assert "always naming the most frequent class (353 right): its classes, their" in refusal(
        lambda: validate_above_chance(score(shifted, labels), 3)
    )


def test_too_few_images_are_said_to_be_too_few() -> None:
    for labels in ([0, 1], [0], [], [3] * 512):
        labels = torch.tensor(labels, dtype=torch.long)
        message = refusal(lambda labels=labels: validate_above_chance(score(labels, labels), 10))
        assert f"{len(labels)} training images" in message and "too few" in message
        assert "teacher.check_samples=" in message and "teacher.trust=true" in message
    validate_above_chance(score(torch.arange(7), torch.arange(7)), 10)


def test_the_bound_of_balanced_classes() -> None:
    # Of 500 images and 10 classes: P(X >= 66) = .0125, P(X >= 67) = .0087.
    labels = torch.arange(500) % 10
    for hits, passes in ((66, False), (67, True)):
        outputs = labels.clone()
        outputs[hits:] = (outputs[hits:] + 1 + torch.arange(500 - hits) // 10 % 9) % 10
        found = score(outputs, labels)
        assert found.hits == hits and found.chance == pytest.approx(0.1, abs=1e-3)
        if passes:
            validate_above_chance(found, 10)
        else:
            message = refusal(lambda f=found: validate_above_chance(f, 10))
            assert "66 of 500" in message and "10 classes" in message and "teacher=none" in message

"""Made-up outputs of teachers, and codecs of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ghosttrain.distill.codecs import Codec, make_codec
from ghosttrain.distill.teacher_output import TeacherOutput

N, K, WIDTHS = 7, 101, (37, 90)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pooled(rows: int, seed: int = 0) -> Tensor:
    """Features as a network with ReLU pools them: never negative, most small, a few large."""
    maps = draw(rows, sum(WIDTHS), 1, seed=seed) * 1.5 - 1.5 + draw(rows, sum(WIDTHS), 9, seed=seed)
    return maps.relu().mean(dim=2)


def classifier(classes: int = K, seed: int = 1) -> tuple[Tensor, Tensor]:
    return draw(classes, sum(WIDTHS), seed=seed) * 0.3, draw(classes, seed=seed + 1)


def output(rows: int = N, seed: int = 0, features: Tensor | None = None) -> TeacherOutput:
    weight, bias = classifier()
    features = pooled(rows, seed) if features is None else features
    return TeacherOutput(features @ weight.T + bias, features)


def codec(name: str, classes: int = K, mean: Tensor | None = None) -> Codec:
    weight, bias = classifier(classes)
    mean = draw(classes, seed=3).softmax(dim=0) if mean is None else mean
    return make_codec(name, classes, WIDTHS, {"mean": mean, "weight": weight, "bias": bias})

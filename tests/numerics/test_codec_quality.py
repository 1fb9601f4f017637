"""What a codec keeps of a loss and of its gradient, and the measure of it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import numpy as np
import pytest
import timm
import torch
from outputs import K, N, codec, draw, output
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn import functional as F

from ghosttrain.distill.codecs import Codec, make_codec, measure
from ghosttrain.distill.teacher_output import TeacherOutput
from ghosttrain.models.weights.lite import lite_file, to_timm


def soft_ce(temperature: float):
    def loss(student: Tensor, teacher: Tensor, rows: slice) -> Tensor:
        target = (teacher / temperature).softmax(dim=1)
        return -(target * (student / temperature).log_softmax(dim=1)).sum(dim=1).mean()

    return loss


PROMISED = {  # largest relative error of soft cross-entropy, T = 1 / 2 / 5 / 20
    "logits:16": (1e-3, 1e-3, 1e-3, 1e-3),
    "features:16": (1e-3, 1e-3, 1e-3, 1e-3),
    "features:8": (5e-3, 3e-3, 2e-3, 1e-3),
    "logits:8": (5e-3, 5e-3, 2e-3, 1e-3),
    "features:4": (0.06, 0.04, 0.02, 0.01),
    "logits:4": (0.08, 0.08, 0.04, 0.01),
    f"topk:{K - 1}": (3e-3, 3e-3, 3e-3, 3e-3),
}


@pytest.mark.parametrize("name", PROMISED)
def test_losses_keep_their_value_at_every_temperature(name: str) -> None:
    given = output(64)
    students = {"uniform": torch.zeros(64, K), "random": draw(64, K, seed=9)}
    for temperature, promised in zip((1.0, 2.0, 5.0, 20.0), PROMISED[name], strict=True):
        quality = measure(codec(name), given, students, [soft_ce(temperature)])
        assert 0 < quality.loss_error <= promised


def naive(
    first: Codec, given: TeacherOutput, students: Mapping[str, Tensor], temperatures: list[float]
) -> tuple[float, float]:
    """Return the quality for soft cross-entropy, each sample alone and by hand, in float64."""
    back = first.decode(first.encode(given)).logits.double()
    errors, cosines = [], []
    for student in students.values():
        for temperature in temperatures:
            differences, exact, along, norms = [], [], 0.0, 0.0
            for s, t, b in zip(student.double(), given.logits.double(), back, strict=True):
                log_q = (s / temperature).log_softmax(0)
                p, p_stored = (t / temperature).softmax(0), (b / temperature).softmax(0)
                exact.append(float(-(p * log_q).sum()))
                differences.append(abs(float(-(p_stored * log_q).sum()) - exact[-1]))
                g, h = log_q.exp() - p, log_q.exp() - p_stored
                cosine = float(g @ h / (g.norm() * h.norm()))
                along, norms = along + cosine * float(g.norm()), norms + float(g.norm())
            errors.append(sum(differences) / sum(exact))
            cosines.append(along / norms)
    return max(errors), min(cosines)


@pytest.mark.parametrize("rows", [1, 5, 64, 97, 150])
@pytest.mark.parametrize("name", ["topk:5", "features:3", "logits:4"])
def test_measure_agrees_with_samples_one_by_one(name: str, rows: int) -> None:
    given, first = output(rows), codec(name)
    students = {"uniform": torch.zeros(rows, K), "random": draw(rows, K, seed=9) * 3}
    quality = measure(first, given, students, [soft_ce(1.0), soft_ce(4.0)])
    error, cosine = naive(first, given, students, [1.0, 4.0])
    assert quality.loss_error == pytest.approx(error, rel=1e-3)
    assert quality.cosine == pytest.approx(cosine, rel=2e-6)


def test_losses_are_told_which_samples_they_get() -> None:
    labels, seen = torch.arange(130) % K, []

    def loss(student: Tensor, teacher: Tensor, rows: slice) -> Tensor:
        seen.append(rows)
        assert len(labels[rows]) == len(student) == len(teacher)
        return F.cross_entropy(student + teacher, labels[rows])

    quality = measure(codec("logits:8"), output(130), {"uniform": torch.zeros(130, K)}, [loss])
    assert quality.cosine > 0.99
    chunks = [rows for rows in seen if rows.stop - rows.start > 1]
    assert {rows.stop - rows.start for rows in chunks} == {65}
    assert {rows.start for rows in seen if rows not in chunks} == set(range(130))


def test_a_loss_that_compares_samples_is_measured_by_the_batch() -> None:
    given, student = output(128), draw(128, K, seed=9)
    first = codec("logits:4")

    def across(student: Tensor, teacher: Tensor, rows: slice) -> Tensor:
        p, q = teacher.softmax(dim=1), student.softmax(dim=1)  # as in DIST's intra-class relation
        return 1 - F.cosine_similarity(p - p.mean(0), q - q.mean(0), dim=0).mean()

    quality = measure(first, given, {"random": student}, [across])
    back = first.decode(first.encode(given)).logits
    exact, kept = (
        torch.stack([across(student[i : i + 64], t[i : i + 64], slice(0)) for i in (0, 64)])
        for t in (given.logits, back)
    )
    assert quality.loss_error == pytest.approx(float((exact - kept).abs().mean() / exact.mean()))
    assert 0.5 < quality.cosine < 1


def test_the_worst_student_and_loss_count() -> None:
    given, first = output(40), codec("topk:5")
    students = {"uniform": torch.zeros(40, K), "random": draw(40, K, seed=9) * 3}
    losses = [soft_ce(1.0), soft_ce(4.0)]
    alone = [measure(first, given, {k: s}, [x]) for k, s in students.items() for x in losses]
    together = measure(first, given, students, losses)
    assert together.loss_error == max(q.loss_error for q in alone)
    assert together.cosine == min(q.cosine for q in alone)


def test_a_student_with_nothing_to_learn_does_not_count() -> None:
    given, first = output(40), codec("logits:4")

    def kl(student: Tensor, teacher: Tensor, rows: slice) -> Tensor:
        return F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean")

    alone = measure(first, given, {"uniform": torch.zeros(40, K)}, [kl])
    both = measure(
        first, given, {"uniform": torch.zeros(40, K), "same": given.logits.clone()}, [kl]
    )
    assert both == alone and alone.cosine > 0.9
    only = measure(first, given, {"same": given.logits.clone()}, [kl])
    assert only.cosine < 0.9  # there is nothing else to go by


def test_a_loss_that_is_not_finite_is_not_called_good() -> None:
    def broken(student: Tensor, teacher: Tensor, rows: slice) -> Tensor:
        return (student * math.nan).sum()

    students = {"uniform": torch.zeros(N, K)}
    quality = measure(codec("logits:8"), output(), students, [soft_ce(1.0), broken])
    assert math.isnan(quality.loss_error) and not quality.cosine >= 0.995


def test_measuring_512_samples_of_1000_classes_is_a_matter_of_moments() -> None:
    logits = draw(512, 1000) * 2
    first = make_codec("logits:4", 1000, (), {})
    started = time.process_time()
    measure(first, TeacherOutput(logits), {"uniform": torch.zeros(512, 1000)}, [soft_ce(1.0)] * 2)
    assert time.process_time() - started < 2


@pytest.fixture(scope="module")
def photos() -> tuple[TeacherOutput, Tensor, Tensor, Tensor]:
    """What EfficientNet-Lite0 says of 32 crops of two photos; other crops' logits; classifier."""
    model = timm.create_model("tf_efficientnet_lite0").eval()
    weights = torch.load(lite_file("tf_efficientnet_lite0"), weights_only=True)
    model.load_state_dict(to_timm(weights, "tf_efficientnet_lite0"))
    rng, crops = np.random.default_rng(0), []
    for number in range(64):
        photo = load_sample_images().images[number % 2]
        side = int(rng.integers(128, 400))
        y, x = (int(rng.integers(0, size - side + 1)) for size in photo.shape[:2])
        pixels = torch.from_numpy(photo[y : y + side, x : x + side].copy()).permute(2, 0, 1)
        crop = F.interpolate(pixels[None].float() / 127.5 - 1, (160, 160), mode="bilinear")
        crops.append(crop)
    layer = model.get_classifier()
    with torch.no_grad():
        features = model.forward_head(model.forward_features(torch.cat(crops)), pre_logits=True)
        logits = layer(features)
    mine = TeacherOutput(logits[:32], features[:32])
    return mine, logits[32:], layer.weight, layer.bias


@pytest.mark.parametrize(
    ("name", "least"),
    [("features:3", 0.985), ("features:4", 0.996), ("features:6", 0.9995), ("logits:6", 0.998)],
)
def test_codecs_keep_the_gradient_for_photos(photos, name: str, least: float) -> None:
    given, other, weight, bias = photos
    first = make_codec(name, 1000, (1280,), {"weight": weight, "bias": bias})
    students = {"uniform": torch.zeros_like(other), "another crop": other}
    for temperature in (1.0, 2.0, 4.0):
        quality = measure(first, given, students, [soft_ce(temperature)])
        assert quality.cosine >= least

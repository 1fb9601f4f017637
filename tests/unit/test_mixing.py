"""Mixup and CutMix."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from ghosttrain.config.schema import AugmentConfig
from ghosttrain.data.augment import (
    mix_batch,
)


def batch(n=6, side=16, classes=5):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, side, side, generator=generator)
    return images, torch.arange(n) % classes, classes


def mixed(mixup, cutmix, number=0, indices=(4, 8, 15, 16, 23, 42)):
    images, labels, k = batch()
    augment = AugmentConfig(policy="with_mixup", mixup_alpha=mixup, cutmix_alpha=cutmix)
    return mix_batch(images, labels, k, augment, number, indices)


def test_without_alphas_the_images_stay_and_the_targets_are_one_hot():
    images, labels, k = batch()
    for augment in (AugmentConfig(), AugmentConfig(policy="with_mixup")):
        out, targets = mix_batch(images, labels, k, augment, 0, range(6))
        assert out is images
        assert torch.equal(targets, torch.eye(k)[labels])


def test_mixup_blends_images_and_targets_by_the_same_share():
    images, labels, k = batch()
    one_hot = torch.eye(k, dtype=torch.float64)[labels]
    for number in range(20):
        out, targets = mixed(0.8, 0.0, number)
        share = targets[1, 1].double()  # image 1 is of class 1, its neighbour of class 0
        x = images.double()
        torch.testing.assert_close(
            out.double(), share * x + (1 - share) * x.roll(1, 0), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            targets.double(), share * one_hot + (1 - share) * one_hot.roll(1, 0), rtol=0, atol=1e-6
        )


def test_cutmix_targets_are_the_shares_of_the_pixels():
    images, labels, k = batch()
    areas = []
    for number in range(60):
        out, targets = mixed(0.0, 1.0, number)
        unchanged = (out == images).all(1)
        other = (out == images.roll(1, 0)).all(1)
        assert (unchanged ^ other).all()  # every pixel is the image's or its neighbour's
        assert (other == other[:1]).all()  # in the same box for the whole batch
        rows, columns = other[0].any(1), other[0].any(0)
        assert other[0].sum() == rows.sum() * columns.sum()
        share = unchanged[0].double().mean()
        one_hot = torch.eye(k, dtype=torch.float64)[labels]
        torch.testing.assert_close(
            targets.double(), share * one_hot + (1 - share) * one_hot.roll(1, 0), rtol=0, atol=1e-6
        )
        areas.append(1 - share)
    assert min(areas) < 0.1 and max(areas) > 0.6


@pytest.mark.parametrize("scale", [2, 3])
def test_a_view_is_mixed_as_the_students_images_are(scale):
    images, labels, k = batch()
    view = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    indices = (4, 8, 15, 16, 23, 42)
    for alphas in ({"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}):
        augment = AugmentConfig(policy="with_mixup", **alphas)
        for number in range(30):
            student, targets = mix_batch(images, labels, k, augment, number, indices)
            mixed_view, of_view = mix_batch(view, labels, k, augment, number, indices)
            if "mixup_alpha" in alphas:
                assert torch.equal(mixed_view[..., ::scale, ::scale], student)
                assert torch.equal(of_view, targets)
                continue
            pairs = (student, images), (mixed_view, view)
            changed, changed_view = ((x != y).any(1)[0] for x, y in pairs)
            for axis in (0, 1):
                small, large = changed.any(axis).nonzero(), changed_view.any(axis).nonzero()
                if len(small) and len(large):
                    edges = [x.aminmax() for x in (small, large)]
                    assert abs(scale * edges[0].min - edges[1].min) <= scale
                    assert abs(scale * (edges[0].max + 1) - (edges[1].max + 1)) <= scale
            torch.testing.assert_close(of_view, targets, rtol=0, atol=2 / 16 + 1e-6)


def test_shares_of_mixup_follow_the_beta_distribution():
    images, labels = torch.zeros(2, 1, 1, 1), torch.tensor([0, 1])
    for alpha in (0.2, 0.8, 4.0):
        augment = AugmentConfig(policy="with_mixup", mixup_alpha=alpha)
        shares = [
            mix_batch(images, labels, 2, augment, e, [0, 1])[1][0, 0].item() for e in range(3000)
        ]
        assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 0.001


def test_mixing_leaves_the_callers_images_alone():
    images, labels, k = batch()
    for alphas in ({"mixup_alpha": 1.0}, {"cutmix_alpha": 1.0}):
        mix_batch(images, labels, k, AugmentConfig(policy="with_mixup", **alphas), 0, range(6))
        assert torch.equal(images, batch()[0])


def test_both_are_drawn_equally_often():
    cut = 0
    images, labels, k = batch()
    for number in range(400):
        out, _ = mixed(0.8, 1.0, number)
        cut += bool(((out == images) | (out == images.roll(1, 0))).all())
    assert 150 < cut < 250


def test_mixing_is_a_function_of_the_batch_and_the_draw_number():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, ta = mixed(0.8, 1.0, 3)
    b, tb = mixed(0.8, 1.0, 3, torch.tensor([4, 8, 15, 16, 23, 42]))
    assert torch.equal(a, b) and torch.equal(ta, tb)
    assert torch.equal(before, torch.get_rng_state())
    others = [mixed(0.8, 1.0, 4), mixed(0.8, 1.0, 3, (4, 8, 15, 16, 23, 43))]
    assert not any(torch.equal(a, other) for other, _ in others)


def test_targets_sum_to_one_and_suit_the_smoothing_of_the_loss():
    _, targets = mixed(0.8, 1.0, 1)
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    smooth = 0.9 * targets + 0.1 / 5
    expected = -(smooth * logits.log_softmax(1)).sum(1).mean()
    loss = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


def test_extreme_alphas_stay_finite():
    for alpha in (1e-4, 1e-2, 50.0, 1e4):
        for number in range(20):
            for out in (*mixed(alpha, 0.0, number), *mixed(0.0, alpha, number)):
                assert out.isfinite().all()

"""AutoAugment, TrivialAugment, 3-Augment, colour jitter: against torchvision's and the papers'."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from pictures import FILL, draws, picture
from PIL import ImageFilter, ImageOps
from scipy import stats
from torchvision.transforms import autoaugment as theirs

from ghosttrain.config.compose import compose
from ghosttrain.config.schema import AugmentConfig
from ghosttrain.data import policies
from ghosttrain.data.augment import apply
from ghosttrain.data.operations import OPS

NAMES = {
    "shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateX",
    "translate_y": "TranslateY", "rotate": "Rotate", "brightness": "Brightness",
    "color": "Color", "contrast": "Contrast", "sharpness": "Sharpness",
    "posterize": "Posterize", "solarize": "Solarize", "auto_contrast": "AutoContrast",
    "equalize": "Equalize", "invert": "Invert",
}  # fmt: skip


def drawn(operations, n=4000, **settings):
    augment = AugmentConfig(operations=operations, erasing_prob=0.0, **settings)
    return [draw.ops for draw in draws(augment, n)]


def test_autoaugments_pairs_are_torchvisions():
    policy = theirs.AutoAugment(theirs.AutoAugmentPolicy.IMAGENET).policies
    assert len(policy) == len(policies._PAIRS) == 25
    for ours, pair in zip(policies._PAIRS, policy, strict=True):
        for operation, (name, probability, magnitude) in zip(ours, pair, strict=True):
            own, own_probability, own_magnitude = operation.split()
            assert NAMES[own] == name and float(own_probability) == probability
            assert magnitude is None or int(own_magnitude) == magnitude


@pytest.mark.parametrize(
    ("ranges", "space", "bins"),
    [
        (policies._AUTO, lambda n: theirs.AutoAugment()._augmentation_space(n, (224, 224)), 10),
        (policies._TRIVIAL, lambda n: theirs.TrivialAugmentWide()._augmentation_space(n), 31),
    ],
)
def test_strengths_are_torchvisions(ranges, space, bins):
    for name, argument in ranges.items():
        values, signed = space(bins).get(NAMES[name], (torch.tensor(0.0), False))
        if not values.ndim:
            continue
        for bin_ in range(bins):
            expected = float(values[bin_])
            if name.startswith("translate"):
                expected /= 224
            if name == "solarize":  # pixels from the threshold on: whole numbers
                expected = np.ceil(expected)
            factor = 1 if name in ("brightness", "color", "contrast", "sharpness") else 0
            for sign in (1, -1) if signed else (1,):
                ours = argument(bin_ / (bins - 1), sign)
                # A half is rounded to even by both, but theirs in float32.
                near = 1 if name == "posterize" and abs(expected - ours) == 1 else 1e-4
                assert ours == pytest.approx(factor + sign * expected, abs=near), (name, bin_)


def test_each_policy_draws_what_it_says():
    auto = drawn("autoaugment")
    assert max(map(len, auto)) == 2 and {name for ops in auto for name, _ in ops} <= set(OPS)
    # The first pair: .4 and .6, one of 25; of the operations, "rotate" stands in four pairs.
    share = sum(name == "rotate" for ops in auto for name, _ in ops) / len(auto)
    expected = sum(
        float(o.split()[1]) for pair in policies._PAIRS for o in pair if o.startswith("rotate")
    )
    assert abs(share - expected / 25) < 0.02
    trivial = Counter(ops[0][0] if ops else "" for ops in drawn("trivialaugment", 14_000))
    assert len(trivial) == 14 and stats.chisquare([*trivial.values()]).pvalue > 0.001
    three = drawn("three_augment", 3000)
    assert stats.chisquare([*Counter(ops[0][0] for ops in three).values()]).pvalue > 0.001
    radii = [value for ops in three for name, value in ops if name == "blur"]
    assert stats.kstest(radii, stats.uniform(0.1, 1.9).cdf).pvalue > 0.001
    assert drawn("autoaugment", 50) == auto[:50]


def test_jitter_is_added_and_leaves_the_other_draws():
    plain, more = drawn("randaugment", 3000), drawn("randaugment", 3000, jitter=0.3)
    assert all(b[: len(a)] == a and len(b) == len(a) + 3 for a, b in zip(plain, more, strict=True))
    orders = Counter(tuple(name for name, _ in ops[-3:]) for ops in more)
    assert len(orders) == 6 and stats.chisquare([*orders.values()]).pvalue > 0.001
    factors = [value for ops in more for _, value in ops[-3:]]
    assert stats.kstest(factors, stats.uniform(0.7, 0.6).cdf).pvalue > 0.001


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_grey_and_blur(mode):
    image, fill = picture(40, 30, mode), FILL[: 1 if mode == "L" else 3]
    grey = ImageOps.grayscale(image).convert(mode)
    assert (OPS["grey"](np.array(image), 0.0, fill) == np.asarray(grey)).all()
    blurred = image.filter(ImageFilter.GaussianBlur(1.3))
    assert (OPS["blur"](np.array(image), 1.3, fill) == np.asarray(blurred)).all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("autoaugment", {"operations": "autoaugment", "erasing_prob": 0.0}),
        ("trivialaugment", {"operations": "trivialaugment", "erasing_prob": 0.1}),
        ("three_augment", {"operations": "three_augment", "jitter": 0.3}),
        ("weak", {"operations": "randaugment", "randaugment_magnitude": 1.0}),
        ("jitter", {"randaugment_ops": 0, "jitter": 0.4}),
    ],
)
def test_the_files_of_policies(name, expected):
    words = ["+recipe=compact_kd", f"augment={name}", "budget=full"]
    augment = compose(words).config.augment
    assert expected.items() <= augment.model_dump().items() and augment.policy == "compact"
    for draw in draws(augment, 60):
        assert apply(np.array(picture()), draw, 24, "bicubic", FILL).shape == (3, 24, 24)

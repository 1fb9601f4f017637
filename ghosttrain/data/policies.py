"""Which operations an image gets: each policy of `augment.operations` is a function from a stream
of random numbers to names of `OPS` with their arguments, in order.

Of Python's random numbers only `Random.random()` is promised to stay the same in later versions: a
draw is made of nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from random import Random

from ghosttrain.config.schema import AugmentConfig

Drawn = tuple[tuple[str, float], ...]
"""Names of `OPS` with their arguments, in order."""
_Argument = Callable[[float, int], float]
"""(level in [0, 1], sign) -> argument of an operation."""


def uniform(rng: Random, low: float, high: float) -> float:
    """Draw from [low, high)."""
    return low + (high - low) * rng.random()


def log_uniform(rng: Random, low: float, high: float) -> float:
    """Draw a number above 0 whose logarithm is uniform."""
    return math.exp(uniform(rng, math.log(low), math.log(high)))


def _gauss(rng: Random, mean: float, std: float) -> float:
    """Box and Muller's method (https://doi.org/10.1214/aoms/1177706645)."""
    radius = math.sqrt(-2 * math.log(1 - rng.random()))
    return mean + std * radius * math.cos(2 * math.pi * rng.random())


def _one_of(rng: Random, count: int) -> int:
    return int(rng.random() * count)


def _sign(rng: Random) -> int:
    return 1 if rng.random() < 0.5 else -1


def _up_to(most: float) -> _Argument:
    return lambda level, sign: sign * level * most


def _around_1(most: float, least: float = 0.0) -> _Argument:
    return lambda level, sign: max(least, 1 + sign * level * most)


def _nothing(level: float, sign: int) -> float:
    return 0.0


RANDAUGMENT: dict[str, _Argument] = {
    "auto_contrast": _nothing,
    "equalize": _nothing,
    "invert": _nothing,
    "rotate": _up_to(30),  # degrees
    # Bits kept: 4 to 1; with none left the image would be black.
    "posterize": lambda level, sign: max(1, 4 - int(4 * level)),
    "solarize": lambda level, sign: 256 - int(256 * level),  # from this value on, inverted
    "solarize_add": lambda level, sign: int(110 * level),  # added to pixels below 128
    "color": _around_1(0.9, least=0.1),
    "contrast": _around_1(0.9, least=0.1),
    "brightness": _around_1(0.9, least=0.1),
    "sharpness": _around_1(0.9, least=0.1),
    "shear_x": _up_to(0.3),
    "shear_y": _up_to(0.3),
    "translate_x": _up_to(0.45),
    "translate_y": _up_to(0.45),
}
"""Operation of RandAugment -> its argument."""


def rand_augment(rng: Random, augment: AugmentConfig) -> Drawn:
    """RandAugment (https://arxiv.org/abs/1909.13719) as timm's `rand-m9-mstd0.5-inc1` varies it.

    Every operation is skipped with probability 1/2, its magnitude has Gaussian noise, and all
    strengths grow with the magnitude.
    """
    names = list(RANDAUGMENT)
    ops = []
    for _ in range(augment.randaugment_ops):
        name = names[_one_of(rng, len(names))]
        magnitude = _gauss(rng, augment.randaugment_magnitude, augment.randaugment_std)
        sign = _sign(rng)
        if rng.random() < 0.5:
            level = min(max(magnitude / 10, 0.0), 1.0)
            ops.append((name, RANDAUGMENT[name](level, sign)))
    return tuple(ops)


def _ranges(
    shear: float, shift: float, degrees: float, factor: float, bits: int
) -> Mapping[str, _Argument]:
    """Return name -> argument for the most that a policy shears, shifts (a share of the side),
    turns, changes colours, and cuts off of 8 bits.
    """
    return {
        "shear_x": _up_to(shear),
        "shear_y": _up_to(shear),
        "translate_x": _up_to(shift),
        "translate_y": _up_to(shift),
        "rotate": _up_to(degrees),
        "brightness": _around_1(factor),
        "color": _around_1(factor),
        "contrast": _around_1(factor),
        "sharpness": _around_1(factor),
        "posterize": lambda level, sign: 8 - round(level * bits),
        "solarize": lambda level, sign: 255 - math.floor(255 * level),
        "auto_contrast": _nothing,
        "equalize": _nothing,
        "invert": _nothing,
    }


_AUTO = _ranges(shear=0.3, shift=150 / 331, degrees=30, factor=0.9, bits=4)
# AutoAugment (https://arxiv.org/abs/1805.09501), table 9, ImageNet: two operations, each with its
# probability and its magnitude of 0 to 9.
_PAIRS = (
    ("posterize 0.4 8", "rotate 0.6 9"),
    ("solarize 0.6 5", "auto_contrast 0.6 5"),
    ("equalize 0.8 8", "equalize 0.6 3"),
    ("posterize 0.6 7", "posterize 0.6 6"),
    ("equalize 0.4 7", "solarize 0.2 4"),
    ("equalize 0.4 4", "rotate 0.8 8"),
    ("solarize 0.6 3", "equalize 0.6 7"),
    ("posterize 0.8 5", "equalize 1.0 2"),
    ("rotate 0.2 3", "solarize 0.6 8"),
    ("equalize 0.6 8", "posterize 0.4 6"),
    ("rotate 0.8 8", "color 0.4 0"),
    ("rotate 0.4 9", "equalize 0.6 2"),
    ("equalize 0.0 7", "equalize 0.8 8"),
    ("invert 0.6 4", "equalize 1.0 8"),
    ("color 0.6 4", "contrast 1.0 8"),
    ("rotate 0.8 8", "color 1.0 2"),
    ("color 0.8 8", "solarize 0.8 7"),
    ("sharpness 0.4 7", "invert 0.6 8"),
    ("shear_x 0.6 5", "equalize 1.0 9"),
    ("color 0.4 0", "equalize 0.6 3"),
    ("equalize 0.4 7", "solarize 0.2 4"),
    ("solarize 0.6 5", "auto_contrast 0.6 5"),
    ("invert 0.6 4", "equalize 1.0 8"),
    ("color 0.6 4", "contrast 1.0 8"),
    ("equalize 0.8 8", "equalize 0.6 3"),
)


def auto_augment(rng: Random, augment: AugmentConfig) -> Drawn:
    """AutoAugment's policy for ImageNet: one of 25 pairs of operations."""
    ops = []
    for operation in _PAIRS[_one_of(rng, len(_PAIRS))]:
        name, probability, magnitude = operation.split()
        taken, sign = rng.random() < float(probability), _sign(rng)
        if taken:
            ops.append((name, _AUTO[name](int(magnitude) / 9, sign)))
    return tuple(ops)


_TRIVIAL = _ranges(shear=0.99, shift=32 / 224, degrees=135, factor=0.99, bits=6)
_TRIVIAL_NAMES = ("", *(name for name in _TRIVIAL if name != "invert"))  # "": the image as it is


def trivial_augment(rng: Random, augment: AugmentConfig) -> Drawn:
    """TrivialAugment with wide ranges (https://arxiv.org/abs/2103.10158): one operation, at one of
    31 strengths.
    """
    name = _TRIVIAL_NAMES[_one_of(rng, len(_TRIVIAL_NAMES))]
    level, sign = _one_of(rng, 31) / 30, _sign(rng)
    return ((name, _TRIVIAL[name](level, sign)),) if name else ()


def three_augment(rng: Random, augment: AugmentConfig) -> Drawn:
    """3-Augment (https://arxiv.org/abs/2204.07118, section 3): grey, solarized from 128 on, or
    blurred with a radius of 0.1 to 2 pixels.
    """
    names = (("grey", 0.0), ("solarize", 128.0), ("blur", uniform(rng, 0.1, 2.0)))
    return (names[_one_of(rng, 3)],)


POLICIES: dict[str, Callable[[Random, AugmentConfig], Drawn]] = {
    "randaugment": rand_augment,
    "autoaugment": auto_augment,
    "trivialaugment": trivial_augment,
    "three_augment": three_augment,
}
"""Value of `augment.operations` -> the policy."""


def jitter(rng: Random, augment: AugmentConfig) -> Drawn:
    """Colour jitter: brightness, contrast and colour by factors around 1, in a random order."""
    names = ["brightness", "contrast", "color"]
    order = [names.pop(_one_of(rng, len(names))) for _ in range(3)]
    low = max(0.0, 1 - augment.jitter)
    return tuple((name, uniform(rng, low, 1 + augment.jitter)) for name in order)

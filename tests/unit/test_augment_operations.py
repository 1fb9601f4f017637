"""The operations of RandAugment, against timm's."""

from __future__ import annotations

import numpy as np
import pytest
from pictures import BOUNDS, FILL, draws, picture
from PIL import Image
from timm.data import auto_augment as timm_ops

from ghosttrain.config.schema import AugmentConfig
from ghosttrain.data.operations import OPS
from ghosttrain.data.policies import RANDAUGMENT

POSITIVE = ("posterize", "solarize", "solarize_add")


@pytest.mark.parametrize("magnitude", [0.0, 9.0, 10.0])
@pytest.mark.parametrize("std", [0.0, 0.5, 5.0])
def test_every_operation_survives_every_argument_it_can_draw(magnitude, std):
    # More than 20,000 draws of every operation at every magnitude, over the three deviations. All
    # whole-numbered arguments are applied, of the others the extremes and a few.
    augment = AugmentConfig(
        randaugment_ops=200, randaugment_magnitude=magnitude, randaugment_std=std
    )
    drawn: dict[str, list[float]] = {name: [] for name in RANDAUGMENT}
    for d in draws(augment.model_copy(update={"erasing_prob": 0.0}), 1200):
        for name, argument in d.ops:
            drawn[name].append(argument)
    rgb, grey = (np.array(picture(12, 12, mode)) for mode in ("RGB", "L"))
    for name, arguments in drawn.items():
        low, high = BOUNDS[name]
        assert len(arguments) > 6800
        assert low <= min(arguments) + 1e-9 and max(arguments) <= high + 1e-9
        chosen = (
            set(arguments)
            if name in POSITIVE
            else {min(arguments), max(arguments), *arguments[:20]}
        )
        for argument in chosen:
            for image, fill in ((rgb, FILL), (grey, FILL[:1])):
                out = OPS[name](image, argument, fill)
                assert (out.dtype, out.shape) == (image.dtype, image.shape)
    if magnitude == 10:
        assert set(drawn["posterize"]) >= {1}


def test_levels_become_timms_arguments():
    names = {
        "rotate": "Rotate",
        "posterize": "PosterizeIncreasing",
        "solarize": "SolarizeIncreasing",
        "solarize_add": "SolarizeAdd",
        "color": "ColorIncreasing",
        "contrast": "ContrastIncreasing",
        "brightness": "BrightnessIncreasing",
        "sharpness": "SharpnessIncreasing",
        "shear_x": "ShearX",
        "shear_y": "ShearY",
        "translate_x": "TranslateXRel",
        "translate_y": "TranslateYRel",
    }
    assert set(names) | {"auto_contrast", "equalize", "invert"} == set(RANDAUGMENT)
    for name, theirs in names.items():
        to_argument = timm_ops.LEVEL_TO_ARG[theirs]
        for level in (0, 0.5, 3, 7.25, 9, 9.99, 10):
            signed = {to_argument(level, {})[0] for _ in range(40)}
            ours = {RANDAUGMENT[name](level / 10, sign) for sign in (1, -1)}
            if name == "posterize" and level == 10:
                signed = {1}  # timm draws 0 here, and Pillow 13 refuses it
            assert sorted(ours) == pytest.approx(sorted(signed)), (name, level)


@pytest.mark.parametrize("size", [(40, 30), (3, 2), (1, 1)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_operations_compute_what_timms_do(mode, size):
    image, fill = picture(*size, mode), FILL[: 1 if mode == "L" else 3]
    before = np.array(image)
    affine = {"resample": Image.Resampling.BILINEAR, "fillcolor": fill}
    for name, argument, theirs in (
        ("auto_contrast", 0, timm_ops.auto_contrast(image)),
        ("equalize", 0, timm_ops.equalize(image)),
        ("invert", 0, timm_ops.invert(image)),
        ("rotate", -17.5, timm_ops.rotate(image, -17.5, **affine)),
        ("posterize", 2, timm_ops.posterize(image, 2)),
        ("solarize", 77, timm_ops.solarize(image, 77)),
        ("solarize_add", 60, timm_ops.solarize_add(image, 60)),
        ("color", 1.7, timm_ops.color(image, 1.7)),
        ("contrast", 0.3, timm_ops.contrast(image, 0.3)),
        ("brightness", 1.4, timm_ops.brightness(image, 1.4)),
        ("sharpness", 0.1, timm_ops.sharpness(image, 0.1)),
        ("shear_x", 0.25, timm_ops.shear_x(image, 0.25, **affine)),
        ("shear_y", -0.11, timm_ops.shear_y(image, -0.11, **affine)),
        ("shear_x", -0.3, timm_ops.shear_x(image, -0.3, **affine)),
        ("shear_y", 0.3, timm_ops.shear_y(image, 0.3, **affine)),
        ("color", 0.2, timm_ops.color(image, 0.2)),
        ("contrast", 1.9, timm_ops.contrast(image, 1.9)),
        ("brightness", 0.1, timm_ops.brightness(image, 0.1)),
        ("sharpness", 1.9, timm_ops.sharpness(image, 1.9)),
        *(  # by whole pixels
            (f"translate_{axis}", share, move(image, share, **affine))
            for axis, move, length in (
                ("x", timm_ops.translate_x_rel, size[0]),
                ("y", timm_ops.translate_y_rel, size[1]),
            )
            for share in (round(0.3 * length) / length, round(-0.45 * length) / length)
        ),
    ):
        ours = OPS[name](before, argument, fill)
        apart = np.abs(ours.astype(int) - np.asarray(theirs))
        most = 1 if "shear" in name else 0  # mixed in float32, Pillow's in float64, then cut off
        assert apart.max() <= most and apart.mean() < 0.01, name
        assert ours.flags.writeable and not np.shares_memory(ours, before), name
        assert (before == np.asarray(image)).all(), name

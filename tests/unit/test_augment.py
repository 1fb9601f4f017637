from __future__ import annotations

import math
import pickle
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy import stats
from timm.data import auto_augment as timm_ops
from torchvision import transforms as tv

from ghosttrain.config.policy import validate_policy
from ghosttrain.config.schema import AugmentConfig, DataConfig
from ghosttrain.data.augment import (
    OPS,
    VERSION,
    Draw,
    apply,
    draw,
    eval_transform,
    mix_batch,
    normalise,
    train_transform,
)
from ghosttrain.data.decode import open_image
from ghosttrain.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "augment"
FILL = (124, 116, 104)
POSITIVE = ("posterize", "solarize", "solarize_add")


def picture(width=90, height=70, mode="RGB"):
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = [np.sin(x * f + y * g) for f, g in ((9, 2), (3, 11), (5, 5))]
    pixels = 128 + 90 * np.stack(waves, -1) + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def draws(augment, n, flip=True, width=500, height=375):
    return [draw(augment, flip, width, height, 0, i) for i in range(n)]


# --- draws ------------------------------------------------------------------------------------


def test_a_draw_is_a_function_of_its_arguments_and_touches_no_global_state():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = draws(AugmentConfig(), 200)
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    assert draws(AugmentConfig(), 200) == first
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    transform = train_transform(DataConfig(train_size=16), AugmentConfig())
    for i in range(40):
        transform(picture, 0, i)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_seed_draw_number_and_index_each_change_the_draw():
    seen = {
        draw(AugmentConfig(seed=s), True, 50, 50, e, i).box
        for s in range(5)
        for e in range(5)
        for i in range(5)
    }
    assert len(seen) == 125


def test_switching_one_ingredient_off_leaves_the_others():
    full = draws(AugmentConfig(), 300)
    for augment, flip, off in (
        (AugmentConfig(randaugment_ops=0), True, "ops"),
        (AugmentConfig(erasing_prob=0.0), True, "erase"),
        (AugmentConfig(), False, "flip"),
        (AugmentConfig(scale_min=0.5), True, "box"),
    ):
        for a, b in zip(full, draws(augment, 300, flip), strict=True):
            for name in {"box", "flip", "ops", "erase"} - {off}:
                assert getattr(a, name) == getattr(b, name)
    assert 110 < sum(d.flip for d in full) < 190
    assert not any(d.flip for d in draws(AugmentConfig(), 300, flip=False))


def test_only_proportions_matter():
    for i in range(50):
        small, large = (draw(AugmentConfig(), True, 500 * k, 375 * k, 0, i) for k in (1, 8))
        assert small == large


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (1000, 300)])
def test_crops_are_distributed_as_torchvisions(width, height):
    n = 4000
    torch.manual_seed(0)
    blank = torch.zeros(1, height, width)
    params = [tv.RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]
    top, left, h, w = np.array(params, dtype=float).T
    box = np.array([d.box for d in draws(AugmentConfig(), n, width=width, height=height)])
    w2, h2 = (box[:, 2] - box[:, 0]) * width, (box[:, 3] - box[:, 1]) * height
    jitter = np.random.default_rng(0).uniform(-0.5, 0.5, (2, n))  # torchvision's are whole pixels
    pairs = [(w * h, (w2 * h2).round()), ((w + jitter[0]) / (h + jitter[1]), w2 / h2)]
    pairs += [(left, (box[:, 0] * width).round()), (top, (box[:, 1] * height).round())]
    for theirs, ours in pairs:
        assert stats.ks_2samp(theirs, ours).statistic < 1.95 * math.sqrt(2 / n)  # p > 0.001
    assert box.min() >= 0 and box.max() <= 1


@pytest.mark.parametrize(("width", "height"), [(1000, 20), (20, 1000), (7, 2000), (1, 1)])
def test_images_that_no_crop_fits_keep_the_largest_central_one(width, height):
    augment = AugmentConfig(scale_min=0.9)
    _, _, h, w = tv.RandomResizedCrop.get_params(
        torch.zeros(1, height, width), [0.9, 1.0], [3 / 4, 4 / 3]
    )
    for d in draws(augment, 20, width=width, height=height):
        left, top, right, bottom = d.box
        if width != height:
            assert ((right - left) * width, (bottom - top) * height) == pytest.approx(
                (w, h), abs=0.5
            )
            assert (left, top) == pytest.approx((1 - right, 1 - bottom))
        assert apply(picture(width, height), d, 16, "bicubic", FILL).shape == (3, 16, 16)


def test_scale_of_the_whole_image_and_one_ratio_keep_everything():
    for d in draws(
        AugmentConfig(scale_min=1.0, ratio_min=1.0, ratio_max=1.0), 20, width=64, height=64
    ):
        assert d.box == (0, 0, 1, 1)


def test_erasing_takes_a_fiftieth_to_a_third_at_its_probability():
    n = 8000
    boxes = [d.erase for d in draws(AugmentConfig(erasing_prob=0.25), n) if d.erase]
    assert abs(len(boxes) / n - 0.25) < 0.02
    left, top, right, bottom = np.array(boxes).T
    area, ratio = (right - left) * (bottom - top), (right - left) / (bottom - top)
    assert 0.02 <= area.min() < 0.03 and 0.32 < area.max() <= 1 / 3
    assert 0.3 <= ratio.min() < 0.35 and 3 < ratio.max() <= 1 / 0.3 + 1e-9
    assert stats.kstest(area, stats.uniform(0.02, 1 / 3 - 0.02).cdf).statistic < 0.06
    assert min(left.min(), top.min()) >= 0 and max(right.max(), bottom.max()) <= 1
    assert all(d.erase for d in draws(AugmentConfig(erasing_prob=1.0), 500))
    assert not any(d.erase for d in draws(AugmentConfig(erasing_prob=0.0), 500))


def test_randaugment_draws_every_operation_equally_often():
    n = 15_000
    counts = dict.fromkeys(OPS, 0)
    for d in draws(AugmentConfig(erasing_prob=0.0), n):
        assert len(d.ops) <= 2
        for name, _ in d.ops:
            counts[name] += 1
    assert len(OPS) == 15
    assert abs(sum(counts.values()) / n - 1) < 0.03  # two operations, each skipped half of the time
    assert stats.chisquare(list(counts.values())).pvalue > 0.001


def test_policy_none_is_the_central_square():
    d = draw(AugmentConfig(policy="none"), True, 200, 100, 3, 4)
    assert d == Draw(box=(0.25, 0.0, 0.75, 1.0))


# --- the operations ---------------------------------------------------------------------------

BOUNDS = {
    "rotate": (-30, 30),
    "posterize": (1, 4),
    "solarize": (0, 256),
    "solarize_add": (0, 110),
    "color": (0.1, 1.9),
    "contrast": (0.1, 1.9),
    "brightness": (0.1, 1.9),
    "sharpness": (0.1, 1.9),
    "shear_x": (-0.3, 0.3),
    "shear_y": (-0.3, 0.3),
    "translate_x": (-0.45, 0.45),
    "translate_y": (-0.45, 0.45),
    "auto_contrast": (0, 0),
    "equalize": (0, 0),
    "invert": (0, 0),
}


@pytest.mark.parametrize("magnitude", [0.0, 9.0, 10.0])
@pytest.mark.parametrize("std", [0.0, 0.5, 5.0])
def test_every_operation_survives_every_argument_it_can_draw(magnitude, std):
    # More than 20,000 draws of every operation at every magnitude, over the three deviations. All
    # whole-numbered arguments are applied, of the others the extremes and a few.
    augment = AugmentConfig(
        randaugment_ops=200, randaugment_magnitude=magnitude, randaugment_std=std
    )
    drawn: dict[str, list[float]] = {name: [] for name in OPS}
    for d in draws(augment.model_copy(update={"erasing_prob": 0.0}), 1200):
        for name, argument in d.ops:
            drawn[name].append(argument)
    rgb, grey = picture(12, 12), picture(12, 12, "L")
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
                out = OPS[name][1](image, argument, fill)
                assert (out.mode, out.size) == (image.mode, image.size)
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
    assert set(names) | {"auto_contrast", "equalize", "invert"} == set(OPS)
    for name, theirs in names.items():
        to_argument = timm_ops.LEVEL_TO_ARG[theirs]
        for level in (0, 0.5, 3, 7.25, 9, 9.99, 10):
            signed = {to_argument(level, {})[0] for _ in range(40)}
            ours = {OPS[name][0](level / 10, sign) for sign in (1, -1)}
            if name == "posterize" and level == 10:
                signed = {1}  # timm draws 0 here, and Pillow 13 refuses it
            assert sorted(ours) == pytest.approx(sorted(signed)), (name, level)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_operations_compute_what_timms_do(mode):
    image, fill = picture(40, 30, mode), FILL[: 1 if mode == "L" else 3]
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
        ("translate_x", 0.3, timm_ops.translate_x_rel(image, 0.3, **affine)),  # 12 pixels
        ("translate_y", -0.2, timm_ops.translate_y_rel(image, -0.2, **affine)),  # 6 pixels
    ):
        ours = OPS[name][1](image, argument, fill)
        assert (np.asarray(ours) == np.asarray(theirs)).all(), name


# --- apply ------------------------------------------------------------------------------------


def chw(image):
    return torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1).permute(2, 0, 1)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_empty_draw_of_an_image_of_the_right_size_is_the_image(mode):
    image = picture(32, 32, mode)
    out = apply(image, Draw(), 32, "bicubic", FILL)
    assert out.dtype == torch.uint8 and torch.equal(out, chw(image))
    assert torch.equal(apply(image, Draw(flip=True), 32, "bicubic", FILL), chw(image).flip(2))
    out.zero_()  # the caller's own copy
    assert np.asarray(image).any()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [24, 64, 150])
def test_cropping_and_resizing_agree_with_pillow(mode, interpolation, size):
    image = picture(90, 70, mode)
    out = apply(image, Draw(box=(1 / 9, 1 / 7, 8 / 9, 6 / 7)), size, interpolation, FILL)
    resample = Image.Resampling[interpolation.upper()]
    theirs = chw(image.crop((10, 10, 80, 60)).resize((size, size), resample))
    assert (out.int() - theirs.int()).abs().max() <= 2


def test_a_draw_replayed_at_another_size_shows_the_same():
    image = picture(300, 200)
    for i in range(40):
        d = draw(AugmentConfig(erasing_prob=0.0, scale_min=0.3), True, 300, 200, 0, i)
        geometric = all(
            name in BOUNDS and name not in ("equalize", "sharpness") for name, _ in d.ops
        )
        small = apply(image, d, 32, "bilinear", FILL).double()
        large = apply(image, d, 96, "bilinear", FILL).double()
        large = large.reshape(3, 32, 3, 32, 3).mean((2, 4))
        assert not geometric or (small - large).abs().mean() < 14, d


def test_erasing_fills_its_box_with_uniform_noise_and_nothing_else():
    image = picture(200, 200)
    d = Draw(erase=(0.1, 0.2, 0.6, 0.9), noise_seed=5)
    out = apply(image, d, 200, "bicubic", FILL)
    same = (out == chw(image)).all(0)
    assert same[:40].all() and same[180:].all() and same[:, :20].all() and same[:, 120:].all()
    hole = out[:, 40:180, 20:120].numpy()
    assert stats.kstest(hole.ravel() / 256, "uniform").statistic < 0.01
    assert np.abs(np.corrcoef(hole.reshape(3, -1)) - np.eye(3)).max() < 0.05  # channels differ
    assert torch.equal(apply(image, d, 200, "bicubic", FILL), out)
    other = apply(image, Draw(erase=d.erase, noise_seed=6), 200, "bicubic", FILL)
    assert not torch.equal(other, out)


def test_operations_follow_in_order():
    image = picture(32, 32)
    d = Draw(ops=(("solarize", 100.0), ("invert", 0.0)), flip=True)
    expected = chw(timm_ops.invert(timm_ops.solarize(image, 100))).flip(2)
    assert torch.equal(apply(image, d, 32, "bicubic", FILL), expected)


# --- transforms -------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["compact", "with_mixup", "none"])
@pytest.mark.parametrize(("in_chans", "mode"), [(3, "RGB"), (1, "L"), (3, "L"), (1, "RGB")])
def test_training_transform_of_any_image(policy, in_chans, mode):
    data = DataConfig(
        train_size=24, in_chans=in_chans, mean=(0.5,) * in_chans, std=(0.2,) * in_chans
    )
    transform = pickle.loads(pickle.dumps(train_transform(data, AugmentConfig(policy=policy))))
    for i, (width, height) in enumerate([(50, 40), (8, 8), (1, 1), (300, 2), (24, 24)] * 12):
        (out,) = transform(partial(picture, width, height, mode), 2, i)
        assert (out.shape, out.dtype) == ((in_chans, 24, 24), torch.uint8)


def test_large_jpegs_give_the_same_crop_from_fewer_pixels(tmp_path):
    image = picture(800, 600)
    image = image.resize((100, 75)).resize((800, 600), Image.Resampling.BICUBIC)  # smooth
    image.save(tmp_path / "a.jpg", quality=95)
    image.save(tmp_path / "a.png")
    augment = AugmentConfig(scale_min=0.3, randaugment_ops=0, erasing_prob=0.0)
    transform = train_transform(DataConfig(train_size=64), augment)
    for i in range(6):
        lazy = open_image(str(tmp_path / "a.jpg"))
        (from_jpeg,) = transform([lazy].pop, 0, i)
        (from_png,) = transform(partial(open_image, str(tmp_path / "a.png")), 0, i)
        left, _, right, _ = draw(augment, True, 800, 600, 0, i).box
        assert lazy.width < 800 and lazy.width * (right - left) >= 2 * 64
        assert (from_jpeg.int() - from_png.int()).abs().double().mean() < 3


@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.6])
@pytest.mark.parametrize(("width", "height"), [(90, 70), (70, 90), (64, 64), (301, 77), (20, 33)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_agrees_with_torchvision(crop_pct, width, height, interpolation):
    data = DataConfig(eval_size=56, crop_pct=crop_pct, interpolation=interpolation)
    theirs = tv.Compose(
        [tv.Resize(int(56 / crop_pct), tv.InterpolationMode(interpolation)), tv.CenterCrop(56)]
    )
    image = picture(width, height)
    (ours,) = pickle.loads(pickle.dumps(eval_transform(data)))(lambda: image, 0, 0)
    assert ours.shape == (3, 56, 56)
    assert (ours.int() - chw(theirs(image)).int()).abs().max() <= 2


# --- views --------------------------------------------------------------------------------------


class Opened:
    """Opens a file, and counts how often."""

    def __init__(self, path):
        self.path, self.times = str(path), 0

    def __call__(self):
        self.times += 1
        return open_image(self.path)


VIEWS = ((160, "bilinear"), (300, "bicubic"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Photos by name: 1600x1200, of which a JPEG decodes smaller for 64 pixels than for 160."""
    folder = tmp_path_factory.mktemp("photos")
    for mode in ("RGB", "L"):
        photo = picture(1600, 1200, mode)
        photo.save(folder / f"{mode}.jpg", quality=90)
        photo.resize((400, 300)).save(folder / f"{mode}.png")
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("name", ["RGB.jpg", "L.jpg", "RGB.png", "L.png"])
def test_a_view_is_the_student_of_its_size_and_leaves_the_students_pixels(files, name, in_chans):
    data = DataConfig(
        train_size=64, in_chans=in_chans, mean=(0.4,) * in_chans, std=(0.2,) * in_chans
    )
    augment = AugmentConfig(erasing_prob=0.5)
    viewing = pickle.loads(pickle.dumps(train_transform(data, augment, VIEWS)))
    times = set()
    for i in range(12):
        opened = Opened(files[name])
        student, *views = viewing(opened, 1, i)
        times.add(opened.times)
        assert torch.equal(student, train_transform(data, augment)(opened, 1, i)[0])
        for (side, interpolation), view in zip(VIEWS, views, strict=True):
            own = data.model_copy(update={"train_size": side, "interpolation": interpolation})
            assert (view.shape, view.dtype) == ((in_chans, side, side), torch.uint8)
            assert torch.equal(view, train_transform(own, augment)(opened, 1, i)[0])
    # Opened again only for another reduction: never a PNG, up to twice more this JPEG.
    assert times == {1} if name.endswith("png") else max(times) > 1


def test_an_image_is_decoded_once_where_one_reduction_suffices_for_all(files):
    once, twice = Opened(files["RGB.jpg"]), Opened(files["RGB.jpg"])
    whole = AugmentConfig(policy="none")
    # 1200 pixels for the crop: reduced 4 times for 2 * 140, twice for 2 * 280.
    train_transform(DataConfig(train_size=140), whole, ((150, "bicubic"), (145, "bilinear")))(
        once, 0, 0
    )
    train_transform(DataConfig(train_size=140), whole, ((280, "bicubic"), (290, "bilinear")))(
        twice, 0, 0
    )
    assert (once.times, twice.times) == (1, 2)


def test_a_view_has_the_students_crop_flip_and_erased_box(files):
    erased = AugmentConfig(erasing_prob=1.0, randaugment_ops=0)
    intact = AugmentConfig(erasing_prob=0.0, randaugment_ops=0)  # the same draws but for the box
    opened, flips = Opened(files["RGB.jpg"]), set()
    for i in range(12):
        (student, view), (student_intact, view_intact) = (
            train_transform(DataConfig(train_size=64), augment, ((192, "bilinear"),))(opened, 0, i)
            for augment in (erased, intact)
        )
        boxes = [(student != student_intact).any(0), (view != view_intact).any(0)]
        small, large = (
            np.array([(at.min(), at.max() + 1) for at in np.nonzero(box.numpy())]) for box in boxes
        )
        assert np.abs(3 * small - large).max() <= 3  # one of the student's pixels
        assert 0.01 < boxes[0].double().mean() < 0.4

        alike = agreement(student_intact, view_intact)
        assert alike > 0.99
        assert agreement(student_intact, view_intact.flip(2)) < 0.95
        assert agreement(student_intact, view_intact.roll(12, 1)) < 0.95
        flips.add(draw(intact, True, 1600, 1200, 0, i).flip)
    assert flips == {False, True}


def agreement(student, view):
    """Correlation of a student's pixels with those of a view three times as large."""
    small = view.double().unfold(1, 3, 3).unfold(2, 3, 3).mean((-1, -2))
    return np.corrcoef(student.ravel(), small.ravel())[0, 1]


@pytest.mark.parametrize("name", ["RGB.jpg", "L.png"])
def test_views_of_evaluation_are_its_centre_crops_at_their_size(files, name):
    data, opened = DataConfig(eval_size=64, crop_pct=0.8), Opened(files[name])
    transform = pickle.loads(pickle.dumps(eval_transform(data, VIEWS)))
    student, *views = transform(opened, 0, 0)
    assert opened.times == 1
    assert torch.equal(student, eval_transform(data)(opened, 0, 0)[0])
    for (side, interpolation), view in zip(VIEWS, views, strict=True):
        own = data.model_copy(update={"eval_size": side, "interpolation": interpolation})
        assert torch.equal(view, eval_transform(own)(opened, 0, 0)[0])
        resample = tv.InterpolationMode(interpolation)
        theirs = tv.Compose([tv.Resize(int(side / 0.8), resample), tv.CenterCrop(side)])
        assert (view.int() - chw(theirs(opened().convert("RGB"))).int()).abs().max() <= 2


def test_normalise_is_float64s_to_rounding():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, 3, 1, 1)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    out = normalise(images, torch.tensor(mean), torch.tensor(std))
    expected = (images.double() / 255 - torch.tensor(mean).double()[:, None, None]) / torch.tensor(
        std
    ).double()[:, None, None]
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
    assert images[0, 0, 15, 15] == 255  # the pixels themselves stay


# --- the policy -------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["compact", "none"])
@pytest.mark.parametrize(("key", "name"), [("mixup_alpha", "Mixup"), ("cutmix_alpha", "CutMix")])
def test_mixing_is_refused_with_the_reason(policy, key, name):
    augment = AugmentConfig(policy=policy, **{key: 0.2})
    with pytest.raises(UserError) as raised:
        validate_policy(augment)
    for part in (
        f"augment.{key}=0.2",
        name,
        f"augment={policy}",
        "2404.11202",
        "augment=with_mixup",
    ):
        assert part in str(raised.value)


def test_mixing_is_allowed_where_it_is_named():
    validate_policy(AugmentConfig(policy="with_mixup", mixup_alpha=0.8, cutmix_alpha=1.0))
    validate_policy(AugmentConfig())


def test_the_policy_is_checked_without_torch():
    code = "import sys, ghosttrain.config.policy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CONF.parents[1]).returncode == 0


@pytest.mark.parametrize("name", ["compact", "with_mixup", "none"])
def test_every_configuration_is_valid(name):
    augment = AugmentConfig.model_validate(yaml.safe_load((CONF / f"{name}.yaml").read_text()))
    validate_policy(augment)
    assert augment.policy == name
    mixing = {"policy", "mixup_alpha", "cutmix_alpha"}
    assert name == "none" or augment.model_dump(exclude=mixing) == AugmentConfig().model_dump(
        exclude=mixing
    )


# --- what stored teacher answers belong to ------------------------------------------------------

CHANGED = "the pixels or draws of an image changed: raise augment.VERSION, then keep the new ones"
GOLDEN_VERSION = 1
GOLDEN_DRAWS = {  # (draw, index) of a 4:3 image under the default policy
    (0, 2): (
        (0.028700553261294226, 0.30476311760229435, 0.438614219084846, 0.9902350594421075),
        True,
        (),
        None,
        0,
    ),
    (0, 3): (
        (0.3787169099765851, 0.004657140265855309, 0.997171600701271, 0.8869867139540073),
        False,
        (),
        (0.1912113551748825, 0.14025739902845638, 0.5854569039924723, 0.48152690122031083),
        7870273769707448130,
    ),
    (0, 15): (
        (0.3184998313827802, 0.24635850306534005, 0.8979783910782682, 0.8351155209973735),
        True,
        (("color", 1.8111468822789765),),
        (0.01964215190463236, 0.3085082086151656, 0.7887205811170437, 0.6437097659380083),
        8042204543914675962,
    ),
    (1, 12): (
        (0.36561733864788504, 0.06598400437213994, 0.985108349026904, 0.8727643074040207),
        True,
        (("auto_contrast", 0.0), ("rotate", -25.02204694608072)),
        None,
        0,
    ),
    (1, 17): (
        (0.19122614156768994, 0.026700803735784734, 0.6596593936297128, 0.8378241203489708),
        False,
        (("translate_y", -0.37220058429416975), ("shear_y", 0.26872742405035566)),
        None,
        0,
    ),
    (599, 1281166): (
        (0.1783212963726971, 0.16712208695295386, 0.7301586279881904, 0.8457565183073564),
        True,
        (("solarize", 19),),
        None,
        0,
    ),
}
GOLDEN_PIXELS = {  # rows, columns, channels of the 8x8 student
    (0, 3): (
        "6b11e38214e09516d9a811ccbd16ccca14c7e011bdf217b3702edb842fd2633f94094461a6980bce"
        "2bb2e330b1f42cab6f4ac88445c4ba955d980eb29c8a63cd4ba9e246a4f3479e7060b98465b4578f"
        "cb2d3ad0f9ce50cd61a3e36395f366926f80ae827da8957c9fa880a0b97b97cc7d8de17f8bf17a87"
        "6d969c839697969b96a99593bc9885cc9a7de2957cf39a7a70b29284b68b97b080aab47cbbb47ece"
        "b079e3b570f4b3666fcf8b84c98197cd74aace6dbcc96ecdcf6ce2cc5ff3ca59"
    ),
    (0, 15): (
        "ff1dc5ff28cbf122e6d428eeb533fc9c2eff7b36ff613cffff31b1ff3bc1e740c6cf3cd9af48e592"
        "4ced7548fb5855ffd92c06035b94d37940dd48c21392db0e884a6d66e95465ec4ad86d7a3a8f4a7b"
        "c615ecbb1b7e74d1cc766383cf4282d74b715201e0b049fdedfbe3b080af81d0d5415896b1469dcb"
        "ff934be39d54c8a266af9d7c91a88174ae8c59a99c39b5b1f9b03dddae4ebfbb54a6bd538dba616e"
        "c7754fc88935c58ff1cd1bd3ca37bdcb3a9fd93984d54a68d76344e3752de181"
    ),
    (1, 12): (
        "7c7468ff3089e92596c616a8a508be8806ce7c74687c74687c7468f95476d9428eb4389b9825b078"
        "1ac95909e03806eefb8059ea7565c8647fa757958b45a86a39bc4a27d1291ce6f8a246d89656b584"
        "689877817b67975b58a93949bb173ad1ecc32fcab33da7a6528794716889874a75922b6daa0758bc"
        "dee520bad13a9cc6497db3625ba775389782178a990179a9ccfb17aaf22b8ee5376dd5414ec75a2e"
        "b76d09a9867c74687c74687c74687ffa265ff7303fe64a1ddb6303c7737c7468"
    ),
    (1, 17): (
        "7c74687c74687c74687c74687c74687c74687c74687c72697c74687c74687c74687c74687b608082"
        "4a9e9031baa416ca74677a6a509e683ab96b1cd77b1edc8926d39829cda533c4421bf05025e75e28"
        "df6a2fdb7b38d1893bc89845c1a64cb74237dc503ad55e41d56a4ccb7b4cc08956ba985bb3a55eae"
        "434cce5052c85f5bc56a5dbb7b67b4886eac9671a3a57da24263c64f6dbf5c70b56879ae7b7eaf87"
        "78a57c74687c7468417ec14e7bba7c74687c74687c74687c74687c74687c7468"
    ),
}

GOLDEN_OPS = {  # the argument that draw 0 of image 0 has of many, and row 5 of an 8x8 image by it
    "auto_contrast": (0.0, "00b1a142bb8960b47e7fac669eb74cbcb041dbba4cfab33a"),
    "equalize": (0.0, "00a6c03ab0b055a9a970a2998bac87a6a580c1af87dca87b"),
    "invert": (0.0, "ff593fc54f4faa56568f5d66745378595a7f3e5078235784"),
    "rotate": (-27.37103310020408, "2ad89658bf9868b68f84ab8a9b9b8dbc8e90d17c8bd86e89"),
    "posterize": (1, "008080008080008080008080808080808080808080808000"),
    "solarize": (18, "00593fc54f4faa56568f5d66745378595a7f3e5078235784"),
    "solarize_add": (105, "69a6c0a3b0b0bea9a9d9a2998bac87a6a580c1af87dca8e4"),
    "color": (1.661690987102583, "00c5f003c7c72db9b959ac9d7eb577a9a76accae6bf7a156"),
    "contrast": (0.1938280953114654, "6484897086867585857a84827f867e84847d8a867e8f857c"),
    "brightness": (0.1231873240797482, "0014170715150a14140d131211151014140f1715101b140f"),
    "sharpness": (1.7970124810053925, "00a6c041b3b056a9aa709f998bae83a4a27dbfb28cdca87b"),
    "shear_x": (0.2967387437796534, "4babab66a49e81a88d9ca782b7ab84d2aa7f7c74687c7468"),
    "shear_y": (-0.25550853683266384, "00a3c133a0b9518fae778dae8480a0aa7da5c77797d86a8a"),
    "translate_x": (0.42126063919365614, "70a2998bac87a6a580c1af87dca87b7c74687c74687c7468"),
    "translate_y": (-0.37113109367111746, "0050ef2349d84642cf694ccf8c45c1af4fb8d248b8d641aa"),
}


def golden_picture():
    """Whole numbers only: the same picture everywhere."""
    y, x = np.mgrid[:60, :80]
    channels = (x * 3 + (x * y) % 31, y * 4 + (x + y) % 17, 255 - x - 2 * y + (x ^ y) % 23)
    return Image.fromarray(np.stack(channels, -1).clip(0, 255).astype(np.uint8))


def test_draws_stay_what_they_were():
    assert VERSION == GOLDEN_VERSION, "keep the draws and pixels of this version in this test"
    for (draw_number, index), (box, flip, ops, erase, noise_seed) in GOLDEN_DRAWS.items():
        drawn = draw(AugmentConfig(), True, 500, 375, draw_number, index)
        # Logarithms and cosines may differ in their last bit.
        assert drawn.box == pytest.approx(box, abs=1e-12), CHANGED
        assert [name for name, _ in drawn.ops] == [name for name, _ in ops], CHANGED
        arguments = [argument for _, argument in ops]
        assert [argument for _, argument in drawn.ops] == pytest.approx(arguments, abs=1e-9), (
            CHANGED
        )
        assert (drawn.erase is None) is (erase is None), CHANGED
        assert erase is None or drawn.erase == pytest.approx(erase, abs=1e-12), CHANGED
        assert (drawn.flip, drawn.noise_seed) == (flip, noise_seed), CHANGED


def test_pixels_stay_what_they_were():
    transform = train_transform(DataConfig(train_size=8), AugmentConfig())
    for (draw_number, index), digits in GOLDEN_PIXELS.items():
        (out,) = transform(golden_picture, draw_number, index)
        before = np.frombuffer(bytes.fromhex(digits), np.uint8).reshape(8, 8, 3)
        # Resampling may differ by a level between library versions, which operations enhance.
        difference = np.abs(out.permute(1, 2, 0).numpy().astype(int) - before)
        assert difference.max() <= 4 and difference.mean() <= 1, CHANGED


def test_operations_stay_what_they_were():
    arguments = dict(draw(AugmentConfig(randaugment_ops=150), True, 500, 375, 0, 0).ops)
    image = Image.fromarray(np.asarray(golden_picture())[::8, ::10])
    assert arguments.keys() == GOLDEN_OPS.keys(), CHANGED
    for name, (argument, digits) in GOLDEN_OPS.items():
        assert arguments[name] == pytest.approx(argument, abs=1e-9), CHANGED
        out = apply(image, Draw(ops=((name, argument),)), 8, "bicubic", FILL).permute(1, 2, 0)
        before = np.frombuffer(bytes.fromhex(digits), np.uint8).reshape(8, 3)
        assert np.abs(out[5].numpy().astype(int) - before).max() <= 1, CHANGED


# --- Mixup and CutMix -------------------------------------------------------------------------


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
        own = (out == images).all(1)
        other = (out == images.roll(1, 0)).all(1)
        assert (own ^ other).all()  # every pixel is the image's or its neighbour's
        assert (other == other[:1]).all()  # in the same box for the whole batch
        rows, columns = other[0].any(1), other[0].any(0)
        assert other[0].sum() == rows.sum() * columns.sum()
        share = own[0].double().mean()
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
            own, own_view = ((x != y).any(1)[0] for x, y in ((student, images), (mixed_view, view)))
            for axis in (0, 1):
                small, large = own.any(axis).nonzero(), own_view.any(axis).nonzero()
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

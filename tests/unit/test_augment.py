from __future__ import annotations

import math
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy import stats
from timm.data import auto_augment as timm_ops
from torchvision import transforms as tv

from ghosttrain.config.errors import UserError
from ghosttrain.config.policy import check_policy
from ghosttrain.config.schema import Augment, Data
from ghosttrain.data.augment import (
    OPS,
    Draw,
    apply,
    draw,
    eval_transform,
    mix_batch,
    normalise,
    train_transform,
)
from ghosttrain.data.decode import open_image

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
    first = draws(Augment(), 200)
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    assert draws(Augment(), 200) == first
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    transform = train_transform(Data(train_size=16), Augment())
    for i in range(40):
        transform(picture(), 0, i)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_seed_draw_number_and_index_each_change_the_draw():
    seen = {
        draw(Augment(seed=s), True, 50, 50, e, i).box
        for s in range(5)
        for e in range(5)
        for i in range(5)
    }
    assert len(seen) == 125


def test_draws_stay_what_they_were():
    drawn = draw(Augment(erasing_prob=1.0, randaugment_ops=4), True, 500, 375, 3, 14)
    assert drawn.box == pytest.approx((0.15901572, 0.06001146, 0.421146398, 0.372810285))
    assert drawn.flip is False
    assert dict(drawn.ops) == pytest.approx(
        {"contrast": 0.166374923, "equalize": 0.0, "posterize": 1}
    )
    assert drawn.erase == pytest.approx((0.069660528, 0.263723198, 0.713892254, 0.738740235))
    assert drawn.noise_seed == 1184009579922202983


def test_switching_one_ingredient_off_leaves_the_others():
    full = draws(Augment(), 300)
    for augment, flip, off in (
        (Augment(randaugment_ops=0), True, "ops"),
        (Augment(erasing_prob=0.0), True, "erase"),
        (Augment(), False, "flip"),
        (Augment(scale_min=0.5), True, "box"),
    ):
        for a, b in zip(full, draws(augment, 300, flip), strict=True):
            for name in {"box", "flip", "ops", "erase"} - {off}:
                assert getattr(a, name) == getattr(b, name)
    assert 110 < sum(d.flip for d in full) < 190
    assert not any(d.flip for d in draws(Augment(), 300, flip=False))


def test_only_proportions_matter():
    for i in range(50):
        small, large = (draw(Augment(), True, 500 * k, 375 * k, 0, i) for k in (1, 8))
        assert small == large


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (1000, 300)])
def test_crops_are_distributed_as_torchvisions(width, height):
    n = 4000
    torch.manual_seed(0)
    blank = torch.zeros(1, height, width)
    params = [tv.RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]
    top, left, h, w = np.array(params, dtype=float).T
    box = np.array([d.box for d in draws(Augment(), n, width=width, height=height)])
    w2, h2 = (box[:, 2] - box[:, 0]) * width, (box[:, 3] - box[:, 1]) * height
    jitter = np.random.default_rng(0).uniform(-0.5, 0.5, (2, n))  # torchvision's are whole pixels
    pairs = [(w * h, (w2 * h2).round()), ((w + jitter[0]) / (h + jitter[1]), w2 / h2)]
    pairs += [(left, (box[:, 0] * width).round()), (top, (box[:, 1] * height).round())]
    for theirs, ours in pairs:
        assert stats.ks_2samp(theirs, ours).statistic < 1.95 * math.sqrt(2 / n)  # p > 0.001
    assert box.min() >= 0 and box.max() <= 1


@pytest.mark.parametrize(("width", "height"), [(1000, 20), (20, 1000), (7, 2000), (1, 1)])
def test_images_that_no_crop_fits_keep_the_largest_central_one(width, height):
    augment = Augment(scale_min=0.9)
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
    for d in draws(Augment(scale_min=1.0, ratio_min=1.0, ratio_max=1.0), 20, width=64, height=64):
        assert d.box == (0, 0, 1, 1)


def test_erasing_takes_a_fiftieth_to_a_third_at_its_probability():
    n = 8000
    boxes = [d.erase for d in draws(Augment(erasing_prob=0.25), n) if d.erase]
    assert abs(len(boxes) / n - 0.25) < 0.02
    left, top, right, bottom = np.array(boxes).T
    area, ratio = (right - left) * (bottom - top), (right - left) / (bottom - top)
    assert 0.02 <= area.min() < 0.03 and 0.32 < area.max() <= 1 / 3
    assert 0.3 <= ratio.min() < 0.35 and 3 < ratio.max() <= 1 / 0.3 + 1e-9
    assert stats.kstest(area, stats.uniform(0.02, 1 / 3 - 0.02).cdf).statistic < 0.06
    assert min(left.min(), top.min()) >= 0 and max(right.max(), bottom.max()) <= 1
    assert all(d.erase for d in draws(Augment(erasing_prob=1.0), 500))
    assert not any(d.erase for d in draws(Augment(erasing_prob=0.0), 500))


def test_randaugment_draws_every_operation_equally_often():
    n = 15_000
    counts = dict.fromkeys(OPS, 0)
    for d in draws(Augment(erasing_prob=0.0), n):
        assert len(d.ops) <= 2
        for name, _ in d.ops:
            counts[name] += 1
    assert len(OPS) == 15
    assert abs(sum(counts.values()) / n - 1) < 0.03  # two operations, each skipped half of the time
    assert stats.chisquare(list(counts.values())).pvalue > 0.001


def test_policy_none_is_the_central_square():
    d = draw(Augment(policy="none"), True, 200, 100, 3, 4)
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
    augment = Augment(randaugment_ops=200, randaugment_magnitude=magnitude, randaugment_std=std)
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
        d = draw(Augment(erasing_prob=0.0, scale_min=0.3), True, 300, 200, 0, i)
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
    data = Data(train_size=24, in_chans=in_chans, mean=(0.5,) * in_chans, std=(0.2,) * in_chans)
    transform = pickle.loads(pickle.dumps(train_transform(data, Augment(policy=policy))))
    for i, (width, height) in enumerate([(50, 40), (8, 8), (1, 1), (300, 2), (24, 24)] * 12):
        out = transform(picture(width, height, mode), 2, i)
        assert (out.shape, out.dtype) == ((in_chans, 24, 24), torch.uint8)


def test_large_jpegs_give_the_same_crop_from_fewer_pixels(tmp_path):
    image = picture(800, 600)
    image = image.resize((100, 75)).resize((800, 600), Image.Resampling.BICUBIC)  # smooth
    image.save(tmp_path / "a.jpg", quality=95)
    image.save(tmp_path / "a.png")
    augment = Augment(scale_min=0.3, randaugment_ops=0, erasing_prob=0.0)
    transform = train_transform(Data(train_size=64), augment)
    for i in range(6):
        lazy = open_image(str(tmp_path / "a.jpg"))
        from_jpeg, from_png = (
            transform(lazy, 0, i),
            transform(open_image(str(tmp_path / "a.png")), 0, i),
        )
        left, _, right, _ = draw(augment, True, 800, 600, 0, i).box
        assert lazy.width < 800 and lazy.width * (right - left) >= 2 * 64
        assert (from_jpeg.int() - from_png.int()).abs().double().mean() < 3


@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.6])
@pytest.mark.parametrize(("width", "height"), [(90, 70), (70, 90), (64, 64), (301, 77), (20, 33)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_agrees_with_torchvision(crop_pct, width, height, interpolation):
    data = Data(eval_size=56, crop_pct=crop_pct, interpolation=interpolation)
    theirs = tv.Compose(
        [tv.Resize(round(56 / crop_pct), tv.InterpolationMode(interpolation)), tv.CenterCrop(56)]
    )
    image = picture(width, height)
    ours = pickle.loads(pickle.dumps(eval_transform(data)))(image, 0, 0)
    assert ours.shape == (3, 56, 56)
    assert (ours.int() - chw(theirs(image)).int()).abs().max() <= 2


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
    augment = Augment(policy=policy, **{key: 0.2})
    with pytest.raises(UserError) as raised:
        check_policy(augment)
    for part in (
        f"augment.{key}=0.2",
        name,
        f"augment={policy}",
        "2404.11202",
        "augment=with_mixup",
    ):
        assert part in str(raised.value)
    with pytest.raises(UserError):
        train_transform(Data(), augment)
    with pytest.raises(UserError):
        mix_batch(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), 3, augment, 0, [0, 1])


def test_mixing_is_allowed_where_it_is_named():
    check_policy(Augment(policy="with_mixup", mixup_alpha=0.8, cutmix_alpha=1.0))
    check_policy(Augment())


def test_the_policy_is_checked_without_torch():
    code = "import sys, ghosttrain.config.policy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CONF.parents[1]).returncode == 0


@pytest.mark.parametrize("name", ["compact", "with_mixup", "none"])
def test_every_configuration_is_valid(name):
    augment = Augment.model_validate(yaml.safe_load((CONF / f"{name}.yaml").read_text()))
    check_policy(augment)
    assert augment.policy == name
    mixing = {"policy", "mixup_alpha", "cutmix_alpha"}
    assert name == "none" or augment.model_dump(exclude=mixing) == Augment().model_dump(
        exclude=mixing
    )


# --- Mixup and CutMix -------------------------------------------------------------------------


def batch(n=6, side=16, classes=5):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, side, side, generator=generator)
    return images, torch.arange(n) % classes, classes


def mixed(mixup, cutmix, number=0, indices=(4, 8, 15, 16, 23, 42)):
    images, labels, k = batch()
    augment = Augment(policy="with_mixup", mixup_alpha=mixup, cutmix_alpha=cutmix)
    return mix_batch(images, labels, k, augment, number, indices)


def test_without_alphas_the_images_stay_and_the_targets_are_one_hot():
    images, labels, k = batch()
    for augment in (Augment(), Augment(policy="with_mixup")):
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


def test_shares_of_mixup_follow_the_beta_distribution():
    images, labels = torch.zeros(2, 1, 1, 1), torch.tensor([0, 1])
    for alpha in (0.2, 0.8, 4.0):
        augment = Augment(policy="with_mixup", mixup_alpha=alpha)
        shares = [
            mix_batch(images, labels, 2, augment, e, [0, 1])[1][0, 0].item() for e in range(3000)
        ]
        assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > 0.001


def test_mixing_leaves_the_callers_images_alone():
    images, labels, k = batch()
    for alphas in ({"mixup_alpha": 1.0}, {"cutmix_alpha": 1.0}):
        mix_batch(images, labels, k, Augment(policy="with_mixup", **alphas), 0, range(6))
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

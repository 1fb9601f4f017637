"""Draws of the augmentation, and what they make of an image."""

from __future__ import annotations

import math
import pickle
import random
from functools import partial

import numpy as np
import pytest
import torch
from pictures import BOUNDS, FILL, chw, draws, picture
from PIL import Image
from scipy import stats
from timm.data import auto_augment as timm_ops
from torchvision import transforms as tv

from ghosttrain.config.schema import AugmentConfig, DataConfig
from ghosttrain.data.augment import (
    Draw,
    apply,
    draw,
    eval_transform,
    train_transform,
)
from ghosttrain.data.decode import open_image
from ghosttrain.data.policies import RANDAUGMENT


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
        assert apply(np.array(picture(width, height)), d, 16, "bicubic", FILL).shape == (3, 16, 16)


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
    counts = dict.fromkeys(RANDAUGMENT, 0)
    for d in draws(AugmentConfig(erasing_prob=0.0), n):
        assert len(d.ops) <= 2
        for name, _ in d.ops:
            counts[name] += 1
    assert len(RANDAUGMENT) == 15
    assert abs(sum(counts.values()) / n - 1) < 0.03  # two operations, each skipped half of the time
    assert stats.chisquare(list(counts.values())).pvalue > 0.001


def test_policy_none_is_the_central_square():
    d = draw(AugmentConfig(policy="none"), True, 200, 100, 3, 4)
    assert d == Draw(box=(0.25, 0.0, 0.75, 1.0))


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_empty_draw_of_an_image_of_the_right_size_is_the_image(mode):
    image = picture(32, 32, mode)
    out = apply(np.array(image), Draw(), 32, "bicubic", FILL)
    assert out.dtype == torch.uint8 and torch.equal(out, chw(image))
    flipped = apply(np.array(image), Draw(flip=True), 32, "bicubic", FILL)
    assert torch.equal(flipped, chw(image).flip(2))
    out.zero_()  # the caller's own copy
    assert np.asarray(image).any()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [24, 64, 150])
def test_cropping_and_resizing_agree_with_pillow(mode, interpolation, size):
    image = picture(90, 70, mode)
    out = apply(np.array(image), Draw(box=(1 / 9, 1 / 7, 8 / 9, 6 / 7)), size, interpolation, FILL)
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
        small = apply(np.array(image), d, 32, "bilinear", FILL).double()
        large = apply(np.array(image), d, 96, "bilinear", FILL).double()
        large = large.reshape(3, 32, 3, 32, 3).mean((2, 4))
        assert not geometric or (small - large).abs().mean() < 14, d


def test_erasing_fills_its_box_with_uniform_noise_and_nothing_else():
    image = picture(200, 200)
    d = Draw(erase=(0.1, 0.2, 0.6, 0.9), noise_seed=5)
    out = apply(np.array(image), d, 200, "bicubic", FILL)
    same = (out == chw(image)).all(0)
    assert same[:40].all() and same[180:].all() and same[:, :20].all() and same[:, 120:].all()
    hole = out[:, 40:180, 20:120].numpy()
    assert stats.kstest(hole.ravel() / 256, "uniform").statistic < 0.01
    assert np.abs(np.corrcoef(hole.reshape(3, -1)) - np.eye(3)).max() < 0.05  # channels differ
    assert torch.equal(apply(np.array(image), d, 200, "bicubic", FILL), out)
    other = apply(np.array(image), Draw(erase=d.erase, noise_seed=6), 200, "bicubic", FILL)
    assert not torch.equal(other, out)


def test_operations_follow_in_order():
    image = picture(32, 32)
    d = Draw(ops=(("solarize", 100.0), ("invert", 0.0)), flip=True)
    expected = chw(timm_ops.invert(timm_ops.solarize(image, 100))).flip(2)
    assert torch.equal(apply(np.array(image), d, 32, "bicubic", FILL), expected)


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
    transform = train_transform(DataConfig(train_size=64, decoder="pillow"), augment)
    quick = train_transform(DataConfig(train_size=64, decoder="simplejpeg"), augment)
    for i in range(6):
        lazy = open_image(str(tmp_path / "a.jpg"))
        (from_jpeg,) = transform([lazy].pop, 0, i)
        (from_png,) = transform(partial(open_image, str(tmp_path / "a.png")), 0, i)
        assert torch.equal(quick(partial(open_image, str(tmp_path / "a.jpg")), 0, i)[0], from_jpeg)
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

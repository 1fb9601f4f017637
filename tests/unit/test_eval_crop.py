"""The evaluation crop against timm's and torchvision's own code: integers, pixels, top-1."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import functional

from ghosttrain.config.schema import DataConfig, TeacherConfig
from ghosttrain.data.augment import centre_crop, eval_transform
from ghosttrain.data.datasets import build_datasets
from ghosttrain.data.loader import eval_loader
from ghosttrain.distill.teacher import build_teacher

MEAN, STD = (0.3096,) * 3, (0.3491,) * 3  # of the digits


class Recorder:
    """Stands for an image of torchvision's: it has a size and no pixels."""

    def __init__(self, width, height):
        self.width, self.height = width, height


def timms(monkeypatch, width, height, size, crop_pct):
    """Return (resized size, offset) that timm's evaluation transform arrives at, without pixels."""
    seen = {}

    def resize(image, new, *args, **kwargs):
        short = new if isinstance(new, int) else new[0]
        h, w = functional._compute_resized_output_size((image.height, image.width), [short])
        return Recorder(w, h)

    def crop(image, top, left, h, w):
        seen.update(size=(image.width, image.height), at=(left, top), box=(w, h))
        return image

    def pad(*args, **kwargs):
        raise AssertionError("padded")

    monkeypatch.setattr(functional, "resize", resize)
    monkeypatch.setattr(functional, "crop", crop)
    monkeypatch.setattr(functional, "pad", pad)
    monkeypatch.setattr(functional, "get_dimensions", lambda i: [3, i.height, i.width])
    transform = create_transform(size, crop_pct=crop_pct, crop_mode="center", normalize=False)
    image = Recorder(width, height)
    for step in transform.transforms[:2]:  # resize, crop; the rest makes a tensor of it
        image = step(image)
    assert seen["box"] == (size, size)
    return seen["size"], seen["at"]


def test_size_and_box_are_timms_integers(monkeypatch):
    rng = random.Random(0)
    shapes = [(500, 375), (375, 500), (1, 1), (1, 999), (4001, 3), (31, 33), (64, 64), (7, 5)]
    for size in range(32, 385):
        for crop_pct in (0.8, 0.85, 0.875, 0.9, 0.95, 0.96, 0.965, 1.0, rng.uniform(0.8, 1)):
            shape = rng.choice([*shapes, (rng.randint(1, 600), rng.randint(1, 600))])
            expected = timms(monkeypatch, *shape, size, crop_pct)
            assert centre_crop(shape, size, crop_pct) == expected, (shape, size, crop_pct)
    assert centre_crop((500, 375), 224, 0.875) == ((341, 256), (58, 16))
    assert centre_crop((64, 64), 64, 0.96) == ((66, 66), (1, 1))  # round() would make it 67


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_pixels_are_within_2_levels_of_timms(interpolation, in_chans):
    rng = np.random.default_rng(0)
    shapes = [(97, 71), (640, 41), (3, 400), (33, 31), (20, 20), (500, 375), (67, 67)]
    for number, (width, height) in enumerate(shapes):
        size, crop_pct = [(32, 0.8), (64, 0.96), (97, 0.95), (56, 1.0)][number % 4]
        small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        image = small.resize((width, height), Image.Resampling.BICUBIC)
        image = image if in_chans == 3 else image.convert("L")
        chans = {"mean": (0.5,) * in_chans, "std": (0.5,) * in_chans, "in_chans": in_chans}
        data = DataConfig(eval_size=size, crop_pct=crop_pct, interpolation=interpolation, **chans)
        (ours,) = eval_transform(data)(lambda image=image: image, 0, 0)
        theirs = create_transform(
            size, crop_pct=crop_pct, crop_mode="center", interpolation=interpolation,
            normalize=False,
        )(image)  # fmt: skip
        assert ours.shape == theirs.shape
        assert (ours.int() - theirs.int()).abs().max() <= 2, (width, height, size, crop_pct)


def test_top1_is_that_under_timms_transform():
    """The digits' teacher, which knows its classes: every answer is the same, but for images whose
    margin is smaller than what the resampling moves the logits by.
    """
    data = DataConfig(name="digits", eval_size=96, crop_pct=0.96, workers=0, mean=MEAN, std=STD)
    held_out = build_datasets(data)[1]
    teacher = build_teacher(
        TeacherConfig(name="digits", weights="digits"), held_out.classes, data, torch.device("cpu")
    )
    transform = create_transform(
        96, crop_pct=0.96, crop_mode="center", interpolation="bicubic", mean=MEAN, std=STD
    )
    n = 120
    chosen = list(range(0, 360, 3))
    with torch.inference_mode(), eval_loader(held_out, data, torch.device("cpu")) as loader:
        (batch,) = loader.batches([chosen])
        ours = teacher(batch.images).logits
        theirs = teacher(torch.stack([transform(held_out.load(i)) for i in chosen])).logits
    moved = (ours - theirs).abs().amax(dim=1)
    assert moved.max() < 0.01 * theirs.std()  # another crop moves them 15 times as much
    margin = theirs.topk(2).values.diff(dim=1).abs().squeeze(1)
    differ = ours.argmax(1) != theirs.argmax(1)
    assert (margin[differ] <= 2 * moved[differ]).all()
    assert (theirs.argmax(1) == batch.labels).sum() > 0.8 * n

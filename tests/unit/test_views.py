"""Views: the same draw at the sizes that a teacher takes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from pictures import chw, picture
from torchvision import transforms as tv

from ghosttrain.config.schema import AugmentConfig, DataConfig
from ghosttrain.data.augment import (
    draw,
    eval_transform,
    normalise,
    train_transform,
)
from ghosttrain.data.decode import open_image


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
            settings = data.model_copy(update={"train_size": side, "interpolation": interpolation})
            assert (view.shape, view.dtype) == ((in_chans, side, side), torch.uint8)
            assert torch.equal(view, train_transform(settings, augment)(opened, 1, i)[0])
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
        settings = data.model_copy(update={"eval_size": side, "interpolation": interpolation})
        assert torch.equal(view, eval_transform(settings)(opened, 0, 0)[0])
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

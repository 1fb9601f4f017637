"""JPEG photographs for benchmarks, cut from those that scikit-learn and scikit-image ship.

What is on them does not matter for the time; that they are photographs does.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from ghosttrain.data.decode import open_image, to_pixels

WIDTH, HEIGHT = 500, 375  # the most common size in ImageNet
QUALITY = 92
_SCIKIT_IMAGE = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")


def two_photos() -> list[Image.Image]:
    """Return scikit-learn's."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(photo) for photo in load_sample_images().images]


def all_photos() -> list[Image.Image]:
    """Return scikit-learn's, and scikit-image's where it is installed, none smaller than a crop."""
    found, spec = two_photos(), find_spec("skimage")
    if spec is not None and spec.origin:
        folder = Path(spec.origin).parent / "data"
        found += [to_pixels(open_image(str(folder / name)), 3) for name in _SCIKIT_IMAGE]
    return [_large_enough(photo) for photo in found]


def _large_enough(photo: Image.Image) -> Image.Image:
    by = max(1.0, 1.2 * WIDTH / photo.width, 1.2 * HEIGHT / photo.height)
    size = round(by * photo.width), round(by * photo.height)
    return photo if by == 1 else photo.resize(size, Image.Resampling.BICUBIC)


def write_crops(photos: Sequence[Image.Image], root: Path, images: int, classes: int = 10) -> None:
    """Write random crops of 500x375 pixels as JPEG of quality 92 into class folders: `images` to
    train on, and one of each class held out.
    """
    from timm.data.imagenet_info import ImageNetInfo

    rng = np.random.default_rng(0)
    synsets = ImageNetInfo("imagenet-1k").label_names()[: min(images, classes)]
    for number in range(images + len(synsets)):
        photo = photos[number % len(photos)]
        left = int(rng.integers(photo.width - WIDTH + 1))
        top = int(rng.integers(photo.height - HEIGHT + 1))
        split = "train" if number < images else "val"
        folder = root / split / synsets[number % len(synsets)]
        folder.mkdir(parents=True, exist_ok=True)
        crop = photo.crop((left, top, left + WIDTH, top + HEIGHT))
        crop.save(folder / f"{number:06d}.JPEG", quality=QUALITY)

"""A folder of real JPEG photos in ImageNet's classes: crops of what ships with scikit-image and
scikit-learn.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import skimage
import sklearn.datasets
from PIL import Image

PHOTOS = {
    "n02124075": "chelsea.png",  # Egyptian cat
    "n03785016": "motorcycle_left.png",  # moped
    "n03877845": "china.jpg",  # palace
    "n04485082": "camera.png",  # tripod
    "n07920052": "coffee.png",  # espresso
}
"""ImageNet's synset of each photo, as EfficientNet-Lite0 sees it."""


def photo(name: str) -> Image.Image:
    """Return a bundled photo in RGB."""
    folders = (
        Path(skimage.__file__).parent / "data",
        Path(sklearn.datasets.__file__).parent / "images",
    )
    (path,) = (folder / name for folder in folders if (folder / name).is_file())
    return Image.open(path).convert("RGB")


def make_photos(root: Path, train: int = 12, val: int = 4) -> None:
    """Write `train` and `val` random crops of each photo as JPEG into `root/<split>/<synset>/`."""
    rng = np.random.default_rng(0)
    for synset, name in PHOTOS.items():
        whole = photo(name)
        for split, count in (("train", train), ("val", val)):
            folder = root / split / synset
            folder.mkdir(parents=True)
            for number in range(count):
                side = int(min(whole.size) * rng.uniform(0.7, 1.0))
                left = int(rng.integers(whole.width - side + 1))
                top = int(rng.integers(whole.height - side + 1))
                crop = whole.crop((left, top, left + side, top + side))
                crop.save(folder / f"{number}.JPEG", quality=92)

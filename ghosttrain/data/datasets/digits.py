"""The embedded data: scikit-learn's handwritten digits."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from ghosttrain.data.datasets.base import ArrayDataset, Dataset
from ghosttrain.errors import UserError

FILE = "datasets/data/digits.csv.gz"
"""Where scikit-learn keeps them: a row for each, 64 levels from 0 to 16 and the label."""


def read_digits(in_chans: int) -> tuple[Dataset, Dataset]:
    """Return scikit-learn's 1,797 handwritten digits (8x8, 17 grey levels), enlarged once to 64x64.

    The images are sorted by class, keeping their order otherwise; of this row every fifth is held
    out: 360 images, a fifth of every class. Both halves hold digits by the same writers.
    """
    levels, labels = load_levels()
    small = (levels * (255 / 16)).round().astype(np.uint8)
    enlarged = (
        Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC) for image in small
    )
    images = np.stack([np.asarray(image) for image in enlarged])
    held_out = held_out_digits(labels)
    classes = [str(k) for k in range(10)]
    return (
        ArrayDataset("digits, train", classes, labels[~held_out], in_chans, images[~held_out]),
        ArrayDataset("digits, held out", classes, labels[held_out], in_chans, images[held_out]),
    )


def held_out_digits(labels: np.ndarray) -> np.ndarray:
    """Return which digits are held out, (N,) bool, by the labels of all, (N,)."""
    by_class = np.argsort(labels, kind="stable")
    held_out = np.zeros(len(labels), dtype=bool)
    held_out[by_class[::5]] = True
    return held_out


def load_levels() -> tuple[np.ndarray, np.ndarray]:
    """Return levels (1797, 8, 8) and labels (1797,) int64 as `sklearn.datasets.load_digits` does.

    They are read from its file: importing scikit-learn takes a second.

    Raises:
        UserError: scikit-learn is not installed, or not whole.
    """
    spec = importlib.util.find_spec("sklearn")
    path = Path(spec.origin).parent / FILE if spec and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(
            f"data=digits reads the digits of scikit-learn, and {path or 'it'} is missing: type "
            "pip install --force-reinstall scikit-learn"
        )
    rows = np.loadtxt(path, delimiter=",")
    return rows[:, :-1].reshape(-1, 8, 8), rows[:, -1].astype(np.int64)

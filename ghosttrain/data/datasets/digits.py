"""The embedded data: scikit-learn's handwritten digits."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ghosttrain.data.datasets.base import ArrayDataset, Dataset


def read_digits(in_chans: int) -> tuple[Dataset, Dataset]:
    """Return scikit-learn's 1,797 handwritten digits (8x8, 17 grey levels), enlarged once to 64x64.

    The images are sorted by class, keeping their order otherwise; of this row every fifth is held
    out: 360 images, a fifth of every class. Both halves hold digits by the same writers.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = (digits.images * (255 / 16)).round().astype(np.uint8)
    enlarged = (
        Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC) for image in small
    )
    images = np.stack([np.asarray(image) for image in enlarged])
    labels = digits.target.astype(np.int64)
    by_class = np.argsort(labels, kind="stable")
    held_out = np.zeros(len(labels), dtype=bool)
    held_out[by_class[::5]] = True
    classes = [str(k) for k in range(10)]
    return (
        ArrayDataset("digits, train", classes, labels[~held_out], in_chans, images[~held_out]),
        ArrayDataset("digits, held out", classes, labels[held_out], in_chans, images[held_out]),
    )

"""Images that look alike: the same photograph saved twice, scaled, recompressed, or a burst.

A perceptual hash finds candidates (the signs of the differences between neighbours of a 16x16 grey
thumbnail, "dHash": 240 bits), the correlation of the thumbnails decides. Imports no torch.

Legend: N images.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

from ghosttrain.data.datasets.base import Dataset
from ghosttrain.data.decode import reduction, to_pixels
from ghosttrain.errors import UserError

SIDE = 16
"""Of a thumbnail in pixels."""
BANDS = 12
"""Pieces of a hash: two images are compared where one piece is equal, so up to 11 bits may differ
anywhere."""
ALIKE = 0.995
"""Correlation of two thumbnails from which they count as the same picture."""
FLAT = 2.0
"""Standard deviation of a thumbnail (of 255) below which an image shows nothing to compare."""


def near_duplicates(*datasets: Dataset) -> list[tuple[int, int]]:
    """Return pairs of images that look alike, by their numbers in the data sets put in a row.

    Of many that look alike each is paired with the first. An image that cannot be decoded is left
    to whoever needs it.
    """
    thumbnails = [thumbnail(d, i) for d in datasets for i in range(len(d))]
    kept = [i for i, pixels in enumerate(thumbnails) if pixels is not None]
    if len(kept) < 2:
        return []
    pixels_N = np.stack([thumbnails[i] for i in kept]).reshape(len(kept), -1)  # type: ignore[misc]
    return [(kept[a], kept[b]) for a, b in _pairs(pixels_N)]


def thumbnail(dataset: Dataset, index: int) -> np.ndarray | None:
    """Return the grey thumbnail of an image: (16, 16) float32; None where it shows nothing."""
    try:
        image = dataset.open(index)
        grey = to_pixels(image, 1, reduction(image, (4 * SIDE, 4 * SIDE)), dataset.bit_depth)
    except UserError:
        return None
    small = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)
    return small if small.std() >= FLAT else None


def _pairs(pixels: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield pairs of rows of (N, 256) that look alike, each row with the first of its kind."""
    square = pixels.reshape(-1, SIDE, SIDE)
    bits = (square[:, :, 1:] > square[:, :, :-1]).reshape(len(pixels), -1)
    unit = pixels - pixels.mean(1, keepdims=True)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    first = np.arange(len(pixels))
    for piece in np.array_split(bits, BANDS, axis=1):
        packed = np.packbits(piece, axis=1)
        _, inverse = np.unique(packed, axis=0, return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        for bucket in np.split(order, np.flatnonzero(np.diff(inverse[order])) + 1):
            while len(bucket) > 1:
                head, rest = bucket[0], bucket[1:]
                same = unit[rest] @ unit[head] >= ALIKE
                for other in rest[same]:
                    first[other] = min(first[other], head)
                bucket = rest[~same]
    for other, head in enumerate(first.tolist()):
        if head != other:
            yield head, other

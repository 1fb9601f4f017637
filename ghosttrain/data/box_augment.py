"""Augmentation of images with boxes, by torchvision's transforms (`torchvision.transforms.v2`),
which move the boxes with the pixels.

Every ingredient draws from a generator of its own, seeded by (augment.seed, ingredient, draw
number, sample number), as in `augment.py`: workers, ranks, `seed` and the global random state have
no part in it, and switching one off leaves the others as they were.

Mosaic and Mixup are left out: they need other images than the one of the sample (a draw would be no
function of it any more), and the recipes here are those of torchvision's reference, which has
neither.

An image is stretched to the square that the network sees, in training and evaluation alike, as
torchvision's SSDLite has it.

Legend: C channels, H W map, S side of the square, M boxes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ghosttrain.config.schema import AugmentConfig, DataConfig
from ghosttrain.data.datasets.boxes import SMALLEST, Boxes
from ghosttrain.data.decode import decoded
from ghosttrain.data.order import mix

THIN = 16
"""Pixels of the shorter side below which an image is not cropped or scaled; nor is one of which
less than two would be left of it in the square."""
NO_CLASS = -1.0
"""In the place of a class, in rows that fill up."""
_PHOTOMETRIC, _ZOOM, _JITTER, _CROP, _FLIP = range(20, 25)  # beside the streams of augment.py


def box_transform(data: DataConfig, augment: AugmentConfig | None, boxes: Boxes) -> Any:
    """Return what the loader calls for an image: (opens it, draw number, sample number[, S]) ->
    pixels (C, S, S) uint8 and boxes (M, 5): left, top, right, bottom in pixels of the square and
    class, filled up to the most boxes that an image has with rows of class `NO_CLASS`.

    Args:
        data: size and resampling.
        augment: the policy; None: evaluation, nothing random.
        boxes: of the data set. A sample's number is that of its image, or larger by a multiple of
            their number.
    """
    return partial(_sample, data, augment, boxes)


def _sample(
    data: DataConfig,
    augment: AugmentConfig | None,
    boxes: Boxes,
    opened: Callable[[], Image.Image],
    draw_number: int,
    index: int,
    size: int | None = None,
) -> list[Tensor]:
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    number = index % len(boxes.sizes)
    image = opened()
    pixels = torch.from_numpy(decoded(image, data))
    pixels = pixels.reshape(*pixels.shape[:2], -1).permute(2, 0, 1).contiguous()
    height, width = pixels.shape[1:]
    corners, labels = boxes.objects(number)
    sample = {
        "pixels": tv_tensors.Image(pixels),
        "boxes": tv_tensors.BoundingBoxes(
            torch.from_numpy(corners).float(), format="XYXY", canvas_size=(height, width)
        ),
        "labels": torch.from_numpy(labels.copy()),
    }
    size = size or (data.eval_size if augment is None else data.train_size)
    if augment is not None:
        short, long = sorted((width, height))
        thin = short < THIN or 2 * long > short * data.train_size
        for ingredient, transform in _ingredients(augment, data, len(labels) > 0, thin):
            sample = _drawn(transform, sample, mix(augment.seed, ingredient, draw_number, index))
    end = [
        v2.Resize((size, size), v2.InterpolationMode(data.interpolation), antialias=True),
        v2.ClampBoundingBoxes(),
        v2.SanitizeBoundingBoxes(min_size=SMALLEST, labels_getter=lambda each: each["labels"]),
    ]
    sample = v2.Compose(end)(sample)
    rows = torch.full((boxes.most(), 5), NO_CLASS)
    rows[: len(sample["labels"]), :4] = sample["boxes"]
    rows[: len(sample["labels"]), 4] = sample["labels"].float()
    # Channels last in memory, as the other transforms leave it.
    return [_plain(sample["pixels"]).permute(1, 2, 0).contiguous().permute(2, 0, 1), rows]


def _ingredients(
    augment: AugmentConfig, data: DataConfig, has_boxes: bool, thin: bool
) -> Iterator[tuple[int, Any]]:
    """Yield the stream and the transform of everything that is on, in order; of a thin image, of
    which a part may have no pixel, none that takes a part.
    """
    from torchvision.transforms import v2

    if augment.policy == "none":
        return
    fill: Any = [round(255 * mean) for mean in data.mean]
    if augment.photometric:
        yield _PHOTOMETRIC, v2.RandomPhotometricDistort()
    if augment.zoom_out > 1:
        yield _ZOOM, v2.RandomZoomOut(fill=fill, side_range=(1.0, augment.zoom_out))
    if augment.scale_jitter and not thin:
        low, high = 1 - augment.scale_jitter, 1 + augment.scale_jitter
        square = (data.train_size, data.train_size)
        crop = v2.RandomCrop(square, pad_if_needed=True, fill=fill)
        yield _JITTER, v2.Compose([v2.ScaleJitter(square, (low, high)), crop])
    if augment.iou_crop and has_boxes and not thin:  # without a box no crop would do
        yield _CROP, v2.RandomIoUCrop()
    if data.flip:
        yield _FLIP, v2.RandomHorizontalFlip()


def _drawn(transform: Any, sample: dict[str, Any], seed: int) -> dict[str, Any]:
    """Apply a transform whose draws are a function of `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transform(sample)


def _plain(pixels: Any) -> Tensor:
    return pixels.as_subclass(Tensor)


def to_original(corners: np.ndarray, size: int | tuple[int, int], image: np.ndarray) -> np.ndarray:
    """Return boxes (M, 4) of the square of side `size`, or of that height and width, in pixels of
    the image, whose width and height `image` (2,) has.
    """
    width_height = size if isinstance(size, int) else size[::-1]
    return corners * np.tile(image / width_height, 2)

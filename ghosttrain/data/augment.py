"""The augmentation policy: DRAW numbers first, then APPLY them to pixels.

A `Draw` is plain numbers in relative coordinates, a pure function of (augment.seed, draw number,
sample index) and of the image's proportions. It does not depend on workers, ranks, `seed` or any
global random state. Every ingredient draws from a stream of its own: switching one off leaves the
others as they were.

One draw can be applied at several sizes: a teacher whose input is larger than the student's sees
the same crop, mirrored and changed alike, as a `View` of its own made from the decoded image.

Pixels stay 8 bit until the loader has them on the device: `normalise` is the last step.

Legend: B batch, C channels, H W map, K classes; S the side of the square that reaches the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ghosttrain.config.schema import AugmentConfig, DataConfig
from ghosttrain.data.decode import decoded, orientation, reduction, upright_size
from ghosttrain.data.operations import OPS, Fill
from ghosttrain.data.order import mix
from ghosttrain.data.policies import POLICIES, Drawn, jitter, log_uniform, uniform

VERSION = 1
"""Raise it with every change that changes pixels or draws: stored teacher answers belong to it."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom as shares of width and height."""
View = tuple[int, str]
"""How a network sees an image: the side S in pixels, and `bilinear` or `bicubic` resampling."""
Transform = Callable[..., list[Tensor]]
"""(opens the image, draw number, sample index[, S]) -> a (C, S, S) uint8 for the student and for
each further view; S is the student's, where it is not that of the settings. It opens the image
again where a view needs more of a JPEG's pixels: an opened one can be decoded once only."""

_CROP, _FLIP, _OPS, _ERASE, _MIX = range(2, 7)  # a stream for each ingredient; order.py has 1, 7
_JITTER = 8
_TRIES = 10  # boxes drawn before a fallback, as torchvision and timm do


@dataclass(frozen=True)
class Draw:
    """Everything that is random about one augmented image."""

    box: Box = (0.0, 0.0, 1.0, 1.0)
    """Part of the image that is kept."""
    flip: bool = False
    """Mirror left and right."""
    ops: Drawn = ()
    """Names of `OPS` with their arguments, in order."""
    erase: Box | None = None
    """Part of the result that is replaced by noise."""
    noise_seed: int = 0
    """Seed of that noise."""

    def least(self, size: int) -> tuple[int, int]:
        """Return (width, height) of a whole image whose crop has twice `size` pixels each way."""
        left, top, right, bottom = self.box
        return math.ceil(2 * size / (right - left)), math.ceil(2 * size / (bottom - top))


# --- draw -----------------------------------------------------------------------------------------


def draw(
    augment: AugmentConfig, flip: bool, width: int, height: int, draw_number: int, index: int
) -> Draw:
    """Draw the augmentation of one image.

    Args:
        augment: the policy; `none` draws nothing and keeps the largest central square.
        flip: whether a mirrored image keeps its label.
        width: of the whole image, in pixels; only the proportions matter.
        height: of the whole image, in pixels.
        draw_number: which draw of this image; the loop counts epochs.
        index: the sample's number.
    """
    if augment.policy == "none":
        short = min(width, height)
        return Draw(_centred(short / width, short / height))

    def stream(ingredient: int) -> Random:
        return Random(mix(augment.seed, ingredient, draw_number, index))

    erase = _erase_box(stream(_ERASE), augment.erasing_prob) if augment.erasing_prob else None
    return Draw(
        box=_crop_box(stream(_CROP), augment, width / height),
        flip=flip and stream(_FLIP).random() < 0.5,
        ops=POLICIES[augment.operations](stream(_OPS), augment)
        + (jitter(stream(_JITTER), augment) if augment.jitter else ()),
        erase=erase,
        noise_seed=mix(augment.seed, _ERASE, draw_number, index) if erase else 0,
    )


def _placed(rng: Random, width: float, height: float) -> Box:
    left, top = uniform(rng, 0, 1 - width), uniform(rng, 0, 1 - height)
    return left, top, left + width, top + height


def _centred(width: float, height: float) -> Box:
    return (1 - width) / 2, (1 - height) / 2, (1 + width) / 2, (1 + height) / 2


def _crop_box(rng: Random, augment: AugmentConfig, aspect: float) -> Box:
    """Draw an area and a log-uniform width / height (section 6 of https://arxiv.org/abs/1409.4842).

    Boxes that do not fit are drawn again; after ten of them, the largest central box of a permitted
    shape is kept, as in torchvision's RandomResizedCrop.
    """
    for _ in range(_TRIES):
        area = uniform(rng, augment.scale_min, augment.scale_max)
        ratio = log_uniform(rng, augment.ratio_min, augment.ratio_max)
        width, height = math.sqrt(area * ratio / aspect), math.sqrt(area / ratio * aspect)
        if width <= 1 and height <= 1:
            return _placed(rng, width, height)
    return _centred(min(1.0, augment.ratio_max / aspect), min(1.0, aspect / augment.ratio_min))


def _erase_box(rng: Random, probability: float) -> Box | None:
    """RandomErasing (https://arxiv.org/abs/1708.04896): 2 % to a third of the area.

    The ratio of the sides is log-uniform in 0.3 to 1 / 0.3. The paper erases up to 40 % of the
    area; a third is timm's bound.
    """
    if rng.random() >= probability:
        return None
    for _ in range(_TRIES):
        area, ratio = uniform(rng, 0.02, 1 / 3), log_uniform(rng, 0.3, 1 / 0.3)
        width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if width < 1 and height < 1:
            return _placed(rng, width, height)
    return None


# --- apply ----------------------------------------------------------------------------------------


def apply(pixels: np.ndarray, drawn: Draw, size: int, interpolation: str, fill: Fill) -> Tensor:
    """Apply a draw to a decoded image.

    Args:
        pixels: the whole image, (H, W, 3) or (H, W) uint8, at any resolution: a draw is relative.
        drawn: what to do.
        size: side S of the result in pixels.
        interpolation: `bilinear` or `bicubic`.
        fill: colour of uncovered corners.

    Returns:
        (C, S, S) uint8, channels last in memory. At another size it shows the same, but for what
        goes pixel by pixel: the noise in the erased box has other values, sharpness sharpens
        smaller details.
    """
    left, top, right, bottom = _whole_pixels(drawn.box, pixels.shape[1], pixels.shape[0])
    x = resized(pixels[top:bottom, left:right], (size, size), interpolation)
    if drawn.flip:
        x = x.flip(1)
    if drawn.ops:
        small = x.numpy()
        for name, argument in drawn.ops:
            small = OPS[name](small, argument, fill)
        x = torch.from_numpy(small)
    x = x.reshape(size, size, -1)
    if drawn.erase is not None:
        left, top, right, bottom = _whole_pixels(drawn.erase, size, size)
        hole = x[top:bottom, left:right]
        # Uniform for every pixel and channel: the filling that the paper prefers.
        noise = bytearray(Random(drawn.noise_seed).randbytes(hole.numel()))
        hole.copy_(torch.frombuffer(noise, dtype=torch.uint8).view(hole.shape))
    return x.permute(2, 0, 1)


def _whole_pixels(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) in whole pixels, at least one pixel each way."""
    left, top = min(round(box[0] * width), width - 1), min(round(box[1] * height), height - 1)
    return left, top, max(round(box[2] * width), left + 1), max(round(box[3] * height), top + 1)


def resized(pixels: np.ndarray, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resample to (width, height), antialiased; returns a tensor of its own, (H, W, 3) or (H, W)
    as `pixels`.

    torch's 8-bit resampling differs from Pillow's by 2 of 255 levels at most, and is several times
    as fast for colour (measured here: 400x300 to 224x224, 0.20 against 1.18 ms).
    """
    x = torch.from_numpy(pixels)
    if x.shape[:2] == size[::-1]:
        return x.clone(memory_format=torch.contiguous_format)
    channels = x.shape[2:]
    x = x.reshape(1, *x.shape[:2], -1).permute(0, 3, 1, 2)
    x = F.interpolate(x, size[::-1], mode=interpolation, antialias=True)
    return x.permute(0, 2, 3, 1).reshape(*size[::-1], *channels)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return float32 `(pixel / 255 - mean) / std` of uint8 (..., C, H, W), channels last in memory;
    mean and std: (C,).

    Whole rows at once: with three channels as the innermost axis it takes four times as long
    (measured here: 24 images of 224 px on one thread, 120 against 520 us an image).
    """
    width = images.shape[-1]
    rows = images.movedim(-3, -1).flatten(-2).to(torch.float32)
    rows.div_(255).sub_(mean.repeat(width)).div_(std.repeat(width))
    return rows.unflatten(-1, (width, len(mean))).movedim(-1, -3)


# --- what the loader calls ------------------------------------------------------------------------


def train_transform(
    data: DataConfig, augment: AugmentConfig, views: Sequence[View] = ()
) -> Transform:
    """Return the augmentation of one image: for the student with S = `data.train_size` if the call
    names no other, then for each of `views`, all by the same draw.

    It can be pickled. A large JPEG is decoded at a half, a quarter or an eighth of its size where
    the crop then still has twice the pixels it needs: a function of the file, the draw and S. What
    a network sees is therefore the same to the bit whatever the others see.
    """
    return partial(_train_sample, data, augment, tuple(views))


def eval_transform(data: DataConfig, views: Sequence[View] = ()) -> Transform:
    """Return the centre crop of one image: for the student with S = `data.eval_size`, then for each
    of `views`; nothing random.

    It can be pickled. The shorter side is resized to floor(S / crop_pct) pixels, then the centre is
    cropped: the same size and box, in whole pixels, as timm's evaluation transform.
    """
    student = data.eval_size, data.interpolation
    return partial(_eval_sample, data, (student, *views))


def _train_sample(
    data: DataConfig,
    augment: AugmentConfig,
    views: tuple[View, ...],
    opened: Callable[[], Image.Image],
    draw_number: int,
    index: int,
    size: int | None = None,
) -> list[Tensor]:
    image = opened()
    views = ((size or data.train_size, data.interpolation), *views)
    drawn = draw(augment, data.flip, *upright_size(image, data.orientation), draw_number, index)
    least = [drawn.least(size) for size, _ in views]
    if orientation(image, data.orientation) > 4:  # the file's width is the picture's height
        least = [(height, width) for width, height in least]
    reductions = [reduction(image, each) for each in least]
    pixels: dict[int, np.ndarray] = {}
    for reduced in reductions:
        if reduced not in pixels:
            pixels[reduced] = decoded(opened() if pixels else image, data, reduced)
    fill = tuple(round(255 * mean) for mean in data.mean)
    return [
        apply(pixels[reduced], drawn, size, interpolation, fill)
        for reduced, (size, interpolation) in zip(reductions, views, strict=True)
    ]


def _eval_sample(
    data: DataConfig,
    views: tuple[View, ...],
    opened: Callable[[], Image.Image],
    draw_number: int,
    index: int,
) -> list[Tensor]:
    pixels = decoded(opened(), data)
    return [_centre(pixels, size, data.crop_pct, interpolation) for size, interpolation in views]


def _centre(pixels: np.ndarray, size: int, crop_pct: float, interpolation: str) -> Tensor:
    (width, height), (left, top) = centre_crop(pixels.shape[1::-1], size, crop_pct)
    x = resized(pixels, (width, height), interpolation).reshape(height, width, -1)
    return x[top : top + size, left : left + size].permute(2, 0, 1)


def centre_crop(
    image_size: tuple[int, int], size: int, crop_pct: float
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (width, height) to resize to and (left, top) of the square to crop, in whole pixels.

    timm takes the floor of the quotient as floats have it, torchvision cuts the longer side's
    fraction off and rounds half a pixel to the even offset. With crop_pct of at most 1 the resized
    image is never smaller than the square: nothing is padded.
    """
    short = math.floor(size / crop_pct)
    width, height = (side * short // min(image_size) for side in image_size)
    return (width, height), (round((width - size) / 2), round((height - size) / 2))


# --- Mixup and CutMix -----------------------------------------------------------------------------


def mix_batch(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    augment: AugmentConfig,
    draw_number: int,
    indices: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Mix every image of a batch with its neighbour, by Mixup or CutMix.

    Mixup: https://arxiv.org/abs/1710.09412; CutMix: https://arxiv.org/abs/1905.04899. If both are
    on, each batch draws one of them with equal chance. A pure function of the batch,
    `augment.seed`, the draw number and the samples' numbers.

    A view of the same batch, mixed with the same draw number and indices, is mixed alike: the same
    share of the same neighbour, and for CutMix the same box in relative coordinates, rounded to
    the view's pixels. The targets to train with are those of the call with the student's images: a
    view's box may cover a slightly different share.

    Args:
        images: (B, C, H, W) float: pixels in [0, 1] or normalised.
        labels: (B,) int64.
        num_classes: K.
        augment: `mixup_alpha` and `cutmix_alpha`; both 0 leave the images as they are.
        draw_number: as for `draw`.
        indices: sample numbers of the batch, in its order.

    Returns:
        (images (B, C, H, W), targets (B, K) that sum to 1). Label smoothing is left to the loss:
        torch's cross-entropy smooths targets that are probabilities too.

    """
    targets = F.one_hot(labels, num_classes).to(torch.float32)
    if not augment.mixup_alpha and not augment.cutmix_alpha:
        return images, targets
    rng = Random(mix(augment.seed, _MIX, draw_number, *map(int, indices)))
    both = augment.mixup_alpha and augment.cutmix_alpha
    cut = rng.random() < 0.5 if both else augment.cutmix_alpha > 0
    alpha = augment.cutmix_alpha if cut else augment.mixup_alpha
    share = rng.betavariate(alpha, alpha)  # what is left of an image
    other = images.roll(1, dims=0)
    if cut:
        height, width = images.shape[-2:]
        half = math.sqrt(1 - share) / 2
        x, y = rng.random(), rng.random()
        top, bottom = round(max(y - half, 0) * height), round(min(y + half, 1) * height)
        left, right = round(max(x - half, 0) * width), round(min(x + half, 1) * width)
        images = images.clone()
        images[..., top:bottom, left:right] = other[..., top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        images = torch.lerp(other, images, share)
    return images, torch.lerp(targets.roll(1, dims=0), targets, share)

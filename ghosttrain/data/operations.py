"""The operations that a policy draws: pixels and a number -> pixels, those of Pillow to the bit
(shears: to the level).

Those that go pixel by pixel, all channels alike, are a table of 256 values: Pillow makes the table
from a ramp, and the image is looked up in it at once. What needs neighbours or a histogram is
Pillow's own, but for sharpness and shears: the sums below take 0.29, 0.41 and 0.58 ms where Pillow
takes 1.25, 1.40 and 1.48 (measured here, 224x224 RGB, one thread).

Legend: H W image, C channels. An image here is (H, W, 3) or (H, W) uint8.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

Fill = tuple[int, ...]
"""Colour of the corners that a geometric operation uncovers: 3 numbers or 1."""
_OnImage = Callable[[Image.Image, float, Fill], Image.Image]
_OnPixels = Callable[[np.ndarray, float, Fill], np.ndarray]

_RAMP = Image.fromarray(np.arange(256, dtype=np.uint8)[None])


def looked_up(pixels: np.ndarray, table: bytes) -> np.ndarray:
    """Replace every value by that of a table of 256 bytes."""
    out = bytearray(pixels).translate(table)
    return np.frombuffer(out, np.uint8).reshape(pixels.shape)


def _by_pillow(operation: _OnImage) -> _OnPixels:
    def on_pixels(pixels: np.ndarray, argument: float, fill: Fill) -> np.ndarray:
        return np.array(operation(Image.fromarray(pixels), argument, fill))

    return on_pixels


def _by_table(operation: Callable[[Image.Image, float], Image.Image]) -> _OnPixels:
    def on_pixels(pixels: np.ndarray, argument: float, fill: Fill) -> np.ndarray:
        return looked_up(pixels, operation(_RAMP, argument).tobytes())

    return on_pixels


def _with_contrast(pixels: np.ndarray, factor: float, fill: Fill) -> np.ndarray:
    """Pillow's contrast: away from the mean of the grey image, or towards it."""
    counts = Image.fromarray(pixels).convert("L").histogram()
    mean = int(np.dot(counts, np.arange(256)) / sum(counts) + 0.5)
    flat = Image.new("L", _RAMP.size, mean)
    return looked_up(pixels, Image.blend(flat, _RAMP, factor).tobytes())


def _sharpened(pixels: np.ndarray, factor: float, fill: Fill) -> np.ndarray:
    """Pillow's sharpness: away from the smoothed image (3x3 of 1 around 5, by 13), or towards it;
    the outermost pixels stay.
    """
    out = pixels.copy()
    if min(pixels.shape[:2]) < 3:
        return out
    wide = pixels.astype(np.uint16)
    middle = wide[1:-1, 1:-1]
    rows = wide[:-2] + wide[1:-1] + wide[2:]
    smooth = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    smooth += 4 * middle + 6  # 6 of 13: to the nearest
    smooth //= 13
    sharp = middle.astype(np.float32)
    sharp -= smooth
    sharp *= np.float32(factor)
    sharp += smooth
    out[1:-1, 1:-1] = sharp.clip(0, 255, out=sharp)  # cut off, as Pillow does
    return out


# Bicubic rotations and shears take Pillow 2.5 times as long (measured here, 224x224 RGB), and
# nothing is made smaller that would need it.
_BILINEAR = Image.Resampling.BILINEAR


def _sheared_x(pixels: np.ndarray, by: float, fill: Fill) -> np.ndarray:
    """Pillow's bilinear affine transform (1, by, 0, 0, 1, 0): every row moves by an amount of its
    own, so that all of its pixels are mixed from two neighbours by the same shares.
    """
    height, width = pixels.shape[:2]
    n, step = width * len(fill), len(fill)  # values of a row, of a pixel
    moves = by * (np.arange(height) + 0.5)
    whole = np.floor(moves).astype(int)
    margin = (int(np.abs(whole).max()) + 2) * step
    wide = np.empty((height, n + 2 * margin), np.uint8)  # beyond its edges: anything
    wide[:, margin:-margin] = pixels.reshape(height, n)
    wide[:, margin - step : margin] = wide[:, margin : margin + step]
    wide[:, -margin : step - margin] = wide[:, -margin - step : -margin]
    rows = sliding_window_view(wide.reshape(-1), n)
    starts = np.arange(height) * wide.shape[1] + margin + whole * step
    left = rows[starts]
    mixed = rows[starts + step].astype(np.float32)
    mixed -= left
    mixed *= (moves - whole).astype(np.float32)[:, None]
    mixed += left
    out = mixed.astype(np.uint8)  # cut off, as Pillow does
    place = np.repeat(np.arange(width, dtype=np.int16), step)
    first = np.ceil(-0.5 - moves).astype(np.int16)[:, None]
    for uncovered in (place < first, place >= first + width):
        np.copyto(out, _row(fill, width), where=uncovered)
    return out.reshape(pixels.shape)


def _sheared_y(pixels: np.ndarray, by: float, fill: Fill) -> np.ndarray:
    return _transposed(_sheared_x(_transposed(pixels), by, fill))


def _transposed(pixels: np.ndarray) -> np.ndarray:
    out = np.empty((pixels.shape[1], pixels.shape[0], *pixels.shape[2:]), np.uint8)
    planes = zip(np.atleast_3d(out).T, np.atleast_3d(pixels).T, strict=True)
    for plane, source in planes:  # channel by channel: a fifth of the time of all at once
        plane.T[:] = source
    return out


def _shifted(pixels: np.ndarray, fill: Fill, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    # By whole pixels: nothing to interpolate.
    height, width = pixels.shape[:2]
    right, down = -round(x * width), -round(y * height)
    out = np.empty_like(pixels)
    out.reshape(height, -1)[:] = _row(fill, width)
    out[_inside(down, height), _inside(right, width)] = pixels[
        _inside(-down, height), _inside(-right, width)
    ]
    return out


def _row(fill: Fill, width: int) -> np.ndarray:
    return np.tile(np.array(fill, np.uint8), width)


def _inside(shift: int, length: int) -> slice:
    return slice(max(shift, 0), length + min(shift, 0))


def _brightened_below_half(image: Image.Image, amount: float) -> Image.Image:
    return image.point(
        [min(255, value + int(amount)) if value < 128 else value for value in range(256)]
    )


OPS: dict[str, _OnPixels] = {
    "auto_contrast": _by_pillow(lambda image, _, fill: ImageOps.autocontrast(image)),
    "equalize": _by_pillow(lambda image, _, fill: ImageOps.equalize(image)),
    "invert": _by_table(lambda image, _: ImageOps.invert(image)),
    "rotate": _by_pillow(
        lambda image, degrees, fill: image.rotate(degrees, _BILINEAR, fillcolor=fill)
    ),
    "posterize": _by_table(lambda image, bits: ImageOps.posterize(image, int(bits))),
    "solarize": _by_table(lambda image, threshold: ImageOps.solarize(image, int(threshold))),
    "solarize_add": _by_table(_brightened_below_half),
    "color": _by_pillow(lambda image, factor, fill: ImageEnhance.Color(image).enhance(factor)),
    "contrast": _with_contrast,
    "brightness": _by_table(lambda image, factor: ImageEnhance.Brightness(image).enhance(factor)),
    "sharpness": _sharpened,
    "shear_x": _sheared_x,
    "shear_y": _sheared_y,
    "translate_x": lambda pixels, share, fill: _shifted(pixels, fill, x=share),
    "translate_y": lambda pixels, share, fill: _shifted(pixels, fill, y=share),
    "grey": _by_pillow(lambda image, _, fill: image.convert("L").convert(image.mode)),
    "blur": _by_pillow(lambda image, radius, fill: image.filter(ImageFilter.GaussianBlur(radius))),
}
"""name -> operation on (pixels, argument, fill), whose result may be written to."""

NO_ARGUMENT = ("auto_contrast", "equalize", "invert")
"""Operations whose argument says nothing."""

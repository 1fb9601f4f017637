"""An image file -> pixels of the one kind asked for: 8 bit, RGB or grey.

Whatever the file's name says, its content decides: a PNG called .JPEG, CMYK, 16 bit, palettes and
alpha all decode. A broken file is an error that names it. It is never replaced by another image:
everything else is keyed by the sample's number. Orientation tags are ignored and alpha is dropped,
as ImageNet loaders commonly do.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, JpegImagePlugin

from ghosttrain.config.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def open_image(path: str) -> Image.Image:
    """Read a file and its header: size and mode are known, pixels are decoded by `to_pixels`.

    The whole file is read at once: Pillow then decodes a JPEG in about three quarters of the time
    (measured here: 500x375, quality 92, 1.13 against 1.48 ms).

    Raises:
        UserError: the file cannot be read or is no image.
    """
    with _named(path):
        with open(path, "rb") as file:
            image = Image.open(io.BytesIO(file.read()))
        image.filename = path
    return image


def to_pixels(
    image: Image.Image, in_chans: int, least: tuple[int, int] | None = None
) -> Image.Image:
    """Decode into mode RGB (3 channels) or L (1 channel).

    Args:
        image: from `open_image`, or any image in memory.
        in_chans: 3 or 1.
        least: (width, height) that still suffices; a JPEG is then decoded at 1/2, 1/4 or 1/8 of its
            size if both sides stay at least that long. None decodes every pixel.

    Raises:
        UserError: the file is broken.
    """
    with _named(getattr(image, "filename", "") or "an image in memory"):
        if least is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
            image.draft(None, least)
        image.load()
        if image.mode == "F":
            raise OSError("floating-point pixels have no agreed range")
        if image.mode.startswith("I"):
            # The upper 8 of 16 bits; convert("L") would clip at 255 instead.
            image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8))
        if "transparency" in image.info:
            image = image.convert("RGBA")
        mode = "RGB" if in_chans == 3 else "L"
        return image if image.mode == mode else image.convert(mode)


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Turn whatever reading this file raises into one line that names it.

    Pillow's readers raise almost anything on broken bytes (SyntaxError, struct.error, EOFError,
    ...); every cause but exhausted memory lies in the file.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "no image format that Pillow knows"
        else:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(
            f"cannot decode {path} ({' '.join(reason.split())}): "
            "put an intact copy in its place and run the same command again"
        ) from error

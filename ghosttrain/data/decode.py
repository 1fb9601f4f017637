"""An image file -> pixels of the one kind asked for: 8 bit, RGB or grey.

Whatever the file's name says, its content decides: a PNG called .JPEG, CMYK, 16 bit, palettes and
alpha all decode. A broken file is an error that names it. Unless the user wants otherwise,
orientation tags are ignored and alpha is dropped, as ImageNet loaders commonly do.

Legend: H W map.
"""

from __future__ import annotations

import errno
import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import PIL
from PIL import Image, JpegImagePlugin

from ghosttrain.config.schema import DataConfig
from ghosttrain.errors import UserError
from ghosttrain.files import open_file

try:
    import simplejpeg
except ImportError:  # no wheel for this platform
    simplejpeg = None

FORMATS = (
    "JPEG", "PNG", "WEBP", "AVIF", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "TGA", "PCX",
    "SGI", "QOI",
)  # fmt: skip
"""What may be opened, by Pillow's names. Pillow knows more: it starts Ghostscript for EPS, and has
formats of fonts, icons, videos and stars."""
BIT_DEPTH: int = DataConfig.model_fields["bit_depth"].default
MAX_PIXELS: int = DataConfig.model_fields["max_pixels"].default
_AGAIN = "then run the same command again"
_NOT_THE_FILE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class BrokenImage(UserError):
    """One image file that cannot be used: `data.on_error` says what happens."""


class OversizedImage(BrokenImage):
    """One image file with more pixels than `data.max_pixels`."""


def suffixes() -> frozenset[bytes]:
    """Return the endings of names, such as `jfif`, that Pillow's readers of `FORMATS` claim."""
    Image.init()
    endings = Image.registered_extensions().items()
    found = {end[1:].encode() for end, name in endings if name in FORMATS}
    return frozenset(found | {b"mpo"})  # several JPEGs in one file: the first one is read


def open_image(path: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a file and its header: size and mode are known, pixels are decoded by `to_pixels`.

    The whole file is read at once: Pillow then decodes a JPEG in about three quarters of the time
    (measured here: 500x375, quality 92, 1.13 against 1.48 ms).

    Raises:
        UserError: the file cannot be read, is no image, or has more than `max_pixels` pixels.
    """
    content = read_file(path)
    with _decoding(path):
        try:
            image = Image.open(io.BytesIO(content), formats=readable())
        except Image.UnidentifiedImageError:
            raise BrokenImage(_no_image(path, content)) from None
        image.filename = path
        if (pixels := image.width * image.height) > max_pixels:
            raise OversizedImage(
                f"{path} has {image.width:,} x {image.height:,} pixels, more than "
                f"data.max_pixels={max_pixels}: type data.max_pixels={pixels} if it is what it "
                f"should be (decoded, it takes {3 * pixels / 1e6:,.0f} MB of memory for each "
                "worker), or make it smaller"
            )
    return image


def read_file(path: str) -> bytes:
    """Return the bytes of an image file.

    Raises:
        UserError: it cannot be read, or is no file: a FIFO would be waited for, a device read
            without end.
    """
    try:
        with open_file(path) as file:
            return file.read()
    except MemoryError as error:
        raise _no_memory(path) from error
    except OSError as error:
        kind = UserError if error.errno in _NOT_THE_FILE else BrokenImage
        raise kind(
            f"cannot read {path} ({error.strerror or error}): {image_remedy(error)}"
        ) from error


def orientation(image: Image.Image, setting: str) -> int:
    """Return how an image lies that is not decoded yet: 1 (upright) to 8, EXIF's tag 274.

    Always 1 under `data.orientation=ignore`, where a tag cannot be read, and for TIFF: Pillow turns
    it while decoding.
    """
    if setting == "ignore" or image.format == "TIFF":
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged: Pillow raises almost anything, and the pixels may be intact
        return 1
    return found if found in _UPRIGHT else 1


_ORIENTATION = 274
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}
"""Orientation -> what puts (H, W) or (H, W, 3) upright (section 4.6.4 of EXIF 2.3)."""


def upright_size(image: Image.Image, setting: str) -> tuple[int, int]:
    """Return (width, height) as `decoded` gives them; `setting` is `data.orientation`."""
    return image.size[::-1] if orientation(image, setting) > 4 else image.size


def reduction(image: Image.Image, least: tuple[int, int]) -> int:
    """Return by how much an image that is not decoded yet can be reduced while it decodes.

    8, 4, 2 or 1 for a JPEG: the most that leaves both sides at least as long as `least`, (width,
    height). Always 1 for other formats.
    """
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return 1
    most = min(image.width // least[0], image.height // least[1])
    return next((by for by in (8, 4, 2) if by <= most), 1)


def to_pixels(
    image: Image.Image,
    in_chans: int,
    reduced: int = 1,
    bit_depth: int = BIT_DEPTH,
    background: str = "ignore",
) -> Image.Image:
    """Decode into mode RGB (3 channels) or L (1 channel), not turned.

    Args:
        image: from `open_image`, or any image in memory.
        in_chans: 3 or 1.
        reduced: from `reduction`; both sides come out 1 / reduced as long, rounded up.
        bit_depth: bits that the values of 16-bit images use; the upper 8 of them are kept.
        background: `data.background`.

    Raises:
        UserError: the file is broken, or its values do not fit into `bit_depth` bits.
    """
    path = getattr(image, "filename", "") or "an image in memory"
    with _decoding(path):
        if reduced > 1:
            # Pillow takes the largest reduction that leaves this size: the one asked for.
            image.draft(None, (image.width // reduced, image.height // reduced))
        kept_upper_8 = is_deep_colour(image)  # known before the pixels are decoded only
        bits = stated_depth(image) or bit_depth
        image.load()
        if image.mode == "F":
            raise BrokenImage(
                f"{path} has floating-point pixels, which have no agreed range: save it with "
                f"integers of 8 or 16 bits, {_AGAIN}"
            )
        if kept_upper_8 and bit_depth != BIT_DEPTH:
            raise BrokenImage(
                f"{path} is a colour image of 16 bits, of which the upper 8 are read, whatever "
                f"data.bit_depth={bit_depth} says (it is for grey images): save it with 8 bits"
            )
        if image.mode.startswith("I"):
            image = Image.fromarray(_upper_8(np.asarray(image), bits, path))
        if "transparency" in image.info:
            image = image.convert("RGBA")
        if background != "ignore" and image.mode in _WITH_ALPHA:
            image = image.convert("RGBA")
            behind = Image.new("RGBA", image.size, background)
            image = Image.alpha_composite(behind, image)
        mode = "RGB" if in_chans == 3 else "L"
        return image if image.mode == mode else image.convert(mode)


_WITH_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")


def decoded(image: Image.Image, data: DataConfig, reduced: int = 1) -> np.ndarray:
    """Decode as `data` says into (H, W, 3), or (H, W) for one channel: uint8 that may be written
    to, upright where `data.orientation=apply`.

    The pixels are those of `to_pixels`, with its errors. JPEGs are decoded by
    simplejpeg, which calls the library that Pillow calls, straight into an array: 0.84 against
    1.43 ms (measured here: 500x375, quality 92, `python -m ghosttrain bench data`, and the same
    with data.decoder=pillow).

    Args:
        image: from `open_image`.
        data: channels, bits, decoder, orientation, background.
        reduced: from `reduction`.
    """
    turn = _UPRIGHT[orientation(image, data.orientation)]  # a decoded TIFF has no tag any more
    pixels = _jpeg_pixels(image, data, reduced)
    if pixels is None:
        pixels = np.array(to_pixels(image, data.in_chans, reduced, data.bit_depth, data.background))
    return np.ascontiguousarray(turn(pixels))


def _jpeg_pixels(image: Image.Image, data: DataConfig, reduced: int) -> np.ndarray | None:
    """Return what simplejpeg decodes; None where it is not to, or cannot."""
    colours = {(3, "RGB"): "RGB", (3, "L"): "RGB", (1, "L"): "GRAY"}
    wanted = colours.get((data.in_chans, image.mode))
    content = getattr(image, "fp", None)
    quick = jpeg_decoder(data.decoder) == "simplejpeg" and image.format == "JPEG"
    if not (quick and wanted and type(content) is io.BytesIO):
        return None
    width, height = (math.ceil(side / reduced) for side in image.size)
    try:
        pixels = simplejpeg.decode_jpeg(
            content.getvalue(), wanted, min_width=width, min_height=height
        )
    except ValueError:  # a damaged file: Pillow says of it what there is to say
        return None
    return pixels if data.in_chans == 3 else pixels[..., 0]


def jpeg_decoder(setting: str) -> str:
    """Return which of `simplejpeg` and `pillow` decodes JPEGs under `data.decoder`.

    Raises:
        UserError: simplejpeg is asked for and not installed.
    """
    if simplejpeg is None and setting == "simplejpeg":
        raise UserError(
            "data.decoder=simplejpeg: the package is not installed: type pip install simplejpeg, "
            "or data.decoder=pillow (the same pixels, more slowly)"
        )
    return "pillow" if simplejpeg is None else setting.replace("auto", "simplejpeg")


def jpeg_decoder_version(setting: str) -> str:
    """Return the name and the version of what decodes JPEGs under `data.decoder`."""
    name = jpeg_decoder(setting)
    return f"{name} {(PIL if name == 'pillow' else simplejpeg).__version__}"


def _upper_8(values: np.ndarray, bits: int, path: str) -> np.ndarray:
    """Return the upper 8 of `bits` bits; Pillow's convert("L") would clip at 255 instead."""
    low, high = int(values.min()), int(values.max())
    if low < 0:
        raise BrokenImage(
            f"{path} has negative pixels (down to {low:,}), which have no agreed range: save it "
            f"with values of 0 or more, {_AGAIN}"
        )
    if high >> bits:
        raise BrokenImage(
            f"{path} has values up to {high:,}, more than the {bits} bits of data.bit_depth="
            f"{bits}: type data.bit_depth={high.bit_length()}"
        )
    return (values >> (bits - 8)).astype(np.uint8)


def stated_depth(image: Image.Image) -> int | None:
    """Return the bits of a grey image whose file states them: a TIFF of 12 bits has 12, a PGM is
    scaled to 16 by Pillow; None where the file does not say. Not decoded yet.
    """
    if image.format == "PPM":
        return 16
    stated = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]
    return stated if 8 <= stated < 16 else None


_BITS_PER_SAMPLE = 258  # TIFF 6.0, section 8


def is_deep_colour(image: Image.Image) -> bool:
    """Return whether an image not decoded yet has 16 bits in each of several channels: Pillow reads
    the upper 8 of them.
    """
    layouts = (str(tile[3]) for tile in getattr(image, "tile", ()))
    return not image.mode.startswith("I") and any(";16" in layout for layout in layouts)


@contextmanager
def without_pillows_limit() -> Iterator[None]:
    """Let `data.max_pixels` decide how large an image may be, in place of Pillow's global limit,
    which also warns from half of it on.
    """
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


# --- what to say --------------------------------------------------------------------------------


@contextmanager
def _decoding(path: str) -> Iterator[None]:
    """Turn whatever decoding this file raises into one line that names it.

    Pillow's readers raise almost anything on broken bytes (SyntaxError, struct.error, EOFError,
    ...); every cause but exhausted memory lies in the file.
    """
    try:
        # Pillow warns of damaged tags, which nothing here needs.
        with without_pillows_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except MemoryError as error:
        raise _no_memory(path) from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BrokenImage(
            f"cannot decode {path} ({' '.join(reason.split())}): the file is damaged or cut short; "
            f"put an intact copy in its place, {_AGAIN}"
        ) from error


def _no_memory(path: str) -> UserError:
    return UserError(
        f"no memory is left to decode {path}: type a smaller data.workers, or make the image "
        "smaller"
    )


def image_remedy(error: OSError) -> str:
    """Return what helps when a file of images cannot be read."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return TOO_MANY_FILES
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"make it readable (chmod +r), {_AGAIN}"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        return f"it was there when the folder was listed; put it back, {_AGAIN}"
    if error.errno == errno.ENXIO:
        return f"put an image in its place or remove it, {_AGAIN}"
    if error.errno == errno.EISDIR:
        return "a file is expected there"
    return f"see to the disk or the network it lies on, {_AGAIN}"


TOO_MANY_FILES = "type `ulimit -n 65536` in this shell, or a smaller data.workers"
"""What helps against EMFILE."""


def _no_image(path: str, content: bytes) -> str:
    if not content:
        return f"{path} is empty: put an intact copy in its place or remove it, {_AGAIN}"
    start = content[:16].decode("latin-1")
    shown = repr(start) if start.isascii() and start.isprintable() else content[:16].hex(" ")
    return (
        f"{path} is no image of a kind that is read here: it begins with {shown}; put an image in "
        f"its place or remove it, {_AGAIN}"
    )


@cache
def readable() -> tuple[str, ...]:
    """Return those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)

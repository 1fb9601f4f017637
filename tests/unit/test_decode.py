from __future__ import annotations

import errno
import io
import os
import random
import re
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile
from helpers import refusal
from PIL import Image

from ghosttrain.config.schema import DataConfig
from ghosttrain.data import decode
from ghosttrain.data.decode import (
    decoded,
    jpeg_decoder,
    open_image,
    read_file,
    reduction,
    suffixes,
    to_pixels,
)
from ghosttrain.errors import UserError


def picture(height=48, width=64):
    """A smooth colour picture, uint8 (H, W, 3)."""
    y, x = np.mgrid[:height, :width]
    channels = (x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height))
    return np.stack(channels, -1).astype(np.uint8)


def load(path, in_chans=3, least=None):
    image = open_image(str(path))
    return to_pixels(image, in_chans, reduction(image, least) if least else 1)


def reading(in_chans=3, **settings):
    values = (0.5,) * in_chans
    return DataConfig(in_chans=in_chans, mean=values, std=values, **settings)


def grey(rgb):
    return np.asarray(Image.fromarray(rgb).convert("L"))


SAVED = {
    "RGB.png": ("RGB", {}, 0),
    "RGB.bmp": ("RGB", {}, 0),
    "RGB.tif": ("RGB", {}, 0),
    "RGB.jpg": ("RGB", {"quality": 95}, 6),
    "RGB.webp": ("RGB", {"lossless": True}, 0),
    "CMYK.jpg": ("CMYK", {"quality": 95}, 8),
    "CMYK.tif": ("CMYK", {}, 2),
    "YCbCr.jpg": ("YCbCr", {"quality": 95}, 6),
    "RGBA.png": ("RGBA", {}, 0),
    "P.png": ("P", {}, 60),
    "P.gif": ("P", {}, 60),
}


JPEGS = (
    ("RGB", {"quality": 92}),
    ("RGB", {"quality": 75, "subsampling": 0}),
    ("RGB", {"quality": 50, "subsampling": 1, "optimize": True}),
    ("RGB", {"progressive": True}),
    ("RGB", {"keep_rgb": True}),
    ("RGB", {"restart_marker_rows": 1}),
    ("L", {"quality": 92}),
    ("CMYK", {"quality": 92}),
)


@pytest.mark.parametrize("size", [(75, 100), (73, 101), (47, 33), (1, 1), (300, 8)])
def test_both_decoders_give_the_same_bits_of_every_kind_of_jpeg(tmp_path, size):
    path = str(tmp_path / "a.jpg")
    noisy = np.random.default_rng(0).normal(0, 20, (*size, 3))
    for mode, options in JPEGS:
        rgb = (picture(*size) + noisy).clip(0, 255).astype(np.uint8)
        Image.fromarray(rgb).convert(mode).save(path, **options)
        for reduced in (1, 2, 4, 8):
            if min(size) < reduced:
                continue
            for in_chans in (3, 1):
                quick, theirs = (
                    decoded(open_image(path), reading(in_chans, decoder=decoder), reduced)
                    for decoder in ("simplejpeg", "pillow")
                )
                assert quick.shape == theirs.shape and (quick == theirs).all(), (mode, options)
                assert quick.flags.writeable and theirs.flags.writeable


def test_a_damaged_jpeg_is_pillows_to_judge(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(picture()).save(path)
    content = path.read_bytes()
    for length in (len(content) // 2, len(content) - 40):  # within the header, within the pixels
        path.write_bytes(content[:length])
        for decoder in ("simplejpeg", "pillow"):
            refusal(
                lambda by=decoder: decoded(open_image(str(path)), reading(decoder=by)), "cut short"
            )
    end = content[-2:]  # Pillow decodes both, simplejpeg refuses the second
    for tolerable in (content + b"after the end", content[:-2] + b"\0\0\0" + end):
        path.write_bytes(tolerable)
        quick, theirs = (
            decoded(open_image(str(path)), reading(decoder=by)) for by in ("simplejpeg", "pillow")
        )
        assert (quick == theirs).all()


def test_without_simplejpeg(monkeypatch):
    assert jpeg_decoder("auto") == "simplejpeg"
    monkeypatch.setattr(decode, "simplejpeg", None)
    assert jpeg_decoder("auto") == jpeg_decoder("pillow") == "pillow"
    refusal(lambda: jpeg_decoder("simplejpeg"), "not installed", "pip install simplejpeg")
    jpeg = io.BytesIO()
    Image.fromarray(picture()).save(jpeg, "JPEG")
    assert decoded(Image.open(jpeg), reading()).shape == (48, 64, 3)


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("in_chans", [1, 3])
def test_every_kind_of_colour_file_decodes(tmp_path, name, in_chans):
    mode, options, most = SAVED[name]
    rgb = picture()
    Image.fromarray(rgb).convert(mode).save(tmp_path / name, **options)
    image = load(tmp_path / name, in_chans)
    assert (image.mode, image.size) == ("RGB" if in_chans == 3 else "L", (64, 48))
    expected = rgb if in_chans == 3 else grey(rgb)
    assert np.abs(np.asarray(image, dtype=int) - expected).max() <= most


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.pgm", "a.tif"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_grey_files_decode(tmp_path, name, in_chans):
    pixels = grey(picture())
    Image.fromarray(pixels).save(tmp_path / name, **({"quality": 100} if name == "a.jpg" else {}))
    image = np.asarray(load(tmp_path / name, in_chans), dtype=int)
    assert image.shape == ((48, 64, 3) if in_chans == 3 else (48, 64))
    assert np.abs(image.reshape(48, 64, -1) - pixels[..., None]).max() <= 2


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_16_bits_keep_their_upper_8(tmp_path, name, in_chans):
    deep = np.array([[0, 255, 256, 511, 32768, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / name)
    image = np.asarray(load(tmp_path / name, in_chans)).reshape(6, -1)
    assert (image == np.array([0, 0, 1, 1, 128, 255])[:, None]).all()


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("name", ["deep.png", "little.tif", "big.tif", "wide.tif"])
def test_values_of_fewer_bits_fill_the_range_when_told(tmp_path, name, bits):
    values = np.array([[0, 1, 2 ** (bits - 1), 2**bits - 1]])
    if name == "deep.png":
        Image.fromarray(values.astype(np.uint16)).save(tmp_path / name)
    else:  # "I;16", "I;16B" and "I"
        kind = {"little.tif": "<u2", "big.tif": ">u2", "wide.tif": "<u4"}[name]
        order = ">" if name == "big.tif" else "<"
        tifffile.imwrite(tmp_path / name, values.astype(kind), byteorder=order)
    image = np.asarray(to_pixels(open_image(str(tmp_path / name)), 1, bit_depth=bits))
    assert image.tolist() == [[0, 1 if bits == 8 else 0, 128, 255]]
    if bits > 8:
        with pytest.raises(UserError, match=f"data.bit_depth={bits - 1}: .* data.bit_depth={bits}"):
            to_pixels(open_image(str(tmp_path / name)), 1, bit_depth=bits - 1)


def test_a_file_that_states_its_bits_keeps_them(tmp_path):
    packed = 0xFFF800001 << 4  # 4095, 2048, 0 and a filler, 12 bits each, as cameras write them
    raw = packed.to_bytes(5, "big") + b"\0"
    tags = [(256, 3), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1)]
    tags += [(279, len(raw))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<I", 8 + len(raw))
    (tmp_path / "a.tif").write_bytes(head + raw + struct.pack("<H", len(tags)) + entries + bytes(4))
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 4095\n" + np.array([4095, 2048, 0], ">u2").tobytes())
    for name in ("a.tif", "a.pgm"):
        for bits in (16, 12):
            image = to_pixels(open_image(str(tmp_path / name)), 1, bit_depth=bits)
            assert np.asarray(image).tolist() == [[255, 128, 0]], (name, bits)


def test_values_that_have_no_range_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.array([[-5, 100]], np.int16))
    refused(tmp_path / "a.tif", "negative pixels (down to -5)")
    deep = np.full((4, 4, 3), 300, np.uint16)
    tifffile.imwrite(tmp_path / "b.tif", deep, photometric="rgb")
    image = open_image(str(tmp_path / "b.tif"))
    with pytest.raises(UserError, match=r"colour image of 16 bits.*save it with 8 bits"):
        to_pixels(image, 3, bit_depth=12)


@pytest.mark.parametrize("mode", ["1", "LA", "PA-bytes", "L-key", "RGB-key"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_bitmaps_and_transparency_decode_without_a_warning(tmp_path, mode, in_chans):
    image, options = Image.fromarray(picture()), {}
    if mode == "PA-bytes":
        image, options = image.convert("P"), {"transparency": bytes(range(256))}
    elif mode.endswith("-key"):
        image = image.convert(mode[:-4])
        options = {"transparency": 5 if image.mode == "L" else (1, 2, 3)}
    else:
        image = image.convert(mode)
    image.save(tmp_path / "a.png", **options)
    decoded = load(tmp_path / "a.png", in_chans)
    assert (decoded.mode, decoded.size) == ("RGB" if in_chans == 3 else "L", (64, 48))


def test_the_content_decides_not_the_name(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "n01.JPEG", format="PNG")
    assert (np.asarray(load(tmp_path / "n01.JPEG")) == picture()).all()


def test_in_memory_images_pass_through():
    image = Image.fromarray(picture())
    assert to_pixels(image, 3) is image
    assert to_pixels(image, 1).mode == "L"


# --- decoding at less than full size ----------------------------------------------------------


@pytest.mark.parametrize(
    ("least", "size"),
    [
        (None, (801, 600)),
        ((801, 600), (801, 600)),
        ((500, 300), (801, 600)),
        ((400, 300), (401, 300)),
        ((200, 150), (201, 150)),
        ((100, 75), (101, 75)),
        ((1, 1), (101, 75)),
        ((9000, 9000), (801, 600)),
    ],
)
def test_a_jpeg_is_decoded_no_smaller_than_asked(tmp_path, least, size):
    Image.fromarray(picture(600, 801)).save(tmp_path / "a.jpg", quality=95)
    image = load(tmp_path / "a.jpg", least=least)
    assert image.size == size
    reference = Image.fromarray(picture(600, 801)).resize(size, Image.Resampling.BOX)
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(reference)).max() <= 12


def test_other_formats_decode_every_pixel(tmp_path):
    Image.fromarray(picture(600, 801)).save(tmp_path / "a.png")
    assert load(tmp_path / "a.png", least=(10, 10)).size == (801, 600)
    assert reduction(Image.fromarray(picture(600, 801)), (10, 10)) == 1


def test_the_reduction_is_the_one_pillow_takes_for_the_same_size(tmp_path):
    rng = random.Random(0)
    seen = set()
    for _ in range(40):
        width, height = rng.randint(1, 60), rng.randint(1, 60)
        Image.new("L", (width, height)).save(tmp_path / "a.jpg")
        for _ in range(10):
            least = rng.randint(1, 20), rng.randint(1, 20)
            theirs, ours = (open_image(str(tmp_path / "a.jpg")) for _ in range(2))
            theirs.draft(None, least)
            by = reduction(ours, least)
            assert to_pixels(ours, 1, by).size == theirs.size
            assert theirs.size == (-(-width // by), -(-height // by))
            seen.add(by)
    assert seen == {1, 2, 4, 8}


# --- broken files -------------------------------------------------------------------------------


def test_a_truncated_jpeg_is_named_in_one_line(tmp_path):
    path = tmp_path / "n02.JPEG"
    Image.fromarray(picture()).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(
        UserError, match=r"cannot decode .*n02\.JPEG \(.*truncated.*\): .*put an intact copy"
    ) as raised:
        load(path)
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is not None


def refused(path, *parts, **settings):
    message = refusal(lambda: to_pixels(open_image(str(path), **settings), 3), *parts)
    assert message.startswith(("cannot", "no memory", str(path)))
    return message


def test_what_is_no_image_is_named_with_its_first_bytes(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"<html>404</html>")
    refused(
        tmp_path / "a.jpg", "no image of a kind that is read here: it begins with", "'<html>404"
    )
    (tmp_path / "a.jpg").write_bytes(b"\x00\x01\xff")
    refused(tmp_path / "a.jpg", "begins with 00 01 ff", "or remove it")
    (tmp_path / "a.jpg").write_bytes(b"")
    refused(tmp_path / "a.jpg", "is empty")


def test_postscript_is_not_run_whatever_its_name(tmp_path, monkeypatch):
    """Pillow decodes EPS by Ghostscript, on what may have come from anywhere."""
    Image.fromarray(picture()).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("started a program"))
    refused(tmp_path / "a.jpg", "no image of a kind that is read here", "'%!PS-Adobe-3.0")
    assert not {b"eps", b"ps", b"pdf", b"mpg", b"wmf", b"ico"} & suffixes()
    assert {
        b"jfif",
        b"jpe",
        b"jpg",
        b"jp2",
        b"pgm",
        b"tiff",
        b"webp",
        b"avif",
        b"mpo",
    } <= suffixes()


def test_a_file_that_cannot_be_read_gets_the_remedy_of_its_cause(tmp_path, monkeypatch):
    refused(tmp_path / "gone.jpg", "cannot read", "(No such file or directory)", "put it back")
    refused(tmp_path, "(Is a directory)", "a file is expected")
    with pytest.raises(UserError, match=r"^cannot read .*gone\.jpg \(No such file"):
        read_file(str(tmp_path / "gone.jpg"))
    for number, remedy in {
        errno.EMFILE: "ulimit -n",
        errno.ENFILE: "ulimit -n",
        errno.EACCES: "chmod +r",
        errno.EIO: "the disk or the network",
        errno.ESTALE: "the disk or the network",
    }.items():

        def fails(*args, number=number, **options):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("builtins.open", fails)
        message = refused(tmp_path / "a.jpg", f"({os.strerror(number)})", remedy)
        monkeypatch.undo()
        assert "intact" not in message


def test_what_is_no_file_is_neither_waited_for_nor_read_without_end(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    refused(tmp_path / "a.jpg", "(it is a FIFO, a device or a socket, not a file)", "or remove it")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "b.jpg"))
        refused(tmp_path / "b.jpg", "(it is a FIFO, a device or a socket, not a file)")
    (tmp_path / "c.jpg").symlink_to("/dev/zero")
    refused(tmp_path / "c.jpg", "(it is a FIFO, a device or a socket, not a file)")


def test_only_one_place_opens_images_by_pillow():
    """All others would lack the list of formats, the limit of pixels and the line about the file;
    `bench data` reads as timm does."""
    package = Path(decode.__file__).parents[1]
    found = [p for p in package.rglob("*.py") if re.search(r"\bImage\.open\(", p.read_text())]
    assert {p.name for p in found} == {"decode.py", "bench_data.py"}
    for path in found:
        calls = re.findall(r"\bImage\.open\(.*", path.read_text())
        assert all("formats=readable()" in call for call in calls)


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "a.tif")
    message = refused(tmp_path / "a.tif", "floating-point", "integers of 8 or 16 bits")
    assert "intact" not in message


def test_exhausted_memory_is_not_blamed_on_the_file(tmp_path, monkeypatch):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    image = open_image(str(tmp_path / "a.png"))
    monkeypatch.setattr(image, "load", lambda: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(UserError, match="no memory is left .* smaller data.workers"):
        to_pixels(image, 3)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp", "a.jpg"])
def test_the_pixel_limit_is_a_setting(tmp_path, monkeypatch, name):
    """Pillow's own, which it warns of from half of it on, has no part in it."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with Image.fromarray(picture()) as image:
        image.save(tmp_path / name)
    assert to_pixels(open_image(str(tmp_path / name), 3072), 3).size == (64, 48)
    message = refused(tmp_path / name, "64 x 48 pixels", "type data.max_pixels=3072", max_pixels=99)
    assert "intact" not in message
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow remarks on some of the damage
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.bmp", "a.webp", "a.tif", "a.pgm"])
def test_damage_anywhere_ends_in_pixels_or_one_line(tmp_path, name):
    path = tmp_path / name
    Image.fromarray(picture()).convert("L" if name == "a.pgm" else "RGB").save(path)
    whole, rng = path.read_bytes(), random.Random(0)
    refused = 0
    for trial in range(60):
        if trial % 2:
            damaged = whole[: rng.randrange(len(whole))]
        else:
            damaged = bytearray(whole)
            for _ in range(5):
                damaged[rng.randrange(len(whole) if trial % 4 else 80)] = rng.randrange(256)
        path.write_bytes(bytes(damaged))
        try:
            assert load(path).mode == "RGB"
        except UserError as error:
            refused += 1
            assert name in str(error) and "\n" not in str(error)
    assert refused > 12

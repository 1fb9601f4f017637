"""Every row of docs/data.md's table of odd files: what the network sees of each."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
from helpers import refusal
from PIL import Image, ImageOps

from ghosttrain.config.schema import AugmentConfig, DataConfig
from ghosttrain.data.augment import eval_transform, train_transform
from ghosttrain.data.decode import decoded, open_image, upright_size

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
HEIGHT, WIDTH = 24, 40


def picture():
    """Colours that differ in every corner and change slowly, (H, W, 3) uint8."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([x * 6, y * 10, (x + y) * 3], -1).astype(np.uint8)


def exif(orientation):
    tags = Image.Exif()
    tags[274] = orientation
    return tags


def write(path, image, form, **options):
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(path, form, **options)
    return path


def see(path, **settings):
    return decoded(open_image(str(path)), DataConfig(**settings)).astype(int)


def close(seen, expected, levels):
    assert seen.shape == expected.shape
    assert np.abs(seen - expected).max() <= levels


def test_png_called_jpeg(tmp_path):
    close(see(write(tmp_path / "a.JPEG", picture(), "PNG")), picture(), 0)


def test_cmyk_jpeg(tmp_path):
    image = Image.fromarray(picture()).convert("CMYK")
    close(see(write(tmp_path / "a.JPEG", image, "JPEG", quality=98)), picture(), 12)


def test_grey_jpeg(tmp_path):
    grey = Image.fromarray(picture()).convert("L")
    seen = see(write(tmp_path / "a.jpg", grey, "JPEG", quality=98))
    close(seen, np.repeat(np.asarray(grey)[..., None], 3, axis=2), 4)


def test_damaged_exif(tmp_path):
    damaged = b"Exif\0\0" + b"II*\0\xff\xff\xff\x7f" + bytes(8)
    path = write(tmp_path / "a.jpg", picture(), "JPEG", quality=98, exif=damaged)
    for setting in ("ignore", "apply"):
        close(see(path, orientation=setting), picture(), 12)


def test_orientation_tag(tmp_path):
    for form, options in (("JPEG", {"quality": 98}), ("PNG", {}), ("WEBP", {"lossless": True})):
        for tag in range(1, 9):
            path = write(tmp_path / "a", picture(), form, exif=exif(tag), **options)
            with Image.open(path) as stored:
                turned = np.asarray(ImageOps.exif_transpose(stored)).astype(int)
            for decoder in ("simplejpeg", "pillow"):
                close(see(path, decoder=decoder), np.asarray(Image.open(path)).astype(int), 0)
                close(see(path, decoder=decoder, orientation="apply"), turned, 0)
            assert upright_size(open_image(str(path)), "apply") == turned.shape[1::-1]
        path = write(tmp_path / "a", picture(), form, exif=exif(77), **options)
        close(see(path, orientation="apply"), see(path), 0)
    path = write(tmp_path / "a.tif", picture(), "TIFF", exif=exif(6))
    for setting in ("ignore", "apply"):
        close(see(path, orientation=setting), np.rot90(picture(), -1), 0)


def test_a_turned_jpeg_is_cropped_and_reduced_as_if_it_were_stored_upright(tmp_path):
    big = np.asarray(Image.fromarray(picture()).resize((800, 480)))
    upright = np.ascontiguousarray(np.rot90(big, -1))
    stored = write(tmp_path / "a.png", upright, "PNG")
    turned = write(tmp_path / "b.jpg", big, "JPEG", quality=98, exif=exif(6))
    for size in (32, 64, 224):
        data = DataConfig(orientation="apply", train_size=size, eval_size=size)
        policy = AugmentConfig(randaugment_ops=0, erasing_prob=0)
        for transform in (train_transform(data, policy), eval_transform(data)):
            for number in range(6):
                ours, theirs = (
                    transform(lambda path=path: open_image(str(path)), number, 0)[0].int()
                    for path in (turned, stored)
                )
                assert (ours - theirs).abs().float().mean() < 2


def test_alpha_channel(tmp_path):
    alpha = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
    alpha[:, : WIDTH // 2] = 0
    path = write(tmp_path / "a.png", np.concatenate([picture(), alpha], 2), "PNG")
    close(see(path), picture(), 0)
    for name, value in (("white", 255), ("black", 0)):
        behind = picture().astype(int)
        behind[:, : WIDTH // 2] = value
        close(see(path, background=name), behind, 0)
    half = np.full((HEIGHT, WIDTH, 1), 51, np.uint8)  # a fifth
    path = write(tmp_path / "a.png", np.concatenate([picture(), half], 2), "PNG")
    close(see(path, background="white"), np.rint(0.2 * picture() + 0.8 * 255).astype(int), 1)
    grey = Image.merge("LA", [Image.fromarray(picture()[..., 0]), Image.fromarray(half[..., 0])])
    seen = see(write(tmp_path / "a.png", grey, "PNG"), background="black")
    close(seen[..., 0], np.rint(0.2 * picture()[..., 0]).astype(int), 1)


def test_palette(tmp_path):
    image = Image.fromarray(picture()).quantize(16)
    seen = see(write(tmp_path / "a.png", image, "PNG"))
    close(seen, np.asarray(image.convert("RGB")).astype(int), 0)


def test_palette_with_a_transparent_colour(tmp_path):
    image = Image.fromarray(picture()).quantize(16)
    shown = np.asarray(image.convert("RGB")).astype(int)
    path = write(tmp_path / "a.png", image, "PNG", transparency=3)
    close(see(path), shown, 0)
    shown[np.asarray(image) == 3] = 255
    close(see(path, background="white"), shown, 0)


def test_1_bit(tmp_path):
    image = Image.fromarray(picture()).convert("1")
    seen = see(write(tmp_path / "a.png", image, "PNG"))
    close(seen[..., 0], np.asarray(image) * 255, 0)


def test_16_bit_grey(tmp_path):
    values = picture()[..., 0].astype(np.uint16)
    path = write(tmp_path / "a.png", values * 257, "PNG")
    close(see(path)[..., 2], values.astype(int), 0)
    path = write(tmp_path / "a.png", values << 4, "PNG")
    close(see(path, bit_depth=12)[..., 0], values.astype(int), 0)


def test_16_bit_colour(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture().astype(np.uint16) * 257, photometric="rgb")
    close(see(path), picture(), 0)


def test_animated_gif(tmp_path):
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("red", "blue")]
    path = tmp_path / "a.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    close(see(path)[0, 0], np.array([255, 0, 0]), 0)


def test_several_jpegs_in_one_file_mpo(tmp_path):
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("red", "blue")]
    path = tmp_path / "a.mpo"
    frames[0].save(path, "MPO", save_all=True, append_images=frames[1:])
    close(see(path)[0, 0], np.array([254, 0, 0]), 2)


def test_one_pixel_wide(tmp_path):
    for size in ((1, 300), (300, 1), (1, 1)):
        path = write(tmp_path / "a.jpg", Image.new("RGB", size, (9, 99, 199)), "JPEG", quality=98)
        data = DataConfig(train_size=32, eval_size=32)
        policy = AugmentConfig(randaugment_ops=0, erasing_prob=0)
        for transform in (train_transform(data, policy), eval_transform(data)):
            (pixels,) = transform(lambda path=path: open_image(str(path)), 0, 0)
            assert pixels.shape == (3, 32, 32) and abs(int(pixels[1].max()) - 99) <= 4


def test_bytes_after_the_end(tmp_path):
    path = write(tmp_path / "a.jpg", picture(), "JPEG", quality=98)
    expected = see(path)
    path.write_bytes(path.read_bytes() + b"more")
    close(see(path), expected, 0)


def test_floating_point(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", picture()[..., 0].astype(np.float32))
    refusal(lambda: see(tmp_path / "a.tif"), "a.tif", "floating-point")


def test_cut_short(tmp_path):
    content = io.BytesIO()
    Image.fromarray(picture()).save(content, "PNG")
    (tmp_path / "a.png").write_bytes(content.getvalue()[:-60])
    refusal(lambda: see(tmp_path / "a.png"), "a.png", "cut short")


def test_empty(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    refusal(lambda: see(tmp_path / "a.png"), "a.png", "is empty")


def test_no_image(tmp_path):
    (tmp_path / "a.png").write_bytes(b"<html>not found</html>")
    refusal(lambda: see(tmp_path / "a.png"), "a.png", "<html>")


def test_more_pixels_than_data_max_pixels(tmp_path):
    path = str(write(tmp_path / "a.png", picture(), "PNG"))
    limit = HEIGHT * WIDTH - 1
    refusal(lambda: open_image(path, limit), "data.max_pixels=960")


def test_the_table_has_a_test_for_every_row():
    table = DOCS.read_text().split("| file | what the network sees |\n|---|---|\n")[1]
    rows = [line.split("|")[1] for line in table.split("\n\n")[0].splitlines()]
    names = ["_".join(re.findall(r"[a-z0-9]+", row.lower())) for row in rows]
    missing = [name for name in names if not callable(globals().get(f"test_{name}"))]
    assert len(rows) >= 20 and not missing


@pytest.mark.parametrize("setting", ["orientation=turn", "background=red"])
def test_another_word_is_refused(setting):
    key, value = setting.split("=")
    with pytest.raises(ValueError, match="Input should be"):
        DataConfig(**{key: value})

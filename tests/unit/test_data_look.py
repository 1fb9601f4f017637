"""`data show` and `data stats`, through the command line and against numbers computed by hand."""

from __future__ import annotations

import re

import numpy as np
import pytest
from boxes import make_coco
from helpers import refusal
from PIL import Image

from ghosttrain.cli import main
from ghosttrain.config.compose import compose
from ghosttrain.config.schema import AugmentConfig, DataConfig
from ghosttrain.data.augment import draw
from ghosttrain.data.datasets.base import evenly
from ghosttrain.study import data_look
from ghosttrain.study.data_look import draw_sheet, statistics, words_of


@pytest.fixture
def photos(tmp_path):
    """Twelve training images of two kinds, one turned, one transparent, one damaged."""
    rng = np.random.default_rng(0)
    pixels = {}
    for split, count in (("train", 6), ("val", 2)):
        for name in ("a", "b"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels[split, name, number] = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels[split, name, number]).save(folder / f"{number}.png")
    return tmp_path / "data", pixels


def size_of(path):
    with Image.open(path) as image:
        return image.size


def test_mean_and_std_are_those_of_all_pixels(photos):
    root, pixels = photos
    data = DataConfig(name="folder", root=str(root), eval_size=32, crop_pct=1.0)
    *_, last = statistics(data, 512)
    train = np.stack([p for (split, *_), p in pixels.items() if split == "train"]) / 255
    mean, std = train.mean((0, 1, 2)), train.std((0, 1, 2))
    said = re.findall(r"\[([\d.,]+)\]", last)
    assert [float(x) for x in said[0].split(",")] == pytest.approx(mean, abs=6e-4)
    assert [float(x) for x in said[1].split(",")] == pytest.approx(std, abs=6e-4)
    assert said[2:] == ["0.485,0.456,0.406", "0.229,0.224,0.225"]


def test_what_needs_a_setting_is_said(photos, capsys):
    root, pixels = photos
    tags = Image.Exif()
    tags[274] = 6
    folder = root / "train" / "a"
    Image.fromarray(pixels["train", "a", 0]).resize((50, 40)).save(folder / "0.jpg", exif=tags)
    (folder / "0.png").unlink()
    Image.fromarray(pixels["train", "a", 1]).convert("RGBA").save(folder / "1.png")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:200])
    words = ["data", "stats", "data=folder", f"data.root={root}"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "12 images, 2 classes; held out 4" in text
    assert "most images 'a' 6, fewest 'a' 6" in text or "most images 'a' 6, fewest 'b' 6" in text
    assert "looked at 12 training images" in text
    assert "formats: PNG 10, JPEG 1; modes: RGB 10, RGBA 1" in text
    assert "width 32 (32 to 50), height 32 (32 to 40)" in text
    assert "orientation: 1 lie on a side; data.orientation=apply turns them" in text
    assert "transparent: 1 (data.background=ignore)" in text
    assert "cannot be read: 1, the first: cannot decode" in text and "2.png" in text
    assert main([*words, "--images", "3"]) == 0
    assert "looked at 3 training images" in capsys.readouterr().out


def test_nothing_that_can_be_read(photos):
    root, _ = photos
    for path in root.glob("train/*/*"):
        path.write_bytes(b"")
    data = DataConfig(name="folder", root=str(root))
    refusal(lambda: statistics(data, 9), "none of 9 images can be read", "is empty")


def test_the_sheet_shows_what_the_network_sees(photos, tmp_path, monkeypatch):
    root, _ = photos
    config = compose(
        ["+recipe=compact_kd", "teacher=none", "distill=none", "data=folder", f"data.root={root}",
         "data.train_size=32", "budget=full"], trains=False
    ).config  # fmt: skip
    seen = []
    monkeypatch.setattr(
        data_look, "_place", lambda axis, pixels, words: seen.append((pixels, words))
    )
    path = draw_sheet(config, samples=3, draws=4, out=tmp_path / "sheet.png")
    assert path == tmp_path / "sheet.png" and size_of(path)[0] > 300
    assert len(seen) == 3 * 5
    pixels, words = seen[0]
    assert words == "a\n32 x 32" and pixels.shape == (32, 32, 3)
    from ghosttrain.data.augment import train_transform
    from ghosttrain.data.datasets import build_datasets

    train, _ = build_datasets(config.data)
    transform = train_transform(config.data, config.augment)
    for row, index in enumerate(evenly(12, 3)):
        for number in range(4):
            pixels, words = seen[5 * row + 1 + number]
            (expected,) = transform(lambda i=index: train.open(i), number, index)
            assert (pixels == expected.permute(1, 2, 0).numpy()).all()
            drawn = draw(config.augment, config.data.flip, 32, 32, number, index)
            assert words == words_of(drawn)
            assert ("erase" in words) == (drawn.erase is not None)
            assert ("flip" in words) == drawn.flip
            assert all(name.replace("_", " ") in words for name, _ in drawn.ops)


def test_a_sheet_without_a_name_lies_below_run_root(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "show", "--samples", "2", "--draws", "2", "augment=with_mixup"]) == 0
    path = capsys.readouterr().out.strip()
    assert path.startswith(str(tmp_path / "runs" / "data_show-")) and size_of(path)[1] > 100


@pytest.mark.parametrize(
    "words, parts",
    [
        (["data"], ["data show", "data stats", "data check"]),
        (["data", "show", "--json"], ["--json is for data check, not for data show"]),
        (["data", "check", "data=folder", "data.root=/nowhere"], ["/nowhere"]),
        (["data", "shwo"], ["data shwo", "data show"]),
        (["data", "show", "--draws", "0"], ["--draws 0", "1 or more"]),
        (["data", "show", "--draws", "400"], ["3,208 pictures", "400"]),
        (["data", "stats", "data=folder", "data.root=/nowhere"], ["/nowhere"]),
        (["data", "stats", "--top", "3"], ["--top does not belong to data"]),
        (["data", "show", "augment=nothing"], ["no augment is called"]),
    ],
)
def test_mistakes_are_one_line(words, parts, capsys):
    assert main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(part in line for part in parts), line


def test_a_policy_without_draws_has_words():
    assert words_of(draw(AugmentConfig(policy="none"), True, 40, 20, 0, 0)) == "crop 50 %"


def test_the_sheet_has_the_boxes_where_the_objects_are(tmp_path, monkeypatch, capsys):
    make_coco(tmp_path, train=4, val=2)
    words = ["+recipe=detect_ssdlite", "data=coco", f"data.root={tmp_path}", "data.train_size=64",
             "data.eval_size=64", "augment.zoom_out=2"]  # fmt: skip
    seen = []
    monkeypatch.setattr(
        data_look, "_place", lambda axis, *rest: seen.append((*rest, ()) if len(rest) < 3 else rest)
    )
    draw_sheet(compose(words, trains=False).config, samples=4, draws=3, out=tmp_path / "sheet.png")
    assert len(seen) == 16 and seen[12][1] == "no box\n80 x 64" and not len(seen[13][2])
    inside = [
        pixels[round(top) + 2 : round(bottom) - 2, round(left) + 2 : round(right) - 2]
        for pixels, _, boxes in seen
        for left, top, right, bottom in boxes
    ]
    assert len(inside) > 12
    for patch in inside:  # red or blue, not grey
        assert abs(float(patch[..., 0].mean()) - float(patch[..., 2].mean())) > 150
    assert main(["data", "stats", *words]) == 2
    assert "data stats is for classification" in capsys.readouterr().err

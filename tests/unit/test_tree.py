"""A tree of images: what is found in it, and what is said of everything that is not used."""

from __future__ import annotations

import functools
import os

import numpy as np
import pytest
import torch
from helpers import make_images, only_run, paint, refusal
from PIL import Image
from torchvision.datasets import ImageFolder

from ghosttrain.config.schema import AugmentConfig, DataConfig
from ghosttrain.data import decode
from ghosttrain.data.augment import eval_transform, train_transform
from ghosttrain.data.datasets import build_datasets, notes_on


@pytest.fixture
def root(tmp_path):
    make_images(tmp_path / "images", classes=2, train=3, val=2)
    return tmp_path / "images"


def build(root, **settings):
    return build_datasets(DataConfig(name="folder", root=str(root), **settings))


def refused(root, *parts):
    refusal(lambda: build(root), *parts)


def test_images_are_found_at_any_depth_and_in_one_order(root):
    cat = root / "train" / "class0"
    for name in ("b/x.png", "b/c/y.png", "b-1.png", "B.png", "0.JPEG.d/z.webp"):
        (cat / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (len(name), 0, 0)).save(cat / name)
    (root / "elsewhere").mkdir()
    Image.new("RGB", (4, 4)).save(root / "elsewhere" / "linked.png")
    (cat / "link").symlink_to(root / "elsewhere")
    train, _ = build(root)
    found = [train.path(i) for i in range(len(train))]
    assert sorted(found) == sorted(path for path, _ in ImageFolder(root / "train").samples)
    names = [os.fsdecode(name) for name in train.names[train.labels == 0]]
    assert names == sorted(names, key=os.fsencode) and len(names) == 3 + 6
    assert train.load(names.index("b/c/y.png")).getpixel((0, 0)) == (len("b/c/y.png"), 0, 0)
    assert not any("left out" in note for note in notes_on(train))


def test_names_that_a_terminal_would_obey(root, tmp_path):
    """A class is refused, since its name is shown everywhere; other names are shown as text."""
    os.mkfifo(root / "train" / "class0" / "\x1b[2Ka.JPEG")
    (root / "train" / "class0" / "b\n.\x1bjpg").touch()
    (root / "train" / "class0" / "0.JPEG").rename(root / "train" / "class0" / "c\r\n.JPEG")
    train, _ = build(root)
    assert train.name_of(len(train.names[train.labels == 0]) - 1).endswith(
        "class0/c\\x0d\\x0a.JPEG"
    )
    notes = "\n".join(notes_on(train))
    assert "1 neither file nor folder (first: " in notes and "/\\x1b[2Ka.JPEG)" in notes
    assert "(.\\x1bjpg 1; first: " in notes and "/b\\x0a.\\x1bjpg)" in notes
    assert notes.replace("\n", " ").isprintable()
    for split in ("train", "val"):
        (root / split / "class0").rename(root / split / "\x1b]0;x\x07")
    refused(root, r"has a class '\x1b]0;x\x07', whose name holds control characters: rename it")
    table = tmp_path / "table.csv"
    table.write_text("path,label\na.jpg,x\u202ey\n")
    paint(tmp_path / "a.jpg")
    settings = DataConfig(name="table", root=str(tmp_path), table="table.csv", split=0.5)
    refusal(lambda: build_datasets(settings), f"{table} has a class", r"'x\u202ey'")


def test_every_ending_that_the_decoder_reads_is_found(root):
    for name in (
        "a.jfif",
        "a.JPE",
        "a.jp2",
        "a.apng",
        "a.tga",
        "a.avif",
        "a.pnm",
        "a.dib",
        "a.mpo",
    ):
        path = root / "train" / "class1" / name
        image = Image.new("RGB", (16, 16), (200, 30, 40))
        if name == "a.mpo":  # a camera's pair
            image.save(path, format="MPO", save_all=True, append_images=[image])
        else:
            image.save(path)
    train, _ = build(root)
    assert len(train) == 3 + 3 + 9 and "left out" not in notes_on(train)[0]
    for index in range(6, len(train)):
        pixel = np.array(train.load(index).getpixel((8, 8)))
        assert (np.abs(pixel - (200, 30, 40)) < 12).all(), train.path(index)


def test_nothing_is_left_out_without_a_line(root):
    cat = root / "train" / "class0"
    (cat / "deep").mkdir()
    for name in ("b.txt", "a.txt", "a.xml", "deep/Thumbs.db", "README"):
        (cat / name).touch()
    for name in (".hidden.jpg", "deep/._0.JPEG", "../.cache"):
        (cat / name).touch()
    (root / "train" / "labels.csv").touch()
    (cat / "deep" / "up").symlink_to(cat)
    os.mkfifo(cat / "pipe.jpg")
    train, held_out = build(root)
    assert len(train) == 6 and notes_on(held_out) == ()
    (note,) = notes_on(train)
    for part in (
        f"left out of {root}/train: ",
        f"5 without an image's suffix (.txt 2, .db 1, .xml 1, none 1; first: {cat}/README)",
        f"3 hidden (first: {root}/train/.cache)",
        f"1 outside the class folders (first: {root}/train/labels.csv)",
        f"1 linked in a circle (first: {cat}/deep/up)",
        f"1 neither file nor folder (first: {cat}/pipe.jpg)",
    ):
        assert part in note, note


@pytest.mark.parametrize("where", ["class0", "class0/7.jpg", "class0/deep/7", "circle"])
def test_a_link_that_leads_nowhere_is_refused(root, where):
    """A whole class can hang on it, or images whose disk is not there today."""
    path = root / "train" / where
    if path.is_dir():
        path.rename(root / "moved")
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(path if where == "circle" else root / "gone")
    target = path if where == "circle" else root / "gone"
    refused(root, "1 of the links in", f"first: {path} -> {target}", "-xtype l -delete")


def test_hidden_links_that_lead_nowhere_are_hidden(root):
    (root / "train" / ".#lock").symlink_to("me@here")
    assert "1 hidden" in notes_on(build(root)[0])[0]


def test_a_link_to_a_folder_above_ends(root):
    (root / "train" / "class0" / "all").symlink_to(root)
    train, _ = build(root)
    assert "linked in a circle" in notes_on(train)[0]
    assert len(train) == 6 + 6 - 3 + 4  # class0 finds what the root holds beside itself


def test_a_folder_that_cannot_be_listed_is_refused(root, monkeypatch):
    scandir = os.scandir

    def refusing(path):
        if os.fsencode(path).endswith(b"class1"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    refused(root, "cannot list", "class1 (Permission denied)", "make it readable")


def test_one_class_is_refused(root):
    for split in ("train", "val"):
        (root / split / "class1").rename(root / f"{split}1")
    refused(root, f"{root}/train has one class, 'class0'", "nothing to tell apart")


# --- a look at the images -----------------------------------------------------------------------


def repaint(root, make):
    for number, path in enumerate(sorted(root.glob("*/*/*.JPEG"))):
        make(number).save(path, format="PNG")


def deep(high):
    def make(number):
        values = np.random.default_rng(number).integers(0, high + 1, (12, 12))
        values[0, 0] = high
        return Image.fromarray(values.astype(np.uint16))

    return make


def test_training_and_evaluation_see_the_bits_that_are_used(root):
    values = np.random.default_rng(0).integers(0, 256, (40, 40))
    seen = []
    for shift, kind in ((0, np.uint8), (4, np.uint16)):  # 8 bits; the same with 4 more
        path = root / "train" / "class0" / "0.JPEG"
        Image.fromarray((values << shift).astype(kind)).save(path, format="PNG")
        data = DataConfig(name="folder", root=str(root), train_size=16, eval_size=16, bit_depth=12)
        train, _ = build_datasets(data)
        for transform in (train_transform(data, AugmentConfig()), eval_transform(data)):
            seen.append(transform(functools.partial(train.open, 0), 0, 0)[0])
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])


def test_a_crop_above_pillows_limit_is_no_warning(root, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = DataConfig(name="folder", root=str(root), train_size=16, eval_size=16)
    train, _ = build_datasets(data)
    for transform in (train_transform(data, AugmentConfig(scale_min=0.9)), eval_transform(data)):
        assert transform(functools.partial(train.open, 0), 0, 0)[0].shape == (3, 16, 16)


@pytest.mark.parametrize(("high", "bits"), [(255, 8), (1023, 10), (4095, 12)])
def test_16_bit_images_of_a_small_range_are_said_once_with_the_setting(root, high, bits):
    repaint(root, deep(high))
    train, held_out = build(root)
    assert np.asarray(train.load(0)).max() == high >> 8
    for dataset, n in ((train, 6), (held_out, 4)):
        note = notes_on(dataset)[0]
        assert f"{n} of {n} images looked at" in note and f"reach {high:,} of 65,535" in note
        assert f"type data.bit_depth={bits}" in note
        assert len(notes_on(dataset)) == (2 if bits == 8 else 1)  # and are of one colour
    train, held_out = build(root, bit_depth=bits)
    assert notes_on(train) == notes_on(held_out) == ()
    assert np.asarray(train.load(0)).max() == 255


def test_one_colour_is_said_once_and_is_no_error(root):
    repaint(root, lambda n: Image.new("RGB", (8, 8), (250, 250, 250)))
    deep(65535)(0).save(root / "train" / "class1" / "2.JPEG", format="PNG")
    train, held_out = build(root)
    first = root / "train" / "class0" / "0.JPEG"
    assert notes_on(train) == (
        f"note: 5 of 6 images looked at in {root}/train are of one colour (first: {first})",
    )
    assert "4 of 4" in notes_on(held_out)[0]


def test_masks_of_0_and_1_are_said(root):
    repaint(root, lambda n: Image.fromarray(np.eye(8, dtype=np.uint8)))
    assert "brightest pixel of 6 images looked at" in notes_on(build(root)[0])[0]
    assert "is 1 of 255" in notes_on(build(root)[0])[0]


def test_a_broken_image_is_left_to_who_needs_it(root):
    (root / "train" / "class0" / "0.JPEG").write_bytes(b"broken")
    assert notes_on(build(root)[0]) == ()


# --- through the command line -------------------------------------------------------------------


def test_the_line_reaches_the_user_of_train_and_eval(ghosttrain, tiny, tmp_path, root):
    (root / "train" / "class0" / "notes.txt").touch()
    (root / "val" / "class0" / ".DS_Store").touch()
    outcome = ghosttrain(*tiny, f"data.root={root}", "train.global_batch=4", "train.max_steps=1")
    assert outcome.code == 0
    run = only_run(tmp_path / "runs")
    for text in (outcome.out + outcome.err, (run / "log.txt").read_text()):
        assert f"  left out of {root}/train: 1 without an image's suffix (.txt 1;" in text
        assert f"  left out of {root}/val: 1 hidden" in text
    assert f"left out of {root}/val: 1 hidden" in ghosttrain("eval", run).out


def test_the_pixel_limit_holds_in_workers_and_can_be_typed(ghosttrain, tiny):
    outcome = ghosttrain(*tiny, "train.max_steps=1", "data.workers=2", "data.max_pixels=2687")
    assert outcome.code == 2
    assert "has 56 x 48 pixels, more than data.max_pixels=2687" in outcome.err
    assert "type data.max_pixels=2688" in outcome.err and "intact" not in outcome.err
    assert outcome.err.count("\n") == 1


def test_values_that_bit_depth_does_not_hold_are_refused(ghosttrain, tiny, root):
    repaint(root, deep(4095))
    outcome = ghosttrain(*tiny, f"data.root={root}", "train.global_batch=4", "data.bit_depth=10")
    assert outcome.code == 2 and "type data.bit_depth=12" in outcome.err
    assert decode.BIT_DEPTH == 16
    assert "data.bit_depth=7 is not" in ghosttrain(*tiny, "data.bit_depth=7").err

"""`data check`, through the command line, against what Pillow says of the same files."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from ghosttrain.engine import progress
from ghosttrain.study import data_check


@pytest.fixture
def images(tmp_path):
    """Two classes of 6 training and 2 held-out images, no two of them alike."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name in ("a", "b"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (20 + number, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "images"


@pytest.fixture
def checked(ghosttrain, images):
    """Run `data check ... --json`; return the exit code and what it found."""

    def run(*args):
        outcome = ghosttrain("data", "check", "data=folder", f"data.root={images}", *args, "--json")
        return outcome.code, json.loads(outcome.out)

    return run


def names(found, root):
    """Return the paths below the root of images, or of groups of them."""
    if isinstance(found, dict):
        return os.path.relpath(found["image"], root)
    return [names(each, root) for each in found]


def test_good_images(checked, ghosttrain, images):
    code, found = checked()
    assert code == 0 and found["training"] == 12 and found["held_out"] == 4
    assert found["modes"] == {"RGB": 16}
    assert (found["largest"]["width"], found["largest"]["height"]) == (24, 25)
    for kind in ("unreadable", "oversized", "grey", "cmyk", "duplicates", "two_labels", "overlap"):
        assert found[kind] == []
    outcome = ghosttrain("data", "check", "data=folder", f"data.root={images}")
    assert outcome.code == 0 and outcome.err == ""
    first, second, *_, last = outcome.out.splitlines()
    assert first == f"{images}/train: 12 images, 2 classes; held out 4"
    assert second.startswith("read 16 images in 0:0") and second.endswith("modes: RGB 16")
    assert last == "nothing here keeps a run from going through"


def test_each_kind_of_odd_image_is_named(checked, ghosttrain, images):
    a, b = images / "train" / "a", images / "train" / "b"
    Image.open(a / "0.png").convert("L").save(a / "grey.jpg")
    Image.open(a / "1.png").convert("CMYK").save(a / "cmyk.jpg")
    Image.new("RGB", (50, 40)).save(b / "large.png")
    (b / "cut.png").write_bytes((b / "1.png").read_bytes()[:300])
    (images / "val" / "a" / "empty.png").write_bytes(b"")
    code, found = checked("data.max_pixels=1999")
    assert code == 1
    assert names(found["grey"], images) == ["train/a/grey.jpg"]
    assert names(found["cmyk"], images) == ["train/a/cmyk.jpg"]
    assert names(found["oversized"], images) == ["train/b/large.png"]
    assert "50 x 40 pixels, more than data.max_pixels=1999" in found["oversized"][0]["reason"]
    assert names(found["unreadable"], images) == ["train/b/cut.png", "val/a/empty.png"]
    assert [each["half"] for each in found["unreadable"]] == ["training", "held-out"]
    assert found["faults"] == ["a run ends at 3 images that cannot be used"]

    words = ["data=folder", f"data.root={images}", "data.max_pixels=1999"]
    text = ghosttrain("data", "check", *words)
    assert text.code == 1
    for part in (
        "unreadable: 2 (a run ends there; data.on_error=skip goes on without them; read are JPEG, ",
        "oversized: 1 (",
        "grey (mode L): 1 (seen as three equal channels)",
        "CMYK: 1 (converted to RGB)",
    ):
        assert part in text.out, text.out
    code, found = checked("data.max_pixels=1999", "data.on_error=skip")
    assert code == 0 and len(found["unreadable"]) == 2


def test_the_same_content_is_found_wherever_it_lies(checked, ghosttrain, images):
    train, val = images / "train", images / "val"
    for path, copies in (
        (train / "a" / "0.png", [train / "a" / "copy.bmp", train / "a" / "again.png"]),
        (train / "a" / "1.png", [train / "b" / "other_label.png"]),
        (train / "b" / "2.png", [val / "b" / "known.tga", val / "a" / "known.png"]),
        (val / "a" / "0.png", [val / "a" / "twice.png"]),  # harms no training
    ):
        for copy in copies:
            Image.open(path).save(copy)
    code, found = checked()
    assert code == 1 and found["faults"] == ["held-out images are trained on"]
    assert names(found["duplicates"], images) == [
        ["train/a/0.png", "train/a/again.png", "train/a/copy.bmp"]
    ]
    assert names(found["two_labels"], images) == [["train/a/1.png", "train/b/other_label.png"]]
    assert [each["class"] for each in found["two_labels"][0]] == ["a", "b"]
    assert names(found["overlap"], images) == [
        ["train/b/2.png", "val/a/known.png", "val/b/known.tga"]
    ]

    groups = defaultdict(set)  # the same by Pillow
    for path in images.rglob("*.*"):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        groups[pixels.shape, pixels.tobytes()].add(os.path.relpath(path, images))
    every = [group for group in groups.values() if len(group) > 1]
    kinds = ("duplicates", "two_labels", "overlap")
    ours = [{*group} for kind in kinds for group in names(found[kind], images)]
    assert all(group in every for group in ours) and len(every) == len(ours) + 1

    text = ghosttrain("data", "check", "data=folder", f"data.root={images}").out
    assert f"{train}/a/1.png (a) = {train}/b/other_label.png (b)" in text
    assert f"training {train}/b/2.png = held-out {val}/a/known.png" in text
    split = ["data", "check", "data=folder", f"data.root={train}", "data.split=0.5"]
    outcome = ghosttrain(*split)
    assert outcome.code == 1 and "or type data.near_duplicates=together" in outcome.out
    assert ghosttrain(*split, "data.near_duplicates=together").code == 0


def test_names_and_what_is_left_out_are_told_as_they_are(checked, ghosttrain, images):
    """JSON has names that open the file; lines show them."""
    odd = images / "train" / "a" / "odd\x1b name.png"
    odd.write_bytes(b"")
    os.mkfifo(images / "val" / "b" / "fifo.png")
    _, found = checked()
    (unreadable,) = found["unreadable"]
    assert unreadable["image"] == str(odd) and os.path.exists(unreadable["image"])
    (left_out,) = found["left_out"]
    assert "neither file nor folder" in left_out and "fifo.png" in left_out
    text = ghosttrain("data", "check", "data=folder", f"data.root={images}").out
    assert "odd\\x1b name.png is empty" in text and left_out in text


def test_workers_and_lines_change_nothing(checked, ghosttrain, images, monkeypatch, capsys):
    shutil.copy(images / "train" / "a" / "0.png", images / "val" / "a" / "9.png")
    monkeypatch.setattr(data_check, "CHUNK", 3)
    monkeypatch.setattr(progress, "EVERY", -1.0)
    words = ["data", "check", "data=folder", f"data.root={images}", "--json"]
    alone, two = (ghosttrain(*words, f"data.workers={count}") for count in (0, 2))
    assert alone.out == two.out and alone.code == two.code == 1
    lines = two.err.splitlines()
    assert len(lines) == 6 and lines[-1].startswith("17 of 17 images, ")


def test_a_worker_that_dies_is_one_line(ghosttrain, images, monkeypatch):
    monkeypatch.setattr(data_check, "read", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    outcome = ghosttrain("data", "check", "data=folder", f"data.root={images}", "data.workers=2")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert "a data worker was killed" in outcome.err


def test_many_are_counted_and_some_named(ghosttrain, images):
    for number in range(14):
        (images / "train" / "a" / f"broken{number}.png").write_bytes(b"")
    text = ghosttrain("data", "check", "data=folder", f"data.root={images}").out
    assert "unreadable: 14 (" in text and "and 4 more (--json has all)" in text
    for path in images.rglob("*.png"):
        path.write_bytes(b"")
    outcome = ghosttrain("data", "check", "data=folder", f"data.root={images}")
    assert outcome.code == 1 and "unreadable: 30 (" in outcome.out

"""`data.index`: a listing that is kept equals one that is made, and holds only while nothing has
changed."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
from helpers import refusal

from ghosttrain.config.schema import DataConfig
from ghosttrain.data.datasets import build_datasets, tree
from ghosttrain.data.datasets.tree import list_tree

OLD_NS = 10**18


def age(folder, when=OLD_NS):
    """Let the folders look as if they had not changed for years."""
    for top, _, _ in os.walk(folder):
        os.utime(top, ns=(when, when))


@pytest.fixture
def root(tmp_path):
    """Three classes, one with a folder within and a name that is no UTF-8; files that are left
    out."""
    for split in ("train", "val"):
        for k, label in enumerate(("ant", "bee", "cat")):
            folder = tmp_path / "data" / split / label
            (folder / "deeper").mkdir(parents=True)
            for number in range(2 + k):
                (folder / f"{number}.jpg").touch()
            (folder / "deeper" / "x.png").touch()
            (folder / "notes.txt").touch()
    (tmp_path / "data" / "train" / "readme.md").touch()
    with open(os.fsencode(tmp_path) + b"/data/train/bee/\xff.jpg", "wb"):
        pass
    age(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def listings(monkeypatch):
    """Which folders were listed."""
    made, real = [], tree._listed
    monkeypatch.setattr(tree, "_listed", lambda folder: made.append(folder) or real(folder))
    return made


def same(one, other):
    assert one.classes == other.classes and one.counts == other.counts
    assert one.names.tolist() == other.names.tolist() and one.names.dtype == other.names.dtype
    assert (one.left_out, one.listed) == (other.left_out, other.listed)


def test_what_was_kept_is_what_was_listed(root, tmp_path, listings):
    index = str(tmp_path / "kept")
    first, again = (list_tree(root / "train", index) for _ in range(2))
    assert len(listings) == 1
    same(first, again)
    same(first, list_tree(root / "train"))
    assert again.counts == [3, 5, 5] and b"\xff.jpg" in again.names
    (note,) = again.left_out
    assert ".txt 3" in note and "outside the class folders" in note
    data = DataConfig(name="folder", root=str(root), index=index)
    halves, plain = build_datasets(data), build_datasets(data.model_copy(update={"index": None}))
    for one, other in zip(halves, plain, strict=True):
        assert one.identity() == other.identity() and one.left_out == other.left_out
    for number in range(len(halves[0])):
        assert os.path.exists(os.fsencode(halves[0].path(number)))


def changes(root):
    """Everything that can happen to a tree."""
    return {
        "a file more": (root / "ant" / "new.jpg").touch,
        "a file less": (root / "ant" / "0.jpg").unlink,
        "another name": lambda: (root / "bee" / "0.jpg").rename(root / "bee" / "z.jpg"),
        "deeper": (root / "cat" / "deeper" / "new.png").touch,
        "moved": lambda: (root / "ant" / "1.jpg").rename(root / "bee" / "moved.jpg"),
        "a class more": lambda: _new_class(root / "dog"),
        "a class renamed": lambda: (root / "ant").rename(root / "ape"),
    }


def _new_class(folder):
    folder.mkdir()
    (folder / "0.jpg").touch()


def test_every_change_is_seen(root, tmp_path, listings):
    index, train = str(tmp_path / "kept"), root / "train"
    for k, (name, change) in enumerate(changes(train).items()):
        list_tree(train, index)
        before = len(listings)
        same(list_tree(train, index), list_tree(train))
        assert len(listings) == before + 1, name  # the one without an index
        change()
        same(list_tree(train, index), list_tree(train))
        assert len(listings) == before + 3, name
        age(train, OLD_NS + k + 1)


def test_a_folder_that_changed_just_now_is_not_kept(root, tmp_path, listings):
    (root / "train" / "ant" / "new.jpg").touch()
    for _ in range(2):
        list_tree(root / "train", str(tmp_path / "kept"))
    assert len(listings) == 2 and not (tmp_path / "kept").exists()


def test_a_damaged_index_is_made_anew(root, tmp_path, listings):
    index = tmp_path / "kept"
    expected = list_tree(root / "train", str(index))
    (file,) = index.iterdir()
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    for k in range(60):
        if k % 3 == 0:
            damaged = content[: int(rng.integers(len(content)))]
        else:
            damaged = bytearray(content)
            damaged[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        same(list_tree(root / "train", str(index)), expected)
        assert file.read_bytes() == content or file.read_bytes() == damaged


def test_other_kinds_of_files_are_listed_anew(root, tmp_path, listings, monkeypatch):
    index = str(tmp_path / "kept")
    assert list_tree(root / "train", index).counts == [3, 5, 5]
    monkeypatch.setattr(tree, "suffixes", lambda: frozenset({b"png"}))
    assert list_tree(root / "train", index).counts == [1, 1, 1]


def test_folders_are_listed_side_by_side(root, monkeypatch):
    """All three classes are being listed at the same moment."""
    meeting, real = threading.Barrier(3, timeout=20), tree._class_images

    def waits(folder):
        meeting.wait()
        return real(folder)

    monkeypatch.setattr(tree, "_class_images", waits)
    assert list_tree(root / "train").counts == [3, 5, 5]


def test_an_index_that_cannot_be_written_is_said(root, tmp_path):
    (tmp_path / "file").touch()
    refusal(lambda: list_tree(root / "train", str(tmp_path / "file" / "x")), "data.index=")

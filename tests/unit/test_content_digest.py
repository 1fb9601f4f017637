"""The digest that tells one data set from another."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import count_calls, paint
from PIL import Image

from ghosttrain.config.schema import DataConfig
from ghosttrain.data.datasets import ArrayDataset, FolderDataset, build_datasets, folder
from ghosttrain.errors import UserError


def digest_of(root):
    return build_datasets(DataConfig(name="folder", root=str(root)))[0].content_digest()


def test_the_digest_does_not_depend_on_where_the_folder_lies(root, tmp_path_factory):
    first = digest_of(root)
    assert len(first) == 64 and int(first, 16) >= 0
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "moved"
    shutil.copytree(root, elsewhere)
    assert digest_of(elsewhere) == first
    (root / "train").rename(root / "other")
    split = build_datasets(DataConfig(name="folder", root=str(root), train_split="other"))[0]
    assert split.content_digest() == first
    shutil.rmtree(root / "val" / "cat")  # only the training images are in it
    (root / "val" / "cat").mkdir()
    paint(root / "val" / "cat" / "new.png")
    (root / "other").rename(root / "train")
    assert digest_of(root) == first


def rename_class(train):
    (train / "cat").rename(train / "dog")
    (train.parent / "val" / "cat").rename(train.parent / "val" / "dog")


CHANGES = {
    "a file was renamed": lambda train: (train / "cat" / "2.JPEG").rename(train / "cat" / "7.JPEG"),
    "a file was added": lambda train: paint(train / "cat" / "3.JPEG"),
    "a file was removed": lambda train: (train / "cat" / "2.JPEG").unlink(),
    "a file has another label": lambda train: (train / "bird" / "2.JPEG").rename(
        train / "Ant" / "3.JPEG"
    ),
    "a class was renamed": rename_class,
    "an image was resized": lambda train: (
        Image.open(train / "bird" / "1.JPEG").resize((4, 3)).save(train / "bird" / "1.JPEG")
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_tells_other_images(root, change):
    first = digest_of(root)
    CHANGES[change](root / "train")
    assert digest_of(root) != first


def test_the_digest_reads_evenly_spaced_files_the_first_and_the_last_among_them(root, monkeypatch):
    train, _ = build_datasets(DataConfig(name="folder", root=str(root)))
    read = []
    monkeypatch.setattr(folder, "read_file", lambda path: read.append(Path(path).name) or b"")
    monkeypatch.setattr(folder, "DIGEST_FILES", 64)
    n = 1000
    names = np.array([f"{i:04}.jpg".encode() for i in range(n)])
    FolderDataset("here", ["a"], np.zeros(n, np.int64), 3, names).content_digest()
    chosen = np.array([int(name[:4]) for name in read])
    assert len(chosen) == 64 and chosen[0] == 0 and chosen[-1] == n - 1
    assert set(np.diff(chosen)) <= {15, 16}
    read.clear()
    train.content_digest()
    assert read == [f"{i}.JPEG" for _ in range(3) for i in range(3)]  # all of a small set


def test_the_digest_names_a_file_that_is_gone(root):
    train, _ = build_datasets(DataConfig(name="folder", root=str(root)))
    (root / "train" / "cat" / "2.JPEG").unlink()
    with pytest.raises(UserError, match=r"cat/2\.JPEG \(No such file"):
        train.content_digest()


def test_the_digest_of_arrays_tells_classes_labels_shapes_and_every_pixel():
    images, labels = np.zeros((6, 4, 2), np.uint8), np.arange(6) % 2

    def digest(source="x", classes=("0", "1"), labels=labels, in_chans=3, images=images):
        return ArrayDataset(source, list(classes), labels, in_chans, images).content_digest()

    pixel, label = images.copy(), labels.copy()
    pixel[5, 3, 1] = 1
    label[5] = 0
    assert digest() == digest(source="elsewhere", in_chans=1, labels=labels.astype(np.int32))
    assert digest(images=np.asfortranarray(pixel)) == digest(images=pixel)
    others = [
        digest(classes=("01", "")),
        digest(classes=("1", "0")),
        digest(labels=label),
        digest(images=pixel),
        digest(images=images.reshape(6, 2, 4)),
    ]
    assert len({digest(), *others}) == 6


def test_the_digest_handles_names_all_at_once(monkeypatch):
    """A million names take a tenth of a second: it opens a few files, but calls nothing by name."""
    monkeypatch.setattr(folder, "read_file", lambda path: b"")

    def calls(n: int) -> int:
        names = np.array([b"n01440764_%d.JPEG" % i for i in range(n)])
        labels = np.arange(n) * 10 // n
        dataset = FolderDataset("here", [f"n{k:08}" for k in range(10)], labels, 3, names)
        return count_calls(dataset.content_digest)

    assert calls(100_000) - calls(50_000) < 25_000

"""What a resumed run compares: the listing of a data set, without opening an image."""

from pathlib import Path

import numpy as np
import pytest
from helpers import make_images

from ghosttrain.config.schema import DataConfig
from ghosttrain.data.datasets import FolderDataset, build_datasets


def listing(root: Path) -> dict:
    return build_datasets(DataConfig(name="folder", root=str(root)))[0].identity()


def test_a_listing_tells_names_labels_and_classes_apart_and_not_where_they_lie(tmp_path):
    for name in "ab":
        make_images(tmp_path / name, classes=2, train=3, val=1)
    first, two = (tmp_path / name / "train" for name in "ab")
    before = listing(tmp_path / "a")
    assert before == listing(tmp_path / "b")
    assert before["classes"] == ["class0", "class1"] and before["images"] == 6

    (two / "class0" / "0.JPEG").rename(two / "class0" / "9.JPEG")
    renamed = listing(tmp_path / "b")
    assert renamed["digest"] != before["digest"] and renamed["images"] == 6
    (first / "class0" / "2.JPEG").rename(first / "class1" / "3.JPEG")
    moved = listing(tmp_path / "a")
    assert moved["digest"] != before["digest"] and moved["images"] == 6


def test_of_idx_files_and_digits_the_pixels_count():
    train, held_out = build_datasets(DataConfig(name="digits"))
    before = train.identity()
    assert before["images"] == 1437 and held_out.identity()["images"] == 360
    train.images[5, 0, 0] ^= 1
    assert train.identity()["digest"] != before["digest"]


def test_a_listing_opens_no_image():
    names = np.array([b"absent.jpg"] * 4)
    absent = FolderDataset("/absent", ["a", "b"], np.array([0, 0, 1, 1]), 3, names)
    assert absent.identity()["images"] == 4
    with pytest.raises(ValueError, match="absent"):
        absent.content_digest()

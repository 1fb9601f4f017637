"""The held-out half of data is read where the training half is not there."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from boxes import make_coco, make_voc, read_annotations, write_coco
from helpers import make_images, write_idx

from ghosttrain.config.schema import DataConfig
from ghosttrain.data.datasets import build_datasets, build_held_out
from ghosttrain.errors import UserError


def folder(root: Path) -> DataConfig:
    make_images(root, classes=3, train=2, val=2)
    shutil.rmtree(root / "val" / "class1")
    return DataConfig(name="folder", root=str(root), val_classes="subset")


def some_classes(root: Path) -> DataConfig:
    make_images(root, classes=3, train=2, val=2)
    return DataConfig(name="folder", root=str(root), classes=("class0", "class2"))


def idx(root: Path) -> DataConfig:
    for prefix, labels in (("train", [3, 7, 9, 7]), ("t10k", [9, 3])):
        write_idx(root, prefix, np.zeros((len(labels), 4, 4)), np.array(labels))
    return DataConfig(name="idx", root=str(root), val_split="t10k")


def table(root: Path) -> DataConfig:
    make_images(root, classes=2, train=2, val=2)
    rows = [
        (path.relative_to(root), path.parent.name, path.parents[1].name)
        for path in sorted(root.glob("*/*/*.JPEG"))
    ]
    with open(root / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    return DataConfig(name="table", root=str(root), table="table.csv", split_column="split")


def coco(root: Path) -> DataConfig:
    make_coco(root)
    return DataConfig(
        name="coco", root=str(root), train_split="train2017", val_split="val2017"
    )  # fmt: skip


def voc(root: Path) -> DataConfig:
    make_voc(root)
    return DataConfig(name="voc", root=str(root))


@pytest.mark.parametrize("make", [folder, some_classes, idx, table, coco, voc])
def test_it_is_the_same_without_the_training_half(tmp_path, make):
    data = make(tmp_path)
    train, expected = build_datasets(data)
    gone = [*tmp_path.glob("train*"), *tmp_path.glob("*/instances_train2017.json")]
    gone += [*tmp_path.glob("ImageSets/Main/train.txt"), *tmp_path.glob("*/a.*")]
    for path in gone:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError):
        build_datasets(data)
    found = build_held_out(data, train.classes)
    assert found.identity() == expected.identity() and found.left_out == expected.left_out
    assert found.labels.dtype == np.int64
    assert (np.asarray(found.load(0)) == np.asarray(expected.load(0))).all()


def test_boxes_are_matched_by_name(tmp_path):
    """Other ids, another order, a class that was not trained, one that is not there."""
    data = coco(tmp_path)
    expected = build_held_out(data, ["disc", "bar"])
    content = read_annotations(tmp_path, "val2017")
    for row in content["annotations"]:
        row["category_id"] = {3: 5, 17: 2}[row["category_id"]]
    content["categories"] = [{"id": 5, "name": "disc"}, {"id": 2, "name": "bar"}]
    write_coco(tmp_path, "val2017", content)
    assert build_held_out(data, ["disc", "bar"]).identity() == expected.identity()
    found = build_held_out(data, ["ring", "disc"])
    assert found.classes == ["ring", "disc"] and {*found.boxes.labels.tolist()} == {1}
    assert len(found.boxes.labels) == (expected.boxes.labels == 0).sum()
    assert "are of a category that the file does not name, or training" in found.left_out[0]

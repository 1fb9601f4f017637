"""Sample number -> (image, label): embedded digits, class folders (ImageNet too), tables of
paths, IDX files; or (image, boxes): embedded synthetic scenes, COCO's and VOC's layouts.

Owns what exists on disk and its checks: everything wrong with the data as a whole is said here,
before training starts, in one line. Broken single files show when they are decoded. Knows nothing
of order or augmentation.

Legend: N images, H W map.
"""

from __future__ import annotations

from pathlib import Path

from ghosttrain.config.schema import DataConfig
from ghosttrain.data.datasets.base import ArrayDataset, Dataset
from ghosttrain.data.datasets.coco import held_out_coco, read_coco
from ghosttrain.data.datasets.digits import read_digits
from ghosttrain.data.datasets.folder import (
    FileDataset,
    FolderDataset,
    held_out_folders,
    read_folders,
)
from ghosttrain.data.datasets.idx import held_out_idx, read_idx
from ghosttrain.data.datasets.inspection import (
    classes_note,
    duplicates_note,
    notes_on,
    unusual_notes,
)
from ghosttrain.data.datasets.scenes import read_scenes
from ghosttrain.data.datasets.selection import of_classes, selected
from ghosttrain.data.datasets.splitting import is_split_here
from ghosttrain.data.datasets.table import held_out_table, read_table
from ghosttrain.data.datasets.voc import held_out_voc, read_voc
from ghosttrain.errors import UserError
from ghosttrain.files import expanded

__all__ = [
    "ArrayDataset",
    "Dataset",
    "FileDataset",
    "FolderDataset",
    "build_datasets",
    "build_held_out",
    "classes_note",
    "duplicates_note",
    "notes_on",
    "unusual_notes",
]

READERS = {
    "folder": read_folders,
    "imagenet": read_folders,
    "idx": read_idx,
    "table": read_table,
    "coco": read_coco,
    "voc": read_voc,
}
"""`data.name` -> what reads both halves of data that lie in a folder."""
HELD_OUT_READERS = {
    "folder": held_out_folders,
    "imagenet": held_out_folders,
    "idx": held_out_idx,
    "table": held_out_table,
    "coco": held_out_coco,
    "voc": held_out_voc,
}
"""`data.name` -> what reads the held-out half alone."""
EMBEDDED = {"digits": read_digits, "scenes": read_scenes}
"""`data.name` -> what makes both halves of data that are part of the installation."""


def build_datasets(data: DataConfig) -> tuple[Dataset, Dataset]:
    """Return (training images, held-out images); the split never depends on a seed.

    No image is decoded.

    Raises:
        UserError: the data are not there, not complete, or their two halves do not fit each other.
    """
    if data.name in EMBEDDED:
        halves = EMBEDDED[data.name](data.in_chans)
    else:
        halves = READERS[data.name](data, _root(data))
    train, held_out = selected(data, *halves)
    if len(train.classes) < 2 and train.boxes is None:
        raise UserError(
            f"{train.source} has one class, {train.classes[0]!r}: there is nothing to tell apart, "
            "and the loss is 0 from the start; add images of another class (of what it is not, for "
            "example)"
        )
    return train, held_out


def build_held_out(data: DataConfig, classes: list[str]) -> Dataset:
    """Return the held-out images alone: the training images need not be there, unless one set is
    split here. Boxes are matched to `classes` by name. The classes of other data are those of the
    held-out half, which may not be `classes`: the caller compares.

    Args:
        data: the settings.
        classes: names of the classes that were trained, in the order of their labels.

    Raises:
        UserError: the images are not there or not complete.
    """
    if data.name in EMBEDDED or is_split_here(data):
        return build_datasets(data)[1]
    half = HELD_OUT_READERS[data.name](data, _root(data), classes)
    return of_classes(half, data.classes) if data.classes else half


def _root(data: DataConfig) -> Path:
    root = data.root
    holds = {
        "idx": f"{data.train_split}-images-idx3-ubyte[.gz]",
        "folder": f"{data.train_split}/<class>/*.jpg",
        "imagenet": f"{data.train_split}/<class>/*.JPEG",
        "table": "the images of data.table",
        "coco": f"annotations/instances_{data.train_split}.json and {data.train_split}/*.jpg",
        "voc": "ImageSets/Main/*.txt, Annotations/*.xml and JPEGImages/*.jpg",
    }[data.name]
    if not root:
        raise UserError(
            f"data={data.name} needs its folder: type data.root=/path, which holds {holds}"
        )
    path = expanded(root)
    if not path.is_dir():
        raise UserError(f"data.root={root} is no folder: type data.root=/path, which holds {holds}")
    return path

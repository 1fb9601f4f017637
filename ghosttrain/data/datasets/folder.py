"""Image files in one folder per class, ImageNet's too: `root/train/<class>/...`, at any depth; or
`root/<class>/...`, of which a part is held out here (`splitting.py`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from ghosttrain.config.identity import fault_below
from ghosttrain.config.schema import DataConfig
from ghosttrain.data.datasets.base import Dataset, evenly, splits
from ghosttrain.data.datasets.duplicates import near_duplicates
from ghosttrain.data.datasets.splitting import held_out_mask, is_split_here
from ghosttrain.data.datasets.tree import class_names, entries, list_tree
from ghosttrain.data.decode import MAX_PIXELS, open_image, read_file
from ghosttrain.errors import UserError, did_you_mean
from ghosttrain.text import listed, printable

IMAGENET_CLASSES = 1000
DIGEST_FILES = 1024  # whose content a digest covers


@dataclass(frozen=True, eq=False)
class FileDataset(Dataset):
    """Image files: `source/<name>`."""

    names: np.ndarray
    """File names, relative to `source`: (N,) bytes of fixed width. One array instead of a million
    Python strings: worker processes share its memory, where counting references to strings would
    copy them into every worker."""
    _: KW_ONLY
    max_pixels: int = MAX_PIXELS
    """Pixels of the largest image that is decoded."""
    _arrays: ClassVar[tuple[str, ...]] = ("names",)

    def open(self, index: int) -> Image.Image:
        """Return image `index`, not decoded yet."""
        return open_image(self.path(index), self.max_pixels)

    def path(self, index: int) -> str:
        """Return where image `index` lies."""
        return os.path.join(self.source, self.relative_path(index))

    def relative_path(self, index: int) -> str:
        """Return where image `index` lies below `source`."""
        return os.fsdecode(self.names[index])

    def short_name(self, index: int) -> bytes:
        """Return where image `index` lies below `source`."""
        return os.fsencode(self.relative_path(index))

    def name_of(self, index: int) -> str:
        """Return the path of image `index`, as it can be shown."""
        return printable(self.path(index))

    def _content(self) -> Iterable[bytes]:
        """All names, and the bytes of evenly spaced files: resized copies keep their names, and
        reading the 140 GB of ImageNet would take too long.
        """
        yield self.names.tobytes()
        for index in evenly(len(self), DIGEST_FILES):
            yield read_file(self.path(index))

    def _index(self) -> bytes:
        return self.names.tobytes()


@dataclass(frozen=True, eq=False)
class FolderDataset(FileDataset):
    """Image files in one folder per class: `source/<class>/<name>`; `names` are relative to the
    class folder.
    """

    def relative_path(self, index: int) -> str:
        """Return where image `index` lies below `source`."""
        return os.path.join(self.classes[self.labels[index]], os.fsdecode(self.names[index]))


def read_folders(data: DataConfig, root: Path) -> tuple[Dataset, Dataset]:
    """Return the two halves of a tree of class folders; of ImageNet with all its classes.

    Raises:
        UserError: a split or a class is missing, empty, or cannot be listed.
    """
    if is_split_here(data):
        return _split_folder(data, root)
    train_dir, val_dir = (_split(root, split, key) for split, key in splits(data))
    classes, val_classes = class_names(train_dir), class_names(val_dir)
    if data.name == "imagenet" and len(classes) != IMAGENET_CLASSES:
        raise UserError(
            f"{train_dir} has {len(classes):,} class folders, ImageNet has {IMAGENET_CLASSES:,}: "
            f"for other images type data=folder data.root={root}"
        )
    missing, unknown = set(classes) - set(val_classes), set(val_classes) - set(classes)
    if unknown or (missing and data.val_classes == "all"):
        differ = [f"lacks {listed(map(repr, sorted(missing)))}"] if missing else []
        differ += [f"adds {listed(map(repr, sorted(unknown)))}"] if unknown else []
        raise UserError(
            f"{val_dir} must have the class folders of {train_dir}, but it {' and '.join(differ)}"
            + ("; type data.val_classes=subset where it may lack some" * (not unknown))
        )
    train = _images_of(train_dir, classes, data)
    return train, _images_of(val_dir, classes, data)


def held_out_folders(data: DataConfig, root: Path, classes: list[str]) -> Dataset:
    """Return the held-out half alone. Its classes are those of its folders; with
    `data.val_classes=subset`, which lets it lack some, also `classes`.

    Raises:
        UserError: as `read_folders`.
    """
    _, (split, key) = splits(data)
    folder = _split(root, split, key)
    own = class_names(folder)
    if data.val_classes == "subset":
        own = sorted({*own, *classes}, key=os.fsencode)
    return _images_of(folder, own, data)


def _split_folder(data: DataConfig, root: Path) -> tuple[Dataset, Dataset]:
    """Return the two halves of one folder of classes."""
    classes = class_names(root)
    if {data.train_split, data.val_split} <= set(classes):
        raise UserError(
            f"data.root={root} holds {data.train_split}/ and {data.val_split}/: it is split "
            "already; leave data.split and data.fold out, or name the folder of the classes "
            f"(data.root={root / data.train_split})"
        )
    return split_here(data, _images_of(root, classes, data))


def split_here(data: DataConfig, whole: FileDataset) -> tuple[FileDataset, FileDataset]:
    """Return the training and the held-out part of one set (`splitting.held_out_mask`)."""
    paths = [whole.short_name(i) for i in range(len(whole))]
    alike = near_duplicates(whole) if data.near_duplicates == "together" else ()
    held = held_out_mask(data, paths, whole.labels, whole.classes, alike)
    return whole.part(~held, whole.left_out), whole.part(held)


def _split(root: Path, split: str, key: str) -> Path:
    if fault := fault_below(split.rstrip("/")):
        raise UserError(f"data.{key}={split!r} {fault}: type the name of a folder in {root}")
    folder = root / split
    if not folder.is_dir():
        hint = did_you_mean(split, [name for name, is_dir in entries(root) if is_dir])
        raise UserError(
            f"there is no folder {split!r} in {root}: type data.{key}=NAME, or, if its folders are "
            f"the classes, data.split=0.2 to hold a fifth of each out.{hint}"
        )
    return folder


def _images_of(folder: Path, classes: list[str], data: DataConfig) -> FileDataset:
    """Return the images below `folder`, which may lack some of the classes."""
    tree = list_tree(folder, data.index)
    counts = dict(zip(tree.classes, tree.counts, strict=True))
    numbers = [counts.get(label, 0) for label in classes]
    return FolderDataset(
        str(folder),
        classes,
        np.repeat(np.arange(len(classes), dtype=np.int64), numbers),
        data.in_chans,
        tree.names,
        left_out=tree.left_out,
        listed=tree.listed,
        bit_depth=data.bit_depth,
        max_pixels=data.max_pixels,
    )

"""Pascal VOC's layout (http://host.robots.ox.ac.uk/pascal/VOC/): `root/ImageSets/Main/SPLIT.txt`
names the images, `root/Annotations/NAME.xml` has their boxes, `root/JPEGImages/NAME.jpg` is one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from ghosttrain.config.identity import fault_below
from ghosttrain.config.schema import DataConfig
from ghosttrain.data.datasets.base import Dataset, splits
from ghosttrain.data.datasets.boxes import LARGEST, checked_boxes
from ghosttrain.data.datasets.coco import box_files, files_there
from ghosttrain.data.datasets.folder import FileDataset
from ghosttrain.errors import UserError
from ghosttrain.text import one_line


class _Object(NamedTuple):
    image: int
    name: str
    corners: tuple[float, float, float, float]
    difficult: bool


def read_voc(data: DataConfig, root: Path) -> tuple[Dataset, Dataset]:
    """Return the two halves of data in VOC's format. The classes are the names that occur in the
    training half, sorted.

    Raises:
        UserError: a file is missing or not of this format, or a box is not finite.
    """
    (train_split, train_key), _ = splits(data)
    train = _objects(data, root, train_split, train_key)
    classes = sorted({each.name for each in train[0]})
    return _half(data, root, classes, *train), held_out_voc(data, root, classes)


def held_out_voc(data: DataConfig, root: Path, classes: list[str]) -> Dataset:
    """Return the held-out half alone, with the boxes of `classes`.

    Raises:
        UserError: as `read_voc`.
    """
    _, (split, key) = splits(data)
    return _half(data, root, classes, *_objects(data, root, split, key))


def _objects(
    data: DataConfig, root: Path, split: str, key: str
) -> tuple[list[_Object], list[str], list[tuple[int, int]], tuple[str, ...], Path]:
    """Return objects, names and sizes of the images of a split, notes, and the file that lists
    them.
    """
    file = root / "ImageSets" / "Main" / f"{split}.txt"
    if fault := fault_below(split):
        raise UserError(f"data.{key}={split!r} {fault}: type the name of a split, such as train")
    if not file.is_file():
        raise UserError(
            f"there is no {file}: data=voc reads ImageSets/Main/NAME.txt, Annotations/ and "
            f"JPEGImages/; type data.{key}=NAME"
        )
    words = [
        line.split()[0] for line in file.read_text(errors="replace").splitlines() if line.split()
    ]
    kept, missing = files_there(data, root / "JPEGImages", [f"{word}.jpg" for word in words])
    objects: list[_Object] = []
    sizes = []
    for number, place in enumerate(kept):
        size, found = _annotation(root / "Annotations" / f"{words[place]}.xml", number)
        sizes.append(size)
        objects += found
    return objects, [f"{words[i]}.jpg" for i in kept], sizes, tuple(missing), file


def _annotation(path: Path, number: int) -> tuple[tuple[int, int], list[_Object]]:
    """Return width and height of an image, and its objects."""
    if not path.is_file():
        raise UserError(f"there is no {path}: every image of the split needs its annotation")
    try:
        tree: Any = ElementTree.parse(path).getroot()
        size = tree.find("size")
        width, height = int(size.find("width").text), int(size.find("height").text)
        objects = []
        for each in tree.iter("object"):
            box = each.find("bndbox")
            left, top, right, bottom = (
                float(box.find(side).text) for side in ("xmin", "ymin", "xmax", "ymax")
            )
            difficult = each.find("difficult")
            # VOC counts pixels from 1, and the last one belongs to the box.
            objects.append(
                _Object(
                    number,
                    each.find("name").text.strip(),
                    (left - 1, top - 1, right, bottom),
                    difficult is not None and difficult.text.strip() == "1",
                )
            )
        if not (0 < width < LARGEST and 0 < height < LARGEST):
            raise ValueError(f"an image of {width} x {height} pixels")
    except (ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not of VOC's format ({one_line(error)[:100]}): mend the file"
        ) from None
    return (width, height), objects


def _half(
    data: DataConfig,
    root: Path,
    classes: list[str],
    objects: list[_Object],
    names: list[str],
    sizes: list[tuple[int, int]],
    missing: tuple[str, ...],
    file: Path,
) -> FileDataset:
    label_of = {name: k for k, name in enumerate(classes)}
    boxes, notes = checked_boxes(
        [each.image for each in objects],
        np.array([each.corners for each in objects], dtype=np.float64).reshape(-1, 4),
        [label_of.get(each.name, -1) for each in objects],
        [each.difficult for each in objects],
        None,
        np.array(sizes, dtype=np.int64).reshape(-1, 2),
        str(file),
        lambda number: names[number],
    )
    return box_files(
        data, root / "JPEGImages", classes, names, boxes, (*missing, *notes),
        (file, root / "JPEGImages", root / "Annotations"),
    )  # fmt: skip

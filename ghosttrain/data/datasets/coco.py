"""COCO's layout (https://cocodataset.org/#format-data): `root/annotations/instances_SPLIT.json` and
the images in `root/SPLIT/`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ghosttrain.config.identity import fault_below
from ghosttrain.config.schema import DataConfig
from ghosttrain.data.datasets.base import Dataset, splits
from ghosttrain.data.datasets.boxes import LARGEST, checked_boxes
from ghosttrain.data.datasets.folder import FileDataset
from ghosttrain.data.decode import BrokenImage, upright_size
from ghosttrain.errors import UserError
from ghosttrain.text import listed, one_line, printable


def read_coco(data: DataConfig, root: Path) -> tuple[Dataset, Dataset]:
    """Return the two halves of data in COCO's format. The classes are the categories of the
    training file in the order of their ids, which may have gaps; held-out boxes are matched to them
    by name.

    Raises:
        UserError: a file is missing or not of this format, or a box is not finite.
    """
    (train_split, train_key), _ = splits(data)
    train_file = _annotations(root, train_split, train_key)
    train_json = _read(train_file)
    with _named(train_file):
        rows = sorted(train_json["categories"], key=lambda row: row["id"])
        classes = list(dict.fromkeys(str(row["name"]) for row in rows))
        "".join(classes).encode()  # half a character is no text
        train = _half(data, root, train_split, train_file, train_json, classes)
    return train, held_out_coco(data, root, classes)


def held_out_coco(data: DataConfig, root: Path, classes: list[str]) -> Dataset:
    """Return the held-out half alone; its boxes are matched to `classes` by name.

    Raises:
        UserError: as `read_coco`.
    """
    _, (split, key) = splits(data)
    file = _annotations(root, split, key)
    with _named(file):
        return _half(data, root, split, file, _read(file), classes)


def _half(
    data: DataConfig, root: Path, split: str, file: Path, found: dict[str, Any], classes: list[str]
) -> FileDataset:
    label_of = {name: k for k, name in enumerate(classes)}
    same = _same_categories(found["categories"], file)
    labels = {row["id"]: label_of.get(str(row["name"]), -1) for row in found["categories"]}
    images, missing = files_there(data, root / split, [row["file_name"] for row in found["images"]])
    rows = [found["images"][i] for i in images]
    number_of = {row["id"]: number for number, row in enumerate(rows)}
    if len(number_of) < len(rows):
        raise UserError(f"{file}: two images have the same id: mend the file")
    listed_ids = {row["id"] for row in found["images"]}
    own = [row for row in found["annotations"] if row["image_id"] in number_of]
    strays = sum(row["image_id"] not in listed_ids for row in found["annotations"])
    sizes = np.array([(row["width"], row["height"]) for row in rows], dtype=np.int64)
    if not ((sizes > 0) & (sizes < LARGEST)).all():
        number = int(((sizes <= 0) | (sizes >= LARGEST)).any(axis=1).argmax())
        width, height = sizes[number].tolist()
        raise ValueError(f"{rows[number]['file_name']!r}: an image of {width} x {height} pixels")
    ltwh = np.array([row["bbox"] for row in own], dtype=np.float64).reshape(-1, 4)
    ltwh = np.where(np.abs(ltwh) < LARGEST, ltwh, np.nan)  # as good as infinite
    boxes, notes = checked_boxes(
        [number_of[row["image_id"]] for row in own],
        np.concatenate([ltwh[:, :2], ltwh[:, :2] + ltwh[:, 2:]], axis=1),
        [labels.get(row["category_id"], -1) for row in own],
        [bool(row.get("iscrowd", 0)) for row in own],
        [float(row.get("area", 0)) for row in own],
        sizes.reshape(-1, 2),
        str(file),
        lambda number: printable(str(rows[number]["file_name"])),
    )
    notes += same
    if strays:
        notes += (f"{file}: {strays:,} boxes are of images that it does not list: left out",)
    return box_files(data, root / split, classes, [row["file_name"] for row in rows], boxes,
                     (*missing, *notes), (file, root / split))  # fmt: skip


def _same_categories(categories: list[dict[str, Any]], file: Path) -> tuple[str, ...]:
    """Return a line about categories of one name, which are one class.

    Raises:
        UserError: two have one id.
    """
    ids = Counter(row["id"] for row in categories)
    if twice := [each for each, count in ids.items() if count > 1]:
        raise UserError(f"{file}: two categories have the id {twice[0]}: mend the file")
    names = Counter(str(row["name"]) for row in categories)
    alike = [printable(name) for name, count in names.items() if count > 1]
    return (f"{file}: categories of one name are one class: {listed(alike, 5)}",) * bool(alike)


def files_there(data: DataConfig, folder: Path, names: list[str]) -> tuple[list[int], list[str]]:
    """Return which of the files `names` there are in `folder`, and a line about the others.

    Raises:
        UserError: one is missing, and `data.on_error` does not say skip; none is there; a name
            leads out of the folder.
    """
    if not folder.is_dir():
        raise UserError(f"the images should lie in {folder}: there is no such folder")
    there: dict[str, set[str]] = {}
    kept: list[int] = []
    missing: list[int] = []
    for number, name in enumerate(names):
        if fault := fault_below(name):
            raise UserError(f"{folder}: the file name {name!r} {fault}: mend the annotations")
        below, _, leaf = name.rpartition("/")
        if below not in there:
            place = folder / below
            there[below] = set(os.listdir(place)) if place.is_dir() else set()
        (kept if leaf in there[below] else missing).append(number)
    if not missing:
        return kept, []
    line = f"{folder}: {len(missing):,} of {len(names):,} images are missing (first: "
    line += f"{printable(names[missing[0]])})"
    if data.on_error != "skip" or not kept:
        raise UserError(f"{line}: put them there, or leave them out by data.on_error=skip")
    return kept, [f"{line} and are left out with their boxes"]


@dataclass(frozen=True, eq=False)
class BoxFiles(FileDataset):
    """Image files with boxes."""

    _: KW_ONLY
    orientation: str = "ignore"
    """`data.orientation`: how the images lie in whose pixels the boxes are."""

    def open(self, index: int) -> Image.Image:
        """Return image `index`, not decoded yet.

        Raises:
            BrokenImage: it cannot be read, or has another size than its annotation says: its boxes
                would lie elsewhere.
        """
        image = super().open(index)
        assert self.boxes is not None
        width, height = upright_size(image, self.orientation)
        listed = tuple(self.boxes.sizes[index].tolist())
        if listed == (width, height):
            return image
        other = "apply" if self.orientation == "ignore" else "ignore"
        remedy = "mend the annotation"
        if listed == upright_size(image, other):
            remedy = f"its EXIF turns it: type data.orientation={other}"
        raise BrokenImage(
            f"{self.path(index)} is {width} x {height} pixels, its annotation says {listed[0]} x "
            f"{listed[1]}: {remedy}"
        )


def box_files(
    data: DataConfig,
    folder: Path,
    classes: list[str],
    names: list[str],
    boxes: Any,
    notes: tuple[str, ...],
    listed: tuple[Path, ...],
) -> BoxFiles:
    """Return image files in `folder` with their boxes.

    Raises:
        UserError: there are none.
    """
    if not names:
        raise UserError(f"{folder}: the annotations list no images")
    return BoxFiles(
        str(folder),
        classes,
        np.zeros(len(names), dtype=np.int64),
        data.in_chans,
        np.array([os.fsencode(name) for name in names]),
        left_out=notes,
        listed=tuple(os.fsencode(path) for path in listed),
        bit_depth=data.bit_depth,
        boxes=boxes,
        max_pixels=data.max_pixels,
        orientation=data.orientation,
    )


def _annotations(root: Path, split: str, key: str) -> Path:
    file = root / "annotations" / f"instances_{split}.json"
    if fault := fault_below(split):
        raise UserError(f"data.{key}={split!r} {fault}: type the name of a split, such as val2017")
    if not file.is_file():
        raise UserError(
            f"there is no {file}: data=coco reads annotations/instances_NAME.json and the images "
            f"of NAME/; type data.{key}=NAME"
        )
    return file


def _read(file: Path) -> dict[str, Any]:
    try:
        with open(file, "rb") as stream:
            found = json.load(stream)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON ({one_line(error)[:100]}): fetch it again") from None
    missing = [k for k in ("images", "annotations", "categories") if not _is_list(found, k)]
    if missing:
        raise UserError(
            f"{file} is not of COCO's format: it has no list {missing[0]!r}; one of object "
            "instances has images, annotations and categories"
        )
    return found


def _is_list(found: Any, key: str) -> bool:
    return isinstance(found, dict) and isinstance(found.get(key), list)


class _named:
    """Turn what a row of another shape raises within the block into a line that names the file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, UserError):
            return
        if isinstance(error, KeyError):
            raise UserError(f"{self.file}: a row has no {error}: mend the file") from None
        if isinstance(error, TypeError | ValueError | AttributeError | OverflowError):
            raise UserError(
                f"{self.file}: a row is not as COCO's are ({one_line(error)[:100]}): mend the file"
            ) from None

"""Small detection data in COCO's and VOC's layouts, written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 3, "name": "disc"}, {"id": 17, "name": "bar"}]
"""Ids with a gap."""


def draw(
    path: Path, width: int, height: int, boxes: list[tuple[int, list[int]]], seed: int
) -> None:
    """Save a picture of grey noise with a coloured rectangle for every (class, ltwh)."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(90, 130, (height, width, 3), dtype=np.uint8)
    for label, (left, top, w, h) in boxes:
        pixels[top : top + h, left : left + w] = (250, 40, 40) if label == 0 else (40, 40, 250)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make_coco(root: Path, train: int = 16, val: int = 8) -> None:
    """Write `train` and `val` images of 80x64 pixels with up to two rectangles; the last one of
    each half has none.
    """
    rng = np.random.default_rng(0)
    for split, count in (("train2017", train), ("val2017", val)):
        images: list[dict[str, Any]] = []
        rows: list[dict[str, Any]] = []
        for number in range(count):
            name, boxes = f"{number:04d}.jpg", []
            for label in range(rng.integers(1, 3) if number < count - 1 else 0):
                w, h = (int(x) for x in rng.integers(16, 30, 2))
                left = int(rng.integers(0, 38 - w)) + 40 * label
                top = int(rng.integers(0, 64 - h))
                boxes.append((label, [left, top, w, h]))
            draw(root / split / name, 80, 64, boxes, number)
            images.append({"id": 1000 + number, "file_name": name, "width": 80, "height": 64})
            for label, box in boxes:
                rows.append(
                    {
                        "id": len(rows) + 1,
                        "image_id": 1000 + number,
                        "category_id": CATEGORIES[label]["id"],
                        "bbox": box,
                        "area": box[2] * box[3],
                        "iscrowd": 0,
                    }
                )
        write_coco(root, split, {"images": images, "annotations": rows, "categories": CATEGORIES})


def write_coco(root: Path, split: str, content: dict[str, Any]) -> None:
    """Write the annotations of a split."""
    path = root / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def read_annotations(root: Path, split: str) -> dict[str, Any]:
    """Return the annotations of a split."""
    return json.loads((root / "annotations" / f"instances_{split}.json").read_text())


def make_voc(root: Path) -> None:
    """Write two training images and one held-out one, with a difficult box and an unknown name."""
    content = {
        "a": [("cat", (1, 1, 20, 20), 0), ("dog", (11, 21, 40, 60), 1)],
        "b": [("dog", (5, 5, 30, 30), 0)],
        "c": [("cat", (2, 3, 22, 33), 0), ("emu", (1, 1, 9, 9), 0)],
    }
    for name, objects in content.items():
        draw(root / "JPEGImages" / f"{name}.jpg", 64, 64, [], ord(name))
        rows = "".join(
            f"<object><name>{label}</name><difficult>{hard}</difficult><bndbox><xmin>{box[0]}</xmin>"
            f"<ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
            for label, box, hard in objects
        )
        size = "<size><width>64</width><height>64</height></size>"
        path = root / "Annotations" / f"{name}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"<annotation>{size}{rows}</annotation>")
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nb\n")
    (lists / "val.txt").write_text("c\n")

"""The embedded data of detection, synthetic: handwritten digits on parts of photographs.

Digits are scikit-learn's, photographs are scikit-learn's two and matplotlib's one: packages that
are installed anyway, so nothing is downloaded. A scene is composed when it is opened, by a pure
function of its half and number; its boxes are exact, the extent of the painted pixels.

Held out are digits that no training scene shows (those that `data=digits` holds out) and the right
part of every photograph, of which no training scene shows a pixel.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image

from ghosttrain.data.datasets.base import Dataset
from ghosttrain.data.datasets.boxes import Boxes, checked_boxes
from ghosttrain.data.datasets.digits import held_out_digits, load_levels
from ghosttrain.data.decode import open_image, to_pixels
from ghosttrain.errors import UserError

SIDE = 192
"""Of a scene, in pixels."""
SCENES = {"train": 4000, "held out": 250}
PHOTOS = (
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
)
REGIONS = {"train": (0.0, 0.6), "held out": (0.65, 1.0)}
"""Which part of a photograph's width a half shows."""
CROPS = (100, 170)
"""Sides of what is shown of a photograph, in its pixels."""
MOST_OBJECTS = 4
SIDES = (48, 128)
"""Of a digit's square, in pixels of the scene; the digit fills about two thirds of it."""
GAP = 4
"""Pixels between two objects, more or less a pixel."""
_TRIES = 20


class Thing(NamedTuple):
    """One object of a scene."""

    digit: int
    """Number among scikit-learn's digits."""
    side: int
    left: int
    top: int
    colour: tuple[int, int, int]


class Plan(NamedTuple):
    """What a scene shows."""

    photo: int
    crop: tuple[int, int, int, int]
    """Left, top, right, bottom in pixels of the photograph."""
    things: tuple[Thing, ...]


@dataclass(frozen=True, eq=False)
class SceneDataset(Dataset):
    """Scenes by number."""

    plans: tuple[Plan, ...]
    _: KW_ONLY

    def open(self, index: int) -> Image.Image:
        """Return scene `index`, composed."""
        plan = self.plans[index]
        photo = _photos()[plan.photo]
        scene = photo.crop(plan.crop).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        for thing in plan.things:
            mask = _painted(thing.digit, thing.side)
            scene.paste(thing.colour, (thing.left, thing.top), Image.fromarray(255 * mask))
        return scene

    def name_of(self, index: int) -> str:
        """Return `synthetic scene 7`."""
        return f"synthetic scene {index}"

    def _content(self) -> Iterable[bytes]:
        yield self._index()

    def _index(self) -> bytes:
        return repr(self.plans).encode()


def read_scenes(in_chans: int) -> tuple[Dataset, Dataset]:
    """Return the training and the held-out scenes.

    Raises:
        UserError: a package does not have its pictures.
    """
    _, labels = load_levels()
    held = held_out_digits(labels)
    photos = [photo.size for photo in _photos()]
    halves = []
    for number, (half, count) in enumerate(SCENES.items()):
        digits = np.flatnonzero(held == (half == "held out")).tolist()
        plans = [
            _plan(Random(f"scene {number} {scene}"), half, digits, photos) for scene in range(count)
        ]
        halves.append(
            SceneDataset(
                f"synthetic scenes, {half}",
                [str(k) for k in range(10)],
                np.zeros(count, dtype=np.int64),
                in_chans,
                tuple(plans),
                boxes=_boxes(plans, labels, half),
            )
        )
    return halves[0], halves[1]


def _plan(rng: Random, half: str, digits: list[int], photos: list[tuple[int, int]]) -> Plan:
    photo = rng.randrange(len(photos))
    width, height = photos[photo]
    low, high = (round(share * width) for share in REGIONS[half])
    crop = rng.randint(CROPS[0], min(CROPS[1], high - low, height))
    left, top = rng.randint(low, high - crop), rng.randint(0, height - crop)
    things: list[Thing] = []
    taken: list[tuple[float, float, float, float]] = []
    for _ in range(rng.randint(1, MOST_OBJECTS)):
        digit, hue, bright = rng.choice(digits), rng.random(), rng.random() < 0.5
        for _ in range(_TRIES):
            side = rng.randint(*SIDES)
            x, y = rng.randint(0, SIDE - side), rng.randint(0, SIDE - side)
            box = _about(digit, side, x, y)
            if all(_apart(box, other) for other in taken):
                rgb = colorsys.hsv_to_rgb(hue, 0.8, 1.0 if bright else 0.35)
                colour = tuple(round(255 * value) for value in rgb)
                things.append(Thing(digit, side, x, y, (colour[0], colour[1], colour[2])))
                taken.append(box)
                break
    return Plan(photo, (left, top, left + crop, top + crop), tuple(things))


def _apart(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[2] + GAP <= b[0] or b[2] + GAP <= a[0] or a[3] + GAP <= b[1] or b[3] + GAP <= a[1]


def _boxes(plans: list[Plan], labels: np.ndarray, half: str) -> Boxes:
    every = [(number, thing) for number, plan in enumerate(plans) for thing in plan.things]
    boxes, _ = checked_boxes(
        [number for number, _ in every],
        np.array([_extent(t.digit, t.side, t.left, t.top) for _, t in every], dtype=np.float64),
        [int(labels[thing.digit]) for _, thing in every],
        [False] * len(every),
        None,
        np.full((len(plans), 2), SIDE, dtype=np.int64),
        f"synthetic scenes, {half}",
        lambda number: f"scene {number}",
    )
    return boxes


def _about(digit: int, side: int, left: int, top: int) -> tuple[float, float, float, float]:
    """Return `_extent` to a pixel, without painting the digit anew."""
    low_x, low_y, high_x, high_y = (edge * side / SIDES[1] for edge in _largest(digit))
    return left + low_x, top + low_y, left + high_x, top + high_y


@cache
def _largest(digit: int) -> tuple[int, int, int, int]:
    return _extent(digit, SIDES[1], 0, 0)


def _extent(digit: int, side: int, left: int, top: int) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom of the pixels that a digit paints."""
    mask = _painted(digit, side)
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return (
        left + int(columns[0]), top + int(rows[0]),
        left + int(columns[-1]) + 1, top + int(rows[-1]) + 1,
    )  # fmt: skip


@cache
def _levels() -> np.ndarray:
    return (load_levels()[0] * (255 / 16)).round().astype(np.uint8)


def _painted(digit: int, side: int) -> np.ndarray:
    """Return which pixels of a square (side, side) a digit paints: uint8, 0 or 1."""
    large = Image.fromarray(_levels()[digit]).resize((side, side), Image.Resampling.BICUBIC)
    return (np.asarray(large) >= 128).astype(np.uint8)


@cache
def _photos() -> tuple[Image.Image, ...]:
    found = []
    for package, name in PHOTOS:
        spec = find_spec(package)
        path = Path(spec.origin).parent / name if spec and spec.origin else None
        if path is None or not path.is_file():
            wheel = "scikit-learn" if package == "sklearn" else package
            raise UserError(
                f"data=scenes shows a picture of {package}, and {path or package} is missing: type "
                f"pip install --force-reinstall {wheel}"
            )
        found.append(Image.fromarray(np.asarray(to_pixels(open_image(str(path)), 3))))
    return tuple(found)

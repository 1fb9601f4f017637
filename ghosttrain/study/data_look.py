"""What training images look like: a contact sheet of their augmentation, and their statistics.

Legend: C channels, S side.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ghosttrain.config.schema import Config, DataConfig
from ghosttrain.data.augment import Draw, draw, eval_transform, train_transform
from ghosttrain.data.box_augment import box_transform
from ghosttrain.data.datasets import Dataset, FileDataset, build_datasets
from ghosttrain.data.datasets.base import evenly
from ghosttrain.data.decode import BrokenImage, decoded, orientation, upright_size
from ghosttrain.data.operations import NO_ARGUMENT
from ghosttrain.engine.figures import new_figure, save_figure
from ghosttrain.errors import UserError
from ghosttrain.files import resolved
from ghosttrain.text import byte_size, listed, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LARGEST_SHEET = 400
"""Pictures on one sheet."""


def draw_sheet(config: Config, samples: int, draws: int, out: Path | None = None) -> Path:
    """Draw training images, a row for each: as it is, then as the network sees it under each draw
    (epoch), with the operations above; of data with boxes, with these. Return the picture's path.

    Args:
        config: `data` and `augment` count.
        samples: images, evenly spaced over the training set.
        draws: of each.
        out: the picture; None: below `run.root`, named by the time.

    Raises:
        UserError: too many; the data are not there; an image cannot be read.
    """
    if samples * (draws + 1) > LARGEST_SHEET:
        raise UserError(
            f"--samples {samples} --draws {draws} are {samples * (draws + 1):,} pictures: a sheet "
            f"holds {LARGEST_SHEET}"
        )
    data, augment = config.data, config.augment
    train_set, _ = build_datasets(data)
    boxes = train_set.boxes
    transform = (
        train_transform(data, augment) if boxes is None else box_transform(data, augment, boxes)
    )
    chosen = evenly(len(train_set), samples)
    figure = new_figure(1.5 * (draws + 1), 1.9 * len(chosen) + 0.4)
    axes = figure.subplots(len(chosen), draws + 1, squeeze=False)
    for row, index in zip(axes, chosen, strict=True):
        image = train_set.open(index)
        size = upright_size(image, data.orientation)
        if boxes is not None:
            corners, labels = boxes.objects(index)
            named = [train_set.classes[label] for label in labels]
            words = f"{listed(sorted({*named})) or 'no box'}\n{size[0]} x {size[1]}"
            _place(row[0], decoded(image, data), words, corners)
            for number, axis in enumerate(row[1:]):
                pixels, rows = transform(partial(train_set.open, index), number, index)
                kept = rows[rows[:, 4] >= 0, :4].numpy()
                seen = pixels.permute(1, 2, 0).numpy()
                _place(
                    axis, seen, f"draw {number + 1}: {len(kept)} box{'es' * (len(kept) != 1)}", kept
                )
            continue
        label = train_set.classes[train_set.labels[index]]
        _place(row[0], decoded(image, data), f"{label}\n{size[0]} x {size[1]}")
        for number, axis in enumerate(row[1:]):
            drawn = draw(augment, data.flip, *size, number, index)
            (pixels,) = transform(partial(train_set.open, index), number, index)
            _place(axis, pixels.permute(1, 2, 0).numpy(), words_of(drawn))
    mixed = augment.mixup_alpha or augment.cutmix_alpha
    figure.suptitle(
        printable(f"{train_set.source}: {data.train_size} px, augment.policy={augment.policy}")
        + "; Mixup and CutMix, which mix two of these, are not drawn" * bool(mixed),
        fontsize=8, parse_math=False,
    )  # fmt: skip
    if out is None:
        root = resolved(config.run.root)
        root.mkdir(parents=True, exist_ok=True)
        out = root / f"data_show-{time.strftime('%Y%m%d-%H%M%S')}.png"
    save_figure(figure, out, dpi=110)
    return out


def words_of(drawn: Draw) -> str:
    """Return what a draw does, such as `crop 34 %, flip`, then the operations, a line each."""
    left, top, right, bottom = drawn.box
    first = f"crop {100 * (right - left) * (bottom - top):.0f} %" + ", flip" * drawn.flip
    operations = [
        name.replace("_", " ") + ("" if name in NO_ARGUMENT else f" {argument:.3g}")
        for name, argument in drawn.ops
    ]
    return "\n".join([first, *operations, *(["erase"] if drawn.erase else [])])


def _place(axis: Axes, pixels: np.ndarray, words: str, boxes: Iterable[np.ndarray] = ()) -> None:
    from matplotlib.patches import Rectangle

    axis.set_axis_off()
    picture = Image.fromarray(pixels.squeeze()).convert("RGB")
    width = picture.width
    picture.thumbnail((256, 256))
    axis.imshow(picture)
    for box in boxes:
        left, top, right, bottom = box * (picture.width / width)
        corner, sides = (left - 0.5, top - 0.5), (right - left, bottom - top)  # pixels have centres
        axis.add_patch(Rectangle(corner, *sides, fill=False, color="yellow", linewidth=1))
    axis.set_title(printable(words, lines=True), fontsize=5.5, parse_math=False)


# --- statistics -----------------------------------------------------------------------------------


def statistics(data: DataConfig, images: int) -> list[str]:
    """Return lines about the training images: sizes, formats, classes, what needs a setting, and
    the mean and std of what the network sees.

    Up to `images` of them, evenly spaced, are decoded; the classes are counted over all. Mean and
    std are those of all pixels of the evaluation crops (`data.eval_size`), per channel.

    Raises:
        UserError: the data are not there; none of the images can be read.
    """
    train_set, held_out = build_datasets(data)
    transform = eval_transform(data)
    formats: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    widths, heights, turned, clear, broken = [], [], 0, 0, []
    count, sums, squares = 0, np.zeros(data.in_chans), np.zeros(data.in_chans)
    looked = evenly(len(train_set), images)
    for index in looked:
        try:
            image = train_set.open(index)
            tag = orientation(image, "apply")
            (pixels,) = transform(partial(train_set.open, index), 0, index)
        except BrokenImage as error:
            broken.append(str(error))
            continue
        formats[image.format or "in memory"] += 1
        modes[image.mode] += 1
        widths.append(image.width)
        heights.append(image.height)
        turned += tag != 1
        clear += image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
        values = pixels.double().flatten(1) / 255
        count += values.shape[1]
        sums += values.sum(1).numpy()
        squares += values.square().sum(1).numpy()
    if not count:
        raise UserError(f"none of {len(looked):,} images can be read; the first: {broken[0]}")
    mean = sums / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    shorter = np.minimum(widths, heights)
    lines = [
        f"{train_set.describe()}; held out {len(held_out):,}",
        *_class_lines(train_set),
        f"looked at {len(looked):,} training images",
        f"formats: {_counts(formats)}; modes: {_counts(modes)}",
        f"width {_spread(widths)}, height {_spread(heights)}, shorter side {_spread(shorter)}",
        *_bytes_line(train_set, looked),
    ]
    if turned:
        shown = "turns" if data.orientation == "ignore" else "is set and turns"
        lines.append(f"orientation: {turned:,} lie on a side; data.orientation=apply {shown} them")
    if clear:
        lines.append(f"transparent: {clear:,} (data.background={data.background})")
    if broken:
        lines.append(f"cannot be read: {len(broken):,}, the first: {broken[0]}")
    seen, given = (
        f"data.mean={_values(m)} data.std={_values(s)}"
        for m, s in ((mean, std), (data.mean, data.std))
    )
    return [*lines, f"what the network sees ({data.eval_size} px): {seen}; set: {given}"]


def _class_lines(train_set: Dataset) -> list[str]:
    counts = np.bincount(train_set.labels, minlength=len(train_set.classes))
    most, least = int(counts.argmax()), int(counts.argmin())
    names = train_set.classes
    return [
        f"classes: {len(names):,}; most images {names[most]!r} {counts[most]:,}, fewest "
        f"{names[least]!r} {counts[least]:,}, median {np.median(counts):,.0f}"
    ]


def _bytes_line(train_set: Dataset, looked: Sequence[int]) -> list[str]:
    if not isinstance(train_set, FileDataset):
        return []
    sizes = [os.path.getsize(path) for path in map(train_set.path, looked) if os.path.exists(path)]
    each = float(np.median(sizes))
    return [f"files: {byte_size(each)} (median), about {byte_size(each * len(train_set))} in all"]


def _counts(counter: Counter[str]) -> str:
    return listed((f"{name} {count:,}" for name, count in counter.most_common()), most=6)


def _spread(values: Iterable[int]) -> str:
    low, middle, high = np.percentile(list(values), (0, 50, 100))
    return f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"


def _values(values: Iterable[float]) -> str:
    return f"[{','.join(f'{value:.3g}' for value in values)}]"

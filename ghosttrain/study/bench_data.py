"""`bench data`: images a second from JPEG files to batches, against timm's loader, on one thread.

Both sides read the same files in this process (no workers) and deliver float32 batches, normalised,
with crops, flips, RandAugment and RandomErasing on both. timm's comes twice: with its prefetcher's
transform (uint8 batches, normalised and erased as a batch) and with ToTensor and Normalize for each
image. No operation is cheaper by doing less: how far each is from Pillow's is printed.

Legend: B batch.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import auto_augment as timm_ops
from timm.data import create_loader

from ghosttrain.config.schema import AugmentConfig, Config, DataConfig
from ghosttrain.data import augment as augmentation
from ghosttrain.data.augment import draw
from ghosttrain.data.datasets import Dataset, build_datasets
from ghosttrain.data.datasets.folder import FileDataset
from ghosttrain.data.decode import (
    decoded,
    jpeg_decoder_version,
    readable,
    reduction,
    to_pixels,
)
from ghosttrain.data.loader import eval_loader, stacked, train_loader
from ghosttrain.data.operations import NO_ARGUMENT, OPS, Fill
from ghosttrain.data.order import eval_batches
from ghosttrain.data.policies import RANDAUGMENT
from ghosttrain.engine.summary import device_name
from ghosttrain.errors import UserError
from ghosttrain.study.harness import (
    Side,
    Time,
    Timings,
    paired_ratios,
    quartiles,
    take_turns,
    timed,
)
from ghosttrain.study.photos import HEIGHT, QUALITY, WIDTH, all_photos, write_crops
from ghosttrain.study.table import markdown

CPU = torch.device("cpu")
OURS, PREFETCHER, EACH = "ours", "timm, prefetcher", "timm, each image"
TRAINING, VALIDATION = "training", "validation"
LEVEL = 0.9
"""Of the operations whose distance to Pillow's is printed: RandAugment's magnitude 9 of 10."""


def bench_data(config: Config, own_images: bool, images: int, rounds: int, threads: int) -> str:
    """Return tables: speed against timm's, share of each stage, distance of each step to Pillow's,
    speed by number of workers.

    Of `config`, `data` and `augment` count; without `own_images`, those of `data.root`, the images
    are crops of photographs that scikit-learn and scikit-image ship.

    Raises:
        UserError: the data are not image files, or fewer than a batch.
    """
    with tempfile.TemporaryDirectory(prefix="ghosttrain-") as folder:
        data, where = config.data, f"{config.data.root}"
        if not own_images:
            write_crops(all_photos(), Path(folder), images)
            data = data.model_copy(update={"name": "folder", "root": folder})
            where = f"{WIDTH}x{HEIGHT} crops of photographs, quality {QUALITY}"
        data = data.model_copy(update={"workers": 0})
        dataset, _ = build_datasets(data)
        if not isinstance(dataset, FileDataset) or len(dataset) < images:
            raise UserError(
                f"bench data needs --images {images} image files to train on, and "
                f"{dataset.source} has {len(dataset):,}: type a data.root with more, or a smaller "
                "--images"
            )
        batch = min(32, images)
        plan = list(eval_batches(range(images // batch * batch), batch))
        head = [
            f"{len(plan) * batch} JPEG files ({where}), batches of {batch}, "
            f"{data.train_size} px in training and {data.eval_size} px in validation; "
            f"{device_name(CPU)}",
            f"JPEGs decoded by {jpeg_decoder_version(data.decoder)}; torch {torch.__version__}, "
            f"timm {timm.__version__}, Pillow {Image.__version__}; one process, {threads} thread"
            f"{'s' * (threads > 1)}, CPU time, median of {rounds} rounds (lower to upper "
            "quartile), sides taking turns",
        ]
        sides = _sides(dataset, data, config.augment, plan)
        times = take_turns(sides, rounds, warm_up=1, threads=threads)
        count = len(plan) * batch
        lines = [*head, "", *markdown(_speeds(times, count))]
        lines += ["", *markdown(_stages(dataset, data, config.augment, plan))]
        lines += ["", *markdown(_distances(dataset, data))]
        lines += ["", *markdown(_by_workers(dataset, data, config.augment, plan))]
    return "\n".join(lines)


# --- speed ----------------------------------------------------------------------------------------


def _sides(
    dataset: FileDataset, data: DataConfig, augment: AugmentConfig, plan: Sequence[list[int]]
) -> dict[str, Side]:
    loaders = {
        TRAINING: train_loader(dataset, data, augment, CPU, channels_last=True),
        VALIDATION: eval_loader(dataset, data, CPU, channels_last=True),
    }

    def ours(number: int) -> dict[str, Time]:
        def passed(part: str) -> None:
            for _ in loaders[part].batches(plan, draw_number=number):
                pass

        return {part: timed(partial(passed, part), CPU) for part in loaders}

    def theirs(prefetcher: bool) -> Side:
        images = [index for indices in plan for index in indices]
        sources = {
            part: _timms(_Files(dataset, images), data, augment, len(plan[0]), part, prefetcher)
            for part in loaders
        }

        def call(number: int) -> dict[str, Time]:
            return {
                part: timed(lambda source=source: _exhaust(source), CPU)  # type: ignore[misc]
                for part, source in sources.items()
            }

        return call

    return {OURS: ours, PREFETCHER: theirs(True), EACH: theirs(False)}


def _exhaust(batches: Any) -> None:
    for images, _ in batches:
        images.contiguous(memory_format=torch.channels_last)  # as ours, and as both train


class _Files(torch.utils.data.Dataset[Any]):
    """The files as timm's `ImageDataset` reads them."""

    transform: Callable[[Image.Image], Any]

    def __init__(self, dataset: FileDataset, images: Sequence[int]) -> None:
        self._paths = [dataset.path(index) for index in images]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        while True:
            with open(self._paths[index], "rb") as file:
                image = Image.open(file, formats=readable()).convert("RGB")
            try:
                return self.transform(image), 0
            except ValueError:  # timm asks Pillow to keep 0 bits now and then, which it refuses
                continue


def _timms(
    files: _Files,
    data: DataConfig,
    augment: AugmentConfig,
    batch: int,
    part: str,
    prefetcher: bool,
) -> Any:
    training = part == TRAINING
    policy = (
        f"rand-m{augment.randaugment_magnitude:g}-n{augment.randaugment_ops}"
        f"-mstd{augment.randaugment_std:g}-inc1"
    )
    return create_loader(
        files,  # type: ignore[arg-type]  # it reads `transform` and indexes
        input_size=data.train_size if training else data.eval_size,
        batch_size=batch,
        is_training=training,
        re_prob=augment.erasing_prob if training else 0.0,
        re_mode="pixel",
        scale=(augment.scale_min, augment.scale_max),
        ratio=(augment.ratio_min, augment.ratio_max),
        auto_augment=policy if training and augment.randaugment_ops else None,
        color_jitter=0.0,
        interpolation=data.interpolation,
        mean=data.mean,
        std=data.std,
        crop_pct=data.crop_pct,
        num_workers=0,
        persistent_workers=False,
        device=CPU,
        use_prefetcher=prefetcher,
    )


def _speeds(times: dict[tuple[str, str], Timings], images: int) -> list[list[str]]:
    table = [["part", "side", "images/s", "ms an image", "ours is faster by"]]
    for part in (TRAINING, VALIDATION):
        for side in (OURS, PREFETCHER, EACH):
            cpu = times[side, part].cpu
            each = quartiles([ms / images for ms in cpu])
            ratio = paired_ratios(cpu, times[OURS, part].cpu)
            table.append([part, side, f"{1e3 / each.median:.0f}", each.text(2), ratio.text(2)])
    return table


# --- stages ---------------------------------------------------------------------------------------


def _stages(
    dataset: Dataset, data: DataConfig, augment: AugmentConfig, plan: Sequence[list[int]]
) -> list[list[str]]:
    """Return how much of a training image's time each stage takes, in a pass of its own."""
    spent: dict[str, float] = {}

    def stage(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        begun = time.thread_time()
        result = call(*arguments)
        spent[name] = spent.get(name, 0.0) + time.thread_time() - begun
        return result

    size, fill = data.train_size, tuple(round(255 * mean) for mean in data.mean)
    mean, std = torch.tensor((data.mean, data.std))
    for indices in plan:
        samples = []
        for index in indices:
            image = stage("read the file and its header", dataset.open, index)
            drawn = stage("draw", draw, augment, data.flip, *image.size, 0, index)
            reduced = reduction(image, drawn.least(size))
            pixels = stage("decode", decoded, image, data, reduced)
            for name, part in _parts(drawn):
                x = stage(name, augmentation.apply, pixels, part, size, data.interpolation, fill)
                pixels = x.permute(1, 2, 0).numpy()  # x: (C, S, S)
            samples.append(x)
        batch = stage("batch", stacked, samples)
        stage("normalise", augmentation.normalise, batch, mean, std)
    images = sum(map(len, plan))
    total = sum(spent.values())
    return [
        ["stage of a training image", "us", "share %"],
        *([n, f"{1e6 * s / images:.0f}", f"{100 * s / total:.0f}"] for n, s in spent.items()),
    ]


def _parts(drawn: augmentation.Draw) -> Iterator[tuple[str, augmentation.Draw]]:
    """Cut a draw into parts that are applied one after another."""
    yield "crop, resize, flip", augmentation.Draw(box=drawn.box, flip=drawn.flip)
    if drawn.ops:
        yield "RandAugment", augmentation.Draw(ops=drawn.ops)
    if drawn.erase:
        yield "RandomErasing", augmentation.Draw(erase=drawn.erase, noise_seed=drawn.noise_seed)


# --- distance to Pillow's -------------------------------------------------------------------------

_GEOMETRIC = ("rotate", "shear", "translate")


def _distances(dataset: Dataset, data: DataConfig) -> list[list[str]]:
    """Return the largest and the mean difference, in levels of 255, of every step to Pillow's."""
    table = [["step", "to Pillow's: largest", "mean"]]
    size = data.train_size, data.train_size
    images = [
        to_pixels(dataset.open(index), data.in_chans) for index in range(min(8, len(dataset)))
    ]

    def row(name: str, pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
        apart = [np.abs(a.astype(int) - b.astype(int)) for a, b in pairs]
        table.append([name, f"{max(a.max() for a in apart)}", f"{np.mean(apart[0]):.2f}"])

    row(
        "decode",
        [(decoded(dataset.open(i), data), np.asarray(image)) for i, image in enumerate(images)],
    )
    resample = Image.Resampling[data.interpolation.upper()]
    row(
        "crop, resize",
        [
            (
                augmentation.resized(np.array(image), size, data.interpolation).numpy(),
                np.asarray(image.resize(size, resample)),
            )
            for image in images
        ],
    )
    fill = tuple(round(255 * mean) for mean in data.mean)
    small = [image.resize(size, resample) for image in images]
    for name, argument in RANDAUGMENT.items():
        operation, value = OPS[name], argument(LEVEL, 1)
        row(
            name,
            [
                (
                    operation(np.array(x), value, fill),
                    np.asarray(_timms_result(name, x, value, fill)),
                )
                for x in small
            ],
        )
    return table


def _timms_result(name: str, image: Image.Image, value: float, fill: Fill) -> Image.Image:
    if name in NO_ARGUMENT:
        return getattr(timm_ops, name)(image)
    if name.startswith("translate"):  # ours moves by whole pixels
        name, value = f"{name}_abs", round(value * image.width)
    if name.startswith(_GEOMETRIC):
        affine = {"resample": Image.Resampling.BILINEAR, "fillcolor": fill}
        return getattr(timm_ops, name)(image, value, **affine)
    return getattr(timm_ops, name)(image, value)


# --- workers --------------------------------------------------------------------------------------


def _by_workers(
    dataset: Dataset, data: DataConfig, augment: AugmentConfig, plan: Sequence[list[int]]
) -> list[list[str]]:
    """Return images a second, in elapsed time, by number of workers: 0, 1, 2, 4, ... as many as
    there are cores. The first pass starts the workers and does not count.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    counts = [0, *(2**k for k in range(cores.bit_length()) if 2**k <= cores)]
    table = [["workers", "images/s from the folder, elapsed time"]]
    for workers in counts:
        settings = data.model_copy(update={"workers": workers})
        with train_loader(dataset, settings, augment, CPU, channels_last=True) as loader:
            for number in range(2):
                begun = time.perf_counter()
                for _ in loader.batches([*plan, *plan], draw_number=number):
                    pass
                seconds = time.perf_counter() - begun
        table.append([str(workers), f"{2 * len(plan) * len(plan[0]) / seconds:.0f}"])
    return table

"""`data check`: every image read once, by several processes where there are cores.

Two images have the same content where they decode to the same pixels: a copy under another name, in
another lossless format, with other tags. Photographs that merely look alike are for
`data.near_duplicates`.

Legend: N images.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset as TorchDataset

from ghosttrain.config.schema import DataConfig
from ghosttrain.data.datasets import Dataset, build_datasets
from ghosttrain.data.datasets.folder import FileDataset
from ghosttrain.data.datasets.splitting import is_split_here
from ghosttrain.data.decode import BrokenImage, OversizedImage, decoded, readable
from ghosttrain.data.loader import MOST_WORKERS, in_workers
from ghosttrain.engine.progress import Progress
from ghosttrain.terminal import printable
from ghosttrain.text import byte_size, clock, counted, listed
from ghosttrain.threads import cores

CHUNK = 32
"""Images that a worker reads before it tells."""
FEW = 256
"""Images up to which this process reads them itself."""
SHOWN = 10
"""Images of a kind that are named; JSON has all."""
DIGEST = 16
"""Bytes of the digest of an image's content."""
HALVES = ("training", "held-out")


class Image(NamedTuple):
    """Which one."""

    half: int
    """0: training, 1: held out."""
    number: int


class Seen(NamedTuple):
    """What reading an image shows."""

    mode: str = ""
    """Pillow's, of the file."""
    size: tuple[int, int] = (0, 0)
    """Width and height."""
    content: bytes = bytes(DIGEST)
    """Digest of its pixels."""
    fault: str | None = None
    """Why it cannot be read."""
    is_oversized: bool = False


@dataclass
class Report:
    """What was found in both halves."""

    data: DataConfig
    halves: tuple[Dataset, Dataset]
    modes: Counter[str] = field(default_factory=Counter)
    unreadable: list[tuple[Image, str]] = field(default_factory=list)
    """With the reason; without those that are too large."""
    oversized: list[tuple[Image, str]] = field(default_factory=list)
    """Above `data.max_pixels`, with how large they are and what to type."""
    grey: list[Image] = field(default_factory=list)
    cmyk: list[Image] = field(default_factory=list)
    largest: tuple[Image, tuple[int, int]] | None = None
    """Of those that can be read, with width and height."""
    duplicates: list[list[Image]] = field(default_factory=list)
    """Training images of one content, under one label."""
    two_labels: list[list[Image]] = field(default_factory=list)
    """Training images of one content, under several labels."""
    overlap: list[list[Image]] = field(default_factory=list)
    """Images of one content, in both halves."""
    seconds: float = 0.0
    workers: int = 0

    @property
    def left_out(self) -> list[str]:
        """Return a line about each kind of what lies among the images and is not listed."""
        return [note for half in self.halves for note in half.left_out]

    @property
    def faults(self) -> list[str]:
        """Return what keeps a run from going through, or from measuring what it says."""
        refused = len(self.unreadable) + len(self.oversized)
        faults = []
        if refused and self.data.on_error != "skip":
            faults.append(f"a run ends at {counted(refused, 'image')} that cannot be used")
        if self.overlap:
            faults.append("held-out images are trained on")
        return faults

    def name_of(self, image: Image) -> str:
        """Return what a user can find an image by."""
        return self.halves[image.half].name_of(image.number)

    def class_of(self, image: Image) -> str:
        """Return the name of its class."""
        half = self.halves[image.half]
        return half.classes[half.labels[image.number]]


def check_data(data: DataConfig, say: Callable[[str], object]) -> Report:
    """Read every image once.

    Args:
        data: the settings.
        say: prints how far it is, where there is no terminal for a bar.

    Raises:
        UserError: the data are not there or not complete; the workers fail.
    """
    halves = build_datasets(data)
    report = Report(data, halves)
    total = sum(map(len, halves))
    report.workers = workers_for(data, total)
    requests = [
        (half, range(first, min(first + CHUNK, len(dataset))))
        for half, dataset in enumerate(halves)
        for first in range(0, len(dataset), CHUNK)
    ]
    contents = [np.zeros((len(half), DIGEST), np.uint8) for half in halves]
    readable = [np.zeros(len(half), bool) for half in halves]
    started = time.perf_counter()
    with Progress(total, say) as progress:
        results = in_workers(_Images(halves, data), requests, report.workers)
        for (half, numbers), chunk in zip(requests, results, strict=True):
            for number, seen in zip(numbers, chunk, strict=True):
                _note(report, Image(half, number), seen)
                contents[half][number] = np.frombuffer(seen.content, np.uint8)
                readable[half][number] = seen.fault is None
            progress.add(len(numbers))
    report.seconds = time.perf_counter() - started
    _compare(report, contents, readable)
    return report


def workers_for(data: DataConfig, images: int) -> int:
    """Return how many processes read so many images: `data.workers` where it is a number, else one
    a core.
    """
    if isinstance(data.workers, int):
        return data.workers
    return min(int(cores()), MOST_WORKERS) if images > FEW and cores() >= 2 else 0


@dataclass(frozen=True)
class _Images(TorchDataset[Any]):
    """(half, numbers) -> what reading these images shows."""

    halves: tuple[Dataset, Dataset]
    data: DataConfig

    def __getitem__(self, request: tuple[int, Sequence[int]]) -> list[Seen]:
        half, numbers = request
        return [read(self.halves[half], number, self.data) for number in numbers]


def read(half: Dataset, number: int, data: DataConfig) -> Seen:
    """Read and decode an image as a run does."""
    try:
        image = half.open(number)
        mode, size = image.mode, image.size
        pixels = decoded(image, data)
    except BrokenImage as error:
        return Seen(fault=str(error), is_oversized=isinstance(error, OversizedImage))
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(pixels.data)
    return Seen(mode, size, digest.digest()[:DIGEST])


def _note(report: Report, image: Image, seen: Seen) -> None:
    if seen.fault is not None:
        kind = report.oversized if seen.is_oversized else report.unreadable
        kind.append((image, seen.fault))
        return
    report.modes[seen.mode] += 1
    if seen.mode in ("L", "LA"):
        report.grey.append(image)
    if seen.mode == "CMYK":
        report.cmyk.append(image)
    if report.largest is None or np.prod(seen.size) > np.prod(report.largest[1]):
        report.largest = image, seen.size


def _compare(
    report: Report, contents: Sequence[np.ndarray], readable: Sequence[np.ndarray]
) -> None:
    """Find the images of one content.

    Args:
        report: gets them.
        contents: digests of each half, (N, DIGEST) uint8.
        readable: of each half, (N,) bool.
    """
    numbers = np.concatenate([np.flatnonzero(mask) for mask in readable])
    of_half = np.repeat([0, 1], [np.count_nonzero(mask) for mask in readable])
    rows = np.concatenate([each[mask] for each, mask in zip(contents, readable, strict=True)])
    keys = np.ascontiguousarray(rows).view(f"V{DIGEST}")[:, 0]
    _, first, inverse, counts = np.unique(
        keys, return_index=True, return_inverse=True, return_counts=True
    )
    order = np.argsort(inverse, kind="stable")
    groups = np.split(order, np.cumsum(counts)[:-1]) if len(order) else []
    for kind in sorted(np.flatnonzero(counts > 1), key=lambda kind: first[kind]):
        group = [Image(int(of_half[place]), int(numbers[place])) for place in groups[kind]]
        training = [image for image in group if image.half == 0]
        if len(training) > 1:
            labels = {report.class_of(image) for image in training}
            (report.two_labels if len(labels) > 1 else report.duplicates).append(training)
        if 0 < len(training) < len(group):
            report.overlap.append(group)


# --- words ----------------------------------------------------------------------------------------


def describe(report: Report) -> list[str]:
    """Return the report as lines."""
    data, (train_set, held_out) = report.data, report.halves
    by = f"{report.workers} workers" if report.workers else "one process"
    total = len(train_set) + len(held_out)
    lines = [
        f"{train_set.describe()}; held out {len(held_out):,}",
        *report.left_out,
        f"read {total:,} images in {clock(report.seconds)} by {by}; modes: "
        + listed((f"{mode} {count:,}" for mode, count in report.modes.most_common()), most=6),
    ]
    if report.largest is not None:
        image, (width, height) = report.largest
        size = byte_size(width * height * 3)
        lines.append(
            f"largest: {width:,} x {height:,} pixels, {size} decoded: {report.name_of(image)}"
        )
    refused = "a run ends there; data.on_error=skip goes on without them"
    if data.on_error == "skip":
        refused = "left out by data.on_error=skip"
    kinds = f"{refused}; read are {', '.join(readable())}"
    lines += _section("unreadable", kinds, (reason for _, reason in report.unreadable))
    lines += _section("oversized", refused, (reason for _, reason in report.oversized))
    shown = "as three equal channels" if data.in_chans == 3 else "as they are"
    for kind, images, meaning in (
        ("grey (mode L)", report.grey, f"seen {shown}"),
        ("CMYK", report.cmyk, "converted to RGB"),
    ):
        if len(images) == sum(report.modes.values()) > 0:  # nothing stands out
            lines.append(f"{kind}: all ({meaning})")
        else:
            lines += _section(kind, meaning, map(report.name_of, images))
    lines += _section(
        "same content in training",
        "counted twice; remove all but one",
        (_equal(report, group) for group in report.duplicates),
    )
    lines += _section(
        "same content under two labels",
        "one of them is wrong",
        (_equal(report, group, with_class=True) for group in report.two_labels),
    )
    together = ", or type data.near_duplicates=together" * is_split_here(data)
    lines += _section(
        "same content in training and held out",
        f"the held-out accuracy is too high; remove them from one half{together}",
        (_equal(report, group, with_half=True) for group in report.overlap),
    )
    lines.append("; ".join(report.faults) or "nothing here keeps a run from going through")
    return [printable(" ".join(line.splitlines())) for line in lines]


def _section(kind: str, meaning: str, texts: Iterable[str]) -> list[str]:
    """Return a heading and the first of what it counts; nothing where there is none."""
    every = list(texts)
    if not every:
        return []
    more = [f"  and {len(every) - SHOWN:,} more (--json has all)"] if len(every) > SHOWN else []
    return [f"{kind}: {len(every):,} ({meaning})", *(f"  {text}" for text in every[:SHOWN]), *more]


def _equal(
    report: Report, group: Sequence[Image], with_class: bool = False, with_half: bool = False
) -> str:
    return " = ".join(
        f"{HALVES[image.half]} " * with_half
        + report.name_of(image)
        + f" ({report.class_of(image)})" * with_class
        for image in group
    )


def as_json(report: Report, with_class: bool = True) -> dict[str, Any]:
    """Return all of the report as JSON values.

    Args:
        report: what was found.
        with_class: whether to name the class of an image; one with boxes has none of its own.
    """

    def about(image: Image) -> dict[str, Any]:
        half, number = report.halves[image.half], image.number
        return {
            "half": HALVES[image.half],
            "image": half.path(number) if isinstance(half, FileDataset) else half.name_of(number),
            **({"class": report.class_of(image)} if with_class else {}),
        }

    def groups(every: Sequence[Sequence[Image]]) -> list[list[dict[str, Any]]]:
        return [[about(image) for image in group] for group in every]

    train_set, held_out = report.halves
    largest = report.largest
    return {
        "training": len(train_set),
        "held_out": len(held_out),
        "left_out": report.left_out,
        "modes": dict(report.modes),
        "largest": largest
        and about(largest[0]) | {"width": largest[1][0], "height": largest[1][1]},
        "unreadable": [about(image) | {"reason": reason} for image, reason in report.unreadable],
        "oversized": [about(image) | {"reason": reason} for image, reason in report.oversized],
        "grey": list(map(about, report.grey)),
        "cmyk": list(map(about, report.cmyk)),
        "duplicates": groups(report.duplicates),
        "two_labels": groups(report.two_labels),
        "overlap": groups(report.overlap),
        "faults": report.faults,
    }

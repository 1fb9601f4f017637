"""`bench distill`: an epoch with cached outputs, against none and against a live teacher; and what
storing costs on top of asking the teacher.

An epoch is one of the training loop's, as a user runs it: decoding and augmenting real JPEG files
in the same process, forward, backward, LAMB, EMA. Sides take turns within a round. The images are
crops of scikit-learn's two photos under any labels: what is on them does not matter for the time,
that they are photographs does.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ghosttrain.config.compose import compose
from ghosttrain.data.datasets import build_datasets
from ghosttrain.distill.cache import CacheInfo, create, open_cache
from ghosttrain.engine.cache_writer import Asking, fill_cache, write_missing
from ghosttrain.engine.launch import launch
from ghosttrain.engine.summary import device_name
from ghosttrain.engine.teacher_source import ready_teacher
from ghosttrain.engine.track import read_metrics
from ghosttrain.study.timing import quartiles

Row = dict[str, Any]

WIDTH, HEIGHT = 500, 375
"""Pixels of an image: ImageNet's usual ones."""
CLASSES = 64
"""Folders of images, named by ImageNet's first synsets."""
LABELS, STORED, LIVE = "epoch, labels only", "epoch, cached outputs", "epoch, live teacher"
ASKED, WRITTEN = "asking the teacher", "asking and storing"
COMPARED = (
    (LABELS, LABELS),
    (STORED, LABELS),
    (LIVE, LABELS),
    (LIVE, STORED),
    (ASKED, ASKED),
    (WRITTEN, ASKED),
)
"""Rows of the table: a side, and the side that it is compared with."""


def bench_distill(
    model: str,
    teacher: str,
    codec: str,
    images: int,
    batch: int,
    size: int,
    rounds: int,
    threads: int,
    device: torch.device,
) -> list[Row]:
    """Return a row for each kind of epoch and for the two ways of asking the teacher.

    A row names `side`, the `seconds` of its passes over all images as (lower quartile, median,
    upper quartile), and `ratio`: its time over that of the side `against` in the same round, as
    (lower quartile, median, upper quartile). What all rows share stands in each.
    """
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    about = {
        "model": model,
        "teacher": teacher,
        "images": images,
        "batch": batch,
        "size": size,
        "rounds": rounds,
        "torch": torch.__version__,
        "device": device_name(device),
    }
    try:
        with tempfile.TemporaryDirectory(prefix="ghosttrain-") as folder:
            calls, stored = _sides(Path(folder), about, codec, device)
            about |= {"codec": stored.codec, "bytes": stored.bytes_per_image}
            times: dict[str, list[float]] = {side: [] for side in calls}
            for round_ in range(1 + rounds):  # the first one warms up
                order = [*enumerate(calls.items())]
                # There and back: what a side leaves behind must not always meet the same one.
                for number, (side, call) in order if round_ % 2 else reversed(order):
                    with contextlib.redirect_stdout(io.StringIO()):
                        seconds = call(f"{number}-{round_}")
                    if round_:
                        times[side].append(seconds)
    finally:
        torch.set_num_threads(threads_before)
    rows = []
    for side, against in COMPARED:
        paired = [x / y for x, y in zip(times[side], times[against], strict=True)]
        row = {"side": side, "against": against, "seconds": quartiles(times[side])}
        rows.append(row | {"ratio": quartiles(paired)} | about)
    return rows


def describe(rows: list[Row]) -> str:
    """Return the rows as a Markdown table below a line that says what was measured, and on what."""
    about = rows[0]
    lines = [
        f"{about['model']} and {about['teacher']}: a pass over {about['images']} JPEG photos, "
        f"batches of {about['batch']}, {about['size']} pixels; {about['device']}, torch "
        f"{about['torch']}",
        f"stored: {about['codec']}, {about['bytes']} bytes an image; median of {about['rounds']} "
        "rounds (lower to upper quartile), sides taking turns; ratios within a round",
        "",
        "| side | seconds | ratio | to |",
        "|---|---|---|---|",
    ]
    for row in rows:
        seconds, ratio = (
            f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
            for (low, median, high), digits in ((row["seconds"], 2), (row["ratio"], 3))
        )
        lines.append(f"| {row['side']} | {seconds} | {ratio} | {row['against']} |")
    return "\n".join(lines)


def _sides(
    folder: Path, about: Row, codec: str, device: torch.device
) -> tuple[dict[str, Callable[[str], float]], CacheInfo]:
    """Return what is timed, each a function of a fresh name that returns seconds, and what the
    cache holds.
    """
    make_photos(folder / "photos", about["images"])
    labels_only = [
        "+recipe=compact_kd",
        f"model={about['model']}",
        "data=folder",
        f"data.root={folder / 'photos'}",
        f"data.train_size={about['size']}",
        f"data.eval_size={about['size']}",
        "data.workers=0",
        "train.epochs=1",
        f"train.global_batch={about['batch']}",
        "tracker.log_every=1000000",
        f"launch.device={device.type}",
        f"run.root={folder / 'runs'}",
    ]
    live = [*labels_only, f"teacher={about['teacher']}", "teacher.check_samples=0"]
    stored = [*live, f"cache.dir={folder / 'cache'}"]
    labels_only += ["teacher=none", "distill=none"]
    config = compose([*stored, f"cache.codec={codec}"]).config
    with contextlib.redirect_stdout(io.StringIO()):
        fill_cache(config)
    cache = open_cache(folder / "cache")
    train_set = build_datasets(config.data)[0]
    asking = Asking(config, train_set, ready_teacher(config, train_set, device)[0], device)

    def epoch(overrides: list[str]) -> Callable[[str], float]:
        def call(name: str) -> float:
            launch(compose([*overrides, f"run.name={name}"]))
            (row,) = (r for r in read_metrics(folder / "runs" / name) if r["kind"] == "train")
            return about["images"] / row["images_per_second"]

        return call

    def ask(name: str) -> float:
        since = time.perf_counter()
        with asking.loader() as loader:
            for _ in asking.outputs(loader, [range(len(train_set))], draw=0):
                pass
        return time.perf_counter() - since

    def ask_and_write(name: str) -> float:
        written = create(folder / name, cache.info, cache.codec.tables, "")
        since = time.perf_counter()
        write_missing(written, asking, cache.info.draws)
        return time.perf_counter() - since

    return {
        LABELS: epoch(labels_only),
        STORED: epoch(stored),
        LIVE: epoch(live),
        ASKED: ask,
        WRITTEN: ask_and_write,
    }, cache.info


def make_photos(root: Path, images: int) -> None:
    """Write JPEG crops of scikit-learn's photos into class folders: `images` to train on, and one
    of each class held out.
    """
    from sklearn.datasets import load_sample_images
    from timm.data.imagenet_info import ImageNetInfo

    rng = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    synsets = ImageNetInfo("imagenet-1k").label_names()[: min(images, CLASSES)]
    for number in range(images + len(synsets)):
        photo = photos[number % len(photos)]
        left = int(rng.integers(photo.width - WIDTH + 1))
        top = int(rng.integers(photo.height - HEIGHT + 1))
        split = "train" if number < images else "val"
        folder = root / split / synsets[number % len(synsets)]
        folder.mkdir(parents=True, exist_ok=True)
        crop = photo.crop((left, top, left + WIDTH, top + HEIGHT))
        crop.save(folder / f"{number:06d}.JPEG", quality=92)

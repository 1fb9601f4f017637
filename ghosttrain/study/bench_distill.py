"""`bench distill`: an epoch with cached outputs, against none and against a live teacher; and what
storing costs on top of the teacher's inference.

An epoch is one of the training loop's, as a user runs it: decoding and augmenting real JPEG files
in the same process, forward, backward, LAMB, EMA. Sides take turns within a round. The images are
crops of scikit-learn's two photos under any labels: what is on them does not matter for the time,
that they are photographs does.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path

import torch

from ghosttrain.config.compose import compose
from ghosttrain.config.schema import Config
from ghosttrain.data.datasets import build_datasets
from ghosttrain.distill.cache import CacheInfo, create, open_cache
from ghosttrain.engine.cache_writer import fill_cache, write_missing
from ghosttrain.engine.codec_choice import TeacherInference
from ghosttrain.engine.launch import launch
from ghosttrain.engine.rows import read_metrics
from ghosttrain.engine.summary import device_name
from ghosttrain.engine.teacher_source import ready_teacher
from ghosttrain.study.harness import (
    Side,
    Time,
    paired_ratios,
    quartiles,
    take_turns,
    timed,
)
from ghosttrain.study.photos import two_photos, write_crops
from ghosttrain.study.table import markdown

LABELS, CACHED, LIVE = "epoch, labels only", "epoch, cached outputs", "epoch, live teacher"
INFERENCE, STORED = "teacher inference", "inference and storing"
COMPARED = (
    (LABELS, LABELS),
    (CACHED, LABELS),
    (LIVE, LABELS),
    (LIVE, CACHED),
    (INFERENCE, INFERENCE),
    (STORED, INFERENCE),
)
"""Rows of the table: a side, and the side that it is compared with."""


def bench_distill(
    config: Config, images: int, rounds: int, threads: int, device: torch.device
) -> str:
    """Return a table: a row for each kind of epoch, and for the teacher's inference
    without and with storing.

    Of `config`, model, teacher, cache.codec, data.train_size and train.global_batch count. A ratio
    is that of two sides in the same round.
    """
    with tempfile.TemporaryDirectory(prefix="ghosttrain-") as folder:
        sides, info = _sides(Path(folder), config, images, device)
        times = take_turns(sides, rounds, warm_up=1, threads=threads, there_and_back=True)
    table = [["side", "seconds", "ratio", "to"]]
    for name, base in COMPARED:
        seconds = [ms / 1000 for ms in times[name, "pass"].wall]
        ratio = paired_ratios(times[name, "pass"].wall, times[base, "pass"].wall)
        table.append([name, quartiles(seconds).text(2), ratio.text(3), base])
    return "\n".join(
        [
            f"{config.model.name} and {config.teacher.name}: a pass over {images} JPEG photos, "
            f"batches of {config.train.global_batch}, {config.data.train_size} pixels; "
            f"{device_name(device)}, torch {torch.__version__}",
            f"cached: {info.codec}, {info.bytes_per_image} bytes an image; median of {rounds} "
            "rounds (lower to upper quartile), sides taking turns; ratios within a round",
            "",
            *markdown(table),
        ]
    )


def _sides(
    folder: Path, given: Config, images: int, device: torch.device
) -> tuple[dict[str, Side], CacheInfo]:
    """Return what is timed, and what the cache holds."""
    write_crops(two_photos(), folder / "photos", images, classes=64)
    size, teacher = given.data.train_size, given.teacher
    labels_only = [
        "+recipe=compact_kd",
        f"model={given.model.name}",
        "data=folder",
        f"data.root={folder / 'photos'}",
        f"data.train_size={size}",
        f"data.eval_size={size}",
        "data.workers=0",
        "train.epochs=1",
        f"train.global_batch={given.train.global_batch}",
        "tracker.log_every=1000000",
        f"launch.device={device.type}",
        f"run.root={folder / 'runs'}",
    ]
    named = {key: getattr(teacher, key) for key in ("name", "weights", "input_size")}
    settings = [f"teacher.{key}={value}" for key, value in named.items() if value is not None]
    live = [*labels_only, "teacher=timm", *settings, "teacher.check_samples=0"]
    cached = [*live, f"cache.dir={folder / 'cache'}"]
    labels_only += ["teacher=none", "distill=none"]
    config = compose([*cached, f"cache.codec={given.cache.codec}"]).config
    with contextlib.redirect_stdout(io.StringIO()):
        fill_cache(config)
    cache = open_cache(folder / "cache")
    train_set = build_datasets(config.data)[0]
    teacher_network, _ = ready_teacher(config, train_set, device)
    inference = TeacherInference(config, train_set, teacher_network, device)

    def epoch(overrides: list[str], label: str) -> Side:
        def call(number: int) -> dict[str, Time]:
            name = f"{label}-{number}"
            with contextlib.redirect_stdout(io.StringIO()):
                launch(compose([*overrides, f"run.name={name}"]))
            (row,) = (r for r in read_metrics(folder / "runs" / name) if r["kind"] == "train")
            return {"pass": Time(float("nan"), 1000 * images / row["images_per_second"])}

        return call

    def infer(number: int) -> dict[str, Time]:
        def all_images() -> None:
            with inference.loader() as loader:
                for _ in inference.outputs(loader, [range(len(train_set))], draw=0):
                    pass

        return {"pass": timed(all_images, device)}

    def infer_and_store(number: int) -> dict[str, Time]:
        written = create(folder / f"written-{number}", cache.info, cache.codec.tables, "")
        with contextlib.redirect_stdout(io.StringIO()):
            draws = cache.info.draws
            return {"pass": timed(lambda: write_missing(written, inference, draws), device)}

    sides: dict[str, Side] = {
        LABELS: epoch(labels_only, "labels"),
        CACHED: epoch(cached, "cached"),
        LIVE: epoch(live, "live"),
        INFERENCE: infer,
        STORED: infer_and_store,
    }
    return sides, cache.info

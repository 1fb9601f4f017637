"""The verb `cache`: ask the teacher once, and store its outputs for every run to come.

Owns the choice of the codec by measurement, and the writing: draw by draw, file by file, each rank
its own files, so that a command that was killed goes on where it was. The format of the files is
distill/cache.py's, how an output becomes bytes is distill/codecs.py's.

Legend: B batch, K classes, n images of the sample.
"""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from ghosttrain.config.codec import parse_codec
from ghosttrain.config.losses import compares_features, settings_of, signatures, terms
from ghosttrain.config.schema import Config
from ghosttrain.data.datasets import Dataset, build_datasets, notes_on
from ghosttrain.data.loader import Loader, train_loader
from ghosttrain.data.order import epoch_order, eval_batches
from ghosttrain.distill.cache import (
    CacheInfo,
    Shard,
    TeacherCache,
    create,
    is_cache,
    open_cache,
    validate_folder,
)
from ghosttrain.distill.codecs import (
    Codec,
    LogitLoss,
    Quality,
    candidates,
    make_codec,
    measure,
)
from ghosttrain.distill.losses import LossInputs, evaluate_loss
from ghosttrain.distill.teacher import Teacher
from ghosttrain.distill.teacher_output import TeacherOutput, concatenated
from ghosttrain.engine import distributed
from ghosttrain.engine.cache_key import (
    absent,
    cache_key,
    left_open,
    loss_note,
    validate_key,
)
from ghosttrain.engine.cache_picture import draw_picture
from ghosttrain.engine.teacher_source import ready_teacher
from ghosttrain.errors import UserError
from ghosttrain.text import clock

SAMPLE = 512
"""Images on which a codec is measured."""
LEAST_COSINE = 0.995
"""What `cache.codec=auto` keeps of the gradient's direction."""


def fill_cache(
    config: Config | None, dry_run: bool = False, repair: bool = False, inspect: bool = False
) -> None:
    """Store the teacher's outputs for `cache.draws` draws of every training image.

    Args:
        config: all settings on rank 0; None on the other ranks, which receive rank 0's.
        dry_run: measure and print, write nothing.
        repair: read every file that exists, and make again those that are damaged or missing.
        inspect: draw a picture of a few cached outputs instead.

    Raises:
        UserError: the teacher cannot be had or knows nothing; the folder holds other outputs; the
            codec does not fit.
    """
    distributed.start(patience=timedelta(days=30))  # ranks end at other times, a slow one last
    config = distributed.broadcast(config)
    assert config is not None and config.cache.dir is not None
    device = distributed.pick_device(config.launch.device)
    train_set, _ = build_datasets(config.data)
    folder = Path(config.cache.dir)
    if repair and not is_cache(folder):
        raise UserError(f"there is nothing to repair: {folder} holds no cached outputs")
    validate_folder(folder)
    if inspect:
        cache = open_cache(folder)
        validate_key(cache, cache_key(config, train_set))
        _say(f"picture: {draw_picture(cache, config, train_set)}")
        return distributed.stop()

    teacher, about_teacher = ready_teacher(config, train_set, device)
    asking = Asking(config, train_set, teacher, device)
    _say(f"data: {train_set.describe()}")
    for note in notes_on(train_set) if distributed.rank() == 0 else ():
        _say(f"  {note}")
    _say(f"teacher: {about_teacher}")
    found: TeacherCache | None = None
    with ExitStack() as lock:
        if distributed.rank() == 0:
            now = cache_key(config, train_set)
            if is_cache(folder):
                found = _existing(open_cache(folder), config, now)
            elif not repair:
                found = _new(asking, now, about_teacher, dry_run)
            if found is not None and not dry_run:
                lock.enter_context(found.locked())
                found = found if repair else found.extended(_draws(config))
        found = distributed.broadcast(found)
        if found is not None and dry_run:
            _say_missing(found, _draws(config))
        elif found is not None:
            write_missing(found, asking, found.info.draws if repair else _draws(config), repair)
    distributed.stop()


@dataclass(frozen=True)
class Asking:
    """The teacher, and how it is shown the training images."""

    config: Config
    train_set: Dataset
    teacher: Teacher
    device: torch.device

    @property
    def batch(self) -> int:
        """Images decoded and shown at once."""
        return self.config.train.eval_batch or 64

    def loader(self) -> Loader:
        """Return the augmented images, with the views that the teacher takes."""
        config = self.config
        channels_last = config.train.channels_last
        return train_loader(
            self.train_set, config.data, config.augment, self.device, channels_last,
            self.teacher.views,
        )  # fmt: skip

    def outputs(
        self, loader: Loader, parts: Iterable[Sequence[int]], draw: int
    ) -> Iterator[TeacherOutput]:
        """Yield the outputs for parts of the images under one draw, batch by batch: every batch
        lies within one part.
        """
        plan = (batch for part in parts for batch in eval_batches(part, self.batch))
        for batch in loader.batches(plan, draw):
            yield self.teacher(batch.images, batch.views)


# --- Which codec ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """The teacher's outputs for two draws of a few images, and how long they took."""

    labels: Tensor
    """(n,)"""
    output: TeacherOutput
    other: TeacherOutput
    """To another draw of the same images."""
    images_per_second: float


def _draws(config: Config) -> int:
    """Return how many draws to store: without augmentation they would all be the same."""
    if config.augment.policy == "none":
        return 1
    return config.cache.draws or config.train.epochs


def _say_missing(cache: TeacherCache, draws: int) -> None:
    """Say what is left to write of the first `draws` draws of a cache that exists."""
    info = cache.info
    added_bytes = max(draws - info.draws, 0) * cache.total_bytes() / info.draws
    left = sum(shard.draw < draws for shard in cache.missing())
    _say(
        f"{cache.folder}: {info.codec}, {_count(info.draws, 'draw')}, "
        f"{_count(left, 'file')} missing; {_count(draws, 'draw')} add {_bytes(added_bytes)}"
    )


def _existing(cache: TeacherCache, config: Config, now: Mapping[str, Any]) -> TeacherCache:
    """Return the cache, made sure that it was begun with these settings (`now`: cache_key)."""
    validate_key(cache, now)
    for name, old in (("codec", cache.info.codec), ("shard_size", cache.info.shard_size)):
        new = getattr(config.cache, name)
        if new not in ("auto", old):
            raise UserError(
                f"{cache.folder} was begun with cache.{name}={old}: type that, or another cache.dir"
            )
    return cache


def _new(
    asking: Asking, now: dict[str, Any], about_teacher: str, dry_run: bool
) -> TeacherCache | None:
    """Measure, choose a codec, say what storing will take, and make a cache; None if `dry_run`."""
    config, n, draws = asking.config, len(asking.train_set), _draws(asking.config)
    sample = _ask_sample(asking)
    codec, quality = _choose(config, asking.teacher, sample)
    ranks = distributed.world_size()
    seconds = n * draws / sample.images_per_second / ranks
    _say(
        f"{_count(draws, 'draw')} of {n:,} images x {codec.bytes_per_image} bytes = "
        f"{_bytes(codec.bytes_per_image * n * draws)}; at {sample.images_per_second:.0f} images/s "
        f"x {ranks} this will take about {clock(seconds)}"
    )
    if dry_run:
        return None
    info = CacheInfo(
        key=now,
        codec=codec.name,
        num_classes=codec.num_classes,
        widths=codec.widths,
        bytes_per_image=codec.bytes_per_image,
        samples=n,
        draws=draws,
        shard_size=config.cache.shard_size,
        notes={
            "teacher": about_teacher,
            "absent": {name: absent(each) for name, each in config.teacher.networks.items()},
            "left_open": {name: left_open(each) for name, each in config.teacher.networks.items()},
            "loss": loss_note(config),
            "loss_error": quality.loss_error,
            "cosine": quality.cosine,
        },
    )
    settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return create(Path(str(config.cache.dir)), info, codec.tables, settings)


def _ask_sample(asking: Asking) -> Sample:
    """Ask the teacher about two draws of a few random images."""
    indices = epoch_order(len(asking.train_set), 0, 0)[:SAMPLE].tolist()
    outputs, seen, since = [], 0, 0.0
    with asking.loader() as loader:
        for draw in (0, 1):
            parts = []
            for output in asking.outputs(loader, [indices], draw):
                parts.append(output)
                seen += len(output.logits)
                if not since:  # the first batch waits for the workers to start
                    since, seen = time.perf_counter(), 0
            logits, features = concatenated(parts)
            outputs.append(
                TeacherOutput(logits.cpu(), features.cpu() if features is not None else None)
            )
    rate = max(seen, 1) / max(time.perf_counter() - since, 1e-9)
    first, other = outputs
    return Sample(torch.from_numpy(asking.train_set.labels[indices]), first, other, rate)


def _choose(config: Config, teacher: Teacher, sample: Sample) -> tuple[Codec, Quality]:
    """Return the codec that was asked for, or the smallest that is good enough, and how good."""
    told, num_classes = config.cache.codec, sample.output.logits.shape[1]
    names = candidates(num_classes, teacher.widths) if told == "auto" else [told]
    if compares_features(config.distill):
        names = [name for name in names if parse_codec(name)[0] == "features"]
        if not names:
            raise UserError(
                f"a loss that compares features needs the teacher's, which cache.codec={told} "
                "does not store (or this teacher does not have): type cache.codec=features:8 or "
                "distill.features_weight=0"
            )
    students = {
        "uniform": torch.zeros_like(sample.output.logits),
        "another draw": sample.other.logits,
    }
    _say(
        f"codecs, measured on {len(sample.labels)} images with distill={config.distill.name} "
        f"(gradient of a uniform student and of the teacher on another draw; the worse counts):"
    )
    _say(f"  {'codec':<12}{'bytes':>7}{'loss error':>12}{'cosine':>9}")
    codec, quality = None, Quality(0.0, 0.0)
    for name in names:
        codec = make_codec(name, num_classes, teacher.widths, _tables(name, teacher, sample))
        quality = measure(codec, sample.output, students, _losses(config, sample.labels))
        good = quality.cosine >= LEAST_COSINE
        mark = "   <- chosen" if good or name == names[-1] else ""
        _say(
            f"  {name:<12}{codec.bytes_per_image:>7}{100 * quality.loss_error:>10.2f} %"
            f"{quality.cosine:>9.4f}{mark}"
        )
        if good:
            break
    assert codec is not None
    if not quality.cosine >= LEAST_COSINE:
        _say(f"  note: below {LEAST_COSINE}, what cache.codec=auto looks for")
    return codec, quality


def _tables(name: str, teacher: Teacher, sample: Sample) -> dict[str, Tensor]:
    """Return what a codec needs besides each output, and what is stored once."""
    kind, _ = parse_codec(name)
    if kind == "topk":
        return {"mean": sample.output.logits.softmax(dim=1).mean(dim=0)}
    if kind == "features" and teacher.widths:
        weight, bias = teacher.classifier()
        return {"weight": weight.cpu(), "bias": bias.cpu()}
    return {}


def _losses(config: Config, labels: Tensor) -> list[LogitLoss]:
    """Return the run's losses of logits, at every temperature that the schedule names. Where it has
    none, cross-entropy stands for them.
    """
    distill = config.distill
    names = [term.name for term in terms(distill)]
    names = [name for name in names if not signatures()[name].compares_features] or ["soft_ce"]
    points = distill.temperature
    temperatures = [value for _, value in points] if isinstance(points, tuple) else [points]

    def at_temperature(name: str, temperature: float) -> LogitLoss:
        def loss(student_BK: Tensor, teacher_BK: Tensor, part: slice) -> Tensor:
            inputs = LossInputs(student_BK, teacher_BK, labels[part], temperature)
            return evaluate_loss(name, inputs, settings_of(distill, name))

        return loss

    return [at_temperature(name, value) for name in names for value in dict.fromkeys(temperatures)]


# --- Writing --------------------------------------------------------------------------------------


def write_missing(cache: TeacherCache, asking: Asking, draws: int, repair: bool = False) -> None:
    """Write this rank's part of the files of the first `draws` draws that are missing or, with
    `repair`, damaged.
    """
    todo: list[Shard] | None = None
    if distributed.rank() == 0:
        for shard, why in cache.damaged() if repair else []:
            _say(f"damaged: {cache.path(shard)} ({why})")
            cache.path(shard).unlink()
        todo = [shard for shard in cache.missing() if shard.draw < draws]
    todo = distributed.broadcast(todo)
    assert todo is not None
    rank, ranks = distributed.rank(), distributed.world_size()
    mine = todo[rank::ranks]
    started, storing = time.perf_counter(), 0.0
    progress = _Progress(sum(len(cache.samples(shard)) for shard in mine))
    with asking.loader() as loader, progress:
        for draw in sorted({shard.draw for shard in mine}):
            shards = [shard for shard in mine if shard.draw == draw]
            outputs = asking.outputs(loader, map(cache.samples, shards), draw)
            for shard in shards:
                cached: list[Tensor] = []
                for _ in eval_batches(cache.samples(shard), asking.batch):
                    output = next(outputs)
                    since = time.perf_counter()
                    cached.append(cache.codec.encode(output))
                    storing += time.perf_counter() - since
                    progress.add(len(output.logits))
                since = time.perf_counter()
                cache.write(shard, torch.cat(cached))
                storing += time.perf_counter() - since
    distributed.barrier()
    seconds = time.perf_counter() - started
    _say(
        f"{cache.folder}: {_count(draws, 'draw')} of {cache.info.samples:,} images, "
        f"{cache.info.codec}, {_bytes(cache.total_bytes() * draws / cache.info.draws)} in "
        f"{_count(len(cache.shards()) * draws // cache.info.draws, 'file')}"
    )
    if todo:
        done = sum(len(cache.samples(shard)) for shard in todo)
        share = f", {100 * storing / seconds:.1f} % of the time for storing" if mine else ""
        speed = f"{done / seconds:.0f} images/s{share}"
        _say(f"wrote {_count(len(todo), 'file')} in {clock(seconds)} ({speed})")
    else:
        _say(f"nothing to write: all files are {'intact' if repair else 'there'}")
    folder = shlex.quote(str(cache.folder))
    _say(f"train with them: the same settings without `cache`, cache.dir={folder}")


class _Progress:
    """A bar on a terminal, a line every half minute elsewhere; on rank 0."""

    EVERY = 30.0

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.started = self.said = time.perf_counter()
        terminal = sys.stderr.isatty() and distributed.rank() == 0
        self.bar = tqdm(total=total, unit=" images", dynamic_ncols=True) if terminal else None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def add(self, images: int) -> None:
        """Count images."""
        self.done += images
        now = time.perf_counter()
        if self.bar is not None:
            self.bar.update(images)
        elif now - self.said > self.EVERY:
            self.said, speed = now, self.done / (now - self.started)
            left = clock((self.total - self.done) / speed)
            _say(f"{self.done:,} of {self.total:,} images, {speed:.0f} images/s, ETA {left}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _bytes(count: float) -> str:
    if count < 1000:
        return f"{count:.0f} bytes"
    power = min(int(math.log10(count)) // 3, 4)
    return f"{count / 1000**power:.1f} {' kMGT'[power]}B"


def _say(text: str) -> None:
    if distributed.rank() == 0:
        print(text, flush=True)

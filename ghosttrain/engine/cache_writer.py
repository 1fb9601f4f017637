"""The verb `cache`: run the teacher once, and store its outputs for every run to come.

Owns the writing: draw by draw, file by file, each rank its own files, so that a command that was
killed continues where it stopped. The format of the files is distill/cache.py's, how an output
becomes bytes is distill/codecs.py's, which codec is engine/codec_choice.py's.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ghosttrain.config.schema import Config
from ghosttrain.data.datasets import build_datasets, notes_on
from ghosttrain.data.order import eval_batches
from ghosttrain.distill.cache import (
    CacheInfo,
    Shard,
    TeacherCache,
    create,
    is_cache,
    open_cache,
    validate_folder,
)
from ghosttrain.engine import distributed
from ghosttrain.engine.cache_key import absent, cache_key, left_open, loss_note, validate_key
from ghosttrain.engine.cache_picture import draw_picture
from ghosttrain.engine.codec_choice import TeacherInference, choose_codec, sample_outputs
from ghosttrain.engine.distributed import say
from ghosttrain.engine.run_files import config_text
from ghosttrain.engine.teacher_source import ready_teacher
from ghosttrain.errors import UserError
from ghosttrain.files import expanded
from ghosttrain.terminal import screen
from ghosttrain.text import byte_size, clock, counted


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
        UserError: the teacher cannot be had or is no better than guessing; the folder holds other
            outputs; the codec does not fit.
    """
    distributed.start(patience=timedelta(days=30))  # ranks end at other times, a slow one last
    config = distributed.broadcast(config)
    assert config is not None and config.cache.dir is not None
    device = distributed.pick_device(config.launch.device)
    train_set, _ = build_datasets(config.data)
    folder = expanded(config.cache.dir)
    if repair and not is_cache(folder):
        raise UserError(f"there is nothing to repair: {folder} holds no cached outputs")
    validate_folder(folder)
    if inspect:
        stored = open_cache(folder)
        validate_key(stored, cache_key(config, train_set))
        say(f"picture: {draw_picture(stored, config, train_set)}")
        return distributed.stop()

    teacher, about_teacher = ready_teacher(config, train_set, device)
    inference = TeacherInference(config, train_set, teacher, device)
    say(f"data: {train_set.describe()}")
    for note in notes_on(train_set) if distributed.rank() == 0 else ():
        say(f"  {note}")
    say(f"teacher: {about_teacher}")
    cache: TeacherCache | None = None
    with ExitStack() as lock:
        if distributed.rank() == 0:
            key = cache_key(config, train_set)
            if is_cache(folder):
                cache = open_cache(folder)
                _validate_begun(cache, config, key)
            elif not repair:
                cache = _begin(inference, key, about_teacher, dry_run)
            if cache is not None and not dry_run:
                lock.enter_context(cache.locked())
                cache = cache if repair else cache.extended(draws_of(config))
        cache = distributed.broadcast(cache)
        if cache is not None and dry_run:
            _print_missing(cache, draws_of(config))
        elif cache is not None:
            write_missing(
                cache, inference, cache.info.draws if repair else draws_of(config), repair
            )
    distributed.stop()


def draws_of(config: Config) -> int:
    """Return how many draws to store: without augmentation they would all be the same."""
    if config.augment.policy == "none":
        return 1
    return config.cache.draws or config.train.epochs


def _print_missing(cache: TeacherCache, draws: int) -> None:
    """Print what is left to write of the first `draws` draws of a cache that exists."""
    info = cache.info
    added_bytes = max(draws - info.draws, 0) * cache.total_bytes() / info.draws
    left = sum(shard.draw < draws for shard in cache.missing())
    say(
        f"{cache.folder}: {info.codec}, {counted(info.draws, 'draw')}, "
        f"{counted(left, 'file')} missing; {counted(draws, 'draw')} add {byte_size(added_bytes)}"
    )


def _validate_begun(cache: TeacherCache, config: Config, key: Mapping[str, Any]) -> None:
    """Refuse a cache that was begun with other settings (`key`: of `cache_key`)."""
    validate_key(cache, key)
    for name, old in (("codec", cache.info.codec), ("shard_size", cache.info.shard_size)):
        new = getattr(config.cache, name)
        if new not in ("auto", old):
            raise UserError(
                f"{cache.folder} was begun with cache.{name}={old}: type that, or another cache.dir"
            )


def _begin(
    inference: TeacherInference, key: dict[str, Any], about_teacher: str, dry_run: bool
) -> TeacherCache | None:
    """Choose a codec, print what storing will cost, and make a cache; None if `dry_run`."""
    config, n, draws = inference.config, len(inference.train_set), draws_of(inference.config)
    sample = sample_outputs(inference)
    rate = sample.images_per_second
    codec, quality = choose_codec(config, inference.teacher, sample)
    ranks = distributed.world_size()
    seconds = n * draws / rate / ranks
    say(
        f"{counted(draws, 'draw')} of {n:,} images x {codec.bytes_per_image} bytes = "
        f"{byte_size(codec.bytes_per_image * n * draws)}; at {rate:.0f} images/s "
        f"x {ranks} this will take about {clock(seconds)}"
    )
    if dry_run:
        return None
    info = CacheInfo(
        key=key,
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
    return create(expanded(str(config.cache.dir)), info, codec.tables, config_text(config))


def write_missing(
    cache: TeacherCache, inference: TeacherInference, draws: int, repair: bool = False
) -> None:
    """Write this rank's part of the files of the first `draws` draws that are missing or, with
    `repair`, damaged.
    """
    todo: list[Shard] | None = None
    if distributed.rank() == 0:
        for shard, why in cache.damaged() if repair else []:
            say(f"damaged: {cache.path(shard)} ({why})")
            cache.path(shard).unlink()
        todo = [shard for shard in cache.missing() if shard.draw < draws]
    todo = distributed.broadcast(todo)
    assert todo is not None
    rank, ranks = distributed.rank(), distributed.world_size()
    mine = todo[rank::ranks]
    started, storing = time.perf_counter(), 0.0
    progress = _Progress(sum(len(cache.samples(shard)) for shard in mine))
    with inference.loader() as loader, progress:
        for draw in sorted({shard.draw for shard in mine}):
            shards = [shard for shard in mine if shard.draw == draw]
            outputs = inference.outputs(loader, map(cache.samples, shards), draw)
            for shard in shards:
                cached: list[Tensor] = []
                for _ in eval_batches(cache.samples(shard), inference.batch):
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
    say(
        f"{cache.folder}: {counted(draws, 'draw')} of {cache.info.samples:,} images, "
        f"{cache.info.codec}, {byte_size(cache.total_bytes() * draws / cache.info.draws)} in "
        f"{counted(len(cache.shards()) * draws // cache.info.draws, 'file')}"
    )
    if todo:
        done = sum(len(cache.samples(shard)) for shard in todo)
        share = f", {100 * storing / seconds:.1f} % of the time for storing" if mine else ""
        speed = f"{done / seconds:.0f} images/s{share}"
        say(f"wrote {counted(len(todo), 'file')} in {clock(seconds)} ({speed})")
    else:
        say(f"nothing to write: all files are {'intact' if repair else 'there'}")
    folder = shlex.quote(str(cache.folder))
    say(f"train with them: the same settings without `cache`, cache.dir={folder}")


class _Progress:
    """A bar on a terminal, a line every half minute elsewhere; on rank 0."""

    EVERY = 30.0

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.started = self.printed = time.perf_counter()
        shown_on = None if distributed.rank() else screen()
        self.bar = (
            tqdm(total=total, unit=" images", dynamic_ncols=True, file=shown_on)
            if shown_on is not None
            else None
        )

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
        elif now - self.printed > self.EVERY:
            self.printed, speed = now, self.done / (now - self.started)
            left = clock((self.total - self.done) / speed)
            say(f"{self.done:,} of {self.total:,} images, {speed:.0f} images/s, ETA {left}")

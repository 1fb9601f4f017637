"""Where the teacher's output for a batch comes from: a live teacher, or a cache.

Owns the checks before the first step (the teacher knows the classes; the cache belongs to this
data, policy and teacher).

Shapes: B batch, C channels, H W map, R bytes of a cached output.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghosttrain.config import schema
from ghosttrain.config.losses import compares_features
from ghosttrain.config.schema import Config
from ghosttrain.data.augment import View
from ghosttrain.data.datasets import Dataset
from ghosttrain.data.loader import eval_loader
from ghosttrain.data.order import epoch_order, eval_batches
from ghosttrain.distill.cache import TeacherCache, open_cache
from ghosttrain.distill.chance import Score, validate_above_chance
from ghosttrain.distill.teacher import Teacher, build_teacher, measure_teacher
from ghosttrain.distill.teacher_output import TeacherOutput
from ghosttrain.engine.cache_key import cache_key, loss_note, validate_key
from ghosttrain.errors import UserError


@dataclass(frozen=True)
class TeacherSource:
    """Where a run's teacher outputs come from: a live teacher, a cache, or nowhere."""

    about: str = "none"
    """One line for the head of the log."""
    teacher: Teacher | None = None
    cache: TeacherCache | None = None
    draws: int | None = None
    """How many draws of each image are used, over and over; None: each epoch has its own."""

    def __call__(
        self, images: Tensor, views: Mapping[View, Tensor], cached: Tensor | None
    ) -> TeacherOutput | None:
        """Return the output for images (B, C, H, W), their larger views or their cached bytes."""
        if self.cache is not None and cached is not None:
            return self.cache.decode(cached)
        return None if self.teacher is None else self.teacher(images, views)

    @property
    def views(self) -> Sequence[View]:
        """Sizes besides the student's at which the loader should replay each image."""
        return self.teacher.views if self.teacher is not None else ()

    @property
    def cached(self) -> Callable[[int, Sequence[int]], Tensor] | None:
        """(draw number, sample numbers) -> cached outputs (B, R): what the loader reads them by."""
        return self.cache.read if self.cache is not None else None

    @property
    def num_features(self) -> int:
        """Pooled features in an output; 0: it has none."""
        if self.cache is not None:
            return sum(self.cache.info.widths)
        return sum(self.teacher.widths) if self.teacher is not None else 0

    def resumed(self, before: Mapping[str, Any]) -> TeacherSource:
        """Return the source that a run began with: a cache may have more draws since then.

        Raises:
            UserError: `before`, the `state()` of then, is of other outputs.
        """
        now = self.state()
        if before == now:
            return self
        if before["cache"] != now["cache"]:
            raise UserError(
                f"this run began with the cached outputs {before['cache']}, cache.dir now holds"
                f" {now['cache']}: put those back, or type run.fresh=true"
            )
        about = f"{self.about}, of which this run goes on with {before['draws']}"
        return replace(self, draws=before["draws"], about=about)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, so that a resumed run has the same outputs."""
        return {"draws": self.draws, "cache": self.cache.digest() if self.cache else None}

    def draw_number(self, epoch: int) -> int:
        """Return which draw of each image an epoch (from 0) takes."""
        return epoch if self.draws is None else epoch % self.draws


def build_teacher_source(config: Config, train_set: Dataset, device: torch.device) -> TeacherSource:
    """Return where this run's teacher outputs come from, checked; nowhere with `distill=none`.

    Raises:
        UserError: the teacher cannot be had or does not know the classes; the cache is not there,
            not complete, or of other settings; no features where the settings need them.
    """
    if config.distill.name == "none":
        return TeacherSource()
    if config.cache.dir is not None:
        source = _open_cache(config, train_set, device)
    else:
        teacher, about = ready_teacher(config, train_set, device)
        source = TeacherSource(about, teacher)
    if compares_features(config.distill) and not source.num_features:
        raise UserError(
            "a loss that compares features needs the teacher's pooled ones: a teacher whose"
            " classifier is one linear layer, an ensemble with teacher.average=logit, or, with"
            " cache.dir, a cache made with cache.codec=features:8"
        )
    return source


def ready_teacher(config: Config, train_set: Dataset, device: torch.device) -> tuple[Teacher, str]:
    """Return the teacher, checked on unaugmented training images, and a line that says what it is.

    Raises:
        UserError: it cannot be had, or it or a member of it is no better than guessing.
    """
    cfg = config.teacher
    teacher = build_teacher(cfg, train_set.classes, config.data, device)
    assert teacher is not None  # the composer refuses distillation without a teacher
    sample = epoch_order(len(train_set), 0, 0)[: cfg.check_samples].tolist()
    scores: list[Score] = []
    if sample:
        with eval_loader(train_set, config.data, device, views=teacher.views) as images:
            batches = images.batches(eval_batches(sample, 64))
            scores = measure_teacher(teacher, ((b.images, b.labels, b.views) for b in batches))
        subjects = ["the teacher", *(f"the teacher's member {name!r}" for name in teacher.members)]
        for found, name in zip(scores, subjects, strict=False):
            if not cfg.trust:
                validate_above_chance(found, len(train_set.classes), name)
    return teacher, _describe(cfg, teacher, scores)


def _describe(cfg: schema.TeacherConfig, teacher: Teacher, scores: list[Score]) -> str:
    shares = [f", top-1 {100 * found.top1:.1f} %" for found in scores]
    parts = [
        f"{member.name} ({network.weights}), {member.view[0]} px {member.size_note}, "
        + ", ".join(filter(None, (member.network.weights_note, member.classes_note)))
        for network, member in zip(cfg.networks.values(), teacher.members.values(), strict=True)
    ]
    if len(parts) > 1:
        if scores:
            parts = [part + share for part, share in zip(parts, shares[1:], strict=True)]
        line = f"{' + '.join(parts)}; averaged as {cfg.average}"
    else:
        line = parts[0]
    if not scores:
        return f"{line}, not checked"
    most = 100 * scores[0].majority / max(scores[0].n, 1)
    return (
        f"{line}{shares[0]} on {scores[0].n} unaugmented training images "
        f"({most:.1f} % are of one class)"
    )


# --- Cached outputs -------------------------------------------------------------------------------


def _open_cache(config: Config, train_set: Dataset, device: torch.device) -> TeacherSource:
    """Open the cache of `cache.dir` and make sure that it was made for this run."""
    cache = open_cache(Path(str(config.cache.dir)))
    validate_key(cache, cache_key(config, train_set))
    if config.cache.codec not in ("auto", cache.info.codec):
        raise UserError(
            f"cache.dir={cache.folder} holds {cache.info.codec}: leave"
            f" cache.codec={config.cache.codec} out, or store anew in another cache.dir"
        )
    draws = config.cache.draws or cache.info.draws
    if draws > cache.info.draws:
        raise UserError(
            f"cache.draws={draws}, but {cache.folder} holds {cache.info.draws} draws of each"
            f" image: type cache.draws={cache.info.draws}, or store more with python -m"
            " ghosttrain cache"
        )
    missing = [shard for shard in cache.missing() if shard.draw < draws]
    if missing:
        raise UserError(
            f"cache.dir={cache.folder} is not complete: {len(missing)} of its files missing or"
            f" cut short (first: {cache.path(missing[0])}); type python -m ghosttrain cache"
            f" {shlex.quote(str(cache.folder))} --repair"
        )
    notes = cache.info.notes
    about = (
        f"cached outputs of {notes['teacher']}; {cache.info.codec},"
        f" {cache.info.bytes_per_image} bytes each, {draws} draws of each image"
    )
    if notes["loss"] != loss_note(config):
        about += (
            f"; note: the codec was measured with {notes['loss']}, what it keeps of this run's"
            " gradient is not known (cache --dry-run with another cache.dir measures it)"
        )
    return TeacherSource(about, cache=cache.to(device), draws=draws)

"""Which codec stores the teacher's outputs: chosen by what it keeps of the gradient, measured.

Legend: B batch, K classes, n images of the sample.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ghosttrain.config.codec import parse_codec
from ghosttrain.config.losses import compares_features, settings_of, signatures, terms
from ghosttrain.config.schema import Config
from ghosttrain.data.datasets import Dataset
from ghosttrain.data.loader import Loader, train_loader
from ghosttrain.data.order import epoch_order, eval_batches
from ghosttrain.distill.codecs import Codec, LogitLoss, Quality, candidates, make_codec, measure
from ghosttrain.distill.losses import LossInputs, evaluate_loss
from ghosttrain.distill.teacher import Teacher
from ghosttrain.distill.teacher_output import TeacherOutput, concatenated
from ghosttrain.engine.distributed import say
from ghosttrain.errors import UserError

SAMPLE = 512
"""Images on which a codec is measured."""
LEAST_COSINE = 0.995
"""What `cache.codec=auto` keeps of the gradient's direction."""


@dataclass(frozen=True)
class TeacherInference:
    """The teacher and the training images that it is shown."""

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


@dataclass(frozen=True)
class Sample:
    """The teacher's outputs for two draws of a few images, and how long they took."""

    labels: Tensor
    """(n,)"""
    output: TeacherOutput
    other: TeacherOutput
    """To another draw of the same images."""
    images_per_second: float


def sample_outputs(inference: TeacherInference) -> Sample:
    """Return the teacher's outputs for two draws of a few random images."""
    indices = epoch_order(len(inference.train_set), 0, 0)[:SAMPLE].tolist()
    outputs, seen, since = [], 0, 0.0
    with inference.loader() as loader:
        for draw in (0, 1):
            parts = []
            for output in inference.outputs(loader, [indices], draw):
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
    return Sample(torch.from_numpy(inference.train_set.labels[indices]), first, other, rate)


def choose_codec(config: Config, teacher: Teacher, sample: Sample) -> tuple[Codec, Quality]:
    """Return the codec of `cache.codec` and its quality; for "auto" the smallest codec that keeps
    `LEAST_COSINE`, else the last candidate. Prints the measurements.

    Raises:
        UserError: a loss compares features, and the codec stores none.
    """
    setting, num_classes = config.cache.codec, sample.output.logits.shape[1]
    names = candidates(num_classes, teacher.widths) if setting == "auto" else [setting]
    if compares_features(config.distill):
        names = [name for name in names if parse_codec(name)[0] == "features"]
        if not names:
            raise UserError(
                f"a loss that compares features needs the teacher's, which cache.codec={setting} "
                "does not store (or this teacher does not have): type cache.codec=features:8 or "
                "distill.features_weight=0"
            )
    students = {
        "uniform": torch.zeros_like(sample.output.logits),
        "another draw": sample.other.logits,
    }
    say(
        f"codecs, measured on {len(sample.labels)} images with distill={config.distill.name} "
        f"(gradient of a uniform student and of the teacher on another draw; the worse counts):"
    )
    say(f"  {'codec':<12}{'bytes':>7}{'loss error':>12}{'cosine':>9}")
    codec, quality = None, Quality(0.0, 0.0)
    for name in names:
        codec = make_codec(name, num_classes, teacher.widths, _tables(name, teacher, sample))
        quality = measure(codec, sample.output, students, _losses(config, sample.labels))
        good = quality.cosine >= LEAST_COSINE
        mark = "   <- chosen" if good or name == names[-1] else ""
        say(
            f"  {name:<12}{codec.bytes_per_image:>7}{100 * quality.loss_error:>10.2f} %"
            f"{quality.cosine:>9.4f}{mark}"
        )
        if good:
            break
    assert codec is not None
    if not quality.cosine >= LEAST_COSINE:
        say(f"  note: below {LEAST_COSINE}, what cache.codec=auto looks for")
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

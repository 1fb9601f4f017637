"""Exact accuracy of several models over one pass of the held-out images: what is counted. What is
made of the counts: `metrics.py`.

Legend: B batch, K classes, T true class, P predicted class. Every image is counted
once, whatever the number of ranks: ranks may hold different numbers of images, and counts are added
as integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ghosttrain.config.schema import Config
from ghosttrain.data.datasets import Dataset
from ghosttrain.data.loader import PATIENCE, Batch, Broken, eval_loader
from ghosttrain.data.order import eval_batches, eval_indices
from ghosttrain.engine import distributed
from ghosttrain.engine.metrics import BINS, MOST_CONFUSED, UNIT, Counts, row_of
from ghosttrain.engine.stop import Stop
from ghosttrain.models.reparam import using_forward

Table = dict[str, dict[str, float]]
"""Name of a model -> accuracies in per cent, by `metrics.row_of`; "n" images."""


class Evaluation(NamedTuple):
    """What was measured of several models on the held-out images."""

    table: Table
    difference: float
    """Largest absolute difference between a logit of "fused" and of what was fused; 0 without."""
    counts: Mapping[str, Any]
    """Name of a model -> what was counted; its `record(classes)` is what `result.json` holds."""


class HeldOutImages:
    """The batches of the held-out set that belong to this rank, as often as they are iterated over.

    Every image is on exactly one rank. The worker processes end with the block or with `close`.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: Config,
        device: torch.device,
        batch: int,
        stop: Stop | None = None,
    ) -> None:
        """Begin nothing yet.

        Args:
            dataset: the held-out set.
            config: all settings.
            device: of this rank.
            batch: images per forward pass and rank.
            stop: where it is asked for, the iteration raises Stopped on all ranks.
        """
        self.stop, self.dataset = stop, dataset
        self.indices: Sequence[int]
        self.indices = eval_indices(len(dataset), distributed.rank(), distributed.world_size())
        self.batch = batch
        self.loader = eval_loader(
            dataset,
            config.data,
            device,
            config.train.channels_last,
            patience=None if stop else PATIENCE,  # in training the watchdog's
        )

    def __iter__(self) -> Iterator[Batch]:
        asked = False
        for batch in self.loader.batches(eval_batches(self.indices, self.batch)):
            yield batch
            if asked := self.stop is not None and self.stop.is_asked():
                break
        if self.stop is not None:
            self.stop.agree(asked)

    def __enter__(self) -> HeldOutImages:
        self.loader.__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.loader.__exit__(*exc_info)

    def first_batch(self) -> Iterator[Batch]:
        """Return the first batch alone; nothing where this rank has no images."""
        return self.loader.batches(eval_batches(self.indices[: self.batch], self.batch))


@torch.inference_mode()
def try_first_batch(model: nn.Module, held_images: HeldOutImages) -> None:
    """Read this rank's first batch of the held-out set, show it to `model`, and forget its output:
    what cannot be read or does not fit is said before an epoch was trained. On a CPU the network is
    shown one image: a whole batch may not fit in the memory of a GPU.

    Raises:
        UserError: an image is broken.
    """
    with evaluating(model):
        for batch in held_images.first_batch():
            model(batch.images[:1] if batch.images.is_cpu else batch.images)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode within the block, and every module of them back as it was: some may
    be frozen while the others train.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.inference_mode()
def evaluate(
    models: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    device: torch.device,
    num_classes: int,
) -> Evaluation:
    """Evaluate all models on the same batches, in float32 and eval mode.

    Args:
        models: name -> model returning logits (B, K); the logits of "fused" are compared with those
            of "ema" or, where there is none, of the first.
        batches: images (B, C, H, W), labels (B,), ... of this rank.
        device: where the models are.
        num_classes: K.
    """
    tallies = {name: _Tally(num_classes, device) for name in models}
    largest, first = torch.zeros((), device=device), next(iter(models))
    # Branch by branch beside the fused weights: one fold against another would prove nothing.
    together = nn.ModuleList(models.values())
    branches = using_forward(together, "branches") if "fused" in models else nullcontext()
    with evaluating(*models.values()), branches:
        for batch in batches:
            images, labels = batch[:2]
            logits = {name: model(images).float() for name, model in models.items()}
            for name, logits_BK in logits.items():
                count_as_wrong(logits_BK, labels, getattr(batch, "broken", ()))  # pairs will do
                tallies[name].add(logits_BK, labels)
            if "fused" in logits:
                apart = logits["ema" if "ema" in logits else first] - logits["fused"]
                largest = torch.maximum(largest, apart.abs().max())
    counts = {name: tally.counts() for name, tally in tallies.items()}
    distributed.all_max(largest)
    table = {name: row_of(each) for name, each in counts.items()}
    return Evaluation(table, largest.item(), counts)


def count_as_wrong(logits: Tensor, labels: Tensor, broken: Sequence[Broken]) -> None:
    """Let the logits (B, K) of images that could not be read know nothing but what is wrong: the
    label (labels: (B,)) is the least likely class, by a hair.
    """
    for each in broken:
        logits[each.position] = 0
        logits[each.position, labels[each.position]] = -1e-3


class _Tally:
    """Counts of one model, on the device: no batch waits for them."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        K = num_classes
        self.K, self.pairs = K, K * K if K <= MOST_CONFUSED else 0
        self.sizes = (K, K, K, 2, BINS, BINS, BINS, self.pairs)
        self.all = torch.zeros(sum(self.sizes), dtype=torch.int64, device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits (B, K), labels (B,)."""
        images, predicted, hits, sums, *bins, pairs = self.all.split(self.sizes)
        before = classes_before(logits, labels)
        hit = before < 1
        best = torch.where(hit, labels, logits.argmax(dim=1))
        log_p = logits.double().log_softmax(dim=1)
        loss = -log_p.gather(1, labels[:, None])[:, 0]
        confidence = log_p.amax(dim=1).exp().nan_to_num(0)
        units = (confidence * UNIT).round().long()
        which = (units * BINS // UNIT).clamp(max=BINS - 1)
        one = torch.ones_like(labels)
        images.index_add_(0, labels, one)
        predicted.index_add_(0, best, one)
        hits.index_add_(0, labels, hit.long())
        sums[0] += (before < 5).sum()
        sums[1] += (loss.nan_to_num(0, 0, 0).clamp(max=2**20) * UNIT).round().long().sum()
        for total, values in zip(bins, (one, hit.long(), units), strict=True):
            total.index_add_(0, which, values)
        if self.pairs:
            pairs.index_add_(0, labels * self.K + best, one)

    def counts(self) -> Counts:
        """Return the counts of all ranks."""
        whole = distributed.all_sum(self.all).cpu()
        images, predicted, hits, sums, *bins, pairs = (x.numpy() for x in whole.split(self.sizes))
        top5, loss = sums.tolist()
        confusion = pairs.reshape(self.K, self.K) if self.pairs else None
        return Counts(images, predicted, hits, top5, loss, np.stack(bins), confusion)


def classes_before(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how many classes (B,) stand before the label of each image, the best first.

    Of equal logits the class of the lower number is first, as `argmax` has it; `topk` would leave
    the order open. Where a label's logit or another one is NaN, that class is before the label.

    Args:
        logits: (B, K).
        labels: (B,) int64.
    """
    own_logits = logits.gather(1, labels[:, None])
    lower = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    # Not `logits > own`: every comparison with a NaN is false, and no NaN may count as a hit.
    before = ~(logits <= own_logits) | ((logits == own_logits) & lower)
    return before.sum(dim=1)

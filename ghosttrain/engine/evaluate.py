"""Exact top-1 and top-5 of several models over one pass of the held-out images.

Legend: B batch, K classes. Every image is counted once, whatever the number of ranks: ranks may
hold different numbers of images, and counts are added as integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ghosttrain.config.schema import Config
from ghosttrain.data.datasets import Dataset
from ghosttrain.data.loader import Batch, eval_loader
from ghosttrain.data.order import eval_batches, eval_indices
from ghosttrain.engine import distributed
from ghosttrain.models.reparam import using_forward

Table = dict[str, dict[str, float]]
"""Name of a model -> "top1" and "top5" in per cent, "n" images."""


class HeldOutImages:
    """The batches of the held-out set that belong to this rank, as often as they are iterated over.

    Every image is on exactly one rank. The worker processes end with the block or with `close`.
    """

    def __init__(self, dataset: Dataset, config: Config, device: torch.device, batch: int) -> None:
        """`batch`: images per forward pass and rank."""
        self.indices = eval_indices(len(dataset), distributed.rank(), distributed.world_size())
        self.batch = batch
        self.loader = eval_loader(dataset, config.data, device, config.train.channels_last)

    def __iter__(self) -> Iterator[Batch]:
        return self.loader.batches(eval_batches(self.indices, self.batch))

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
    """Show `model` this rank's first batch of the held-out set, and forget its output: what cannot
    be read or does not fit is said before an epoch was trained.

    Raises:
        UserError: an image is broken.
    """
    training = model.training
    model.eval()
    for batch in held_images.first_batch():
        model(batch.images)
    model.train(training)


@torch.inference_mode()
def evaluate(
    models: Mapping[str, nn.Module], batches: Iterable[Batch], device: torch.device
) -> tuple[Table, float]:
    """Evaluate all models on the same batches, in float32 and eval mode.

    Args:
        models: name -> model returning logits (B, K); with "ema" and "fused" their logits are
            compared.
        batches: images (B, C, H, W), labels (B,), ... of this rank.
        device: where the models are.

    Returns:
        name -> {"top1": per cent, "top5": per cent, "n": images}, and the largest absolute
        difference between a logit of "ema" and of "fused" (0 when either is missing).
    """
    modes = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    counts = torch.zeros(len(models), 3, dtype=torch.int64, device=device)
    largest = torch.zeros((), device=device)
    # Branch by branch beside the fused weights: one fold against another would prove nothing.
    together = nn.ModuleList(models.values())
    with using_forward(together, "branches") if "fused" in models else nullcontext():
        for images, labels, *_ in batches:
            logits = {name: model(images).float() for name, model in models.items()}
            for row, logits_BK in zip(counts, logits.values(), strict=True):
                better = classes_before(logits_BK, labels)
                row[0] += (better < 1).sum()
                row[1] += (better < 5).sum()
                row[2] += len(labels)
            if "ema" in logits and "fused" in logits:
                largest = torch.maximum(largest, (logits["ema"] - logits["fused"]).abs().max())
    for name, model in models.items():
        model.train(modes[name])
    distributed.all_sum(counts)
    distributed.all_max(largest)
    table = {}
    for name, (first, five, n) in zip(models, counts.tolist(), strict=True):
        table[name] = {"top1": 100 * first / max(n, 1), "top5": 100 * five / max(n, 1), "n": n}
    return table, largest.item()


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

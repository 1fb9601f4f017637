"""Whether an exported file answers as the network it was made of, and where it begins not to."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ghosttrain.deploy.formats import Format, Runner
from ghosttrain.deploy.network import Tapped, layers_in_order

BOUND = {"fp32": 1e-4, "fp16": 2e-2}
"""Precision -> largest difference of an output that is let through, as a share of the largest
output. Of INT8 the accuracy decides."""


@dataclass(frozen=True)
class Comparison:
    """An exported file and its network on the same images."""

    images: int
    largest: float
    """Difference of an output."""
    mean: float
    scale: float
    """Largest absolute output of the network."""
    agreement: float
    """Per cent of the images to which both give the same class first."""
    clear: int
    """Images whose first class leads by more than the bound."""
    clear_agreement: float
    """Agreement on these, in per cent."""
    top1: float
    """Of the network, in per cent."""
    top1_exported: float
    """Of the file, in per cent."""

    def passes(self, bound: float) -> bool:
        """Whether the differences stay within `bound`, a share of the largest output."""
        return self.largest <= bound * self.scale and self.clear_agreement == 100

    def record(self) -> dict[str, float]:
        """Return it as plain values."""
        return asdict(self)

    def words(self, answer: str) -> str:
        """Return it as a sentence; `answer` is what the outputs are."""
        return (
            f"{self.images:,} images: top-1 {self.top1_exported:.2f} % (PyTorch "
            f"{self.top1:.2f} %), same class for {self.agreement:.2f} %, largest difference of "
            f"{answer} {self.largest:.1e} (mean {self.mean:.1e}; the largest is {self.scale:.3g})"
        )

    def allowed(self, bound: float) -> str:
        """Return in words what passes within `bound`."""
        return f"{bound:.0e} of the largest is allowed"


def compare(
    network: nn.Module,
    runner: Runner,
    batches: Iterable[tuple[Tensor, Tensor]],
    fixed_batch: int | None,
    bound: float = 0.0,
) -> Comparison:
    """Show the same images to a network and to what runs its file.

    Args:
        network: inputs (B, ...) -> outputs (B, K).
        runner: of the file.
        batches: inputs and labels (B,).
        fixed_batch: images that the file takes at once; None: any number.
        bound: as for `Comparison.passes`.
    """
    pairs, labels = [], []
    with torch.inference_mode():
        for inputs, targets in batches:
            outputs = run_in_batches(runner, inputs.numpy(), fixed_batch)[-1]
            pairs.append((network(inputs).float().numpy(), outputs.astype(np.float32)))
            labels.append(targets.numpy())
    ours, theirs = (np.concatenate(each).astype(np.float64) for each in zip(*pairs, strict=True))
    right = np.concatenate(labels)
    apart = np.abs(ours - theirs)
    apart[~np.isfinite(apart)] = np.inf
    scale = float(np.abs(ours).max())
    same = ours.argmax(1) == theirs.argmax(1)
    two_best = np.partition(ours, -2, axis=1)[:, -2:]
    clear = two_best[:, 1] - two_best[:, 0] > bound * scale
    return Comparison(
        images=len(right),
        largest=float(apart.max()),
        mean=float(apart.mean()),
        scale=scale,
        agreement=100 * float(same.mean()),
        clear=int(clear.sum()),
        clear_agreement=100 * float(same[clear].mean()) if clear.any() else 100.0,
        top1=100 * float((ours.argmax(1) == right).mean()),
        top1_exported=100 * float((theirs.argmax(1) == right).mean()),
    )


def run_in_batches(runner: Runner, inputs: np.ndarray, batch: int | None) -> list[np.ndarray]:
    """Return the outputs of a file for any number of inputs, `batch` at once: the last ones are
    filled up with copies, whose outputs are dropped.
    """
    inputs = np.ascontiguousarray(inputs)
    if batch is None:
        return runner(inputs)
    found = [runner(part) for part in _filled(inputs, batch)]
    return [np.concatenate(each)[: len(inputs)] for each in zip(*found, strict=True)]


def _filled(inputs: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    for start in range(0, len(inputs), batch):
        part = inputs[start : start + batch]
        short = batch - len(part)
        yield part if not short else np.concatenate([part, np.repeat(part[-1:], short, axis=0)])


def first_difference(
    network: nn.Module, made: Format, inputs: Tensor, bound: float
) -> tuple[str, float] | None:
    """Return the first layer whose output differs by more than `bound`, a share of its largest
    value, and by what share; None where every layer is within it.

    The network is converted once more with the outputs of all its layers as outputs.
    """
    names = layers_in_order(network, inputs)
    tapped = Tapped(network, names).eval()
    with tempfile.TemporaryDirectory(prefix="ghosttrain-") as folder:
        path = Path(folder) / f"layers{made.suffix}"
        made.convert(tapped, inputs, path, "fp32", False)
        theirs = made.load(path, 1)(inputs.numpy())
    with torch.inference_mode():
        ours = tapped(inputs)
    for name, mine, other in zip(names, ours, theirs, strict=False):
        share = np.abs(mine.numpy() - other).max() / max(float(mine.abs().max()), 1e-12)
        if not share <= bound:  # NaN too
            return name, float(share)
    return None

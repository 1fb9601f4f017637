"""What INT8 does to a network layer by layer: each one alone, rounded as integers would be.

Rounding is simulated in PyTorch: weights symmetric, per output channel; the layer's input affine,
by the range seen on calibration images. So the order of the layers is the same for every format.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ghosttrain.models.int8 import round_inputs, round_weights

Layer = nn.Conv2d | nn.Linear


@dataclass(frozen=True)
class Sensitivity:
    """Of one convolution or linear layer."""

    layer: str
    macs: int
    """Of one image."""
    error: float
    """Squared change of the outputs when this layer alone is INT8, as a share of their squares."""


@torch.inference_mode()
def sensitivities(network: nn.Module, batches: Sequence[Tensor]) -> list[Sensitivity]:
    """Return how much each layer changes the outputs of a network in INT8, the most sensitive
    first.

    Args:
        network: in eval mode; inputs (B, ...) -> outputs (B, K). It is left as it was.
        batches: calibration inputs.
    """
    layers = {name: m for name, m in network.named_modules() if isinstance(m, Layer)}
    ranges, macs, expected = _observed(network, layers, batches)
    total = float(sum((y.double() ** 2).sum() for y in expected))
    found = []
    for name, layer in layers.items():
        if name not in ranges:  # it never ran
            continue
        error = 0.0
        with _rounded(layer, *ranges[name]):
            for x, y in zip(batches, expected, strict=True):
                error += float(((network(x) - y).double() ** 2).sum())
        found.append(Sensitivity(name, macs[name], error / max(total, 1e-30)))
    return sorted(found, key=lambda each: -each.error)


def _observed(
    network: nn.Module, layers: dict[str, Layer], batches: Sequence[Tensor]
) -> tuple[dict[str, tuple[float, float]], dict[str, int], list[Tensor]]:
    """Return by layer the range of its input and its MACs, and the outputs of the network."""
    ranges: dict[str, tuple[float, float]] = {}
    macs: dict[str, int] = {}

    def watch(name: str, layer: Layer):  # type: ignore[no-untyped-def]
        def saw(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            low, high = ranges.get(name, (0.0, 0.0))
            x = inputs[0]
            ranges[name] = min(low, float(x.min())), max(high, float(x.max()))
            macs[name] = output[0].numel() * layer.weight[0].numel()

        return layer.register_forward_hook(saw)

    handles = [watch(name, layer) for name, layer in layers.items()]
    try:
        outputs = [network(x) for x in batches]
    finally:
        for handle in handles:
            handle.remove()
    return ranges, macs, outputs


@contextmanager
def _rounded(layer: Layer, low: float, high: float) -> Iterator[None]:
    """Round the weights and the input of a layer to 8 bits within the block."""

    def enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (round_inputs(inputs[0], torch.tensor(low), torch.tensor(high)), *inputs[1:])

    weight = layer.weight.data
    handle = layer.register_forward_pre_hook(enter)
    layer.weight.data = round_weights(weight)
    try:
        yield
    finally:
        handle.remove()
        layer.weight.data = weight


def int8_share(found: Sequence[Sensitivity], kept: Sequence[str]) -> float:
    """Return the share of the MACs that are INT8 where the layers `kept` are not, in per cent."""
    total = sum(each.macs for each in found)
    return 100 * sum(each.macs for each in found if each.layer not in kept) / total

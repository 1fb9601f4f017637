"""Training a network as its INT8 file will compute: weights and inputs of its layers are rounded.

Every convolution and linear layer of a fused network rounds its weights (symmetric, per output
channel) and its input (affine, by one range) to 8 bits in the forward pass; the gradient passes
through the rounding as if it were not there, and is 0 where a value lies outside of the range
(Jacob et al., 2018, https://arxiv.org/abs/1712.05877, section 3). The rounding itself is PyTorch's
`fake_quantize`. The weights stay float32: the file is made from them as after any training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MOMENTUM = 0.01
"""Weight of a batch in the range of a layer's input; the first batch counts whole."""


class _RoundedInput(nn.Module):
    """What both layers have: the range of the input, averaged over the batches of training."""

    low: Tensor
    high: Tensor
    weight_bits: int

    def round_input(self, x: Tensor) -> Tensor:
        """Return x as UINT8 of the range holds it; in training x widens the range first."""
        if self.training:
            self._see(x.detach().float())
        return round_inputs(x, self.low, self.high)

    def _see(self, x: Tensor) -> None:
        low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
        weight = torch.where(self.high > self.low, MOMENTUM, 1.0)
        self.low.lerp_(low, weight)
        self.high.lerp_(high, weight)


class Int8Conv2d(nn.Conv2d, _RoundedInput):
    """A convolution that rounds: images (B, C, H, W) -> (B, C_out, H', W')."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve the rounded x by the rounded weights."""
        weight = round_weights(self.weight, self.weight_bits)
        return self._conv_forward(self.round_input(x), weight, self.bias)


class Int8Linear(nn.Linear, _RoundedInput):
    """A linear layer that rounds: (B, C) -> (B, C_out)."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the rounded x by the rounded weights."""
        weight = round_weights(self.weight, self.weight_bits)
        return F.linear(self.round_input(x), weight, self.bias)


ROUNDING: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: Int8Conv2d, nn.Linear: Int8Linear}


def round_layers(network: nn.Module, weight_bits: int) -> nn.Module:
    """Let the convolutions and linear layers of a fused network round, in place; return it.

    `weight_bits`: 8, or 7 for processors without VNNI. The weights keep their names; the ranges of
    the inputs (`low`, `high`) start empty and are saved with them.
    """
    for module in network.modules():
        if type(module) in ROUNDING:
            module.__class__ = ROUNDING[type(module)]
            module.weight_bits = weight_bits  # type: ignore[assignment]
            for name in ("low", "high"):
                device = next(module.parameters()).device
                module.register_buffer(name, torch.zeros((), device=device))
    return network


def in_float(module: nn.Module) -> nn.Module:
    """Turn a layer that rounds into the ordinary one of the same weights, in place; return it. Any
    other module is left as it is.
    """
    ordinary: Any = {rounding: plain for plain, rounding in ROUNDING.items()}
    if type(module) in ordinary:
        module.__class__ = ordinary[type(module)]
        for name in ("low", "high", "weight_bits"):
            delattr(module, name)
    return module


def round_weights(weight: Tensor, bits: int = 8) -> Tensor:
    """Return weights (C_out, ...) as symmetric integers of so many bits hold them, each output
    channel with its own step.
    """
    largest = 2 ** (bits - 1) - 1
    step = weight.detach().float().flatten(1).abs().amax(1).clamp(min=1e-12) / largest
    zeros = torch.zeros_like(step, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight.float(), step, zeros, 0, -largest, largest)


def round_inputs(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return x as affine UINT8 of the range from low to high, 0 included, holds it."""
    step = (high - low).clamp(min=1e-12) / 255
    zero = (-low / step).round().int()
    return torch.fake_quantize_per_tensor_affine(x.float(), step, zero, 0, 255)

"""What students are built from: conv-BN, squeeze-excite, channel rounding, the frame of a student.

Owns what is plain. Convolutions with several training branches, and everything that folds a batch
norm into a convolution, are in `reparam.py`.

Shapes: B batch, C channels, H W map, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ghosttrain.config.errors import UserError


def make_divisible(value: float, divisor: int = 4) -> int:
    """Round a number of channels to the nearest multiple of `divisor`, but never down by over 10 %.

    The rule of the MobileNet and GhostNet code (https://arxiv.org/abs/1911.11907, divisor 4).
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * value else rounded + divisor


class ConvBN(nn.Module):
    """Convolution without bias, then batch norm: (B, C_in, H, W) -> (B, C_out, H', W').

    Padding is k // 2 on each side: stride 1 keeps the map, stride 2 leaves half of it, rounded up.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 1,
        stride: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        padding = (kernel[0] // 2, kernel[1] // 2)
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C_in, H, W) to (B, C_out, H', W')."""
        return self.bn(_convolve(self.conv, x))


def _convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Return conv(x); on a CPU, a pointwise one on an NHWC map as the matrix product that it is.

    That is faster than PyTorch's CPU convolution where maps are small, as these are. CUDA keeps
    cuDNN's convolution: its TF32 setting is not the one of matrix products.
    """
    pointwise = conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1
    if pointwise and x.is_cpu and x.is_contiguous(memory_format=torch.channels_last):
        return F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1)).permute(0, 3, 1, 2)
    return conv(x)


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from all channel means: (B, C, H, W) -> (B, C, H, W).

    https://arxiv.org/abs/1709.01507, with GhostNet's reduction to a quarter and hard sigmoid.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        reduced = make_divisible(channels / 4)
        self.reduce = nn.Linear(channels, reduced)
        self.expand = nn.Linear(reduced, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, C, H, W) times its gates (B, C)."""
        gate_BC = F.hardsigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3))))))
        return x * gate_BC[:, :, None, None]


class Student(nn.Module):
    """Frame of every student: what is known about it, and the check of its input.

    A subclass sets the attributes and defines `forward_features` and `forward_head`.
    """

    name: str
    num_classes: int
    in_chans: int
    num_features: int
    """Channels of the last map, the output of `forward_features`."""
    min_size: int
    """Least side of an image in pixels."""
    one_value_size: int
    """Largest side at which some batch norm sees a single position per image."""

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to the last map (B, num_features, H', W')."""
        raise NotImplementedError

    def forward_head(self, features: Tensor) -> Tensor:
        """Map the last map (B, num_features, H', W') to logits (B, K)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to logits (B, K); UserError if they cannot be taken."""
        self.check_input(x)
        return self.forward_head(self.forward_features(x))

    def check_input(self, x: Tensor) -> None:
        """Raise UserError where images x (B, C, H, W) have a shape this network cannot take."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise UserError(
                f"{self.name} takes images (B, {self.in_chans}, H, W), got {tuple(x.shape)}: "
                "create it with in_chans= the channels of the data (data.in_chans)."
            )
        B, _, H, W = x.shape
        if min(H, W) < self.min_size:
            raise UserError(
                f"{self.name} takes images of at least {self.min_size}x{self.min_size} pixels, got "
                f"{H}x{W}: set data.train_size and data.eval_size to {self.min_size} or more."
            )
        if self.training and B == 1 and max(H, W) <= self.one_value_size:
            # Not so in the fused form, with frozen statistics, or shared ones (SyncBatchNorm).
            if any(isinstance(m, nn.BatchNorm2d) and m.training for m in self.modules()):
                raise UserError(
                    f"{self.name} cannot train on a batch of 1 at {H}x{W}: a batch norm would see "
                    "a single value. Use a batch of 2 or more (train.micro_batch) or images larger "
                    f"than {self.one_value_size} pixels (data.train_size)."
                )

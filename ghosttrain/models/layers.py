"""What students are built from: conv-BN, squeeze-excite, channel rounding, the frame of a student.

Owns what is plain. Convolutions with several training branches, and everything that folds a batch
norm into a convolution, are in `reparam.py`.

Shapes: B batch, C channels, H W map, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ghosttrain.config.students import sides_of
from ghosttrain.errors import UserError
from ghosttrain.models.weights.files import WeightsInfo

CLASSIFIER_STD = 0.002
"""Of the weights that `start_small` draws. torchvision's 0.01 for MobileNetV2 is too large for
evaluation with two classes: the first loss was 1.2 ln 2 (measured here, mobilenetv2_140; 1.02 ln 2
with this one)."""


def make_divisible(value: float, divisor: int = 4) -> int:
    """Round a number of channels to the nearest multiple of `divisor`, but never down by over 10 %.

    The rule of the MobileNet and GhostNet code (https://arxiv.org/abs/1911.11907, divisor 4).
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * value else rounded + divisor


class BatchNorm(nn.BatchNorm2d):
    """Batch norm whose running statistics change once per step.

    PyTorch's updates them again when activation checkpointing repeats a forward.
    """

    synced = False
    """Whether the batch is that of all processes."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (B, C, H, W)."""
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None or not (self.training and repeats_a_forward()):
            return super().forward(x)
        copies = mean.clone(), var.clone()  # as many tensors as the first time
        return F.batch_norm(x, *copies, self.weight, self.bias, True, 0.0, self.eps)


def repeats_a_forward() -> bool:
    """Whether this forward runs within a backward: checkpointing computes maps for a second time.

    Not seen by torch.compile. (A first forward that a gradient hook starts looks the same.)
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


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
        self.bn = BatchNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C_in, H, W) to (B, C_out, H', W')."""
        conv = self.conv
        padding = int(conv.padding[0]), int(conv.padding[1])
        return self.bn(convolve(x, conv.weight, None, conv.stride[0], padding, conv.groups))


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int | tuple[int, int],
    groups: int,
) -> Tensor:
    """Return the convolution of x; on a CPU, a 1x1 one on an NHWC map as a matrix product.

    That is faster than PyTorch's CPU convolution where maps are small, as these are. CUDA keeps
    cuDNN's convolution: its TF32 setting is not the one of matrix products.
    """
    pointwise = weight.shape[2:] == (1, 1) and (stride, groups) == (1, 1)
    if pointwise and x.is_cpu and x.is_contiguous(memory_format=torch.channels_last):
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias, stride, padding, 1, groups)


def start_small(classifier: nn.Linear) -> None:
    """Give a classifier (F -> K) small random weights and no bias.

    The first logits then have a standard deviation of 0.1 or less, so that the first loss is ln K
    for any number of classes. Not 0, since LAMB moves a weight by a share of its norm.
    """
    nn.init.normal_(classifier.weight, std=CLASSIFIER_STD)
    nn.init.zeros_(classifier.bias)


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


def last_of_each_stride(layers: Sequence[tuple[str, int, int]]) -> list[dict[str, Any]]:
    """Return `Student.feature_info` of layers that follow one another.

    Args:
        layers: name of the module, channels of its map, and its own stride.
    """
    taps, reduction = {}, 1
    for module, channels, stride in layers:
        reduction *= stride
        taps[reduction] = {"num_chs": channels, "reduction": reduction, "module": module}
    return list(taps.values())


class Student(nn.Module):
    """Frame of every student: what is known about it, and the check of its input.

    A subclass sets `num_features`, `stages`, `classifier` and `feature_info`, and defines
    `forward_stem` and `forward_last`. The least sizes of images come from
    `ghosttrain/config/students.py`.
    """

    stages: nn.Sequential
    classifier: nn.Linear

    feature_info: list[dict[str, Any]]
    """Of the last layer of each stride, as timm's networks have it: channels of its map
    (`num_chs`), pixels of the image for one of the map (`reduction`), name of the `module`."""

    stem_end = "stem"
    """Name of the last module of the stem."""
    num_features: int
    """Channels of the last map, the output of `forward_features`."""
    weights_dialect: str | None = None
    """Dialect of the file of weights that was loaded (`weights/dialects`); None: random weights."""
    weights_note: str = ""
    """What that file did not hold, and how it starts instead."""
    weights_about: WeightsInfo | None = None
    """What is known of that file: classes, images."""

    def __init__(
        self, name: str, num_classes: int, in_chans: int, dropout: float, input_stride: str
    ) -> None:
        super().__init__()
        self.name, self.num_classes, self.in_chans = name, num_classes, in_chans
        self.dropout = nn.Dropout(dropout)
        self.min_size, self.one_value_size = sides_of(name, input_stride)

    def forward_stem(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to the map that the first stage takes."""
        raise NotImplementedError

    def forward_last(self, x: Tensor) -> Tensor:
        """Map the map of the last stage to the last map (B, num_features, H', W')."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to (B, num_features, H / 32, W / 32), rounded up.

        With `input_stride="small"` the map is 1/16 of the image.
        """
        return self.forward_last(self.stages(self.forward_stem(x)))

    def forward_maps(self, x: Tensor) -> list[Tensor]:
        """Map images (B, in_chans, H, W) to the maps that `feature_info` lists, after the
        activation where one follows the layer: (B, num_chs, H / reduction, W / reduction), rounded
        up.

        Raises:
            UserError: the images cannot be taken.
        """
        self.check_input(x)
        x = self.forward_stem(x)
        maps = {self.stem_end: x}
        for name, stage in self.stages.named_children():
            x = maps[f"stages.{name}"] = stage(x)
        maps["last"] = self.forward_last(x)
        return [maps[tap["module"]] for tap in self.feature_info]

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the last map (B, num_features, H', W') and classify it: logits (B, K).

        With `pre_logits`, what the classifier sees: pooled features (B, F), after dropout.
        """
        x = self.dropout(self.pool(features))
        return x if pre_logits else self.classifier(x)

    def pool(self, features: Tensor) -> Tensor:
        """Map the last map (B, num_features, H', W') to pooled features (B, F)."""
        return features.mean((2, 3))

    def get_classifier(self) -> nn.Linear:
        """Return the layer that makes logits of pooled features."""
        return self.classifier

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
            # Not so in the fused form, with frozen statistics, or those of all ranks together.
            if any(
                isinstance(m, BatchNorm) and m.training and not m.synced for m in self.modules()
            ):
                raise UserError(
                    f"{self.name} cannot train on a batch of 1 at {H}x{W}: a batch norm would see "
                    "a single value. Use a batch of 2 or more (train.micro_batch) or images larger "
                    f"than {self.one_value_size} pixels (data.train_size)."
                )

"""The network of the shipped digits teacher: timm's `test_resnet`, under the names of its weights.

Written out here because to import timm takes longer than the first step of the main job; the same
operators in the same order, so that its logits are timm's to the bit.

Source: https://github.com/huggingface/pytorch-image-models/blob/main/timm/models/resnet.py

Shapes: B batch, C channels, H W map, F = 96 pooled features, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

NAME = "test_resnet"
"""What timm calls it."""
BLOCKS = (
    (32, ((32, 3, 1), (32, 3, 1))),
    (32, ((48, 3, 2), (48, 3, 1))),
    (48, ((48, 1, 1), (48, 3, 2), (192, 1, 1))),
    (192, ((96, 3, 2), (96, 3, 1))),
)
"""Of every block its input channels, and of its convolutions (output channels, side, stride)."""


class DigitsTeacher(nn.Module):
    """Images (B, in_chans, H, W) -> logits (B, num_classes); four residual blocks."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            _conv(in_chans, 16, 3, 2),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            _conv(16, 16, 3, 1),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            _conv(16, 32, 3, 1),
        )
        self.bn1 = nn.BatchNorm2d(32)
        for number, (chans, convolutions) in enumerate(BLOCKS, 1):
            self.add_module(f"layer{number}", nn.Sequential(_Block(chans, convolutions)))
        self.fc = nn.Linear(BLOCKS[-1][1][-1][0], num_classes)

    def forward_features(self, images_BCHW: Tensor) -> Tensor:
        """Return the last map (B, F, H/32, W/32)."""
        x = F.relu_(self.bn1(self.conv1(images_BCHW)))
        x = F.max_pool2d(x, 3, 2, 1)
        for number in range(1, len(BLOCKS) + 1):
            x = self.get_submodule(f"layer{number}")(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits (B, K) of a map; its pooled features (B, F) with `pre_logits`."""
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return x if pre_logits else self.fc(x)

    def get_classifier(self) -> nn.Linear:
        """Return the layer that makes logits of pooled features."""
        return self.fc

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return the logits (B, K)."""
        return self.forward_head(self.forward_features(images_BCHW))


class _Block(nn.Module):
    """Convolutions with batch norm, and around them the input, where shapes differ halved by
    averages and projected.
    """

    def __init__(self, chans: int, convolutions: Sequence[tuple[int, int, int]]) -> None:
        super().__init__()
        first, self.count = chans, len(convolutions)
        for number, (out, side, stride) in enumerate(convolutions, 1):
            self.add_module(f"conv{number}", _conv(chans, out, side, stride))
            self.add_module(f"bn{number}", nn.BatchNorm2d(out))
            chans = out
        self.downsample = nn.Sequential()
        if first != chans:
            self.downsample = nn.Sequential(
                nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),
                _conv(first, chans, 1, 1),
                nn.BatchNorm2d(chans),
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(x)
        for number in range(1, self.count + 1):
            x = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(x))
            if number < self.count:
                x = F.relu_(x)
        return F.relu_(x + shortcut)


def _conv(chans: int, out: int, side: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(chans, out, side, stride, side // 2, bias=False)

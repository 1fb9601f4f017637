"""MobileNetV2 with re-parameterized convolutions.

Owns the structure: inverted residuals (https://arxiv.org/abs/1801.04381) that expand a thin map by
a 1x1 convolution, filter it by a depthwise one and project it back, without an activation on the
thin side. Channels are those of timm's `mobilenetv2_*` (https://github.com/huggingface/
pytorch-image-models); with one branch, no scale and no identity it is that network.

Convolutions are initialised as timm does it, after TensorFlow's code: normal with variance 2 / fan
out. timm's classifier, uniform within 1 / sqrt(K), starts with logits of standard deviation 6 where
K is small: here it starts small (`start_small`). Branches of a layer share its gain (`share_gain`).

Shapes: B batch, C channels, H W map, K classes.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ghosttrain.config.schema import ReparamConfig
from ghosttrain.models.layers import (
    ConvBN,
    Student,
    last_of_each_stride,
    make_divisible,
    start_small,
)
from ghosttrain.models.reparam import RepConv2d, make_stem, share_gain, stem_stride

# Expansion, output channels at width 1.0, blocks, stride of the first block.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM_CHANNELS, LAST_CHANNELS = 32, 1280
DIVISOR = 8  # of every number of channels


class InvertedResidual(nn.Module):
    """Expand, filter (reducing the map with stride 2), project, add the input where shapes allow.

    (B, C_in, H, W) -> (B, C_out, H / stride, W / stride), rounded up. `expansion` 1 does not
    expand.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        expansion: int,
        *,
        reparam: ReparamConfig,
    ) -> None:
        super().__init__()
        mid = in_channels * expansion
        self.expand = RepConv2d(in_channels, mid, 1, reparam=reparam) if expansion > 1 else None
        self.depthwise = RepConv2d(mid, mid, 3, stride, mid, reparam=reparam)
        self.project = RepConv2d(mid, out_channels, 1, reparam=reparam)
        self.has_shortcut = stride == 1 and in_channels == out_channels
        self.drop_path: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C_in, H, W) to (B, C_out, H / stride, W / stride)."""
        y = x if self.expand is None else F.relu6(self.expand(x), inplace=True)
        y = self.project(F.relu6(self.depthwise(y), inplace=True))
        if self.has_shortcut:
            y = self.drop_path(y)
            y += x
        return y


class MobileNetV2(Student):
    """MobileNetV2 of a given width: images (B, in_chans, H, W) -> logits (B, K)."""

    def __init__(
        self,
        name: str,
        width: float,
        num_classes: int,
        in_chans: int,
        reparam: ReparamConfig,
        dropout: float,
        input_stride: str,
    ) -> None:
        super().__init__(name, num_classes, in_chans, dropout, input_stride)
        # Narrow networks keep all of the last map's channels, as the paper does.
        self.num_features = make_divisible(LAST_CHANNELS * max(width, 1.0), DIVISOR)

        channels = make_divisible(STEM_CHANNELS * width, DIVISOR)
        self.stem = make_stem(in_chans, channels, input_stride, reparam)
        layers = [("stem", channels, stem_stride(input_stride))]
        stages: list[nn.Module] = []
        for expansion, out, depth, first_stride in STAGES:
            out_channels = make_divisible(out * width, DIVISOR)
            stage = nn.Sequential()
            for stride in (first_stride, *[1] * (depth - 1)):
                stage.append(
                    InvertedResidual(channels, out_channels, stride, expansion, reparam=reparam)
                )
                channels = out_channels
            layers.append((f"stages.{len(stages)}", channels, first_stride))
            stages.append(stage)
        self.stages = nn.Sequential(*stages)
        self.last = ConvBN(channels, self.num_features, 1)
        self.feature_info = last_of_each_stride([*layers, ("last", self.num_features, 1)])
        self.classifier = nn.Linear(self.num_features, num_classes)
        self.apply(_initialise)
        share_gain(self)
        start_small(self.classifier)

    def forward_stem(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to (B, C, H / 2, W / 2), rounded up."""
        return F.relu6(self.stem(x), inplace=True)

    def forward_last(self, x: Tensor) -> Tensor:
        """Map (B, C, H', W') to the last map (B, num_features, H', W')."""
        return F.relu6(self.last(x), inplace=True)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)

"""GhostNetV3: the network of GhostNetV2 with re-parameterized convolutions.

Owns the structure. GhostNet (https://arxiv.org/abs/1911.11907) makes half of each map by a 1x1
convolution and the other half from that by a cheap depthwise one; GhostNetV2
(https://arxiv.org/abs/2211.12905) gates the expanded map by long-range ("DFC") attention;
GhostNetV3 (https://arxiv.org/abs/2404.11202) trains the 1x1, the cheap and the stride-2 depthwise
convolutions with several branches. Stem, shortcuts and attention stay plain, as in the official
code (https://github.com/huawei-noah/Efficient-AI-Backbones). With one branch, no scale and no
identity it is GhostNetV2.

Every layer has PyTorch's own initialisation, as in timm and the official code.

Shapes: B batch, C channels, H W map, K classes.
"""

from __future__ import annotations

from torch import Tensor, cat, nn
from torch.nn import functional as F

from ghosttrain.config.schema import ReparamConfig
from ghosttrain.models.layers import (
    ConvBN,
    SqueezeExcite,
    Student,
    last_of_each_stride,
    make_divisible,
)
from ghosttrain.models.reparam import RepConv2d, make_stem, stem_stride

# One line per block, one tuple per stage: kernel of the depthwise convolutions, expanded and output
# channels at width 1.0, squeeze-excite, stride.
STAGES = (
    ((3, 16, 16, False, 1),),
    ((3, 48, 24, False, 2),),
    ((3, 72, 24, False, 1),),
    ((5, 72, 40, True, 2),),
    ((5, 120, 40, True, 1),),
    ((3, 240, 80, False, 2),),
    (
        (3, 200, 80, False, 1),
        (3, 184, 80, False, 1),
        (3, 184, 80, False, 1),
        (3, 480, 112, True, 1),
        (3, 672, 112, True, 1),
    ),
    ((5, 672, 160, True, 2),),
    (
        (5, 960, 160, False, 1),
        (5, 960, 160, True, 1),
        (5, 960, 160, False, 1),
        (5, 960, 160, True, 1),
    ),
)
STEM_CHANNELS, LAST_CHANNELS, HEAD_CHANNELS = 16, 960, 1280
PLAIN_BLOCKS = 2  # the first blocks have no attention: their maps are the largest


class DFCAttention(nn.Sequential):
    """Gate of each position from its row and column, at half the resolution (GhostNetV2)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            ConvBN(in_channels, out_channels, 1),
            ConvBN(out_channels, out_channels, (1, 5), groups=out_channels),
            ConvBN(out_channels, out_channels, (5, 1), groups=out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C_in, H, W) to gates in (0, 1), (B, C_out, H, W)."""
        gate = super().forward(F.avg_pool2d(x, 2)).sigmoid()
        return F.interpolate(gate, size=x.shape[-2:], mode="nearest")


class GhostModule(nn.Module):
    """Half of the output by a 1x1 convolution, the other half from it by a 3x3 depthwise one.

    (B, C_in, H, W) -> (B, C_out, H, W); C_out is even. `relu` follows each half; `attention` gates
    their union.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        reparam: ReparamConfig,
        relu: bool = False,
        attention: bool = False,
    ) -> None:
        super().__init__()
        half = out_channels // 2
        self.relu = relu
        self.primary = RepConv2d(in_channels, half, 1, reparam=reparam)
        self.cheap = RepConv2d(half, half, 3, groups=half, reparam=reparam)
        self.attention = DFCAttention(in_channels, out_channels) if attention else None

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C_in, H, W) to (B, C_out, H, W)."""
        primary = self.primary(x)
        if self.relu:
            primary = F.relu(primary, inplace=True)
        cheap = self.cheap(primary)
        if self.relu:
            cheap = F.relu(cheap, inplace=True)
        y = cat([primary, cheap], 1)
        return y if self.attention is None else y * self.attention(x)


class GhostBottleneck(nn.Module):
    """Expand, reduce the map (stride 2), squeeze-excite, project, add the shortcut.

    (B, C_in, H, W) -> (B, C_out, H / stride, W / stride).
    """

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        *,
        reparam: ReparamConfig,
        squeeze_excite: bool,
        attention: bool,
    ) -> None:
        super().__init__()
        self.ghost1 = GhostModule(
            in_channels, mid_channels, reparam=reparam, relu=True, attention=attention
        )
        self.depthwise = None
        if stride > 1:
            self.depthwise = RepConv2d(
                mid_channels, mid_channels, kernel_size, stride, mid_channels, reparam=reparam
            )
        self.se = SqueezeExcite(mid_channels) if squeeze_excite else None
        self.ghost2 = GhostModule(mid_channels, out_channels, reparam=reparam)
        self.drop_path: nn.Module = nn.Identity()
        self.shortcut = None
        if stride > 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                ConvBN(in_channels, in_channels, kernel_size, stride, in_channels),
                ConvBN(in_channels, out_channels, 1),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C_in, H, W) to (B, C_out, H / stride, W / stride)."""
        y = self.ghost1(x)
        if self.depthwise is not None:
            y = self.depthwise(y)
        if self.se is not None:
            y = self.se(y)
        y = self.drop_path(self.ghost2(y))
        y += x if self.shortcut is None else self.shortcut(x)
        return y


class GhostNet(Student):
    """GhostNetV3 of a given width: images (B, in_chans, H, W) -> logits (B, K)."""

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
        self.num_features = make_divisible(LAST_CHANNELS * width)

        channels = make_divisible(STEM_CHANNELS * width)
        self.stem = make_stem(in_chans, channels, input_stride, reparam)
        layers = [("stem", channels, stem_stride(input_stride))]
        stages: list[nn.Module] = []
        depth = 0
        for blocks in STAGES:
            stage = nn.Sequential()
            for kernel_size, mid, out, squeeze_excite, stride in blocks:
                out_channels = make_divisible(out * width)
                stage.append(
                    GhostBottleneck(
                        channels,
                        make_divisible(mid * width),
                        out_channels,
                        kernel_size,
                        stride,
                        reparam=reparam,
                        squeeze_excite=squeeze_excite,
                        attention=depth >= PLAIN_BLOCKS,
                    )
                )
                channels, depth = out_channels, depth + 1
            layers.append((f"stages.{len(stages)}", channels, blocks[0][-1]))
            stages.append(stage)
        self.stages = nn.Sequential(*stages)
        self.last = ConvBN(channels, self.num_features, 1)
        self.feature_info = last_of_each_stride([*layers, ("last", self.num_features, 1)])
        self.head = nn.Linear(self.num_features, HEAD_CHANNELS)
        self.classifier = nn.Linear(HEAD_CHANNELS, num_classes)

    def forward_stem(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to (B, C, H / 2, W / 2), rounded up."""
        return F.relu(self.stem(x), inplace=True)

    def forward_last(self, x: Tensor) -> Tensor:
        """Map (B, C, H', W') to the last map (B, num_features, H', W')."""
        return F.relu(self.last(x), inplace=True)

    def pool(self, features: Tensor) -> Tensor:
        """Map the last map (B, num_features, H', W') to pooled features (B, 1280)."""
        return F.relu(self.head(features.mean((2, 3))))

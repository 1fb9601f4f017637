"""ShuffleNetV2 with re-parameterized convolutions.

Owns the structure (https://arxiv.org/abs/1807.11164): a block works on one half of the channels,
passes the other half on and interleaves both, so that the next block works on a mixture; stride-2
blocks work on all channels twice. Channels and blocks are those of torchvision's `shufflenet_v2_x*`
(https://github.com/pytorch/vision); with one branch, no scale and no identity it is that network.

Convolutions have PyTorch's own initialisation, as in torchvision. Branches of a layer share its
gain (`share_gain`), and the classifier starts small (`start_small`).

Shapes: B batch, C channels, H W map, K classes.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ghosttrain.config.schema import ReparamConfig
from ghosttrain.models.layers import ConvBN, Student, last_of_each_stride, start_small
from ghosttrain.models.reparam import RepConv2d, make_stem, share_gain, stem_stride

DEPTHS = (4, 8, 4)  # blocks per stage; the first of each has stride 2
STEM_CHANNELS = 24


def interleave(left: Tensor, right: Tensor) -> Tensor:
    """Return the channels of two maps in turn: twice (B, C, H, W) -> (B, 2 C, H, W).

    This is concatenation and the paper's channel shuffle in one copy. A map in NHWC stays in NHWC:
    torch's own reshaping of the channels would silently return NCHW.
    """
    if right.is_contiguous(memory_format=torch.channels_last):
        return torch.stack((left.movedim(1, 3), right.movedim(1, 3)), 4).flatten(3).movedim(3, 1)
    return torch.stack((left, right), 2).flatten(1, 2)


class ShuffleBlock(nn.Module):
    """Work on one half of the channels (stride 1) or on all of them twice (stride 2), interleave.

    (B, C_in, H, W) -> (B, C_out, H / stride, W / stride), rounded up; C_out is even, and equal to
    C_in with stride 1.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, *, reparam: ReparamConfig
    ) -> None:
        super().__init__()
        half = out_channels // 2
        inputs = in_channels if stride > 1 else half
        self.left = None
        if stride > 1:
            self.left = nn.Sequential(
                OrderedDict(
                    depthwise=RepConv2d(inputs, inputs, 3, stride, inputs, reparam=reparam),
                    pointwise=RepConv2d(inputs, half, 1, reparam=reparam),
                    relu=nn.ReLU(inplace=True),
                )
            )
        self.right = nn.Sequential(
            OrderedDict(
                expand=RepConv2d(inputs, half, 1, reparam=reparam),
                relu=nn.ReLU(inplace=True),
                depthwise=RepConv2d(half, half, 3, stride, half, reparam=reparam),
                project=RepConv2d(half, half, 1, reparam=reparam),
                last_relu=nn.ReLU(inplace=True),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C_in, H, W) to (B, C_out, H / stride, W / stride)."""
        if self.left is not None:
            return interleave(self.left(x), self.right(x))
        left, right = x.chunk(2, 1)
        # A dense copy, in the format of x: every branch would make its own of a part of a map.
        return interleave(left, self.right(right.clone()))


class ShuffleNetV2(Student):
    """ShuffleNetV2: images (B, in_chans, H, W) -> logits (B, K).

    `channels` are those of the three stages and of the last map.
    """

    stem_end = "stem_pool"

    def __init__(
        self,
        name: str,
        channels: tuple[int, int, int, int],
        num_classes: int,
        in_chans: int,
        reparam: ReparamConfig,
        dropout: float,
        input_stride: str,
    ) -> None:
        super().__init__(name, num_classes, in_chans, dropout, input_stride)
        *widths, self.num_features = channels

        self.stem = make_stem(in_chans, STEM_CHANNELS, input_stride, reparam)
        self.stem_pool = nn.MaxPool2d(3, stride=2, padding=1)
        layers = [("stem_pool", STEM_CHANNELS, 2 * stem_stride(input_stride))]
        stages: list[nn.Module] = []
        inputs = STEM_CHANNELS
        for depth, outputs in zip(DEPTHS, widths, strict=True):
            stage = nn.Sequential(ShuffleBlock(inputs, outputs, 2, reparam=reparam))
            for _ in range(depth - 1):
                stage.append(ShuffleBlock(outputs, outputs, 1, reparam=reparam))
            layers.append((f"stages.{len(stages)}", outputs, 2))
            stages.append(stage)
            inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.last = ConvBN(inputs, self.num_features, 1)
        self.feature_info = last_of_each_stride([*layers, ("last", self.num_features, 1)])
        self.classifier = nn.Linear(self.num_features, num_classes)
        share_gain(self)
        start_small(self.classifier)

    def forward_stem(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to (B, C, H / 4, W / 4), rounded up."""
        x = F.relu(self.stem(x), inplace=True)
        return self.stem_pool(x)

    def forward_last(self, x: Tensor) -> Tensor:
        """Map (B, C, H', W') to the last map (B, num_features, H', W')."""
        return F.relu(self.last(x), inplace=True)

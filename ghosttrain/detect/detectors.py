"""SSDLite and RetinaNet of torchvision, on any backbone.

Heads, anchors, matching, losses and non-maximum suppression are torchvision's
(`torchvision.models.detection`), with the values of its own SSDLite and RetinaNet where nothing
else is said; what stands here connects them to a backbone. Images come from the loader with their
final size and normalisation, so torchvision's own resizing is left out (`AsTheyAre`).

A detector in training mode maps (images, targets) to its losses by name, in evaluation images to a
dictionary for each: `boxes` (D, 4), `scores` (D,), `labels` (D,). Label 0 is the background, class
k of the data is label k + 1, as in torchvision.

Shapes: B batch, C channels, S side of the square, D detections, K classes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead, _extra_block, _normal_init
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

from ghosttrain.detect.backbones import Backbone, build_backbone

Target = dict[str, Tensor]
"""`boxes` (M, 4): left, top, right, bottom in pixels of the image that the detector sees;
`labels` (M,) int64, from 1."""

SSDLITE_REDUCTIONS = (16, 32)
EXTRA_CHANNELS = (512, 256, 256, 128)
"""Of the maps that SSDLite makes of the last one, each half as large as the one before."""
PYRAMID = (8, 16, 32)
"""Strides of the backbone's maps in RetinaNet's pyramid; P6 and P7 follow."""
BACKBONE_PATH = "backbone.backbone.network"
"""Where the classification network stands in a detector: its `backbone_path`, what
`models/depth.py` tells it from the rest by."""
ANCHOR = 4
"""Side of RetinaNet's smallest anchor of a map, in strides of it
(https://arxiv.org/abs/1708.02002)."""


class AsTheyAre(nn.Module):
    """In the place of torchvision's `GeneralizedRCNNTransform`: the images of a batch have their
    size and normalisation already, and boxes are wanted in their pixels.
    """

    def forward(
        self, images: Tensor, targets: Sequence[Target] | None = None
    ) -> tuple[ImageList, Sequence[Target] | None]:
        """Return images (B, C, S, S) as the detectors of torchvision keep them, and `targets`."""
        B, _, H, W = images.shape
        return ImageList(images, [(H, W)] * B), targets

    def postprocess(self, detections: Any, *sizes: Any) -> Any:
        """Return the detections as they are."""
        return detections


class SSDLiteMaps(nn.Module):
    """The maps of a backbone at strides 16 and 32, and four that are made of the last one."""

    def __init__(self, backbone: Backbone, norm_layer: Any) -> None:
        super().__init__()
        self.backbone = backbone
        inputs = (backbone.channels[-1], *EXTRA_CHANNELS[:-1])
        self.extra = nn.ModuleList(
            _extra_block(before, after, norm_layer)
            for before, after in zip(inputs, EXTRA_CHANNELS, strict=True)
        )
        _normal_init(self.extra)
        self.channels = [*backbone.channels, *EXTRA_CHANNELS]

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Map images (B, C, S, S) to six maps, the largest first."""
        maps = self.backbone(images)
        for block in self.extra:
            maps.append(block(maps[-1]))
        return OrderedDict((str(i), x) for i, x in enumerate(maps))


class PyramidMaps(nn.Module):
    """A feature pyramid (https://arxiv.org/abs/1612.03144) on the maps of a backbone, with P6 and
    P7.
    """

    def __init__(self, backbone: Backbone, channels: int) -> None:
        super().__init__()
        self.backbone, self.out_channels = backbone, channels
        self.fpn = FeaturePyramidNetwork(
            list(backbone.channels), channels, extra_blocks=LastLevelP6P7(channels, channels)
        )

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Map images (B, C, S, S) to maps of `out_channels`, the largest first."""
        maps = self.backbone(images)
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(maps)))


def ssdlite(backbone: Backbone, num_classes: int, size: int) -> SSD:
    """Return SSDLite (https://arxiv.org/abs/1801.04381) with the values of torchvision's
    `ssdlite320_mobilenet_v3_large`.

    Args:
        backbone: gives maps of `SSDLITE_REDUCTIONS`.
        num_classes: K, without the background.
        size: S, side of the images in pixels.
    """
    norm_layer = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)
    maps = SSDLiteMaps(backbone, norm_layer)
    anchors = DefaultBoxGenerator([[2, 3] for _ in maps.channels], min_ratio=0.2, max_ratio=0.95)
    head = SSDLiteHead(
        maps.channels, anchors.num_anchors_per_location(), num_classes + 1, norm_layer
    )
    detector = SSD(
        maps, anchors, (size, size), num_classes + 1, head=head,
        score_thresh=0.001, nms_thresh=0.55, detections_per_img=300, topk_candidates=300,
    )  # fmt: skip
    return _connected(detector)


def retinanet(backbone: Backbone, num_classes: int, channels: int = 256) -> RetinaNet:
    """Return RetinaNet (https://arxiv.org/abs/1708.02002) with the values of torchvision's, on a
    pyramid of `channels`.

    Args:
        backbone: its strides are the pyramid's.
        num_classes: K, without the background.
        channels: of every map of the pyramid and of the head.
    """
    strides = [*backbone.reductions, *(backbone.reductions[-1] * 2**k for k in (1, 2))]
    sides = (ANCHOR * stride for stride in strides)
    sizes = tuple((a, int(a * 2 ** (1 / 3)), int(a * 2 ** (2 / 3))) for a in sides)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    maps = PyramidMaps(backbone, channels)
    head = RetinaNetHead(channels, anchors.num_anchors_per_location()[0], num_classes + 1)
    detector = RetinaNet(maps, num_classes + 1, anchor_generator=anchors, head=head)
    return _connected(detector)


def _connected(detector: Any) -> Any:
    """Return a detector that takes images as they are, whose losses are computed in float32, and
    that says where its backbone stands.
    """
    detector.transform = AsTheyAre()
    detector.head.register_forward_hook(_in_float32)
    detector.backbone_path = BACKBONE_PATH
    return detector


def _in_float32(_: nn.Module, __: Any, output: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under autocast a focal loss in bfloat16 would take 1 - p in steps of .004."""
    return {name: values.float() for name, values in output.items()}


def create_detector(
    name: str, network: nn.Module, model: str, num_classes: int, size: int, channels: int = 256
) -> nn.Module:
    """Return a detector, freshly initialised, on a network that has its weights.

    Args:
        name: `ssdlite` or `retinanet`.
        network: what becomes the backbone.
        model: what the user calls it.
        num_classes: K, without the background.
        size: S, side of the images in pixels.
        channels: of RetinaNet's pyramid.

    Raises:
        UserError: the network does not give the maps.
    """
    if name == "ssdlite":
        return ssdlite(build_backbone(network, SSDLITE_REDUCTIONS, model), num_classes, size)
    return retinanet(build_backbone(network, PYRAMID, model), num_classes, channels)


def targets_of(boxes_BM5: Tensor) -> list[Target]:
    """Return a batch's boxes as torchvision takes them.

    Args:
        boxes_BM5: left, top, right, bottom and class (from 0) of every box; class -1 fills up.
    """
    return [
        {"boxes": rows[:, :4], "labels": rows[:, 4].long() + 1}
        for rows in (each[each[:, 4] >= 0] for each in boxes_BM5)
    ]


def head_outputs(detector: Any) -> tuple[dict[str, Tensor], Any]:
    """Return a dictionary that is filled with what the head says of every batch, before anything is
    chosen of it, and the handle whose `remove()` ends that.
    """
    kept: dict[str, Tensor] = {}

    def keep(_: nn.Module, __: Any, output: Mapping[str, Tensor]) -> None:
        kept.update(output)

    return kept, detector.head.register_forward_hook(keep)

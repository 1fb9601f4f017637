"""Classification networks as backbones: images -> the map of the last layer of each stride.

Students, timm's networks and torchvision's say which layers these are (`feature_info`; for
torchvision `TORCHVISION`, a table). What follows the last map is taken off: nothing of it would
learn.

Shapes: B batch, C channels, H W map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ghosttrain.errors import UserError, did_you_mean
from ghosttrain.models.layers import Student

TORCHVISION = {
    "mobilenet_v2": {4: "features.3", 8: "features.6", 16: "features.14.conv.0", 32: "features.18"},
    "mobilenet_v3_large": {
        4: "features.3", 8: "features.6", 16: "features.13.block.0", 32: "features.16",
    },
    "mobilenet_v3_small": {
        4: "features.1", 8: "features.3", 16: "features.9.block.0", 32: "features.12",
    },
    "resnet18": {4: "layer1", 8: "layer2", 16: "layer3", 32: "layer4"},
    "resnet50": {4: "layer1", 8: "layer2", 16: "layer3", 32: "layer4"},
}  # fmt: skip
"""Network of torchvision -> stride -> its last layer. That of stride 16 in a MobileNet is the
expansion of the block that halves the map, as in torchvision's own SSDLite."""


class Backbone(nn.Module):
    """Images (B, C, H, W) -> a map for each of `reductions`, of `channels`, the largest first."""

    def __init__(
        self, network: nn.Module, reductions: Sequence[int], channels: Sequence[int]
    ) -> None:
        super().__init__()
        self.network = network
        self.reductions, self.channels = tuple(reductions), tuple(channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images (B, C, H, W) to maps (B, channels[i], H / reductions[i], W / ...)."""
        raise NotImplementedError


class StudentBackbone(Backbone):
    """A student without its classifier."""

    def __init__(self, student: Student, reductions: Sequence[int]) -> None:
        taps = _taps(student.feature_info, reductions, student.name)
        super().__init__(student, reductions, [tap["num_chs"] for tap in taps])
        self.places = [student.feature_info.index(tap) for tap in taps]
        for name in ("head", "classifier"):  # the fully connected layers
            if hasattr(student, name):
                setattr(student, name, nn.Identity())

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps; UserError where the student cannot take images of this size."""
        student: Any = self.network
        maps = student.forward_maps(images)
        return [maps[place] for place in self.places]


class TimmBackbone(Backbone):
    """A network of timm that has intermediate maps, without what follows them."""

    def __init__(self, network: Any, reductions: Sequence[int], name: str) -> None:
        info = getattr(network, "feature_info", None)
        if not info or not hasattr(network, "forward_intermediates"):
            raise UserError(
                f"timm's {name} gives no maps of several strides: type model=timm "
                "model.name=mobilenetv3_large_100, or another convolutional network"
            )
        rows = [info[i] for i in range(len(info))]
        taps = _taps(rows, reductions, f"timm's {name}")
        super().__init__(network, reductions, [tap["num_chs"] for tap in taps])
        self.places = [rows.index(tap) for tap in taps]
        network.prune_intermediate_layers(self.places, prune_norm=True, prune_head=True)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps."""
        network: Any = self.network
        return network.forward_intermediates(images, indices=self.places, intermediates_only=True)


class TorchvisionBackbone(Backbone):
    """A network of torchvision, cut behind its last map."""

    def __init__(self, network: nn.Module, reductions: Sequence[int], name: str) -> None:
        from torchvision.models.feature_extraction import create_feature_extractor

        layers = {TORCHVISION[name][reduction]: str(reduction) for reduction in reductions}
        cut = create_feature_extractor(network, layers)
        with torch.no_grad():
            maps = cut.eval()(torch.zeros(1, 3, 64, 64))
        super().__init__(cut.train(), reductions, [m.shape[1] for m in maps.values()])

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps."""
        return list(self.network(images).values())


def create_torchvision_model(name: str, **options: Any) -> nn.Module:
    """Build a network of torchvision that `TORCHVISION` lists, randomly initialised.

    Raises:
        UserError: it lists no network of this name.
    """
    from torchvision.models import get_model

    if name not in TORCHVISION:
        raise UserError(
            f"model.name={name} is no backbone of torchvision that is known here."
            f"{did_you_mean(name, TORCHVISION)}"
        )
    return get_model(name, weights=None, **options)


def build_backbone(network: Any, reductions: Sequence[int], name: str) -> Backbone:
    """Return `network` as a backbone that gives maps of `reductions`.

    Args:
        network: a student, a network of timm, or one of `TORCHVISION`.
        reductions: pixels of the image for one of the map, rising.
        name: what the user calls the network.

    Raises:
        UserError: it has no maps of these reductions.
    """
    if isinstance(network, Student):
        return StudentBackbone(network, reductions)
    if name in TORCHVISION and not hasattr(network, "feature_info"):
        return TorchvisionBackbone(network, reductions, name)
    return TimmBackbone(network, reductions, name)


def _taps(
    info: Sequence[dict[str, Any]], reductions: Sequence[int], name: str
) -> list[dict[str, Any]]:
    """Return the last row of `feature_info` for each reduction."""
    found = {row["reduction"]: row for row in info}
    missing = [reduction for reduction in reductions if reduction not in found]
    if missing:
        raise UserError(
            f"{name} has maps of strides {', '.join(map(str, found))}, not of {missing[0]}: type "
            "model.input_stride=standard, or another model="
        )
    return [found[reduction] for reduction in reductions]

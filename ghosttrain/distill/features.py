"""Pooled features: what the classifier of a network sees, of teachers and students alike.

Owns how they are taken out of a network, by the methods that timm's networks and this project's
students share (`forward_features`, `forward_head`, `get_classifier`), and the projection of the
student's onto the teacher's. The loss of the two is in losses.py.

Shapes: B batch, C channels, H W map, K classes, F pooled features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def pool(network: Any, images_BCHW: Tensor) -> Tensor:
    """Return the pooled features (B, F) of a network for which `pooled_width` is not 0."""
    return network.forward_head(network.forward_features(images_BCHW), pre_logits=True)


def classify(network: Any, features_BF: Tensor) -> Tensor:
    """Return the logits (B, K) of pooled features."""
    return network.get_classifier()(features_BF)


@torch.no_grad()
def pooled_width(network: Any, in_chans: int, size: int) -> int:
    """Return F where the logits of a network are one linear layer of pooled features, else 0.

    Found out by asking it with an image (1, in_chans, size, size): networks share the names of the
    methods, but some have two heads, or a head that does more.
    """
    if not all(hasattr(network, name) for name in ("forward_features", "forward_head")):
        return 0
    layer = network.get_classifier()
    if not isinstance(layer, nn.Linear):
        return 0
    parameter = next(network.parameters())
    image = torch.rand(1, in_chans, size, size, generator=torch.Generator().manual_seed(0))
    image = image.to(parameter.device, parameter.dtype)
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    mode = network.training
    network.eval()
    expected, features = network(image), pool(network, image)
    hook.remove()
    network.train(mode)
    if len(seen) != 1 or features.shape != seen[0].shape or features.dim() != 2:
        return 0
    # Both: nothing between the features and the layer, and nothing after it.
    same = torch.equal(features, seen[0])
    close = torch.allclose(layer(features), expected, rtol=1e-4, atol=1e-5)
    return layer.in_features if same and close else 0


class StudentOutput(NamedTuple):
    """What the network that is trained says of a batch."""

    logits: Tensor
    """(B, K)"""
    features: Tensor | None = None
    """(B, F): its pooled features, projected onto the teacher's; None without a projection."""


class Network(nn.Module):
    """What is trained: a student and, where a loss compares features, a linear projection of its
    pooled features onto the teacher's.

    The projection is thrown away with the teacher: it is neither in the average nor in the deployed
    weights. In training the features have the dropout that the classifier sees.
    """

    def __init__(self, student: nn.Module, projection: nn.Linear | None = None) -> None:
        super().__init__()
        self.student = student
        self.projection = nn.Module() if projection is None else projection

    def forward(self, images_BCHW: Tensor) -> StudentOutput:
        """Return logits (B, K) and, with a projection, projected features (B, F)."""
        if not isinstance(self.projection, nn.Linear):
            return StudentOutput(self.student(images_BCHW))
        features_BF = pool(self.student, images_BCHW)
        return StudentOutput(classify(self.student, features_BF), self.projection(features_BF))

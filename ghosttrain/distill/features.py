"""Pooled features: what the classifier of a network sees, of teachers and students alike.

Owns how they are taken out of a network, by the methods that timm's networks and this project's
students share (`forward_features`, `forward_head`, `get_classifier`), and the projection of the
student's onto the teacher's. The loss of the two is in losses.py.

Shapes: B batch, C channels, H W map, K classes, F pooled features.
"""

from __future__ import annotations

from typing import Any

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


class WithFeatures(nn.Module):
    """A student, and a linear projection of its pooled features onto the teacher's.

    The projection is trained with the student and thrown away with the teacher: it is neither in
    the average nor in the deployed weights. In training the features have the dropout that the
    classifier sees.
    """

    def __init__(self, student: nn.Module, num_features: int, teacher_features: int) -> None:
        super().__init__()
        self.student = student
        self.project = nn.Linear(num_features, teacher_features)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, K) and projected features (B, teacher_features)."""
        features_BF = pool(self.student, images_BCHW)
        return classify(self.student, features_BF), self.project(features_BF)

"""ShuffleNetV2 as torchvision names it."""

from __future__ import annotations

from ghosttrain.config.schema import PLAIN
from ghosttrain.models.weights.dialects.layout import Layout

_SHUFFLENETV2_TORCHVISION = {
    "stem.conv": "conv1.0",
    "stem.bn": "conv1.1",
    **{
        f"stages.{stage}.B.{ours}": f"stage{stage + 2}.B.{theirs}"
        for stage in range(3)
        for ours, theirs in {
            "left.depthwise.conv": "branch1.0",
            "left.depthwise.bn": "branch1.1",
            "left.pointwise.conv": "branch1.2",
            "left.pointwise.bn": "branch1.3",
            "right.expand.conv": "branch2.0",
            "right.expand.bn": "branch2.1",
            "right.depthwise.conv": "branch2.3",
            "right.depthwise.bn": "branch2.4",
            "right.project.conv": "branch2.5",
            "right.project.bn": "branch2.6",
        }.items()
    },
    "last.conv": "conv5.0",
    "last.bn": "conv5.1",
    "classifier": "fc",
}

DIALECTS = (
    Layout(
        "torchvision",
        "shufflenetv2",
        "stage2.0.branch1.0.weight",
        _SHUFFLENETV2_TORCHVISION,
        PLAIN,
        {
            "050": "shufflenet_v2_x0_5",
            "100": "shufflenet_v2_x1_0",
            "150": "shufflenet_v2_x1_5",
            "200": "shufflenet_v2_x2_0",
        },
    ),
)

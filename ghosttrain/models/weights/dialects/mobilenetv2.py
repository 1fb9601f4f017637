"""MobileNetV2 as timm and torchvision name it."""

from __future__ import annotations

from ghosttrain.config.schema import PLAIN
from ghosttrain.models.mobilenetv2 import STAGES
from ghosttrain.models.weights.dialects.layout import Layout

_MOBILENETV2 = {
    "stem.conv": "conv_stem",
    "stem.bn": "bn1",
    "stages.0.0.depthwise.conv": "blocks.0.0.conv_dw",  # the first block does not expand
    "stages.0.0.depthwise.bn": "blocks.0.0.bn1",
    "stages.0.0.project.conv": "blocks.0.0.conv_pw",
    "stages.0.0.project.bn": "blocks.0.0.bn2",
    "stages.S.B.expand.conv": "blocks.S.B.conv_pw",
    "stages.S.B.expand.bn": "blocks.S.B.bn1",
    "stages.S.B.depthwise.conv": "blocks.S.B.conv_dw",
    "stages.S.B.depthwise.bn": "blocks.S.B.bn2",
    "stages.S.B.project.conv": "blocks.S.B.conv_pwl",
    "stages.S.B.project.bn": "blocks.S.B.bn3",
    "last.conv": "conv_head",
    "last.bn": "bn2",
}
# torchvision numbers the blocks through, from 1.
_BLOCKS = [f"stages.{s}.{b}" for s, (*_, depth, _) in enumerate(STAGES) for b in range(depth)]
_MOBILENETV2_TORCHVISION = {
    "stem.conv": "features.0.0",
    "stem.bn": "features.0.1",
    "stages.0.0.depthwise.conv": "features.1.conv.0.0",
    "stages.0.0.depthwise.bn": "features.1.conv.0.1",
    "stages.0.0.project.conv": "features.1.conv.1",
    "stages.0.0.project.bn": "features.1.conv.2",
    **{
        f"{block}.{ours}": f"features.{number}.conv.{theirs}"
        for number, block in enumerate(_BLOCKS[1:], start=2)
        for ours, theirs in {
            "expand.conv": "0.0",
            "expand.bn": "0.1",
            "depthwise.conv": "1.0",
            "depthwise.bn": "1.1",
            "project.conv": "2",
            "project.bn": "3",
        }.items()
    },
    "last.conv": f"features.{len(_BLOCKS) + 1}.0",
    "last.bn": f"features.{len(_BLOCKS) + 1}.1",
    "classifier": "classifier.1",
}

DIALECTS = (
    Layout(
        "timm",
        "mobilenetv2",
        "blocks.3.3.conv_pwl.weight",
        _MOBILENETV2,
        PLAIN,
        {width: f"mobilenetv2_{width}" for width in ("050", "100", "140")},
    ),
    Layout(
        "torchvision",
        "mobilenetv2",
        "features.1.conv.0.0.weight",
        _MOBILENETV2_TORCHVISION,
        PLAIN,
        {"100": "mobilenet_v2"},
    ),
)

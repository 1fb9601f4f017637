"""GhostNetV2 and V3 as timm and the official code name them."""

from __future__ import annotations

from ghosttrain.config.schema import FULL, PLAIN
from ghosttrain.models.weights.dialects.layout import Layout

# timm's GhostNetV2 and V3, and the official code, agree on all that has no branches.
_GHOSTNET = {
    "stem.conv": "conv_stem",
    "stem.bn": "bn1",
    "stages.S.B.ghost1.attention.0.conv": "blocks.S.B.ghost1.short_conv.0",
    "stages.S.B.ghost1.attention.0.bn": "blocks.S.B.ghost1.short_conv.1",
    "stages.S.B.ghost1.attention.1.conv": "blocks.S.B.ghost1.short_conv.2",
    "stages.S.B.ghost1.attention.1.bn": "blocks.S.B.ghost1.short_conv.3",
    "stages.S.B.ghost1.attention.2.conv": "blocks.S.B.ghost1.short_conv.4",
    "stages.S.B.ghost1.attention.2.bn": "blocks.S.B.ghost1.short_conv.5",
    "stages.S.B.se.reduce": "blocks.S.B.se.conv_reduce",
    "stages.S.B.se.expand": "blocks.S.B.se.conv_expand",
    "stages.S.B.shortcut.0.conv": "blocks.S.B.shortcut.0",
    "stages.S.B.shortcut.0.bn": "blocks.S.B.shortcut.1",
    "stages.S.B.shortcut.1.conv": "blocks.S.B.shortcut.2",
    "stages.S.B.shortcut.1.bn": "blocks.S.B.shortcut.3",
    "last.conv": "blocks.9.0.conv",
    "last.bn": "blocks.9.0.bn1",
    "head": "conv_head",
    "classifier": "classifier",
}
_GHOSTNETV2 = {
    **_GHOSTNET,
    "stages.S.B.G.primary.conv": "blocks.S.B.G.primary_conv.0",
    "stages.S.B.G.primary.bn": "blocks.S.B.G.primary_conv.1",
    "stages.S.B.G.cheap.conv": "blocks.S.B.G.cheap_operation.0",
    "stages.S.B.G.cheap.bn": "blocks.S.B.G.cheap_operation.1",
    "stages.S.B.depthwise.conv": "blocks.S.B.conv_dw",
    "stages.S.B.depthwise.bn": "blocks.S.B.bn_dw",
}
# The official code (https://github.com/huawei-noah/Efficient-AI-Backbones, ghostnetv3_pytorch)
# calls the batch norm of a branch `bn`, timm `bn1`; there is no other difference.
_GHOSTNETV3_OFFICIAL = {
    **_GHOSTNET,
    "stages.S.B.G.primary.branches.N.conv": "blocks.S.B.G.primary_rpr_conv.N.conv",
    "stages.S.B.G.primary.branches.N.bn": "blocks.S.B.G.primary_rpr_conv.N.bn",
    "stages.S.B.G.cheap.branches.N.conv": "blocks.S.B.G.cheap_rpr_conv.N.conv",
    "stages.S.B.G.cheap.branches.N.bn": "blocks.S.B.G.cheap_rpr_conv.N.bn",
    "stages.S.B.G.cheap.scale.conv": "blocks.S.B.G.cheap_rpr_scale.conv",
    "stages.S.B.G.cheap.scale.bn": "blocks.S.B.G.cheap_rpr_scale.bn",
    "stages.S.B.G.cheap.identity": "blocks.S.B.G.cheap_rpr_skip",
    "stages.S.B.depthwise.branches.N.conv": "blocks.S.B.dw_rpr_conv.N.conv",
    "stages.S.B.depthwise.branches.N.bn": "blocks.S.B.dw_rpr_conv.N.bn",
    "stages.S.B.depthwise.scale.conv": "blocks.S.B.dw_rpr_scale.conv",
    "stages.S.B.depthwise.scale.bn": "blocks.S.B.dw_rpr_scale.bn",
}
_GHOSTNETV3 = {
    ours: theirs + "1" if theirs.endswith(".bn") else theirs
    for ours, theirs in _GHOSTNETV3_OFFICIAL.items()
}

DIALECTS = (
    Layout(
        "timm",
        "ghostnet",
        "blocks.0.0.ghost1.primary_rpr_conv.0.bn1.weight",
        _GHOSTNETV3,
        FULL,
        {width: f"ghostnetv3_{width}" for width in ("050", "100", "130", "160")},
    ),
    Layout(  # the official GhostNetV2 has these names too
        "timm",
        "ghostnet",
        "blocks.0.0.ghost1.primary_conv.1.weight",
        _GHOSTNETV2,
        PLAIN,
        {width: f"ghostnetv2_{width}" for width in ("100", "130", "160")},
    ),
    Layout(
        "official",
        "ghostnet",
        "blocks.0.0.ghost1.primary_rpr_conv.0.bn.weight",
        _GHOSTNETV3_OFFICIAL,
        FULL,
    ),
    Layout("deployed", "ghostnet", "blocks.0.0.ghost1.primary_conv.0.bias", _GHOSTNETV2),
)

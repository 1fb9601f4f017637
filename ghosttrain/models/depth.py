"""Which parameter of a network lies how deep: for learning rates that fall with the distance from
the classifier, and for what stays frozen.

Students are counted block by block, timm's networks as their `group_matcher` says, torchvision's by
the blocks in their names. A detector is its backbone, and all that is not the backbone (extra maps,
pyramid, head) counts like a classifier. Names of parameters are those of `named_parameters`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.fx import GraphModule

from ghosttrain.errors import UserError
from ghosttrain.models.layers import Student
from ghosttrain.models.weights.fit import STUDENT_ENDS, ends_of

TORCHVISION_BLOCK = re.compile(r"features\.\d+|layer\d+\.\d+")
"""What the name of a parameter of torchvision's networks begins with, but for ResNet's stem."""


def block_depths(network: nn.Module) -> dict[str, int]:
    """Return the depth of every parameter, block by block: 0 at the input, the most at the
    classifier.
    """
    return _depths(network, coarse=False)


def stage_depths(network: nn.Module) -> dict[str, int]:
    """Return the depth of every parameter, stage by stage: 0 the stem, then each stage, then what
    follows them.
    """
    return _depths(network, coarse=True)


def classifier_of(network: Any) -> tuple[str, ...]:
    """Return the names of the layers that make logits; of a detector, of all parts beside its
    backbone.
    """
    if hasattr(network, "backbone_path"):
        return _beside(network, network.backbone_path)
    return (STUDENT_ENDS if isinstance(network, Student) else ends_of(network)).classifier


def _beside(network: Any, path: str) -> tuple[str, ...]:
    """Return the names of the modules beside those on the way to `path`."""
    names, at = [], ""
    for step in path.split("."):
        children = network.get_submodule(at).named_children()
        names += [f"{at}.{name}".lstrip(".") for name, _ in children if name != step]
        at = f"{at}.{step}".lstrip(".")
    return tuple(names)


def _depths(network: Any, coarse: bool) -> dict[str, int]:
    if hasattr(network, "backbone_path"):
        path = network.backbone_path
        inner = _groups(network.get_submodule(path), coarse)
        groups = {f"{path}.{name}": depth for name, depth in inner.items()}
    else:
        groups = _groups(network, coarse)
    last = classifier_of(network)
    depth: dict[str, int] = {}
    deepest = max(groups.values(), default=0)
    for name, _ in network.named_parameters():
        at_end = any(name.startswith(f"{layer}.") for layer in last)
        depth[name] = deepest + 1 if at_end else groups.get(name, deepest)
    order = {value: place for place, value in enumerate(sorted(set(depth.values())))}
    return {name: order[value] for name, value in depth.items()}


def _groups(network: Any, coarse: bool) -> dict[str, int]:
    """Return the place of parameters of a classification network, in the order of its layers."""
    if isinstance(network, Student):
        return _student_groups(network, coarse)
    if isinstance(network, GraphModule):  # of torchvision, cut behind its last map
        return _torchvision_groups(network, coarse)
    return _timm_groups(network, coarse)


def _torchvision_groups(network: nn.Module, coarse: bool) -> dict[str, int]:
    if coarse:
        raise UserError(
            "torchvision's networks do not say where their stages begin: type "
            "model.freeze=backbone, bn or none"
        )
    names = [name for name, _ in network.named_parameters()]
    blocks = [found[0] if (found := TORCHVISION_BLOCK.match(name)) else "" for name in names]
    order = list(dict.fromkeys(blocks))
    return {name: order.index(block) for name, block in zip(names, blocks, strict=True)}


def _student_groups(network: Student, coarse: bool) -> dict[str, int]:
    """Count the parts of a student in the order in which they stand in it."""
    groups: dict[str, int] = {}
    number = 0
    for name, child in network.named_children():
        parts: list[tuple[str, nn.Module]] = [(name, child)]
        if name == "stages":
            parts = [
                (f"{name}.{i}" if coarse else f"{name}.{i}.{j}", part)
                for i, stage in enumerate(child.children())
                for j, part in enumerate([stage] if coarse else stage.children())
            ]
        for path, part in parts:
            own = [f"{path}.{leaf}" for leaf, _ in part.named_parameters()]
            groups.update(dict.fromkeys(own, number))
            number += bool(own)
    return groups


def _timm_groups(network: Any, coarse: bool) -> dict[str, int]:
    from timm.models import group_parameters

    if not hasattr(network, "group_matcher"):
        raise UserError(
            f"timm's {type(network).__name__} does not say how deep its layers are: type "
            "optim.layer_decay=1 and model.freeze=none or backbone"
        )
    matcher: Callable[..., Any] = network.group_matcher
    return dict(group_parameters(network, matcher(coarse=coarse), reverse=True))

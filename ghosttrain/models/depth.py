"""Which parameter of a network lies how deep: for learning rates that fall with the distance from
the classifier, and for what stays frozen.

Students are counted block by block, timm's networks as their `group_matcher` says. Names of
parameters are those of `named_parameters`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ghosttrain.errors import UserError
from ghosttrain.models.layers import Student
from ghosttrain.models.weights.fit import STUDENT_ENDS, ends_of


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


def classifier_of(network: nn.Module) -> tuple[str, ...]:
    """Return the names of the layers that make logits."""
    return (STUDENT_ENDS if isinstance(network, Student) else ends_of(network)).classifier


def _depths(network: nn.Module, coarse: bool) -> dict[str, int]:
    if isinstance(network, Student):
        groups = _student_groups(network, coarse)
    else:
        groups = _timm_groups(network, coarse)
    last = classifier_of(network)
    depth: dict[str, int] = {}
    deepest = max(groups.values(), default=0)
    for name, _ in network.named_parameters():
        at_end = any(name.startswith(f"{layer}.") for layer in last)
        depth[name] = deepest + 1 if at_end else groups.get(name, deepest)
    order = {value: place for place, value in enumerate(sorted(set(depth.values())))}
    return {name: order[value] for name, value in depth.items()}


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

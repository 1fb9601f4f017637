"""What of a network does not learn: nothing, all but the classifier, its first stages, or its batch
norms; also by a schedule, for a classifier that learns first and a network that thaws stage by
stage.

What is frozen keeps its weights, and evaluates: its batch norms use their running statistics and
leave them, its dropout is off.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from ghosttrain.errors import UserError
from ghosttrain.models.depth import classifier_of, stage_depths
from ghosttrain.optim.groups import is_norm

Freeze = str | Sequence[tuple[float, str]]
"""`none`, `backbone`, `stages:N`, `bn`; or `[[share of the run, one of these], ...]`."""


def freeze_at(freeze: Freeze, progress: float) -> str:
    """Return what is frozen when `progress` in [0, 1] of the run is done."""
    if isinstance(freeze, str):
        return freeze
    begun = [what for share, what in freeze if share <= progress]
    return begun[-1] if begun else "none"


def frozen_parameters(network: nn.Module, what: str) -> set[str]:
    """Return the names of the parameters that `what` freezes.

    Args:
        network: a student, or a network of timm.
        what: `none`, `backbone`: all but the classifier, `stages:N`: the stem and the first N
            stages, `bn`: weights and biases of norms.

    Raises:
        UserError: it has fewer stages.
    """
    names = [name for name, _ in network.named_parameters()]
    if what == "none":
        return set()
    if what == "backbone":
        ends = classifier_of(network)
        return {n for n in names if not any(n.startswith(f"{end}.") for end in ends)}
    if what == "bn":
        norms = [path for path, module in network.named_modules() if is_norm(module)]
        return {f"{path}.{leaf}" for path in norms for leaf in ("weight", "bias")} & set(names)
    depths = stage_depths(network)
    count, stages = int(re.sub(r"\D", "", what)), max(depths.values()) - 1
    if count > stages:
        raise UserError(
            f"model.freeze={what}: this network has {stages} stages before its classifier; type "
            f"model.freeze=stages:{stages} or less, or model.freeze=backbone"
        )
    return {name for name, depth in depths.items() if depth <= count}


def frozen_throughout(network: nn.Module, freeze: Freeze) -> set[str]:
    """Return the names of the parameters that never learn.

    Raises:
        UserError: it has fewer stages than `freeze` names.
    """
    every = [freeze] if isinstance(freeze, str) else [what for _, what in freeze]
    return set.intersection(*(frozen_parameters(network, what) for what in every))


def freeze_network(network: nn.Module, what: str) -> None:
    """Put a network into training mode with `what` of it frozen."""
    network.train()
    frozen = frozen_parameters(network, what)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in frozen)
    for path, module in network.named_modules():
        own = [f"{path}.{leaf}".lstrip(".") for leaf, _ in module.named_parameters()]
        if own and frozen.issuperset(own):
            module.eval()

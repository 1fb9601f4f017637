"""Parameter groups: which parameters are decayed.

Owns the split of a model's trainable parameters by the *type* of the module that holds them. Names
of modules never decide: a convolution called "norm" is decayed, a batch norm called "conv" is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

NORM_FILES = {
    "torch.nn.modules.batchnorm",
    "torch.nn.modules.instancenorm",
    "torch.nn.modules.normalization",
    "timm.layers.norm",
    "timm.layers.norm_act",
    "timm.layers.evo_norm",
    "timm.layers.filter_response_norm",
}
"""Where torch and timm define norm layers: a class from there, or derived from one, is a norm."""

BIASES = ("bias", "in_proj_bias")
"""What torch's modules call their biases (the second: `nn.MultiheadAttention`)."""


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return one group that is decayed and one, of norm parameters and biases, that is not.

    Every trainable parameter is in exactly one of them, in the order of `model.modules()`; a shared
    one belongs where it is met first. Frozen parameters and an empty group are left out.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    seen = set()
    for module in model.modules():
        norm = is_norm(module)
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad and p not in seen:
                seen.add(p)
                (plain if norm or name in BIASES else decayed).append(p)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def layered(
    groups: list[dict[str, Any]], model: nn.Module, depths: Mapping[str, int], decay: float
) -> list[dict[str, Any]]:
    """Cut groups by depth; each gets `lr_scale`, decay^(deepest - depth): the share of the learning
    rate that it is trained with. Parameters without a depth count as the deepest.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    deepest = max(depths.values())
    cut: list[dict[str, Any]] = []
    for group in groups:
        by_depth: dict[int, list[nn.Parameter]] = {}
        for p in group["params"]:
            by_depth.setdefault(depths.get(names[p], deepest), []).append(p)
        cut += [
            group | {"params": by_depth[depth], "lr_scale": decay ** (deepest - depth)}
            for depth in sorted(by_depth)
        ]
    return cut


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a norm layer of torch or timm, or derived from one."""
    return any(cls.__module__ in NORM_FILES for cls in type(module).__mro__)

"""From the settings of an optimizer to the optimizer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from ghosttrain.config.schema import OptimConfig
from ghosttrain.optim.groups import layered, param_groups
from ghosttrain.optim.lamb import Lamb


def build_optimizer(
    cfg: OptimConfig, model: nn.Module, depths: Mapping[str, int] | None = None
) -> Optimizer:
    """Return the optimizer of the model's trainable parameters, at `cfg.lr`; with
    `cfg.layer_decay`, of a share of it that falls with the distance from the classifier
    (`depths`: name of a parameter -> depth).

    Norm parameters and biases are not decayed. SGD is Nesterov's where it has momentum, and its
    decay is an L2 term.
    """
    groups = param_groups(model, cfg.weight_decay)
    if depths is not None and cfg.layer_decay < 1:
        groups = layered(groups, model, depths, cfg.layer_decay)
    betas = (cfg.beta1, cfg.beta2)
    if cfg.name == "lamb":
        return Lamb(groups, lr=cfg.lr, betas=betas, eps=cfg.eps)
    if cfg.name == "adamw":
        return AdamW(groups, lr=cfg.lr, betas=betas, eps=cfg.eps, foreach=True)
    return SGD(groups, lr=cfg.lr, momentum=cfg.beta1, nesterov=cfg.beta1 > 0, foreach=True)


def moments_per_weight(cfg: OptimConfig) -> int:
    """Return how many tensors of a weight's size the optimizer keeps beside it."""
    if cfg.name == "sgd":
        return int(cfg.beta1 > 0)
    return 2

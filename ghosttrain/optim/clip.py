"""Clipping of gradients, between the backward and the optimizer's step."""

from __future__ import annotations

from torch import nn

from ghosttrain.config.schema import OptimConfig
from ghosttrain.models.depth import classifier_of

AGC_EPS = 1e-3
"""Least norm that weights count with, as in Brock et al. (https://arxiv.org/abs/2102.06171)."""


def clip_gradients(cfg: OptimConfig, network: nn.Module, student: nn.Module) -> None:
    """Clip the gradients of a network as `optim.clip_grad` and `optim.clip_mode` say.

    Args:
        cfg: the settings.
        network: what is trained.
        student: the network or the part of it whose classifier `agc` leaves alone, as its authors
            do.
    """
    if cfg.clip_grad is None:
        return
    if cfg.clip_mode == "norm":
        nn.utils.clip_grad_norm_(network.parameters(), cfg.clip_grad)
        return
    from timm.utils.agc import adaptive_clip_grad

    ends = [student.get_submodule(path) for path in classifier_of(student)]
    left_out = {parameter for end in ends for parameter in end.parameters()}
    clipped = [parameter for parameter in network.parameters() if parameter not in left_out]
    adaptive_clip_grad(clipped, clip_factor=cfg.clip_grad, eps=AGC_EPS)

"""Size of a network: parameters, and multiply-accumulates (MACs) of one image. Owns no timing."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ghosttrain.models.reparam import using_forward


def count_params(model: nn.Module) -> int:
    """Return the number of parameters, trainable or frozen; running statistics are none."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, size: int, in_chans: int = 3) -> int:
    """Return the MACs of one image (1, in_chans, size, size) in eval mode.

    Counts convolutions and matrix products (`torch.utils.flop_counter`, two FLOPs per MAC); batch
    norms, activations and additions are free, as in the "FLOPs" of the papers. A training form is
    counted branch by branch. The mode of every module is restored.
    """
    modes = {module: module.training for module in model.modules()}
    parameter = next(model.parameters())
    x = torch.zeros(1, in_chans, size, size, device=parameter.device, dtype=parameter.dtype)
    try:
        branches = using_forward(model, "branches")  # in evaluation the others fold first
        with torch.no_grad(), branches, FlopCounterMode(display=False) as counter:
            model.eval()(x)
    finally:
        for module, training in modes.items():
            module.training = training
    return counter.get_total_flops() // 2

"""Size of a network: parameters, and multiply-accumulates (MACs) of one image. Owns no timing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ghosttrain.models.reparam import using_forward


def count_params(model: nn.Module) -> int:
    """Return the number of parameters, trainable or frozen; running statistics are none."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, size: int, in_chans: int = 3) -> int:
    """Return the MACs of one image (1, in_chans, size, size) in eval mode.

    Counts convolutions and matrix products (the formulas of `torch.utils.flop_counter`, two FLOPs
    per MAC); batch norms, activations and additions are free, as in the "FLOPs" of the papers. A
    training form is counted branch by branch. The mode of every module is restored.
    """
    modes = {module: module.training for module in model.modules()}
    parameter = next(model.parameters())
    x = torch.zeros(1, in_chans, size, size, device=parameter.device, dtype=parameter.dtype)
    try:
        branches = using_forward(model, "branches")  # in evaluation the others fold first
        with torch.no_grad(), branches, _FlopCounter() as counter:
            model.eval()(x)
    finally:
        for module, training in modes.items():
            module.training = training
    return counter.flops // 2


class _FlopCounter(TorchDispatchMode):
    """Adds up the FLOPs of the operators that run within the block.

    torch's own `FlopCounterMode` also keeps a table by modules; with it every operator is called
    through torch._dynamo, whose import takes longer than the count.
    """

    def __init__(self) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry

        self.formulas, self.flops = flop_registry, 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Tell torch that nobody compiles within the block."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._overloadpacket in self.formulas:
            self.flops += self.formulas[func._overloadpacket](*args, **kwargs, out_val=out)
        return out

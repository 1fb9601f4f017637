"""Exponential moving average of a model's weights.

Owns the averaged copy and the number of its updates; float32 on a CPU is averaged by
`native/optim.cpp`, all else by PyTorch's multi-tensor operators. When it is updated and evaluated
is the training loop's.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ghosttrain import native

Slot = tuple[dict[str, Any], dict[str, Any], str]


def decay_at(t: int, decay: float, warmup: bool) -> float:
    """Return the decay of update t (the first is 0); with `warmup` at most (1 + t) / (10 + t).

    The warm-up averages over about the last ninth of the updates so far; it reaches 0.9999 at
    update 89,990. Source: TensorFlow's `ExponentialMovingAverage`, argument `num_updates`.
    """
    return min(decay, (1 + t) / (10 + t)) if warmup else decay


class Ema:
    """Averaged copy of a model: average = d average + (1 - d) weight, with d = `decay_at(t)`.

    Parameters and floating-point buffers (the statistics of batch norms) are averaged, other
    buffers copied. `model` is the averaged copy: in eval mode, without gradients, with the dtypes
    and on the device of the original.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = True) -> None:
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self._source = model
        self._slots = _slots(self.model, model)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the present weights into the average; once per optimizer step."""
        if model is not self._source:
            self._source, self._slots = model, _slots(self.model, model)
        weight = 1 - decay_at(self.updates, self.decay, self.warmup)
        self.updates += 1
        averages = [store[name] for store, _, name in self._slots]
        values = [store[name] for _, store, name in self._slots]
        if weight == 1:  # a copy: what is broken in the average does not survive
            torch._foreach_copy_(averages, values)
        elif not _native_update(averages, values, weight):
            _multi_tensor_update(averages, values, weight)

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights and the number of updates."""
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; every key must match."""
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]


def _native_update(averages: list[Tensor], values: list[Tensor], weight: float) -> bool:
    """Average in C++; False where that cannot be, with nothing changed."""
    ops = native.load() if averages and averages[0].is_cpu else None
    return ops is not None and ops.ema_(averages, values, weight)


def _multi_tensor_update(averages: list[Tensor], values: list[Tensor], weight: float) -> None:
    are_floats = [average.is_floating_point() for average in averages]

    def those(tensors: list[Tensor], floats: bool) -> list[Tensor]:
        return [t for t, is_float in zip(tensors, are_floats, strict=True) if is_float == floats]

    if any(are_floats):
        torch._foreach_lerp_(those(averages, True), those(values, True), weight)
    if not all(are_floats):
        torch._foreach_copy_(those(averages, False), those(values, False))


def _slots(average: nn.Module, model: nn.Module) -> list[Slot]:
    """List where each parameter and buffer lives in both models; a shared one counts once.

    Going through `model.parameters()` at every update would take longer than the averaging, and
    a list of tensors would miss a buffer that its module replaces: hence the dictionaries.
    """
    slots: list[Slot] = []
    seen = set()
    for ours, theirs in zip(average.modules(), model.modules(), strict=True):
        for kind in ("_parameters", "_buffers"):
            store, source = getattr(ours, kind), getattr(theirs, kind)
            for name, tensor in store.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    slots.append((store, source, name))
    return slots

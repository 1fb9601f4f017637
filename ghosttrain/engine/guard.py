"""Steps whose loss or gradient is not finite: all ranks skip them, and nothing of them stays.

A loss that is NaN or infinite makes the gradients of its rank NaN, and the average over ranks
carries that to all of them: each sees the same, without another message. On a CPU the optimizer
then does not step. A GPU is not asked whether a step was good, for it would have to be waited for:
there the step is taken, and undone by the GPU itself. What was skipped is known at the next row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ghosttrain.engine import distributed
from ghosttrain.optim.ema import Ema

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a number -> the integer of that size."""


COUNTS = ("skipped", "in_a_row", "last_taken", "rolled_back_at")
"""What a checkpoint keeps."""


class Skip(NamedTuple):
    """A step that was skipped."""

    step: int
    """Its number, counted from 1."""
    cause: str
    """The term of the loss that was not finite, "gradient" where all were."""
    of_teacher: bool
    """Whether the teacher's answer was not finite."""
    rank: int
    """The first one on which it was so."""
    samples: list[int]
    """Sample numbers of that rank's micro-batch, or of the step where the gradient is to blame."""

    def facts(self) -> dict[str, Any]:
        """Return what metrics.jsonl keeps besides the step."""
        return {name: value for name, value in self._asdict().items() if name != "step"}


@dataclass
class _Step:
    """What must be known of a step if it was skipped."""

    number: int
    terms: list[Mapping[str, Tensor]]
    indices: list[Tensor]
    passed: Tensor
    undone: list[Tensor] | None
    """The weights of which a GPU took the step, and undoes it if it must be; None on a CPU."""


class Guard:
    """Skips the steps that are not finite, and counts them."""

    def __init__(self, network: nn.Module, optimizer: Optimizer, ema: Ema, on_host: bool) -> None:
        """Guard the training of `network`.

        Args:
            network: what is trained.
            optimizer: of its parameters.
            ema: the average.
            on_host: whether this process may look at each step before it is taken (a CPU).
        """
        self.optimizer, self.ema, self.on_host = optimizer, ema, on_host
        self.skipped = self.in_a_row = self.last_taken = 0
        self.longest = 0
        """Steps in a row that were skipped, at most, since the reading before the last."""
        self.rolled_back_at = -1
        """Steps done when the run last went back to its checkpoint; -1: it never did."""
        self.steps: list[_Step] = []
        self._terms: list[Mapping[str, Tensor]] = []
        self._indices: list[Tensor] = []
        self._statistics = _Copies([*network.buffers()])
        self._state: tuple[int, _Copies] = (0, _Copies([]))

    def begin(self) -> None:
        """Keep the running statistics, which the forward changes: before each step."""
        self._statistics.keep()
        self._terms, self._indices = [], []

    def backward(self, terms: Mapping[str, Tensor], indices: Tensor, parts: int) -> None:
        """Add the gradients of a micro-batch, a `parts`-th of the step; not finite where a term of
        its loss is not.

        Args:
            terms: of the loss, by name, each of one number; "loss" is their sum.
            indices: sample numbers of the micro-batch: (B,), on the CPU.
            parts: micro-batches of a step.
        """
        self._terms.append({name: value.detach() for name, value in terms.items()})
        self._indices.append(indices)
        loss = terms["loss"] / parts
        (loss * (1 + 0 * loss.detach())).backward()  # times 1, or NaN

    def passes(self, number: int) -> bool:
        """Whether the optimizer and the average may take the step of this number: after the
        backwards; then comes `end`.
        """
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        stepped = [weight for weight in weights if weight.grad is not None]
        passed = all_finite([weight.grad for weight in stepped if weight.grad is not None])
        # What an optimizer keeps of a parameter comes into being with its first step.
        known = not self.on_host and all(weight in self.optimizer.state for weight in stepped)
        step = _Step(number, self._terms, self._indices, passed, stepped if known else None)
        self.steps.append(step)
        undone = step.undone is not None
        if undone:
            self._copies(weights).keep()
        elif not passed:
            self._statistics.back()
        return undone or bool(passed)

    def end(self) -> Tensor:
        """Undo the step on a GPU if it must be; return whether it was taken, on the device."""
        step = self.steps[-1]
        if step.undone is not None:
            self._statistics.back_unless(step.passed)
            self._state[1].back_unless(step.passed)
        return step.passed

    def rolled_back(self, step: int) -> None:
        """Remember that after this step the run went back to its checkpoint."""
        self.rolled_back_at, self.in_a_row, self.longest = step, 0, 0
        self._state = (0, _Copies([]))  # the optimizer has other tensors

    def read(self) -> list[Skip]:
        """Return the steps that were skipped since the last reading, with what all ranks know of
        them, on rank 0; all ranks call it, and each has counted them.
        """
        steps, self.steps = self.steps, []
        if not steps:
            return []
        passed = torch.stack([step.passed for step in steps]).tolist()
        self.longest = self.in_a_row
        for step, good in zip(steps, passed, strict=True):
            self.skipped += not good
            self.in_a_row = 0 if good else self.in_a_row + 1
            self.longest = max(self.longest, self.in_a_row)
            self.last_taken = step.number if good else self.last_taken
        skipped_steps = [step for step, good in zip(steps, passed, strict=True) if not good]
        if not skipped_steps:
            return []
        for step in skipped_steps:
            if step.undone is not None:
                self._forget_step(step.undone)
        found = distributed.gathered([_fault(step) for step in skipped_steps])
        return [_first(faults) for faults in zip(*found, strict=True)]

    def state(self) -> dict[str, int]:
        """Return the counts that a checkpoint keeps."""
        return {name: getattr(self, name) for name in COUNTS}

    def restore(self, saved: Mapping[str, int]) -> None:
        """Go on from `state()`."""
        for name in COUNTS:
            setattr(self, name, saved[name])

    def has_gone_on(self, saved: Mapping[str, int]) -> bool:
        """Whether a step was taken since the run went back to a checkpoint, if ever it did, by the
        `state()` in a later one.
        """
        return self.rolled_back_at < 0 or saved.get("last_taken", 0) > self.rolled_back_at

    def _copies(self, weights: list[Tensor]) -> _Copies:
        """Return the copies of what a step changes on the device: weights, moments, the average."""
        if len(self.optimizer.state) != self._state[0]:
            kept = [value for each in self.optimizer.state.values() for value in each.values()]
            moments = [t for t in kept if isinstance(t, Tensor) and t.device == weights[0].device]
            average = self.ema.model
            changed = [*weights, *moments, *average.parameters(), *average.buffers()]
            self._state = len(self.optimizer.state), _Copies(changed)
        return self._state[1]

    def _forget_step(self, weights: Sequence[Tensor]) -> None:
        """Take a step of these weights out of the counters of this process, which a GPU cannot
        undo: until the row the corrections of Adam's moments, and the warm-up of the average, were
        a step ahead.
        """
        self.ema.updates -= 1
        counters = [*self.optimizer.param_groups, *(self.optimizer.state[p] for p in weights)]
        for counter in counters:
            step = counter.get("step")
            if isinstance(step, int) or (
                isinstance(step, Tensor) and step.device != weights[0].device  # else it was undone
            ):
                counter["step"] = step - 1


@torch.no_grad()
def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return whether all floating numbers are finite: bool, on their device, in one pass."""
    tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
    device = tensors[0].device
    found, scale = torch.zeros(1, device=device), torch.ones(1, device=device)
    # What torch's GradScaler calls: it multiplies by 1.
    torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, scale)
    return found[0] == 0


class _Copies:
    """Tensors, and copies of them from which they can be put back."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors, self.copies = tensors, [torch.empty_like(t) for t in tensors]
        self.as_bits: list[tuple[list[Tensor], list[Tensor], torch.dtype]] = []

    @torch.no_grad()
    def keep(self) -> None:
        if self.tensors:
            torch._foreach_copy_(self.copies, self.tensors)

    @torch.no_grad()
    def back(self) -> None:
        if self.tensors:
            torch._foreach_copy_(self.tensors, self.copies)

    @torch.no_grad()
    def back_unless(self, passed: Tensor) -> None:
        """Put the copies back unless `passed` (bool), without asking the device: bits are
        multiplied as integers, by 1 or 0, since NaN * 0 is NaN.
        """
        if not self.as_bits:
            pairs = [*zip(self.tensors, self.copies, strict=True)]
            for size, bits in BITS.items():
                views = [(t.view(bits), c.view(bits)) for t, c in pairs if t.element_size() == size]
                if views:
                    self.as_bits.append(([t for t, _ in views], [c for _, c in views], bits))
        for tensors, copies, bits in self.as_bits:
            torch._foreach_mul_(tensors, passed.to(bits))
            torch._foreach_mul_(copies, (~passed).to(bits))
            torch._foreach_add_(tensors, copies)


def skip_note(skips: Sequence[Skip]) -> str:
    """Return a line about steps that were skipped."""
    first = skips[0]
    why = "the gradient is" if first.cause == "gradient" else f"{first.cause} is"
    if first.of_teacher:
        why = "the teacher's answer is"
    where = f" on rank {first.rank}" if distributed.world_size() > 1 else ""
    what = f"step {first.step:,} was skipped"
    if len(skips) > 1:
        what = f"{len(skips)} steps from {first.step:,} to {skips[-1].step:,} were skipped"
        where += f" at step {first.step:,}"
    return f"note: {what}: {why} not finite{where}; metrics.jsonl has the sample numbers"


def skipped_steps_note(skipped: int) -> list[str]:
    """Return a line about how many steps of a run were skipped; nothing where none was."""
    if not skipped:
        return []
    what = "1 step was" if skipped == 1 else f"{skipped:,} steps were"
    return [f"note: {what} skipped: loss or gradient was not finite (metrics.jsonl says where)"]


def _fault(step: _Step) -> Skip:
    """Return what this rank knows of a step that was skipped."""
    rank, everything = distributed.rank(), _numbers(step.indices)
    for terms, indices in zip(step.terms, step.indices, strict=True):
        broken = list(_not_finite(terms))
        if broken:
            cause = next((name for name in broken if name != "agreement"), "loss")
            return Skip(step.number, cause, "agreement" in broken, rank, _numbers([indices]))
    return Skip(step.number, "gradient", False, rank, everything)


def _not_finite(terms: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the terms that are not finite, their sum last."""
    for name in sorted(terms, key="loss".__eq__):
        if not terms[name].isfinite().all():
            yield name


def _numbers(indices: Sequence[Tensor]) -> list[int]:
    return torch.cat(list(indices)).tolist()


def _first(faults: Sequence[Skip]) -> Skip:
    """Return what the first rank says whose loss is to blame, else all ranks' samples together."""
    for fault in faults:
        if fault.cause != "gradient":
            return fault
    samples: list[Any] = [number for fault in faults for number in fault.samples]
    return faults[0]._replace(samples=samples)

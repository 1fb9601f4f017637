"""Epochs, batches and learning rate of a run, as numbers of steps: decided once, when the data is
known.

The composer cannot do this: a folder's number of images is known only after it was read.
"""

from __future__ import annotations

from dataclasses import dataclass

from ghosttrain.config.compose import batch_split
from ghosttrain.config.schema import Config
from ghosttrain.data.order import steps_per_epoch
from ghosttrain.optim.schedule import scaled_lr


@dataclass(frozen=True)
class Plan:
    """How long a run is and how its batch is cut."""

    steps_per_epoch: int
    total_steps: int
    epochs: int
    warmup_steps: int
    micro_batch: int
    """Images per forward pass and rank: what batch norm sees."""
    accumulation: int
    lr: float
    """Peak learning rate after scaling."""

    def epochs_after(self, step: int) -> int:
        """Return how many epochs have begun when `step` optimizer steps are done."""
        return -(-step // self.steps_per_epoch)

    def is_evaluated(self, step: int, every: int) -> bool:
        """Whether the weights after `step` steps are evaluated: at the end of every `every`-th
        epoch, and of the run.
        """
        epochs, rest = divmod(step, self.steps_per_epoch)
        return step >= self.total_steps or (step > 0 and rest == 0 and epochs % every == 0)

    def long_warmup(self) -> str | None:
        """Return a line if the warm-up takes more than a fifth of the run."""
        if 5 * self.warmup_steps <= self.total_steps:
            return None
        share = 100 * self.warmup_steps / self.total_steps
        fifth = 100 * (self.total_steps // 5) // self.steps_per_epoch / 100  # rounded down
        return (
            f"note: the warm-up takes {share:.0f} % of the run; type "
            f"schedule.warmup_epochs={fifth:g} for a fifth or less"
        )


def make_plan(config: Config, n_train: int, ranks: int) -> Plan:
    """Return the plan for `n_train` training images on `ranks` processes.

    Raises:
        UserError: the global batch is larger than the training set, or does not divide.
    """
    train = config.train
    micro_batch, accumulation = batch_split(config, ranks)
    per_epoch = steps_per_epoch(n_train, train.global_batch, ranks, train.micro_batch)
    total = train.epochs * per_epoch
    if train.max_steps is not None:
        total = min(total, train.max_steps)
    warmup = round(config.schedule.warmup_epochs * per_epoch)
    # A short trial of a long recipe still gets past its warm-up.
    return Plan(
        steps_per_epoch=per_epoch,
        total_steps=total,
        epochs=-(-total // per_epoch),
        warmup_steps=min(warmup, total // 2),
        micro_batch=micro_batch,
        accumulation=accumulation,
        lr=scaled_lr(config.optim, train.global_batch),
    )

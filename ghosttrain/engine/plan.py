"""Epochs, batches and learning rate of a run, as numbers of steps: decided once, when the data is
known.

The composer cannot do this: a folder's number of images is known only after it was read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ghosttrain.config.compose import batch_split
from ghosttrain.config.schema import Config, OptimConfig, ScheduleConfig
from ghosttrain.data.order import balanced_order, repeated_order, steps_per_epoch, train_batches
from ghosttrain.optim.schedule import lr_at, scaled_lr, weight_decay_at


@dataclass(frozen=True)
class Plan:
    """How long a run is, how its batches are cut, and the learning rate of every step."""

    images: int
    """Training images."""
    seed: int
    ranks: int
    """Processes."""
    global_batch: int
    """Images per optimizer step, over all ranks and micro-batches."""
    micro_batch: int
    """Images per forward pass and rank: what batch norm sees."""
    accumulation: int
    """Micro-batches per optimizer step and rank."""
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    peak_lr: float
    """Learning rate after the warm-up, scaled to the batch."""
    schedule: ScheduleConfig
    optim: OptimConfig
    eval_every: int
    """Epochs between two evaluations."""
    labels: np.ndarray | None = None
    """Class of every training image (N,), where `data.balance` draws by class."""
    balance: str = "none"
    repeats: int = 1
    """Draws of an image in a batch (`data.repeats`)."""

    @property
    def epochs(self) -> int:
        """Epochs that the run begins."""
        return -(-self.total_steps // self.steps_per_epoch)

    def epoch_of(self, step: int) -> int:
        """Return the epoch (from 0) that optimizer step `step` (from 0) belongs to."""
        return step // self.steps_per_epoch

    def begin_of(self, epoch: int) -> int:
        """Return how many steps are done when `epoch` (from 0) begins."""
        return epoch * self.steps_per_epoch

    def end_of(self, epoch: int) -> int:
        """Return how many steps are done when `epoch` (from 0) has ended."""
        return min((epoch + 1) * self.steps_per_epoch, self.total_steps)

    def epochs_after(self, step: int) -> int:
        """Return how many epochs have begun when `step` optimizer steps are done."""
        return -(-step // self.steps_per_epoch)

    def place_of(self, step: int) -> str:
        """Return `after epoch 2, step 30` or `in epoch 2, step 25` when `step` steps are done."""
        epoch = self.epochs_after(step)
        ended = epoch == 0 or step == self.end_of(epoch - 1)
        return f"{'after' if ended else 'in'} epoch {epoch}, step {step}"

    def epoch_label(self, step: int) -> str:
        """Return `epoch 3/10` when `step` optimizer steps are done."""
        return f"epoch {self.epochs_after(step)}/{self.epochs}"

    def is_evaluated(self, step: int) -> bool:
        """Whether the weights after `step` steps are evaluated: at the end of every `eval_every`-th
        epoch, and of the run.
        """
        epochs, rest = divmod(step, self.steps_per_epoch)
        return step >= self.total_steps or (
            step > 0 and rest == 0 and epochs % self.eval_every == 0
        )

    def lr_at(self, step: int) -> float:
        """Return the learning rate of optimizer step `step` (from 0)."""
        return lr_at(step, self.total_steps, self.warmup_steps, self.peak_lr, self.schedule)

    def weight_decay_at(self, step: int) -> float:
        """Return the weight decay of optimizer step `step` (from 0)."""
        return weight_decay_at(step, self.total_steps, self.optim)

    def batches(self, step: int, rank: int) -> Iterator[list[int]]:
        """Return the sample numbers of every micro-batch of `rank`, from optimizer step `step` to
        the end of its epoch.
        """
        epoch = self.epoch_of(step)
        order = None
        if self.labels is not None:
            order = balanced_order(self.labels, self.balance, self.seed, epoch)
        elif self.repeats > 1:
            order = repeated_order(self.images, self.repeats, self.seed, epoch)
        return train_batches(
            self.images,
            self.seed,
            epoch,
            self.global_batch,
            self.micro_batch,
            rank=rank,
            world=self.ranks,
            start_step=step - self.begin_of(epoch),
            order=order,
        )

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


def make_plan(config: Config, n_train: int, ranks: int, labels: np.ndarray | None = None) -> Plan:
    """Return the plan for `n_train` training images, of which these are the labels (needed by
    `data.balance` only), on `ranks` processes.

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
        images=n_train,
        seed=config.seed,
        ranks=ranks,
        global_batch=train.global_batch,
        micro_batch=micro_batch,
        accumulation=accumulation,
        steps_per_epoch=per_epoch,
        total_steps=total,
        warmup_steps=min(warmup, total // 2),
        peak_lr=scaled_lr(config.optim, train.global_batch),
        schedule=config.schedule,
        optim=config.optim,
        eval_every=train.eval_every,
        labels=None if config.data.balance == "none" else labels,
        balance=config.data.balance,
        repeats=config.data.repeats,
    )

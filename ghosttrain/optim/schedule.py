"""Learning rate: how it follows the steps of a run and the size of the batch.

The weight decay too. Owns pure functions, and what writes their values into an optimizer. Plain
numbers: it imports no torch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ghosttrain.config.schema import OptimConfig, ScheduleConfig

if TYPE_CHECKING:
    from torch.optim import Optimizer


def lr_at(
    step: int, total_steps: int, warmup_steps: int, peak: float, cfg: ScheduleConfig
) -> float:
    """Return the learning rate of optimizer step `step`: first 0, last `total_steps - 1`.

    Linear from `warmup_lr_ratio * peak` at step 0 to `peak` at step `warmup_steps`; from there half
    a cosine down to `min_lr_ratio * peak` at the last step; or `peak`, multiplied by
    `milestone_factor` from each milestone on (a share of `total_steps`); or constant. A warm-up as
    long as the run or longer ends at the last step, so that a short run reaches its peak too; a
    single step is at the peak. Steps after the last keep its value. `exponential` has no warm-up:
    from `warmup_lr_ratio * peak` (which must be above 0) to `peak`, by the same factor in every
    step.
    """
    last = max(total_steps - 1, 0)
    if cfg.name == "exponential":
        share = min(step, last) / last if last else 1
        return peak * cfg.warmup_lr_ratio ** (1 - share)
    warmup = min(warmup_steps, last)
    step = min(step, last)
    if step < warmup:
        return peak * (cfg.warmup_lr_ratio + (1 - cfg.warmup_lr_ratio) * step / warmup)
    if cfg.name == "constant" or step == warmup:
        return peak
    if cfg.name == "step":
        passed = sum(step >= share * total_steps for share in cfg.milestones)
        return peak * cfg.milestone_factor**passed
    cosine = (1 + math.cos(math.pi * (step - warmup) / (last - warmup))) / 2
    return peak * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * cosine)


def scaled_lr(cfg: OptimConfig, global_batch: int) -> float:
    """Return the peak learning rate for `global_batch` images a step: `cfg.lr` is for `lr_batch`.

    LAMB and AdamW scale with the square root of the batch (You et al.,
    https://arxiv.org/abs/1904.00962), SGD linearly (Goyal et al., https://arxiv.org/abs/1706.02677).
    With `lr_batch` null it is `cfg.lr`.
    """
    if cfg.lr_batch is None:
        return cfg.lr
    ratio = global_batch / cfg.lr_batch
    return cfg.lr * (ratio if cfg.name == "sgd" else math.sqrt(ratio))


def weight_decay_at(step: int, total_steps: int, cfg: OptimConfig) -> float:
    """Return the weight decay of optimizer step `step` (from 0): half a cosine from `weight_decay`
    at the first step to `weight_decay_end` at the last, or constant where that is null.
    """
    if cfg.weight_decay_end is None:
        return cfg.weight_decay
    last = max(total_steps - 1, 1)
    share = (1 + math.cos(math.pi * min(step, last) / last)) / 2
    return cfg.weight_decay_end + (cfg.weight_decay - cfg.weight_decay_end) * share


def set_weight_decay(optimizer: Optimizer, weight_decay: float) -> None:
    """Give this weight decay to every parameter group that is decayed."""
    for group in [each for each in optimizer.param_groups if each["weight_decay"]]:
        group["weight_decay"] = weight_decay


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Give every parameter group this learning rate, or its share of it (`groups.layered`)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1)

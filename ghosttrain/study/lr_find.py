"""The learning-rate range test: a short run in which the learning rate rises by the same factor in
every step (Smith, https://arxiv.org/abs/1506.01186), its picture, and a learning rate to try.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ghosttrain.config.compose import compose
from ghosttrain.engine.figures import new_figure, save_figure
from ghosttrain.engine.launch import launch
from ghosttrain.engine.rows import read_metrics
from ghosttrain.errors import UserError
from ghosttrain.files import resolved

HIGHEST = {"lamb": 1.0, "adamw": 1.0, "sgd": 10.0}
"""Optimizer -> learning rate at the end of the test."""
SMOOTHING = 0.9
"""Decay of the average of the losses, corrected for its start."""
LEAST = 10
"""Steps that the test needs."""


def lr_find(overrides: Sequence[str], steps: int, config_dir: str | None) -> Path:
    """Run the test for what a command would train; return the picture's path.

    Raises:
        UserError: a mistake in the overrides; training did not come to `LEAST` steps.
    """
    config = compose(overrides, config_dir).config
    root = resolved(config.run.root) / ".lr_find"
    name = time.strftime("%Y%m%d-%H%M%S")
    words = [
        *overrides, "schedule=exponential", f"optim.lr={HIGHEST[config.optim.name]:g}",
        "optim.lr_batch=null", f"train.max_steps={steps}", f"train.epochs={steps}",
        "train.eval_every=1000000", "train.save_every=1000000epochs", "train.max_skips=0",
        "tracker.log_every=1", "tracker.wandb=off",
        "tracker.tensorboard=false", f"run.root={root}", f"run.name={name}",
    ]  # fmt: skip
    try:
        launch(compose(words, config_dir))
    except UserError as error:
        if "diverged" not in str(error):
            raise
    rows = [row for row in read_metrics(root / name) if row["kind"] == "train"]
    if len(rows) < LEAST:
        raise UserError(f"only {len(rows)} steps were trained, the test needs {LEAST}: see above")
    rates, losses = [row["lr"] for row in rows], smoothed([row["loss"] for row in rows])
    best = suggested(rates, losses)
    path = root.parent / f"lr_find-{name}.png"
    _draw(path, rows, rates, losses, best, config.model.name)
    lowest = rates[losses.index(min(losses))]
    print(
        f"\nsuggested: optim.lr={best:.1e} (the loss falls fastest; it is lowest at {lowest:.1e}), "
        f"for train.global_batch={config.train.global_batch}\n{path}"
    )
    return path


def smoothed(losses: Sequence[float]) -> list[float]:
    """Return the exponential average of losses, corrected for its start."""
    average, out = 0.0, []
    for number, loss in enumerate(losses, 1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        out.append(average / (1 - SMOOTHING**number))
    return out


def suggested(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Return the learning rate at which the loss falls fastest per factor of the rate, before it is
    lowest.

    The slope is that of a line through five points; the first tenth of the losses is left out.
    """
    lowest = losses.index(min(losses))
    first = max(len(rates) // 10, 2)
    places = range(first, max(lowest - 1, first + 1))
    slopes = {k: _slope(rates[k - 2 : k + 3], losses[k - 2 : k + 3]) for k in places}
    return rates[min(slopes, key=lambda k: slopes[k])]


def _slope(rates: Sequence[float], losses: Sequence[float]) -> float:
    x, n = [math.log(rate) for rate in rates], len(rates)
    mean_x, mean_y = sum(x) / n, sum(losses) / n
    across = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, losses, strict=True)) / across


def _draw(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    rates: Sequence[float],
    losses: Sequence[float],
    best: float,
    title: str,
) -> None:
    figure = new_figure(6, 4)
    axis = figure.subplots()
    axis.plot(rates, [row["loss"] for row in rows], color="0.8", linewidth=1)
    axis.plot(rates, losses, linewidth=1.6)
    axis.axvline(best, color="tab:red", linewidth=1, label=f"{best:.1e}")
    lowest = min(losses)
    axis.set_ylim(lowest - 0.1 * (losses[0] - lowest) - 0.05, losses[0] * 1.5)
    axis.set_xscale("log")
    axis.set_xlabel("learning rate")
    axis.set_ylabel("training loss, smoothed")
    axis.set_title(title, fontsize=9)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path, dpi=110)

"""What a run says while it runs: terminal, log.txt, metrics.jsonl, Weights & Biases, TensorBoard;
and its curves.

A terminal gets a progress bar, a pipe or a file gets plain lines. Only rank 0 has a tracker that
writes.
"""

from __future__ import annotations

import json
import re
import secrets
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ghosttrain.config.errors import UserError
from ghosttrain.config.identity import run_name
from ghosttrain.config.schema import Config
from ghosttrain.engine import distributed
from ghosttrain.engine.folder import clock, replacing, write_text

Row = dict[str, float]
NO_TERMS = ("kind", "step", "loss", "agreement", "lr", "images_per_second")
"""What a row of training metrics holds besides the terms of the loss."""
AGREED = "as the teacher (training)"
"""Label of the curve of the agreement with the teacher on augmented images."""


class Meter:
    """Mean losses and speed since the last reading; summed on the device: no step waits for it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.start()

    def start(self) -> None:
        """Forget what was added and start the clock."""
        self.sums, self.count, self.images, self.since = {}, 0, 0, time.perf_counter()

    def add(self, losses: dict[str, Tensor], images: int) -> None:
        """Add the losses of one forward pass, and the images it stands for over all ranks."""
        for name, value in losses.items():
            value = value.detach()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.count += 1
        self.images += images

    def read(self) -> Row:
        """Return the mean losses over ranks and images_per_second, and start again."""
        sums = distributed.all_sum(torch.stack([s.float() for s in self.sums.values()]))
        means = sums / (self.count * distributed.world_size())
        row = dict(zip(self.sums, means.tolist(), strict=True))
        row["images_per_second"] = self.images / (time.perf_counter() - self.since)
        self.start()
        return row


class Tracker:
    """Writes rows of metrics to every place the settings name; a silent one (`folder=None`) for
    other ranks.
    """

    def __init__(
        self,
        config: Config,
        folder: Path | None,
        start_step: int,
        total_steps: int,
        evaluates_first: bool = False,
    ) -> None:
        """Open every place; `evaluates_first`: the weights of `start_step` are evaluated again."""
        self.folder = folder
        self.bar: tqdm[Any] | None = None
        self.wandb: Any = None
        self.tensorboard: Any = None
        if folder is None:
            return
        self.started, self.start_step, self.total = time.perf_counter(), start_step, total_steps
        self.log_file = open(folder / "log.txt", "a", encoding="utf-8")
        self._forget_rows(start_step, evaluates_first)
        self.metrics = open(folder / "metrics.jsonl", "a", encoding="utf-8")
        if config.tracker.wandb != "off":
            self.wandb = _wandb(config, folder, config.tracker.wandb)
        if config.tracker.tensorboard:
            self.tensorboard = _tensorboard(folder)

    def __enter__(self) -> Tracker:
        """Show the progress bar, where there is a terminal to show it on."""
        if self.folder is not None and sys.stderr.isatty():
            self.bar = tqdm(
                total=self.total,
                initial=self.start_step,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}% |{bar:12}| {n_fmt}/{total_fmt} steps, "
                "{elapsed}, ETA {remaining}{postfix}",
            )
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close everything, also when training failed."""
        if self.folder is None:
            return
        if self.bar is not None:
            self.bar.close()
        if self.wandb is not None:
            self.wandb.finish()
        if self.tensorboard is not None:
            self.tensorboard.close()
        self.log_file.close()
        self.metrics.close()

    def say(self, line: str) -> None:
        """Print a line and keep it in log.txt."""
        if self.folder is None:
            return
        if self.bar is not None:
            self.bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)
        self.log_file.write(line + "\n")
        self.log_file.flush()

    def log(self, kind: str, step: int, row: Row) -> None:
        """Write one row of metrics of `kind` train or eval, and move the progress bar."""
        if self.folder is None:
            return
        self.metrics.write(json.dumps({"kind": kind, "step": step} | row) + "\n")
        self.metrics.flush()
        if self.wandb is not None:
            self.wandb.log({f"{kind}/{k}": v for k, v in row.items()}, step=step)
        if self.tensorboard is not None:
            for name, value in row.items():
                self.tensorboard.add_scalar(f"{kind}/{name}", value, step)
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            if kind == "train":
                self.bar.set_postfix_str(describe(row))

    def eta(self, step: int) -> str:
        """Return the time left, from the speed since this process started."""
        if self.folder is None or step <= self.start_step:
            return "?"
        speed = (time.perf_counter() - self.started) / (step - self.start_step)
        return clock(speed * (self.total - step))

    def _forget_rows(self, step: int, evaluates_first: bool) -> None:
        """Drop rows written after the checkpoint that this run resumes from: those steps run
        again, and with `evaluates_first` the evaluation after its last step too.
        """
        path = (self.folder or Path()) / "metrics.jsonl"
        if path.is_file():
            last = {"train": step, "eval": step - evaluates_first}
            kept = [row for row in read_metrics(path.parent) if row["step"] <= last[row["kind"]]]
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def describe(row: Row) -> str:
    """Return `loss 1.2 (label 1.0 + kl 0.2)  agreement 71 %  lr 1.2e-03  540 images/s`."""
    terms = [f"{name} {value:.3f}" for name, value in row.items() if name not in NO_TERMS]
    parts = [f"loss {row['loss']:.3f}" + (f" ({' + '.join(terms)})" if len(terms) > 1 else "")]
    if "agreement" in row:
        parts.append(f"agreement {100 * row['agreement']:.0f} %")
    return "  ".join([*parts, f"lr {row['lr']:.2e}", f"{row['images_per_second']:.0f} images/s"])


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl; a line that is damaged (the last one, cut short by a kill)
    is left out.
    """
    rows = []
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    for line in text.splitlines():
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and row.get("kind") in ("train", "eval") and "step" in row:
                rows.append(row)
    return rows


def draw_curves(folder: Path, title: str) -> None:
    """Draw losses, learning rate and held-out accuracy of metrics.jsonl into curves.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(folder)
    train = [r for r in rows if r["kind"] == "train"]
    held = [r for r in rows if r["kind"] == "eval"]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    losses, rate, accuracy = figure.subplots(1, 3)
    names = [k for k in (train[0] if train else {}) if k == "loss" or k not in NO_TERMS]
    for name in names:
        losses.plot([r["step"] for r in train], [r[name] for r in train], label=name, linewidth=1.2)
    rate.plot([r["step"] for r in train], [r["lr"] for r in train], color="tab:gray")
    for name in ("raw", "ema"):
        rows_with = [r for r in held if f"{name}_top1" in r]
        accuracy.plot(
            [r["step"] for r in rows_with], [r[f"{name}_top1"] for r in rows_with], ".-", label=name
        )
    agreed = [(r["step"], 100 * r["agreement"]) for r in train if "agreement" in r]
    if agreed:
        accuracy.plot(*zip(*agreed, strict=True), color="0.7", linewidth=1, label=AGREED, zorder=0)
    if held:
        best = max(r["ema_top1"] for r in held)
        accuracy.set_title(f"last EMA {held[-1]['ema_top1']:.2f} %, best {best:.2f} %", fontsize=9)
    if held or agreed:
        accuracy.legend(frameon=False)
    if names:
        losses.legend(frameon=False)
    for axis, label in (
        (losses, "training loss"),
        (rate, "learning rate"),
        (accuracy, "held-out top-1 %"),
    ):
        axis.set_xlabel("optimizer step")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.suptitle(title, fontsize=10)
    with replacing(folder / "curves.png") as file:
        figure.savefig(file, format="png", dpi=130)


def _wandb(config: Config, folder: Path, mode: Literal["online", "offline"]) -> Any:
    import wandb

    try:
        return wandb.init(
            project=config.tracker.project,
            name=run_name(config),
            dir=folder,
            mode=mode,
            config=config.model_dump(mode="json"),
            id=_wandb_id(folder),
            resume="allow",
        )
    except (wandb.Error, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"Weights & Biases did not start ({reason}); type tracker.wandb=offline or off"
        ) from None


def _wandb_id(folder: Path) -> str:
    """Return the id of this folder's run, so that a resumed run goes on in the same place."""
    path = folder / "wandb.id"
    kept = path.read_bytes().decode(errors="replace") if path.is_file() else ""
    if re.fullmatch("[0-9a-f]{8}", kept):
        return kept
    write_text(path, made := secrets.token_hex(4))
    return made


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "tracker.tensorboard=true needs the package: pip install tensorboard"
        ) from None
    return SummaryWriter(log_dir=str(folder / "tensorboard"))

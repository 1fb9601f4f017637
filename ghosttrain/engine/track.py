"""What a run says while it runs: terminal, log.txt, metrics.jsonl, Weights & Biases, TensorBoard;
and its curves.

A terminal gets a progress bar, a pipe or a file gets plain lines. Only rank 0 has a tracker that
writes.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ghosttrain.config.identity import run_name
from ghosttrain.config.schema import Config
from ghosttrain.engine import distributed
from ghosttrain.engine.figures import new_figure, save_figure
from ghosttrain.engine.metrics import LISTED_CLASSES, WORDS, headline
from ghosttrain.engine.plan import Plan
from ghosttrain.engine.rows import METRICS, read_metrics, read_rows, row_line
from ghosttrain.errors import UserError
from ghosttrain.files import not_through_links, write_text
from ghosttrain.terminal import cell, failures, reason, screen
from ghosttrain.text import clock, counted, printable

Row = dict[str, float]
Mode = Literal["off", "offline", "online"]
PROGRESS = 30.0
"""Seconds between two lines about a cell of a sweep whose cells run at once."""
LOG = "log.txt"
NO_TERMS = ("kind", "step", "loss", "agreement", "lr", "images_per_second")
"""What a row of training metrics holds besides the terms of the loss."""
AGREED = "as the teacher (training)"
"""Label of the curve of the agreement with the teacher on augmented images."""


class Meter:
    """Mean losses and speed since the last reading; summed on the device: no step waits for it."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forget what was added, and start the clock."""
        self.sums: dict[str, Tensor] = {}
        self.count = torch.zeros(())
        self.images = 0
        self.seconds = 0.0
        self.start()
        self._forget_step()

    def _forget_step(self) -> None:
        self.step: dict[str, Tensor] = {}
        self.parts = 0

    def start(self) -> None:
        """Start the clock again, `seconds` ahead; what was added stays."""
        self.since = time.perf_counter() - self.seconds
        self.seconds = 0.0

    def add(self, losses: dict[str, Tensor], images: int) -> None:
        """Add the losses of one forward pass, and the images it stands for over all ranks."""
        _add(self.step, {name: value.detach() for name, value in losses.items()})
        self.parts += 1
        self.images += images

    def end_step(self, passed: Tensor) -> None:
        """Count the losses since the last step, unless the step was left out (`passed`: bool)."""
        taken = {name: torch.where(passed, value, 0) for name, value in self.step.items()}
        _add(self.sums, taken)
        self.count = self.count.to(passed.device) + self.parts * passed
        self._forget_step()

    def read(self) -> Row:
        """Return the mean losses over ranks and images_per_second, and begin again; nothing where
        every step was left out.
        """
        names = list(self.sums)
        sums = distributed.all_sum(torch.stack([s.float() for s in self.sums.values()]))
        means = sums / (self.count * distributed.world_size())
        speed = self.images / (time.perf_counter() - self.since)
        counted = bool(self.count)
        self.forget()
        if not counted:
            return {}
        return {**dict(zip(names, means.tolist(), strict=True)), "images_per_second": speed}

    def state(self) -> dict[str, Any]:
        """Return what was added since the last reading, on the CPU."""
        return {
            "sums": {name: value.cpu() for name, value in self.sums.items()},
            "count": int(self.count),
            "images": self.images,
            "seconds": time.perf_counter() - self.since if self.images else 0.0,
        }

    def restore(self, saved: Sequence[Mapping[str, Any]], device: torch.device) -> None:
        """Go on from what every rank had added (`state`); with another number of ranks each takes
        their mean.
        """
        rank, ranks = distributed.rank(), distributed.world_size()
        own = saved[rank if len(saved) == ranks else 0]
        self.count = torch.tensor(float(own["count"]), device=device)
        self.images, self.seconds = own["images"], own["seconds"]
        for name, value in own["sums"].items():
            if len(saved) != ranks:
                value = torch.stack([each["sums"][name] for each in saved]).mean(0)
            self.sums[name] = value.to(device)


def _add(sums: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        sums[name] = sums[name] + value if name in sums else value


class Journal:
    """A file that grows by lines. Lines that cannot be written (a full disk) are kept and tried
    again with the next one: nothing is lost once there is room.
    """

    def __init__(self, path: Path, first: Callable[[], object] | None = None) -> None:
        """`first` is done before anything is written, and tried again until it succeeds."""
        self.path, self.unwritten, self.first = path, b"", first

    def append(self, line: str) -> None:
        """Write a line, after those that are still to be written.

        Raises:
            OSError: it could not be written; the next call tries again.
        """
        self.unwritten += printable(line).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Write what is still to be written.

        Raises:
            OSError: it could not be written.
        """
        if self.first is not None:
            self.first()
            self.first = None
        if self.unwritten:
            # Opened anew: it may have been moved.
            with open(self.path, "ab", buffering=0, opener=not_through_links) as file:
                while self.unwritten:
                    self.unwritten = self.unwritten[file.write(self.unwritten) :]


class Tracker:
    """Writes rows of metrics to every place the settings name; a silent one (`folder=None`) for
    other ranks.

    A place that fails is said once in the others and ends nothing: training is worth more than
    what is noted about it.
    """

    def __init__(
        self,
        config: Config,
        plan: Plan,
        start_step: int,
        folder: Path | None,
    ) -> None:
        """Open every place. A run that goes on evaluates the weights of `start_step` again."""
        self.folder = folder
        self.bar: tqdm[Any] | None = None
        self.wandb: Any = None
        self.tensorboard: Any = None
        self.failed: set[str] = set()
        self.cell, self.shown_at = cell(), -PROGRESS
        if folder is None:
            return
        self.started, self.start_step = time.perf_counter(), start_step
        self.anew = start_step + (not plan.is_evaluated(start_step))
        """First step of which something is written again."""
        self.total, self.epoch = plan.total_steps, plan.steps_per_epoch
        self.epoch_label = plan.epoch_label
        self.log_file = Journal(folder / LOG)
        self.metrics = Journal(
            folder / METRICS,
            first=lambda: forget_rows(
                folder, start_step, evaluates_first=plan.is_evaluated(start_step)
            ),
        )
        rows, damaged = read_rows(folder)
        self._attempt(METRICS, self.metrics.flush)
        if damaged:
            self.say(f"{METRICS}: {counted(damaged, 'damaged row')} left out")
        steps = (row["step"] for row in rows if row["kind"] != "eval")
        last = max((step for step in steps if step <= start_step), default=0)
        # Between two rows a checkpoint holds what the next one is made of.
        in_epoch = start_step - plan.begin_of(plan.epoch_of(start_step))
        since_row = min(start_step % config.tracker.log_every, in_epoch)
        if last < start_step - since_row:
            self.say(f"{METRICS}: the rows after step {last} to step {start_step} are lost")
        asked, mode = config.tracker.wandb, wandb_mode(config)
        if mode != "off":
            self._start_wandb(config, folder, mode)
        self.artifacts = config.tracker.artifacts
        self.about_wandb = "" if asked == "off" else f"Weights & Biases {mode}"
        if mode != asked:
            self.about_wandb += f" (tracker.wandb={asked}; the environment's WANDB_ variables win)"
        if self.wandb is not None:
            self.about_wandb += f", project {wandb_project(config)}"
        if config.tracker.tensorboard:
            self._start_tensorboard(folder)

    def __enter__(self) -> Tracker:
        """Show the progress bar, where there is a terminal to show it on."""
        if self.folder is None or self.cell is not None:
            return self
        if (shown_on := screen()) is not None:
            self.bar = tqdm(
                file=shown_on,
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
            self._attempt("Weights & Biases", self.wandb.finish)
        if "Weights & Biases" in self.failed:
            _end_wandb()
        if self.tensorboard is not None:
            self._attempt("TensorBoard", self.tensorboard.close)
        self._attempt(METRICS, self.metrics.flush)
        if self.metrics.unwritten:
            rows = self.metrics.unwritten.count(b"\n")
            self.say(f"{METRICS} and the curves lack {rows} rows that could not be written")

    def about(self) -> list[str]:
        """Return the line of a run's head about W&B and TensorBoard; none if neither was asked
        for.
        """
        if self.folder is None:
            return []
        places = [self.about_wandb] if self.about_wandb else []
        places += ["TensorBoard"] if self.tensorboard is not None else []
        return [f"tracking: {', '.join(places)}"] if places else []

    def say(self, *lines: str) -> None:
        """Print lines and keep them in log.txt."""
        if self.folder is not None:
            for line in lines:
                self._say(line)

    def _say(self, line: str) -> None:
        line = printable(line)  # a name with a line break in it makes no second one
        if self.bar is not None:
            self.bar.clear()
        print(line, flush=True)
        if self.bar is not None:
            self.bar.refresh()
        self._attempt(LOG, lambda: self.log_file.append(line))
        for name, error in failures().items():
            if name not in self.failed:
                self._note(name, error)

    def log(self, kind: str, step: int, row: Row) -> None:
        """Write one row of metrics of `kind` train or eval, and move the progress bar."""
        if self.folder is None:
            return
        self.note(kind, step, row)
        if self.wandb is not None:
            values = {f"{kind}/{name}": value for name, value in row.items()}
            self._attempt("Weights & Biases", lambda: self.wandb.log(values, step=step))
        if self.tensorboard is not None:
            self._attempt("TensorBoard", lambda: self._scalars(kind, step, row))
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            if kind == "train":
                self.bar.set_postfix_str(describe(row))
        if self.cell is not None and time.perf_counter() - self.shown_at >= PROGRESS:
            self.shown_at = time.perf_counter()
            done = f"{self.epoch_label(step)}, {100 * step / self.total:.1f} %"
            print(f"{self.cell} {done}, ETA {self.eta(step)}", flush=True)

    def note(self, kind: str, step: int, facts: Mapping[str, Any]) -> None:
        """Write a row into metrics.jsonl alone."""
        if self.folder is not None:
            line = row_line({"kind": kind, "step": step, **facts})
            self._attempt(METRICS, lambda: self.metrics.append(line))

    def sync(self) -> None:
        """Bring rows and log to disk: a checkpoint and the result count them. Any thread may call
        it.
        """
        if self.folder is not None:
            for name in (METRICS, LOG):
                with suppress(OSError), open(self.folder / name, "rb") as file:
                    os.fsync(file.fileno())

    def summarize(self, result: dict[str, Any]) -> None:
        """End the progress bar: the final table is the last thing on the screen. Give Weights &
        Biases that table and, with `tracker.artifacts`, the EMA weights.
        """
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.wandb is None or self.folder is None:
            return
        table, weights = result["weights"], self.folder / "model.safetensors"
        rows = {f"{name}/{key}": value for name, row in table.items() for key, value in row.items()}
        self._attempt("Weights & Biases", lambda: self.wandb.summary.update(rows))
        if self.artifacts:
            self._attempt(
                "Weights & Biases", lambda: self.wandb.log_artifact(weights, type="model")
            )

    def draw_curves(self, title: str) -> None:
        """Draw curves.png from the rows in metrics.jsonl; a run is none the worse without it."""
        if (folder := self.folder) is not None:
            self._attempt("curves.png", lambda: draw_curves(folder, title, self.epoch))

    def draw_confusion(self, classes: Mapping[str, Any], title: str) -> None:
        """Draw confusion.png, where the confusion matrix of the classes was kept."""
        if (folder := self.folder) is not None and classes["confusion"] is not None:
            self._attempt("confusion.png", lambda: draw_confusion(folder, classes, title))

    def eta(self, step: int) -> str:
        """Return the time left, from the speed since this process started."""
        if self.folder is None or step <= self.start_step:
            return "?"
        speed = (time.perf_counter() - self.started) / (step - self.start_step)
        return clock(speed * (self.total - step))

    def _attempt(self, place: str, write: Callable[[], object]) -> None:
        """Write to one place; what goes wrong there is said once, and goes no further."""
        try:
            write()
        except Exception as error:
            if place == "Weights & Biases":
                self.wandb = None
            if place == "TensorBoard":
                self.tensorboard = None
            if place not in self.failed:
                self._note(place, error)

    def _note(self, place: str, error: Exception) -> None:
        self.failed.add(place)
        after = {
            LOG: "its lines are kept and tried again",
            METRICS: "its rows are kept and tried again",
        }.get(place, "the run goes on without it")
        self.say(f"{place} cannot be written ({reason(error)}); {after}")

    def _scalars(self, kind: str, step: int, row: Row) -> None:
        for name, value in row.items():
            self.tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def _start_wandb(
        self, config: Config, folder: Path, mode: Literal["online", "offline"]
    ) -> None:
        if printable(str(folder)) != str(folder):
            raise UserError(
                f"Weights & Biases cannot write into {folder}, a name that is no text in this "
                "locale: type tracker.wandb=off or another run.root"
            )
        try:
            self.wandb = _wandb(config, folder, mode)
        except Exception as error:
            if self.start_step:  # a run that goes on at night does not end because a server is gone
                return self._note("Weights & Biases", error)
            raise UserError(
                f"Weights & Biases did not start ({reason(error)}); type tracker.wandb=offline or "
                "off"
            ) from None

    def _start_tensorboard(self, folder: Path) -> None:
        writer = summary_writer()
        try:
            # What an earlier process wrote from there on counts no more.
            self.tensorboard = writer(str(folder / "tensorboard"), purge_step=self.anew)
        except (OSError, ValueError) as error:  # ValueError: a name that is no UTF-8
            return self._note("TensorBoard", error)
        for row in read_metrics(folder):
            if row["kind"] == "train" and row["step"] >= self.anew:
                values = {k: v for k, v in row.items() if k not in ("kind", "step")}
                self._attempt("TensorBoard", partial(self._scalars, "train", row["step"], values))


def summary_writer() -> Any:
    """Return TensorBoard's class that writes events; UserError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "tracker.tensorboard=true needs the package: pip install tensorboard"
        ) from None
    return SummaryWriter


def forget_rows(folder: Path, step: int, evaluates_first: bool) -> None:
    """Drop rows written after the checkpoint that a run resumes from: those steps run again, and
    with `evaluates_first` the evaluation after its last step too.
    """
    if (folder / METRICS).is_file():
        rows = read_metrics(folder)
        kept = [r for r in rows if r["step"] <= step - (r["kind"] == "eval" and evaluates_first)]
        write_text(folder / METRICS, "".join(f"{row_line(row)}\n" for row in kept))


def describe(row: Row) -> str:
    """Return `loss 1.2 (label 1.0 + kl 0.2)  agreement 71 %  lr 1.2e-03  540 images/s`."""
    terms = [f"{name} {value:.3f}" for name, value in row.items() if name not in NO_TERMS]
    parts = [f"loss {row['loss']:.3f}" + (f" ({' + '.join(terms)})" if len(terms) > 1 else "")]
    if "agreement" in row:
        parts.append(f"agreement {100 * row['agreement']:.0f} %")
    return "  ".join([*parts, f"lr {row['lr']:.2e}", f"{row['images_per_second']:.0f} images/s"])


def eval_row(table: Mapping[str, Mapping[str, float]]) -> Row:
    """Return the row of metrics of an evaluation: `ema_top1`, `raw_loss`, ... or `ema_ap`, ..."""
    kept = ("top1", "balanced", "loss", "ap", "ap50")
    return {f"{name}_{key}": row[key] for name, row in table.items() for key in kept if key in row}


def describe_eval(table: Mapping[str, Mapping[str, float]], by: str) -> str:
    """Return `held-out top-1: EMA 71.20 %, raw 70.00 %`; with `by` balanced that accuracy too."""
    ema, raw = table["ema"], table["raw"]
    key = headline(ema)
    text = f"held-out {WORDS[key]}: EMA {ema[key]:.2f} %, raw {raw[key]:.2f} %"
    return f"{text}, balanced EMA {ema['balanced']:.2f} %" if by == "balanced" else text


def draw_curves(folder: Path, title: str, steps_per_epoch: int) -> None:
    """Draw losses, learning rate and held-out accuracy of metrics.jsonl by epochs into
    curves.png.
    """
    rows = read_metrics(folder)
    train = [r for r in rows if r["kind"] == "train"]
    held = [r for r in rows if r["kind"] == "eval"]
    figure = new_figure(11, 3.6)
    losses, rate, accuracy = figure.subplots(1, 3)
    judged = "ap" if any("ema_ap" in row for row in held) else "top1"

    def epochs(rows: list[dict[str, Any]]) -> list[float]:
        return [row["step"] / steps_per_epoch for row in rows]

    names = [k for k in (train[0] if train else {}) if k == "loss" or k not in NO_TERMS]
    for name in names:
        losses.plot(epochs(train), [r[name] for r in train], label=name, linewidth=1.2)
    rows_with = [r for r in held if "ema_loss" in r]
    if rows_with:
        held_losses = [r["ema_loss"] for r in rows_with]
        losses.plot(epochs(rows_with), held_losses, ".-", label="held out (EMA)", linewidth=1)
    rate.plot(epochs(train), [r["lr"] for r in train], color="tab:gray")
    for name in ("raw", "ema"):
        key = f"{name}_{judged}"
        rows_with = [r for r in held if key in r]
        accuracy.plot(epochs(rows_with), [r[key] for r in rows_with], ".-", label=name)
    agreed = [
        (r["step"] / steps_per_epoch, 100 * r["agreement"]) for r in train if "agreement" in r
    ]
    if agreed:
        accuracy.plot(*zip(*agreed, strict=True), color="0.7", linewidth=1, label=AGREED, zorder=0)
    if held:
        course = [r[f"ema_{judged}"] for r in held]
        title_of_it = f"last EMA {course[-1]:.2f} %, best {max(course):.2f} %"
        accuracy.set_title(title_of_it, fontsize=9)
    if held or agreed:
        accuracy.legend(frameon=False)
    if names or rows_with:
        losses.legend(frameon=False)
    for axis, label in (
        (losses, "loss"),
        (rate, "learning rate at each step"),
        (accuracy, f"held-out {WORDS[judged]} %"),
    ):
        axis.set_xlabel("epoch")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.suptitle(printable(title), fontsize=10, parse_math=False)
    save_figure(figure, folder / "curves.png", dpi=130)


def draw_confusion(folder: Path, classes: Mapping[str, Any], title: str) -> None:
    """Draw the confusion matrix of the held-out images into confusion.png: a row for each true
    class, its cells the share that was taken for each class.
    """
    names = [printable(name) for name in classes["names"]]
    counts_TP = np.array(classes["confusion"], dtype=float)
    shares_TP = counts_TP / np.maximum(counts_TP.sum(1, keepdims=True), 1)
    side = min(12.0, 3 + 0.3 * len(names))
    figure = new_figure(side + 1, side)
    axis = figure.subplots()
    axis.imshow(shares_TP, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= LISTED_CLASSES:
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right", parse_math=False)
        axis.set_yticks(range(len(names)), names, parse_math=False)
        for t, row in enumerate(counts_TP):
            for p, count in enumerate(row):
                color = "white" if shares_TP[t, p] > 0.5 else "black"
                axis.text(p, t, f"{count:.0f}", ha="center", va="center", fontsize=7, color=color)
    axis.set_xlabel("taken for")
    axis.set_ylabel("is")
    figure.suptitle(printable(title), fontsize=9, parse_math=False)
    save_figure(figure, folder / "confusion.png", dpi=130)


def wandb_mode(config: Config) -> Mode:
    """Return what Weights & Biases does in this run: `tracker.wandb`, or less.

    The environment can only take away: WANDB_MODE=offline (a cluster without a network) turns
    online into offline; WANDB_MODE=disabled and WANDB_DISABLED=true turn it off. Names and values:
    https://docs.wandb.ai/guides/track/environment-variables (dryrun and run are older names).

    Raises:
        UserError: WANDB_MODE is none of them, and tracker.wandb is not off.
    """
    asked = config.tracker.wandb
    if asked == "off" or os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes"):
        return "off"
    given = os.environ.get("WANDB_MODE") or asked
    known: dict[str, Mode] = {
        "online": "online",
        "run": "online",
        "offline": "offline",
        "dryrun": "offline",
        "disabled": "off",
    }
    if given not in known:
        raise UserError(
            f"WANDB_MODE={given} in the environment: set it to online, offline or disabled, or "
            "type tracker.wandb=off"
        )
    return min(asked, known[given], key=("off", "offline", "online").index)


def wandb_project(config: Config) -> str:
    """Return `tracker.project`; where that is not set, WANDB_PROJECT of the environment."""
    unset = config.tracker.project == type(config.tracker)().project
    return (unset and os.environ.get("WANDB_PROJECT")) or config.tracker.project


def _wandb(config: Config, folder: Path, mode: Literal["online", "offline"]) -> Any:
    import wandb

    settings = json.dumps(config.model_dump(mode="json"), ensure_ascii=False)
    return wandb.init(
        project=wandb_project(config),
        name=printable(run_name(config)),
        group=config.tracker.group,  # None: WANDB_RUN_GROUP, which a sweep sets
        job_type="train",
        tags=[*config.recipe.split("+"), config.model.name, config.data.name],
        dir=folder,
        mode=mode,
        config=json.loads(settings.encode("utf-8", "replace")),
        id=os.environ.get("WANDB_RUN_ID") or _wandb_id(folder),  # `wandb agent` gives one
        resume="allow",
    )


def _end_wandb() -> None:
    """End what is left of Weights & Biases' own process, which may have died: else Python's last
    words would be a traceback of theirs.
    """
    with suppress(Exception):
        import wandb

        wandb.teardown()


def _wandb_id(folder: Path) -> str:
    """Return the id of this folder's run, so that a resumed run goes on in the same place."""
    path = folder / "wandb.id"
    kept = path.read_bytes().decode(errors="replace") if path.is_file() else ""
    if re.fullmatch("[0-9a-f]{8}", kept):
        return kept
    write_text(path, made := secrets.token_hex(4))
    return made

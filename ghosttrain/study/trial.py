"""A trial: twenty steps of a run on this machine, for its images per second.

It is the run itself, in a temporary folder: the same loop, images, teacher, network and optimizer,
in one process with one micro-batch a step, and with fewer held-out images. Its result is kept below
`run.root/.trials/`, by the settings that decide the speed and by the device.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ghosttrain.config.compose import batch_split
from ghosttrain.config.schema import Config, DataConfig
from ghosttrain.data.datasets import Dataset, build_datasets
from ghosttrain.data.datasets.base import evenly
from ghosttrain.engine.classification import CLASSIFICATION
from ghosttrain.engine.distributed import pick_device
from ghosttrain.engine.evaluate import Evaluation
from ghosttrain.engine.folder import opened, run_folder
from ghosttrain.engine.rows import read_metrics
from ghosttrain.engine.summary import device_name
from ghosttrain.engine.train import train
from ghosttrain.errors import UserError
from ghosttrain.files import Damaged, expanded, read_json, write_json

STEPS, WARM_UP = 20, 5
"""Optimizer steps of a trial, and how many at its beginning are not counted."""
HELD_OUT = 256
"""Held-out images that a trial evaluates, at most."""
LARGEST = 100_000
"""Bytes of a file that keeps a trial."""


@dataclass(frozen=True)
class Trial:
    """What a trial measured, of one process."""

    device: str
    images_per_second: float
    """Of training: loading, teacher, forward, backward, optimizer, average."""
    teacher_seconds: float
    """Seconds of the live teacher for an image; 0 without one."""
    evaluation_seconds: float
    """Seconds for a held-out image in an evaluation on the way (raw and averaged weights)."""
    final_seconds: float
    """Seconds for a held-out image in the last evaluation (fused weights too)."""
    date: str


def measure_trial(config: Config) -> Trial:
    """Train `STEPS` steps here; keep and return what they took.

    Args:
        config: of the run (`identify.settled`).

    Raises:
        UserError: what the run itself would refuse: no data, no teacher, a batch that is too large.
    """
    device = pick_device(config.launch.device)
    watch, path, threads = _Watch(device), _path(config), torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="ghosttrain-") as folder:
        short = _shortened(config, folder)
        with redirect_stdout(io.StringIO()), opened(short, []) as short:
            task = replace(
                CLASSIFICATION,
                build_data=_few_held_out,
                loss_terms=watch.loss_terms,
                evaluate=watch.evaluate,
            )
            train(lambda _: task, short, [])
        rows = [row for row in read_metrics(run_folder(short)) if row["kind"] == "train"]
    batch, counted = short.train.global_batch, rows[WARM_UP:]
    seconds = sum(batch / row["images_per_second"] for row in counted)
    asked = watch.teacher[-len(counted) :]
    trial = Trial(
        device=device_name(device),
        images_per_second=len(counted) * batch / seconds,
        teacher_seconds=sum(asked) / (len(counted) * batch),
        evaluation_seconds=watch.evaluations[0],
        final_seconds=watch.evaluations[-1],
        date=time.strftime("%Y-%m-%d %H:%M"),
    )
    torch.set_num_threads(threads)  # a run takes as many as cores are free: so does the next trial
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(trial))
    return trial


def kept_trial(config: Config) -> Trial | None:
    """Return what an earlier trial of such a run measured on this device; None without one, or
    where `launch.device` is not here.
    """
    with suppress(OSError, Damaged, TypeError, UserError):
        fields = read_json(_path(config), LARGEST)
        return Trial(
            **{name: fields[name] for name in Trial.__dataclass_fields__ if name in fields}
        )
    return None


def speed_key(config: Config) -> str:
    """Return 16 hexadecimal digits: the same for runs that differ only in what costs no time, such
    as seed, length and learning rate.
    """
    micro, _ = batch_split(config, config.launch.nproc)
    sections = {"model", "reparam", "data", "augment", "teacher", "distill", "cache"}
    length = {"epochs", "max_steps", "extended_at", "eval_every", "global_batch", "micro_batch"}
    saving = {"save_every", "keep", "patience", "best_by"}
    decisive = {
        **config.model_dump(mode="json", include=sections),
        "train": config.train.model_dump(mode="json", exclude=length | saving),
        "optim": [config.optim.name, config.optim.layer_decay],
        "micro_batch": micro,
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def _path(config: Config) -> Path:
    device = device_name(pick_device(config.launch.device))
    name = hashlib.sha256(device.encode()).hexdigest()[:8]
    return expanded(config.run.root) / ".trials" / f"{speed_key(config)}-{name}.json"


def _shortened(config: Config, folder: str) -> Config:
    """Return the settings of the trial of a run."""
    micro, _ = batch_split(config, config.launch.nproc)
    changes: dict[str, Mapping[str, Any]] = {
        "train": {
            "epochs": STEPS,
            "max_steps": STEPS,
            "eval_every": STEPS,
            "extended_at": (),
            "global_batch": micro,
            "micro_batch": micro,
            "save_every": f"{10 * STEPS}epochs",
        },
        "data": {"size_schedule": ()},
        "tracker": {"log_every": 1, "wandb": "off", "tensorboard": False},
        "run": {"root": folder, "name": "trial", "fresh": False},
        "launch": {"nproc": 1},
    }
    sections = {
        name: getattr(config, name).model_copy(update=dict(values))
        for name, values in changes.items()
    }
    return config.model_copy(update=sections)


def _few_held_out(data: DataConfig) -> tuple[Dataset, Dataset]:
    train_set, held_out = build_datasets(data)
    few = np.zeros(len(held_out), dtype=bool)
    few[evenly(len(held_out), HELD_OUT)] = True
    return train_set, held_out.part(few)


class _Watch:
    """A task's functions with a clock around the teacher and the evaluation."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.teacher: list[float] = []
        """Seconds of every micro-batch."""
        self.evaluations: list[float] = []
        """Seconds for an image, of every evaluation."""

    def loss_terms(
        self,
        config: Config,
        network: nn.Module,
        teacher: Callable[..., Any],
        *args: Any,
        **rest: Any,
    ) -> dict[str, Tensor]:
        def ask(*images: Any) -> Any:
            started = self._now()
            output = teacher(*images)
            self.teacher.append(self._now() - started)
            return output

        return CLASSIFICATION.loss_terms(config, network, ask, *args, **rest)

    def evaluate(
        self, models: Mapping[str, nn.Module], batches: Iterable[Any], *rest: Any
    ) -> Evaluation:
        started = self._now()
        found = CLASSIFICATION.evaluate(models, batches, *rest)
        self.evaluations.append((self._now() - started) / found.table["ema"]["n"])
        return found

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

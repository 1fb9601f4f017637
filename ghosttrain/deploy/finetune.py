"""Quantization-aware fine-tuning: a finished run goes on, fused, its layers rounded as INT8 files
round them, by its own command: same data, augmentation, teacher, losses and loop.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from ghosttrain.config.compose import compose
from ghosttrain.config.schema import Config
from ghosttrain.engine.launch import launch
from ghosttrain.engine.run_files import read_provenance
from ghosttrain.errors import UserError

LENGTH, RATE = 0.1, 0.01
"""Of the run's own epochs and of its learning rate, where the user says nothing [chosen]."""


def finetune(folder: Path, config: Config, weight_bits: int, overrides: Sequence[str]) -> Path:
    """Train the run in `folder` on, rounded; return the folder of that run, RUN-int8 beside it. One
    that is unfinished goes on, a finished one is shown.

    Args:
        folder: a finished run.
        config: its settings.
        weight_bits: 8 or 7.
        overrides: the user's, last: `train.epochs=3`, `optim.lr=1e-4`.

    Raises:
        UserError: it was not begun by a command; or as `launch`.
        SystemExit: the training failed; its exit code.
    """
    words, config_dir = _command_of(folder)
    folder = folder.resolve()
    epochs = max(1, round(LENGTH * config.train.epochs))
    words += [
        f"model.weights={folder}",
        f"model.weight_bits={weight_bits}",
        "model.freeze=none",
        f"train.epochs={epochs}",
        f"optim.lr={RATE * config.optim.lr:g}",
        f"optim.lr_batch={config.optim.lr_batch or 'null'}",
        "schedule.warmup_epochs=0",
        f"run.root={folder.parent}",
        f"run.name={folder.name}-int8",
        "run.fresh=false",
        *overrides,
    ]
    print(f"fine-tuning: python -m ghosttrain {shlex.join(words)}", flush=True)
    if code := launch(compose(words, config_dir)):
        raise SystemExit(code)
    return folder.with_name(f"{folder.name}-int8")


def _command_of(folder: Path) -> tuple[list[str], str | None]:
    """Return the words of the command that began a run, and the folder of the user's own groups."""
    command = (read_provenance(folder) or {}).get("command")
    if not command:
        raise UserError(
            f"{folder} was not begun by a command: type one with model.weights={folder} "
            "model.weight_bits=8, and quantize the run that it makes"
        )
    words = shlex.split(command)[3:]  # python -m ghosttrain
    if "--config-dir" in words:
        return words[:-2], words[-1]
    return words, None

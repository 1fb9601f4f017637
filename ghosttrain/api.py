"""The package as a library: `ghosttrain.compose`, `ghosttrain.train`, for scripts and notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ghosttrain.config.compose import Composed
from ghosttrain.config.compose import compose as compose_run
from ghosttrain.config.hydra_words import split_words
from ghosttrain.config.schema import Config
from ghosttrain.engine.folder import run_folder
from ghosttrain.engine.identify import settled
from ghosttrain.engine.launch import launch
from ghosttrain.errors import UserError

_composed: dict[str, Composed] = {}
"""Settings as JSON -> how they came about: what a budget replaced is for the card of the run."""


def compose(overrides: Sequence[str] = (), config_dir: str | None = None) -> Config:
    """Return the frozen settings of a run, as the command line composes them.

    Args:
        overrides: `["+recipe=compact_kd", "model=ghostnetv3_050"]`.
        config_dir: a folder of your own groups and recipes.

    Raises:
        UserError: a mistake in a name or value, in one line.
    """
    if isinstance(overrides, str):
        raise UserError(f"compose({overrides!r}): give a list of words, {overrides.split()!r}")
    words, _ = split_words(overrides, multirun=False)
    composed = compose_run(words, config_dir)
    _composed[composed.config.model_dump_json()] = composed
    return composed.config


def train(config: Config) -> Path:
    """Train, resume or find the run of `config` in this process; return its folder.

    Raises:
        UserError: as the command; several processes, which only the command starts.
    """
    if config.launch.devices:
        raise UserError("launch.devices: train() trains in this process; type the command")
    if config.launch.nproc > 1:
        raise UserError(
            f"launch.nproc={config.launch.nproc}: train() trains in this process; type the command"
            " python -m ghosttrain, or launch.nproc=1"
        )
    known = _composed.get(config.model_dump_json()) or Composed(config, (), {}, (), ())
    launch(known)
    return run_folder(settled(known))

"""The package as a library: `ghosttrain.compose`, `ghosttrain.train`, for scripts and notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ghosttrain.config.compose import Composed
from ghosttrain.config.compose import compose as compose_run
from ghosttrain.config.schema import Config
from ghosttrain.engine.folder import run_folder
from ghosttrain.engine.identify import identified
from ghosttrain.engine.launch import launch
from ghosttrain.errors import UserError


def compose(overrides: Sequence[str] = (), config_dir: str | None = None) -> Config:
    """Return the frozen settings of a run, as the command line composes them.

    Args:
        overrides: `["+recipe=compact_kd", "model=ghostnetv3_050"]`.
        config_dir: a folder of your own groups and recipes.

    Raises:
        UserError: a mistake in a name or value, in one line.
    """
    return compose_run(overrides, config_dir).config


def train(config: Config) -> Path:
    """Train, resume or find the run of `config` in this process; return its folder.

    Raises:
        UserError: as the command; several processes, which only the command starts.
    """
    if config.launch.nproc > 1:
        raise UserError(
            f"launch.nproc={config.launch.nproc}: train() trains in this process; type the command"
            " python -m ghosttrain, or launch.nproc=1"
        )
    launch(Composed(config, (), {}, (), ()))
    return run_folder(identified(config))

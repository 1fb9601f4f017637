"""From composed settings to a run: show a finished one, start the ranks, or train in this process.
Imports no torch: a finished run answers at once.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ghosttrain import ranks
from ghosttrain.config.compose import Composed
from ghosttrain.config.identity import settings_hash
from ghosttrain.config.schema import Config
from ghosttrain.engine.folder import (
    continued,
    has_checkpoint,
    made_by_other_code,
    opened,
    result_lines,
    run_folder,
    validate_nothing_planted,
)
from ghosttrain.engine.identify import settled
from ghosttrain.engine.run_files import damaged_products, read_result, without_remedy, write_config
from ghosttrain.engine.same_data import validate_result
from ghosttrain.engine.spawn import spawn
from ghosttrain.errors import UserError
from ghosttrain.memory import without_collection
from ghosttrain.terminal import go_on_without


def launch(
    composed: Composed, run_everywhere: Callable[[tuple[str, ...]], int] | None = None
) -> int:
    """Train, finish or show this run; return the exit code.

    `run_everywhere` trains it in processes of their own, from the arguments of the command; None:
    this process does, or the ranks that it starts.
    """
    config, notes = settled(composed), replaced_lines(composed)
    _validate_nproc(config.launch.nproc)
    if config.launch.devices and ranks.is_launched() and ranks.parent() is None:
        raise UserError(
            "launch.devices: torchrun and Slurm say themselves what each rank has: leave it out"
        )
    folder = run_folder(config)
    validate_nothing_planted(config)
    result = None if config.run.fresh else finished_result(folder, config, notes)
    if result is not None:
        unknown = validate_result(folder, config, result)
        print(f"finished: {folder}")
        notes_on_it = (made_by_other_code(folder), unknown)
        print("\n".join([*filter(None, notes_on_it), *result_lines(result)]))
        if ranks.is_launched() and run_everywhere is None:
            from ghosttrain.engine import distributed

            distributed.start()
            distributed.broadcast(None)  # tells the other ranks that there is nothing to do
            distributed.stop()
        return 0
    go_on_without()
    if run_everywhere is not None:
        return run_everywhere(composed.arguments)
    if ranks.must_spawn(config.launch.nproc, config.launch.devices):
        return spawn(composed.arguments, config.launch.nproc, config.launch.devices)
    with opened(config, notes, composed.arguments) as config:
        with without_collection():
            from ghosttrain.engine.tasks import task_of
            from ghosttrain.engine.train import train

        train(task_of, config, notes)
    return 0


def follow() -> None:
    """Be one of the ranks after the first: train what rank 0 says."""
    with without_collection():
        from ghosttrain.engine.tasks import task_of
        from ghosttrain.engine.train import train

    go_on_without()
    train(task_of, None, [])  # the settings come from rank 0


@contextmanager
def others_told() -> Iterator[None]:
    """Let the ranks that `follow` end when rank 0 fails inside this block, before it has joined
    them: torchrun and `spawn` end them, srun and submitit wait for all.
    """
    try:
        yield
    except Exception:
        if ranks.is_on_its_own():
            from ghosttrain.engine import distributed

            distributed.call_off()
        raise


def _validate_nproc(nproc: int) -> None:
    """Refuse `launch.nproc` where Slurm or submitit starts several processes already."""
    tasks = ranks.world_size()
    if ranks.is_on_its_own() and nproc not in (1, tasks):
        raise UserError(
            f"launch.nproc={nproc}, but {tasks} tasks of one job run this command, and each is one "
            "process: leave launch.nproc out, and start one task per GPU (--ntasks-per-node=N of "
            "srun, hydra.launcher.tasks_per_node=N of a sweep)"
        )


def finished_result(
    folder: Path, config: Config, notes: list[str], mends: bool = True
) -> dict[str, Any] | None:
    """Return the result of a finished run. None: it begins, goes on, is extended, or has a damaged
    file that is made anew from its last checkpoint, which is added to `notes`. A damaged
    config.yaml of a finished run is written anew, where `mends` says so.

    Raises:
        UserError: it holds a run with other settings, or is damaged and has no checkpoint.
    """
    others: list[str] = []
    config = continued(folder, config, others)
    try:
        result = read_result(folder)
        damaged = damaged_products(folder, result) if result else []
        what = f"{folder / damaged[0]} is missing or damaged" if damaged else ""
    except UserError as error:
        result, what = None, without_remedy(error)
    if what and not has_checkpoint(folder):
        raise UserError(f"{what}, and there is no checkpoint to make it anew: type run.fresh=true")
    if what:
        notes.append(f"{what}: made anew from the last checkpoint")
        return None
    if result and config.train.extended_at and result["settings"] != settings_hash(config):
        return None  # of before it was extended
    if result and others and mends:  # its config.yaml is damaged
        write_config(folder, config)
        print("\n".join(others))
    return result


def replaced_lines(composed: Composed) -> list[str]:
    """Return which values of the recipe the budget replaced, in a few lines; none where it has
    none.
    """
    config = composed.config
    if not composed.replaced:
        return []
    why = f"the budget {config.budget!r} of data={config.data.name} replaces values"
    return [
        f"{why} of the recipe (budget=full leaves them):",
        *textwrap.wrap(
            "; ".join(composed.replaced),
            width=98,
            initial_indent="  ",
            subsequent_indent="  ",
            break_on_hyphens=False,
        ),
    ]

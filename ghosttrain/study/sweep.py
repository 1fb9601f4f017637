"""`-m`: every combination of the listed values, each a run in its own folder.

Hydra's sweeper says which cells there are and Hydra's launcher where they run; what a cell is, and
what it does, is this project's: a cell is composed and launched as if it had been typed. Cells that
can be listed are all composed, and so checked, before the first one starts. A finished cell is
shown, not repeated; a cell that fails is named at the end and the others still run.

Every sweep has a folder below `run.root/.sweeps`, with what became of each cell.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import hydra
from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from ghosttrain import ranks
from ghosttrain.config.compose import Composed, as_mistakes, compose
from ghosttrain.config.names import Cells, Names
from ghosttrain.engine.folder import run_folder
from ghosttrain.engine.identify import settled
from ghosttrain.engine.launch import follow, launch, others_told
from ghosttrain.engine.metrics import WORDS, headline, score
from ghosttrain.engine.run_files import read_result
from ghosttrain.errors import BUSY, UserError, mistake
from ghosttrain.files import expanded, read_json, write_json
from ghosttrain.study.report import report
from ghosttrain.study.submitted import jobs_of
from ghosttrain.terminal import only_lines_of

Conduct = Callable[[Path, Callable[[list[str], int, int], None]], None]
"""See `run_cells`. What lets Hydra run some cells gets more words for Hydra, how many cells ran
before, and how many there will be.
"""
OWNER = "owner"
"""Name below which a search tells Hydra's sweeper whose the trials are; it is no setting."""


def sweep(overrides: list[str], hydra_words: list[str], config_dir: str | None) -> int:
    """Run all cells; return 0, or 1 when a cell failed.

    Args:
        overrides: of the runs, `seed=1,2` among them.
        hydra_words: overrides of Hydra's launcher, sweeper and sweep folder.
        config_dir: the user's own groups and recipes.

    Raises:
        UserError: a cell has a mistake; nothing was started. Hydra has no such launcher.
        KeyboardInterrupt: Ctrl-C ends the sweep, not only the cell that runs.
    """
    cells = Names(config_dir).cells(overrides, hydra_words)
    composed = compose_cells(cells, overrides, config_dir)
    done, failed, elsewhere = run_cells(cells, composed, hydra_words, config_dir)
    if done:
        total = len(done) + len(failed) + len(elsewhere)
        print(f"\n=== {len(done)} of {total} runs finished\n" + report(done))
    return name_failures(failed, elsewhere)


def on_all_ranks(drive: Callable[[], int]) -> int:
    """Go through cells by `drive`, which ends in `run_cells`; return its exit code.

    Under torchrun rank 0 does so, and the other ranks run what it says (`engine.job`).
    """
    if ranks.world_size() == 1:
        return drive()
    if ranks.is_on_its_own():
        raise UserError("a sweep starts its own processes: launch.nproc=N in place of srun")
    from ghosttrain.engine import job

    if ranks.rank() > 0:
        return job.follow()
    with job.leading():
        return drive()


def name_failures(failed: Sequence[str], elsewhere: Sequence[str]) -> int:
    """Print the cells that another process trains, and those that failed; return the exit code."""
    for line in elsewhere:
        print(f"ghosttrain: running elsewhere: {line}", file=sys.stderr)
    for line in failed:
        print(f"ghosttrain: failed: {line}", file=sys.stderr)
    return int(bool(failed))


def run_cells(
    cells: Cells,
    composed: Sequence[Composed],
    hydra_words: list[str],
    config_dir: str | None,
    conduct: Conduct | None = None,
) -> tuple[list[Path], list[str], list[str]]:
    """Let Hydra's launcher run all cells; return the folders of the finished ones, a line about
    each that failed, and one about each that another process trains now.

    Args:
        cells: what Hydra gets.
        composed: every cell that can be listed, else some of them.
        hydra_words: overrides of Hydra's launcher, sweeper and sweep folder.
        config_dir: the user's own groups and recipes.
        conduct: gets the sweep's folder and what lets Hydra run some cells; calls it until there is
            nothing left to do. None: Hydra once runs all.

    Raises:
        UserError: the folder of the sweep cannot be written; another launcher under torchrun.
        KeyboardInterrupt: Ctrl-C ends the sweep, not only the cell that runs.
    """
    launchers = [word for word in hydra_words if word.startswith("hydra/launcher=")]
    if ranks.world_size() > 1 and launchers and launchers[-1] != "hydra/launcher=basic":
        raise UserError(
            f"{launchers[-1]}: under torchrun all ranks run one cell after another; leave it out, "
            "or type launch.nproc=N in place of torchrun"
        )
    root = expanded(composed[0].config.run.root)
    folder = _new_folder(sweeps_folder(root) / time.strftime("%Y-%m-%d_%H-%M-%S"))
    context = {
        "words": cells.words,
        "names": cells.names,
        "lines": cells.lines,
        "config_dir": config_dir,
        "folder": str(folder.resolve()),
        "group": f"sweep-{_group(cells)}",
        "threads": {k: v for k, v in os.environ.items() if k.endswith("_NUM_THREADS")},
        "total": len(composed) if cells.listed is not None else None,
        "first": 0,
    }

    def run_some(words: list[str], first: int, total: int) -> None:
        _hydra_main(
            {**context, "first": first, "total": total}, [*cells.swept, *hydra_words, *words]
        )

    try:
        with jobs_of(hydra_words):
            if conduct is None:
                _hydra_main(context, [*cells.swept, *hydra_words])
            else:
                conduct(folder, run_some)
    finally:
        with suppress(OSError):  # a refused sweep leaves no empty folder
            folder.rmdir()
            folder.parent.rmdir()
    done, failed, elsewhere, numbers = [], [], [], range(len(composed))
    outcomes = {
        int(path.stem): read_json(path, largest=1_000_000) for path in folder.glob("*.json")
    }
    for number in numbers if cells.listed is not None else sorted(outcomes):
        outcome = outcomes.get(number)
        if outcome is None:
            failed.append(f"{' '.join(composed[number].arguments)} (was not started, or killed)")
        elif outcome["elsewhere"]:
            elsewhere.append(" ".join(outcome["words"]))
        elif outcome["exit_code"]:
            failed.append(f"{' '.join(outcome['words'])} (exit code {outcome['exit_code']})")
        else:
            done.append(Path(outcome["run"]))
    return done, failed, elsewhere


def sweeps_folder(root: Path) -> Path:
    """Make and return the folder of the sweeps of `run.root`, which only this user enters: what
    launchers leave there for their jobs is run.

    Raises:
        UserError: it cannot be written, is a link, or belongs to somebody else.
    """
    folder = root / ".sweeps"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
            raise UserError(f"{folder} is a link or belongs to another user: type another run.root")
        folder.chmod(0o700)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; type another run.root") from None
    return folder


def _group(cells: Cells) -> str:
    """Return eight hexadecimal digits: the same for the same sweep."""
    text = " ".join([*cells.words, *cells.swept, *map(" ".join, cells.lines)])
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _new_folder(path: Path) -> Path:
    """Make a folder of this name, or with a number after it: no other sweep has it."""
    folder, numbers = path, count(2)
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            folder = path.with_name(f"{path.name}.{next(numbers)}")


def run_cell(given: DictConfig) -> float | None:
    """Run one cell, in the process that Hydra's launcher chose; return its EMA top-1, of
    detectors its AP, in percent: what a sweeper that searches goes by. None where it failed, or
    where that is no number: with NaN Optuna's plugin ends.
    """
    if ranks.rank() > 0:  # one of several tasks of this cell; only rank 0's result counts
        follow()
        return None
    context = json.loads(given.context)
    job = HydraConfig.get()
    os.environ.setdefault("WANDB_RUN_GROUP", context["group"])
    words = list(context["words"])
    for word in job.overrides.task:
        key, _, value = word.removeprefix("++").partition("=")
        if key == OWNER:
            continue
        place, name = context["names"][key]
        words[place] = f"{name}={value}"
        if context["lines"]:
            words = context["lines"][int(value)]
    number = context["first"] + job.job.num
    of = f"/{context['total']}" if context["total"] else ""
    label = _label(job, context, words, f"[{number + 1}{of}]")
    if label is None:
        print(f"\n=== {number + 1}{of}: {' '.join(words)}", flush=True)
    folder, reached, word = None, math.nan, WORDS["top1"]
    try:
        with others_told(), only_lines_of(label):
            composed = compose(words, context["config_dir"])
            folder = run_folder(settled(composed))
            with _threads_of(context, composed):
                code = launch(composed, _run_everywhere())
    except Exception as error:  # the other cells still run
        message = mistake(error)
        if message is None:
            traceback.print_exc()
        else:
            print(f"ghosttrain: error: {message}", file=sys.stderr)
        code = 1 if message is None else getattr(error, "exit_code", 2)
    elsewhere = code == BUSY
    outcome = {
        "words": words,
        "exit_code": code,
        "elsewhere": elsewhere,
        "run": str(folder and folder.resolve()),
    }
    write_json(Path(context["folder"]) / f"{number}.json", outcome)
    if not code and folder is not None and (result := read_result(folder)):
        reached, word = score(result), WORDS[headline(result["weights"]["ema"])]
    if label is not None or elsewhere:
        what = f"failed (exit code {code})" if code else f"finished, EMA {word} {reached:.2f} %"
        print(label or "===", "running elsewhere" if elsewhere else what, flush=True)
    return reached if math.isfinite(reached) else None


def _label(
    job: HydraConf, context: dict[str, Any], words: Sequence[str], number: str
) -> str | None:
    """Return how lines about a cell begin, with what tells it from the others, where cells run at
    once in one terminal; None where they do not: one after another, or each as a job of Slurm.
    """
    launcher = str(job.runtime.choices["hydra/launcher"])
    if launcher == "basic" or launcher.startswith("submitit"):
        return None
    places = {place for place, _ in context["names"].values()}
    distinct = [word for place, word in enumerate(words) if place in places]
    if context["lines"]:
        distinct = [word for word in words if any(word not in line for line in context["lines"])]
    return f"{number} {' '.join(distinct)}:"


@contextmanager
def _threads_of(context: dict[str, Any], composed: Composed) -> Iterator[None]:
    """Let a cell that gets its share of the cores by `launch.devices` see what the user says of
    threads, not what joblib does in its workers.
    """
    before = {k: v for k, v in os.environ.items() if k.endswith("_NUM_THREADS")}
    if not composed.config.launch.devices:
        yield
        return
    try:
        _set_threads(before, context["threads"])
        yield
    finally:
        _set_threads(context["threads"], before)


def _set_threads(old: Mapping[str, str], new: Mapping[str, str]) -> None:
    for name in old:
        os.environ.pop(name, None)
    os.environ.update(new)


def _run_everywhere() -> Callable[[tuple[str, ...]], int] | None:
    """Return what trains a cell on all ranks of torchrun; None without it."""
    if ranks.world_size() == 1 or ranks.is_on_its_own():
        return None
    from ghosttrain.engine.job import run_everywhere

    return run_everywhere


def compose_cells(
    cells: Cells, overrides: list[str], config_dir: str | None, needs_data: bool = True
) -> list[Composed]:
    """Compose every cell that can be listed, else the first and the last values of each.

    Args:
        cells: of the sweep.
        overrides: as typed, for messages.
        config_dir: the user's own groups and recipes.
        needs_data: whether the images must be on this machine.

    Raises:
        UserError: a cell has a mistake; the line names the cell.
    """
    every = cells.listed if cells.listed is not None else cells.corners
    composed = []
    for cell in every:
        try:
            composed.append(compose(cell, config_dir, needs_data=needs_data))
        except UserError as error:
            distinct = [word for word in cell if any(word not in other for other in every)]
            where = f"{' '.join(distinct)}: " if distinct else ""
            raise UserError(f"{where}{error}{_leave_out(cell, overrides, str(error))}") from None
    return composed


def _leave_out(cell: Sequence[str], overrides: list[str], message: str) -> str:
    """Return how to leave out what a `glob(*)` brought into this cell, if that is the mistake."""
    values = {key: value for key, _, value in (word.partition("=") for word in cell)}
    for word in overrides:
        key, _, value = word.partition("=")
        match = re.fullmatch(r"glob\(([^,=\[\]]+)\)", value)
        if match and message.startswith(f"{key}."):
            return f"; to leave it out: '{key}=glob({match[1]},exclude={values[key]})'"
    return ""


def _hydra_main(context: dict[str, Any], words: list[str]) -> None:
    """Let Hydra run `run_cell` for each cell of `words`.

    Its configuration holds nothing but `context`, as JSON: what a cell is, only `run_cell` knows.
    """
    config = {
        "defaults": [
            "_self_",
            {"override hydra/hydra_logging": "none"},
            {"override hydra/job_logging": "none"},
        ],
        "context": json.dumps(context).replace("$", "\\u0024"),  # OmegaConf would replace ${...}
        "hydra": {
            "output_subdir": None,
            "job": {"name": "ghosttrain", "chdir": False},
            "sweep": {"dir": context["folder"], "subdir": "${hydra.job.num}"},
        },
    }
    ConfigStore.instance().store(name="ghosttrain_sweep", node=config)
    GlobalHydra.instance().clear()
    main = hydra.main(version_base="1.3", config_path=None, config_name="ghosttrain_sweep")
    with _as_hydras_program(["--multirun", *words]), as_mistakes():
        main(run_cell)()


@contextmanager
def _as_hydras_program(words: list[str]) -> Iterator[None]:
    """Give Hydra its command line; its errors are raised, and the log stays this program's."""
    program, sys.argv = sys.argv, ["ghosttrain", *words]
    errors = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        sys.argv = program
        if errors is None:
            del os.environ["HYDRA_FULL_ERROR"]
        root.handlers[:] = handlers  # Hydra's would go on writing to this call's stderr
        root.setLevel(level)

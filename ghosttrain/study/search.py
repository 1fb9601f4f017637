"""`-m hydra/sweeper=optuna`: a search over ranges, whose trials are the cells of a sweep.

Hydra's plugin asks Optuna for values and tells it the top-1 of each cell, of detectors the AP. This
module owns what the plugin leaves open. The trials are kept in a file, by a name that the same
command finds again, so `hydra.sweeper.n_trials` is how many the study shall have: what it lacks is
run, one batch (`hydra.sweeper.n_jobs`) after another, also by two sweeps at once. Both count the
trials that run before each batch; as nothing locks the study between counting and asking, S sweeps
at once run at most (S - 1) x n_jobs trials too many.

A trial belongs to the folder of its sweep, which the sweep's process locks: the system drops the
lock however that process ends. A running trial without it is marked as failed, and its values are
queued once more: the next trial finds the same run folder and goes on from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import socket
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from ghosttrain.config.compose import Composed, as_mistakes, compose
from ghosttrain.config.identity import settings_hash
from ghosttrain.config.names import Cells, Names, quoted
from ghosttrain.engine.metrics import score
from ghosttrain.engine.run_files import read_result
from ghosttrain.errors import UserError
from ghosttrain.files import extra, resolved
from ghosttrain.locks import is_locked, locked
from ghosttrain.study.report import judged_in_words, spread
from ghosttrain.study.sweep import OWNER, compose_cells, name_failures, run_cells, sweeps_folder
from ghosttrain.study.table import markdown
from ghosttrain.text import counted, one_line

DATABASE = "optuna.db"
"""In `run.root/.sweeps`: all searches of this root."""
MOST_TRIES = 2
"""How often the same values are tried when the sweep is killed meanwhile: they may be the cause."""
ASKED_BY = f"++{OWNER}"
"""A trial's attribute with the sweep that it belongs to: `HOST/FOLDER`."""
SWEEPS = "sweeps"
"""The study's attribute with the number of sweeps so far: no two draw the same values."""


@dataclass(frozen=True)
class Search:
    """A study of Optuna, and what the command line says of it."""

    study: Any
    folder: Path
    """`run.root/.sweeps`."""
    words: list[str]
    """For Hydra: its launcher and sweeper, where the trials are kept."""
    target: int
    """Trials that the study shall have."""
    batch: int
    """Trials that are asked for at a time."""
    seed: int | None
    """Of this sweep's draws; the number of trials is added. None: nobody chooses it."""
    most_failures: float
    """Share of a batch that may fail; above it, this sweep ends."""
    judged: str
    """What the trials are judged by, in words."""

    def trials(self, *states: str) -> list[Any]:
        """Return the trials in these states, in the order in which they were asked for."""
        every = self.study.get_trials(deepcopy=False)
        return [trial for trial in every if trial.state.name in states]

    def lacking(self) -> int:
        """Return how many trials are neither complete nor running."""
        return self.target - len(self.trials("COMPLETE", "RUNNING"))


def search(
    overrides: list[str], hydra_words: list[str], config_dir: str | None, confirm: int | None
) -> int:
    """Run what the study lacks, print its trials, and confirm the best; return 0, or 1 where trials
    are lacking still or a confirming run failed.

    Args:
        overrides: of the runs, `optim.lr=interval(0.001,0.1)` among them.
        hydra_words: overrides of Hydra's launcher, sweeper and sweep folder.
        config_dir: the user's own groups and recipes.
        confirm: new seeds to run the best trial with; None: it is not run again.

    Raises:
        UserError: a mistake in the command, or trials that cannot be kept; nothing was started.
        KeyboardInterrupt: Ctrl-C ends the search, not only the trial that runs.
    """
    cells = Names(config_dir).cells(overrides, hydra_words)
    if not cells.swept:
        raise UserError("a search needs what to choose: type a range, optim.lr=interval(0.001,0.1)")
    composed = compose_cells(cells, overrides, config_dir)
    found = _opened(cells, composed, hydra_words)
    print(_state(found))
    failed: list[str] = []
    elsewhere: list[str] = []
    if found.lacking() > 0:
        _, failed, elsewhere = run_cells(
            cells, composed, found.words, config_dir, _conductor(found)
        )
    print("\n" + "\n".join(_table(found, cells, config_dir, confirm)))
    name_failures(failed, elsewhere)
    lacking = found.lacking()
    if lacking > 0:
        print(f"{counted(lacking, 'trial')} lacking: the same command goes on")
    code = int(lacking > 0)
    if confirm is None:
        return code
    if running := len(found.trials("RUNNING")):
        print(f"--confirm: {counted(running, 'trial')} still running; type the same command later")
        return 1
    if not found.trials("COMPLETE"):
        print("--confirm: no trial is complete, so there is none to confirm")
        return 1
    return code | _confirm(found, cells, hydra_words, config_dir, confirm)


# --- the study ------------------------------------------------------------------------------------


def _opened(cells: Cells, composed: Sequence[Composed], hydra_words: Sequence[str]) -> Search:
    """Open the study, or begin it, and free the trials that a killed sweep left."""
    folder = sweeps_folder(resolved(composed[0].config.run.root))
    path = str(folder / DATABASE).replace("{", "{{").replace("}", "}}")  # Optuna formats it
    storage = quoted(f"sqlite:///{path}").replace("${", "\\${")  # Hydra would replace ${x}
    words = [
        f"hydra.sweeper.study_name={_name(cells, composed)}",
        f"hydra.sweeper.storage={storage}",
        "hydra.sweeper.direction=maximize",
        "hydra.sweeper.max_failure_rate=1.0",
        *hydra_words,
    ]
    settings = _sweeper_settings(words)
    if not any(w.startswith(("hydra/launcher=", "hydra.sweeper.n_jobs=")) for w in hydra_words):
        words.append("hydra.sweeper.n_jobs=1")  # one after another: each knows all before it
        settings.n_jobs = 1
    direction = getattr(settings.direction, "name", settings.direction)
    if direction != "maximize":
        raise UserError(
            f"hydra.sweeper.direction={direction}: a search goes by the top-1, of detectors the "
            "AP, of the averaged weights, which is to be as large as possible; leave it out"
        )
    if not settings.storage:
        raise UserError(
            "hydra.sweeper.storage=null would forget the trials: leave it out, or type a database, "
            "hydra.sweeper.storage=sqlite:///FILE"
        )
    for name in ("n_trials", "n_jobs"):
        if settings[name] < 1:
            raise UserError(f"hydra.sweeper.{name}={settings[name]}: give a whole number above 0")
    seed = settings.sampler.get("seed", None)
    if "seed" in settings.sampler and not _named(hydra_words, "hydra.sweeper.sampler.seed"):
        seed = 0
    with locked(folder, None, patience=60):  # two that make the same file at once would collide
        study = _study(settings)
        before = study.user_attrs.get(SWEEPS, 0)
        study.set_user_attr(SWEEPS, before + 1)
    found = Search(
        study,
        folder,
        words,
        settings.n_trials,
        settings.n_jobs,
        None if seed is None else seed + 10_000 * before,
        settings.max_failure_rate,
        judged_in_words([each.config for each in composed]),
    )
    _free_left_trials(found)
    return found


def _named(hydra_words: Sequence[str], key: str) -> bool:
    return any(word.lstrip("+").startswith(f"{key}=") for word in hydra_words)


def _name(cells: Cells, composed: Sequence[Composed]) -> str:
    """Return a name that is the same for the same search, whatever the order of the words."""
    ends = [f"{settings_hash(each.config)} {each.config.seed}" for each in composed]
    digest = hashlib.sha256("\n".join([*sorted(cells.swept), *ends]).encode()).hexdigest()[:8]
    config = composed[0].config
    recipe = re.sub(r"[^\w.]", "_", config.recipe)
    return f"{recipe}-{config.data.name}-{config.model.name}-{digest}"


def _sweeper_settings(words: list[str]) -> DictConfig:
    """Return `hydra.sweeper` as Hydra composes it of these words."""
    GlobalHydra.instance().clear()
    with as_mistakes(), initialize(version_base="1.3", config_path=None):
        return hydra_compose(overrides=words, return_hydra_config=True).hydra.sweeper


def _study(settings: DictConfig) -> Any:
    """Load the study from its storage, or make it."""
    try:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return optuna.create_study(
            storage=settings.storage,
            study_name=settings.study_name,
            direction="maximize",
            load_if_exists=True,
        )
    except Exception as error:  # of the database's driver: any
        reason = one_line(error)[:150] or type(error).__name__
        raise UserError(
            f"hydra.sweeper.storage={settings.storage}: cannot be opened ({reason}){_remedy()}"
        ) from None


def _remedy() -> str:
    """Return what to install where a library is newer than Optuna 2 works with."""
    most = {"sqlalchemy": (2, 0), "alembic": (1, 14)}
    for name, limit in most.items():
        version = metadata.version(name)
        if tuple(map(int, re.findall(r"\d+", version)[:2])) >= limit:
            return f"; {name} {version} is too new: pip install {extra('optuna')}"
    return ""


def _free_left_trials(found: Search) -> None:
    """Mark as failed the running trials of sweeps that are gone; queue their values once more."""
    import optuna

    with locked(found.folder, None, patience=60):
        for trial in found.trials("RUNNING"):
            if _sweep_is_there(found, trial):
                continue
            found.study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            every = found.study.get_trials(deepcopy=False)
            if trial.params and sum(t.params == trial.params for t in every) < MOST_TRIES:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                    found.study.enqueue_trial(trial.params)


def _sweep_is_there(found: Search, trial: Any) -> bool:
    """Whether the sweep that a running trial belongs to still has its process, as far as can be
    known: one of a host that keeps its folders elsewhere is taken to be there.
    """
    owner = trial.user_attrs.get(ASKED_BY)
    if owner is None:  # it was asked for a moment ago, or the sweep was killed in that moment
        return bool(datetime.now() - trial.datetime_start < timedelta(minutes=1))
    host, _, name = owner.partition("/")
    folder = found.folder / name
    if not folder.is_dir():
        return bool(host != socket.gethostname())
    try:
        return is_locked(folder)
    except OSError:  # a file system without locks
        return True


# --- the trials -----------------------------------------------------------------------------------


def _conductor(found: Search) -> Callable[[Path, Callable[[list[str], int, int], None]], None]:
    """Return what runs the trials that the study lacks, batch by batch (`run_cells`)."""

    def conduct(folder: Path, run_some: Callable[[list[str], int, int], None]) -> None:
        owner = f"{socket.gethostname()}/{folder.name}"
        total, ran = found.lacking(), 0
        try:
            with locked(folder, None):
                while (count := min(found.batch, total - ran, found.lacking())) > 0:
                    words = [f"++{OWNER}={owner}", f"hydra.sweeper.n_trials={count}"]
                    trials = len(found.study.get_trials(deepcopy=False))
                    if found.seed is not None:  # else every batch would draw the same values
                        words.append(f"hydra.sweeper.sampler.seed={found.seed + trials}")
                    before = _failures(found, owner)
                    try:
                        run_some(words, ran, total)
                    except ValueError:  # the plugin ends with the best trial; there may be none yet
                        if _failures(found, owner) < before + count:
                            raise
                    ran += count
                    _free_left_trials(found)
                    failed = _failures(found, owner) - before
                    if failed > found.most_failures * count:
                        print(
                            f"{failed} of {counted(count, 'trial')} failed, more than "
                            f"hydra.sweeper.max_failure_rate={found.most_failures:g} allows"
                        )
                        break
        finally:
            _free_left_trials(found)  # Ctrl-C leaves this sweep's own

    return conduct


def _failures(found: Search, owner: str) -> int:
    return sum(trial.user_attrs.get(ASKED_BY) == owner for trial in found.trials("FAIL"))


def _state(found: Search) -> str:
    """Return a line about the study before this sweep runs anything."""
    complete, running = len(found.trials("COMPLETE")), len(found.trials("RUNNING"))
    elsewhere = f", {running} running elsewhere" if running else ""
    return (
        f"search {found.study.study_name}: {complete} of {counted(found.target, 'trial')} "
        f"complete{elsewhere}, {max(found.lacking(), 0)} to run"
    )


def _best_first(found: Search) -> list[Any]:
    return sorted(found.trials("COMPLETE"), key=lambda trial: (-trial.value, trial.number))


def _table(found: Search, cells: Cells, config_dir: str | None, confirm: int | None) -> list[str]:
    """Return the complete trials, best first, and what the best is worth."""
    trials, failed = _best_first(found), found.trials("FAIL")
    running = len(found.trials("RUNNING"))
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    settings = [cells.names[_setting(name)][1].lstrip("+") for name in names]
    rows = [["trial", f"EMA {found.judged} %", *settings]]
    for trial in trials:
        values = [_shown(trial.params.get(name, "-")) for name in names]
        rows.append([str(trial.number), f"{trial.value:.2f}", *values])
    lines = markdown(rows) if trials else []
    counts = [counted(len(trials), "trial") + " complete"]
    counts += [f"{len(failed)} failed"] * bool(failed) + [f"{running} running"] * bool(running)
    lines.append(f"{', '.join(counts)}; search {found.study.study_name}")
    if trials:
        words = [*_words(cells, trials[0]), *(["--config-dir", config_dir] if config_dir else [])]
        lines.append(f"best: python -m ghosttrain {shlex.join(words)}")
    if len(trials) > 1:
        hint = "" if confirm else "; --confirm 3 runs it with three new seeds"
        lines.append(
            f"the best of {len(trials)} is optimistic: the images that measure it also chose it"
            f"{hint}"
        )
    return lines


def _setting(parameter: str) -> str:
    """Return Hydra's name of a setting that a trial has a value of."""
    return parameter.removeprefix("++")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _words(cells: Cells, trial: Any) -> list[str]:
    """Return the command line of a trial."""
    words = list(cells.words)
    for name, value in trial.params.items():
        place, typed = cells.names[_setting(name)]
        words[place] = f"{typed}={value}"
    return words


# --- confirming -----------------------------------------------------------------------------------


def _confirm(
    found: Search, cells: Cells, hydra_words: Sequence[str], config_dir: str | None, count: int
) -> int:
    """Run the best trial with new seeds, as an ordinary sweep; print mean and standard deviation
    beside the value of the search. Return 0, or 1 where a run failed.
    """
    best = _best_first(found)[0]
    words = _words(cells, best)
    searched = compose(words, config_dir).config.seed
    words = [word for word in words if word.lstrip("+").partition("=")[0] != "seed"]
    used = [int(t.params.get("++seed", searched)) for t in found.trials("COMPLETE", "FAIL")]
    seeds = range(max(used) + 1, max(used) + 1 + count)
    sweepers = ("hydra.sweeper.", "hydra/sweeper")
    launcher = [word for word in hydra_words if not word.lstrip("+").startswith(sweepers)]
    lines = Names(config_dir).lines([[*words, f"seed={seed}"] for seed in seeds], launcher)
    composed = [compose(line, config_dir) for line in lines.lines]
    done, failed, elsewhere = run_cells(lines, composed, launcher, config_dir)
    results = [result for folder in done if (result := read_result(folder))]
    values = [score(result) for result in results]
    if values:
        among = len(found.trials("COMPLETE"))
        new = ", ".join(str(result["seed"]) for result in results)
        print(
            f"\nsearched:  {best.value:.2f} % EMA {found.judged} with seed {searched}, the best of "
            f"{among}\n"
            f"confirmed: {spread(values)} % with {counted(len(values), 'new seed')} ({new})"
        )
    return name_failures(failed, elsewhere)

"""A study: what is compared, with which seeds, and against what (`conf/study/NAME.yaml`).

A study says its axes, each a list of named overrides; an arm takes one of every axis. Every arm
runs with every seed, through the same sweep as `-m`. What a run is stays the run's own affair: the
study finds the folder of each by its settings, so runs that are there already count.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ghosttrain.config.compose import Composed, compose
from ghosttrain.config.identity import settings_hash, typed_hash
from ghosttrain.config.names import Names, load_yaml
from ghosttrain.config.schema import Config
from ghosttrain.engine.folder import has_begun, run_folder
from ghosttrain.engine.identify import settled
from ghosttrain.engine.metrics import judged_by
from ghosttrain.engine.rows import read_metrics
from ghosttrain.engine.run_files import read_result
from ghosttrain.errors import UserError, did_you_mean
from ghosttrain.files import Damaged, expanded, read_json
from ghosttrain.study.ledger import (
    Kept,
    Numbers,
    Row,
    numbers,
    numbers_of,
    read_curve,
    read_runs,
)
from ghosttrain.study.report import is_of_boxes, learning_curve, validate_metrics
from ghosttrain.study.study_pictures import Curve
from ghosttrain.study.table import markdown
from ghosttrain.text import first_fault, listed

LARGEST = 1_000_000
"""Bytes that a sweep's file about a run may have."""
NOT_ENDED = ("not run", "not finished")
"""Faults of a run that has not begun, and of one that has."""
PREVIOUS = "previous"
"""Control of a study whose arms add one thing after another."""


class Study(BaseModel):
    """A file of `conf/study/`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    about: str
    """The question that it answers, in one sentence."""
    overrides: list[str] = []
    """What all runs share, as typed on the command line."""
    axes: dict[str, dict[str, list[str]]] = Field(min_length=1)
    """Axis -> name of a choice -> its overrides."""
    control: str
    """What an arm is compared with: the arm that takes these choices, joined by ` + `, in place of
    its own of the same axes; or `previous`: the arm before it."""
    seeds: list[int] = Field(min_length=1)
    metric: str = "top1"
    """A column of `report.metrics`."""


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    arm: str
    seed: int
    words: list[str]
    """Its command line."""
    composed: Composed
    config: Config
    """As it is trained (`settled`)."""
    typed: str
    """What stands for its settings where its images and teacher are not here, or are others
    (`typed_hash`)."""
    folder: Path
    numbers: Numbers | None = None
    """Of its run folder, else of a row of `runs.csv`; None where it has not ended."""
    curve: Curve = field(default_factory=dict)
    """Held-out accuracy of the averaged weights; of the same source."""
    fault: str = ""
    """Why it has none; empty where it has some."""

    row: Row | None = None
    """Where its numbers are those of `runs.csv`."""

    @property
    def key(self) -> tuple[str, int]:
        """What stands for it in `runs.csv`, wherever its images and teacher lie."""
        return settings_hash(self.config), self.seed

    @property
    def typed_key(self) -> tuple[str, int]:
        """The same, wherever its images and teacher are not here, or are others."""
        return self.typed, self.seed


def study_names(names: Names) -> list[str]:
    """Return the studies there are, shipped and one's own."""
    paths = (path for root in names.conf for path in (root / "study").glob("*.yaml"))
    return sorted({path.stem for path in paths if path.is_file()})


def load_study(name: str, config_dir: str | None = None, metric: str | None = None) -> Study:
    """Read a study.

    Args:
        name: of a file in `conf/study/`, or in `study/` of one's own folder.
        config_dir: that folder.
        metric: in place of the one that the file names.

    Raises:
        UserError: there is none, or it does not say what a study says; there is no such metric.
    """
    names = Names(config_dir)
    known = study_names(names)
    if name not in known:
        raise UserError(f"there is no study {name!r}.{did_you_mean(name, known, len(known))}")
    paths = (root / "study" / f"{name}.yaml" for root in names.conf)
    path = next(path for path in paths if path.is_file())
    try:
        study = Study.model_validate(load_yaml(path))
    except ValidationError as error:
        raise UserError(
            f"{path}: {first_fault(error)}; a study says about, axes, control and seeds: type them "
            "as conf/study/ladder.yaml does"
        ) from None
    if metric is not None:
        study = study.model_copy(update={"metric": metric})
    validate_metrics([study.metric])
    if len(_arms(study)) < 2:
        raise UserError(f"{path}: one arm alone compares nothing; write a second choice in axes")
    if study.control == PREVIOUS and any(PREVIOUS in axis for axis in study.axes.values()):
        raise UserError(
            f"{path}: the control {PREVIOUS!r} is the arm before, and a choice of axes has that "
            "name too; give the choice another"
        )
    if not controls(study):
        raise UserError(
            f"{path}: the control {study.control!r} is no arm, no choice of one axis and not "
            f"{PREVIOUS!r}; there are {', '.join(_arms(study))}"
        )
    if len({*study.seeds}) < len(study.seeds):
        raise UserError(f"{path}: a seed stands twice in {study.seeds}")
    every = [*study.overrides, *(word for words in _arms(study).values() for word in words)]
    if seed := next((word for word in every if _setting_of(word) == "seed"), None):
        raise UserError(f"{path}: {seed!r}: the seeds of a study stand below seeds")
    return study


def _arms(study: Study) -> dict[str, list[str]]:
    """Return arm -> its overrides."""
    choices = itertools.product(*(axis.items() for axis in study.axes.values()))
    return {
        " + ".join(name for name, _ in chosen): [word for _, words in chosen for word in words]
        for chosen in choices
    }


def controls(study: Study) -> dict[str, str]:
    """Return arm -> the arm that it is compared with; nothing where the control is none."""
    arms = list(_arms(study))
    if study.control == PREVIOUS:
        return dict(zip(arms[1:], arms, strict=False))
    if study.control in arms:
        return {arm: study.control for arm in arms if arm != study.control}
    axes, wanted = list(study.axes.values()), study.control.split(" + ")
    places = [[i for i, axis in enumerate(axes) if choice in axis] for choice in wanted]
    fixed = {found[0]: choice for found, choice in zip(places, wanted, strict=True) if found}
    if len(fixed) < len(wanted) or max(map(len, places)) > 1:
        return {}
    found = {}
    for chosen in itertools.product(*axes):
        control = " + ".join(fixed.get(i, choice) for i, choice in enumerate(chosen))
        found[" + ".join(chosen)] = control
    return {arm: control for arm, control in found.items() if arm != control}


def study_cells(
    study: Study,
    overrides: Sequence[str],
    config_dir: str | None,
    out: Path | None = None,
    to_run: bool = True,
) -> list[Cell]:
    """Compose every run of a study and look what became of it.

    Args:
        study: what to compare.
        overrides: of all runs: the data, a smaller model; `seed=0,1` chooses other seeds.
        config_dir: the user's own groups and recipes.
        out: folder with the `runs.csv` of runs that count as finished wherever they ran.
        to_run: whether images and weights must be on this machine.

    Raises:
        UserError: a run has a mistake; two arms are the same run; `runs.csv` is damaged.
    """
    kept = kept_runs(out)
    seeds, typed = _seeds(study, overrides)
    cells: list[Cell] = []
    run_in: dict[Path, str] = {}
    for seed in seeds:  # all arms of a seed first: a study that is stopped early has whole pairs
        arm_of: dict[str, str] = {}
        for arm, words in _arms(study).items():
            line = [*_words([*study.overrides, *typed], words), f"seed={seed}"]
            try:
                composed = compose(line, config_dir, needs_data=to_run, needs_weights=to_run)
            except UserError as error:
                raise UserError(f"arm {arm!r}: {error}") from None
            _validate_metric(study.metric, arm, composed.config)
            config = settled(composed)
            same = arm_of.setdefault(settings_hash(config), arm)
            if same != arm:
                raise UserError(
                    f"arms {same!r} and {arm!r} are the same run: change one of them in the "
                    "study, or leave out of the command what sets both alike"
                )
            folder, run = run_folder(config), f"{arm!r}, seed {seed}"
            if folder in run_in:
                raise UserError(
                    f"{run_in[folder]} and {run} have one folder, {folder}: leave run.name out, "
                    "and each run has its own"
                )
            run_in[folder] = run
            typed_as = _typed_hash(line, composed, config_dir)
            cells.append(Cell(arm, seed, line, composed, config, typed_as, folder))
    return looked_at(study, cells, kept)


def _typed_hash(line: Sequence[str], composed: Composed, config_dir: str | None) -> str:
    """Return what stands for a run also where nobody can count its images."""
    config = composed.config
    if config.budget == "small" and not budget_is_typed(line):
        whole = [*line, "budget=full"]
        config = compose(whole, config_dir, False, needs_data=False, needs_weights=False).config
    return typed_hash(config, composed.arguments)


def budget_is_typed(words: Sequence[str]) -> bool:
    """Whether a command line names its budget, so that no number of images chooses it."""
    return any(_setting_of(word) == "budget" for word in words)


def kept_runs(out: Path | None) -> Kept:
    """Return the rows of `runs.csv` in a folder.

    Raises:
        UserError: the file is damaged.
    """
    return {} if out is None else read_runs(out / "runs.csv")


def looked_at(study: Study, cells: Sequence[Cell], kept: Kept) -> list[Cell]:
    """Return the cells with what became of their runs by now, here or as a row of `runs.csv`."""
    now: list[Cell] = []
    codes = _exit_codes({expanded(cell.config.run.root) for cell in cells})
    for cell in cells:
        found, fault = _outcome(cell.folder, cell.config, study.metric)
        if fault in NOT_ENDED and (code := codes.get(str(cell.folder.resolve()))):
            fault = f"failed (exit code {code})"
        curve = {} if found is None else learning_curve(read_metrics(cell.folder))
        row = kept.get(cell.key) or kept.get(cell.typed_key) if found is None else None
        if row is not None:
            found, curve = numbers(row), read_curve(row["curve"])
            fault = f"{fault}; its row in runs.csv counts" if fault.startswith("damaged") else ""
        if found is not None and study.metric not in found:
            fault = f"finished, without {study.metric}"
        now.append(replace(cell, numbers=found, curve=curve, fault=fault, row=row))
    return now


def _exit_codes(roots: Collection[Path]) -> dict[str, int]:
    """Return run folder -> how the newest sweep that ran it says that it ended."""
    files = [file for root in roots for file in (root / ".sweeps").glob("*/*.json")]
    codes = {}
    for file in sorted(files):  # a sweep is named by its time
        with suppress(OSError, Damaged, KeyError):
            outcome = read_json(file, LARGEST)
            if not outcome["elsewhere"]:
                codes[outcome["run"]] = outcome["exit_code"]
    return codes


def _validate_metric(metric: str, arm: str, config: Config) -> None:
    if config.detects != is_of_boxes(metric):
        does = "detects" if config.detects else "classifies"
        raise UserError(
            f"arm {arm!r} {does}, and the study goes by the metric {metric}; type --metric "
            f"{judged_by(config)}, or write metric: {judged_by(config)} in its file"
        )


def _seeds(study: Study, overrides: Sequence[str]) -> tuple[list[int], list[str]]:
    """Take `seed=0,1` out of the overrides."""
    typed = [word for word in overrides if _setting_of(word) != "seed"]
    given = [word for word in overrides if _setting_of(word) == "seed"]
    if not given:
        return study.seeds, typed
    try:
        seeds = [int(text) for text in given[-1].partition("=")[2].split(",")]
    except ValueError:
        raise UserError(f"{given[-1]!r}: whole numbers, such as seed=0,1,2") from None
    if len({*seeds}) < len(seeds):
        raise UserError(f"{given[-1]!r}: a seed stands twice")
    return seeds, typed


def _words(shared: Sequence[str], arm: Sequence[str]) -> list[str]:
    """Return what all arms share and what one says itself. A later word replaces an earlier one of
    the same setting; of a group that the arm switches off (`teacher=none`) nothing shared is left.
    """
    off = {word.removesuffix("=none") for word in arm if word.endswith("=none")}
    left = [word for word in shared if _setting_of(word).partition(".")[0] not in off]
    return list({_setting_of(word): word for word in [*left, *arm]}.values())


def _setting_of(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def _outcome(folder: Path, config: Config, metric: str) -> tuple[Numbers | None, str]:
    """Return the numbers of a run, or why there are none."""
    try:
        result = read_result(folder)
    except UserError as error:
        return None, f"damaged: {error}"
    if result is not None and result["settings"] == settings_hash(config):
        return numbers_of(result, [metric]), ""
    return None, NOT_ENDED[has_begun(folder)]


def list_studies(config_dir: str | None) -> str:
    """Return a line for each study."""
    names = study_names(Names(config_dir))
    studies = {name: load_study(name, config_dir) for name in names}
    rows = [["study", "arms", "seeds", "question"]]
    rows += [
        [name, listed(list(_arms(study)), 4), str(len(study.seeds)), study.about]
        for name, study in studies.items()
    ]
    return "\n".join(markdown(rows))

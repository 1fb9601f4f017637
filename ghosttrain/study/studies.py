"""A study: what is compared, with which seeds, and against what (`conf/study/NAME.yaml`).

A study says its axes, each a list of named overrides; an arm takes one of every axis. Every arm
runs with every seed, through the same sweep as `-m`. What a run is stays the run's own affair: the
study finds the folder of each by its settings, so runs that are there already count.
"""

from __future__ import annotations

import itertools
import math
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ghosttrain.config.compose import Composed, compose
from ghosttrain.config.identity import settings_hash
from ghosttrain.config.names import Names
from ghosttrain.config.schema import Config, TrainConfig
from ghosttrain.engine.folder import has_begun, run_folder
from ghosttrain.engine.identify import settled
from ghosttrain.engine.run_files import read_result
from ghosttrain.errors import UserError, did_you_mean
from ghosttrain.files import read_limited, write_text
from ghosttrain.study.ledger import Numbers, numbers, numbers_of, read_runs, write_runs
from ghosttrain.study.report import spread, title_of, validate_metrics
from ghosttrain.study.stats import Difference, holm, paired_difference, seeds_needed
from ghosttrain.study.sweep import name_failures, run_cells
from ghosttrain.study.table import markdown
from ghosttrain.text import clock, first_fault, listed

LARGEST = 1_000_000
"""Bytes that a file of a study may have."""


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
    """The arm that the others are compared with: its choices, joined by ` + `."""
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
    folder: Path
    numbers: Numbers | None
    """Of its run folder, else of `runs.csv`; None where it has not ended."""
    fault: str
    """Why it has none; empty where it has some."""

    @property
    def key(self) -> tuple[str, int]:
        """What stands for it in `runs.csv`."""
        return settings_hash(self.composed.config), self.seed


def study_names(names: Names) -> list[str]:
    """Return the studies there are, shipped and one's own."""
    return sorted({path.stem for root in names.conf for path in (root / "study").glob("*.yaml")})


def load_study(name: str, config_dir: str | None = None) -> Study:
    """Read a study.

    Args:
        name: of a file in `conf/study/`, or in `study/` of one's own folder.
        config_dir: that folder.

    Raises:
        UserError: there is none, or it does not say what a study says.
    """
    names = Names(config_dir)
    known = study_names(names)
    if name not in known:
        raise UserError(
            f"there is no study {name!r}; there are {', '.join(known)}.{did_you_mean(name, known)}"
        )
    paths = (root / "study" / f"{name}.yaml" for root in names.conf)
    path = next(path for path in paths if path.is_file())
    try:
        study = Study.model_validate(yaml.safe_load(read_limited(path, LARGEST)))
    except ValidationError as error:
        raise UserError(f"{path}: {first_fault(error)}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    validate_metrics([study.metric])
    arms = list(_arms(study))
    if study.control not in arms:
        raise UserError(
            f"{path}: the control {study.control!r} is no arm; there are {', '.join(arms)}"
        )
    if len({*study.seeds}) < len(study.seeds):
        raise UserError(f"{path}: a seed stands twice in {study.seeds}")
    return study


def _arms(study: Study) -> dict[str, list[str]]:
    """Return arm -> its overrides."""
    choices = itertools.product(*(axis.items() for axis in study.axes.values()))
    return {
        " + ".join(name for name, _ in chosen): [word for _, words in chosen for word in words]
        for chosen in choices
    }


def study_cells(
    study: Study, overrides: Sequence[str], config_dir: str | None, out: Path | None = None
) -> list[Cell]:
    """Compose every run of a study and look what became of it.

    Args:
        study: what to compare.
        overrides: of all runs: the data, a smaller model; `seed=0,1` chooses other seeds.
        config_dir: the user's own groups and recipes.
        out: folder with the `runs.csv` of runs that count as finished wherever they ran.

    Raises:
        UserError: a run has a mistake; two arms are the same run; `runs.csv` is damaged.
    """
    kept = {} if out is None else read_runs(out / "runs.csv")
    seeds, typed = _seeds(study, overrides)
    cells: list[Cell] = []
    for seed in seeds:  # all arms of a seed first: a study that is stopped early has whole pairs
        arm_of: dict[str, str] = {}
        for arm, words in _arms(study).items():
            line = _later_wins([*study.overrides, *words, *typed, f"seed={seed}"])
            try:
                composed = compose(line, config_dir)
            except UserError as error:
                raise UserError(f"arm {arm!r}: {error}") from None
            config = settled(composed)
            same = arm_of.setdefault(settings_hash(config), arm)
            if same != arm:
                raise UserError(
                    f"arms {same!r} and {arm!r} are the same run: change one of them in the "
                    "study, or leave out of the command what sets both alike"
                )
            folder = run_folder(config)
            found, fault = _outcome(folder, config, study.metric)
            row = kept.get((settings_hash(composed.config), seed))
            if found is None and row is not None:
                found, fault = numbers(row), ""
            cells.append(Cell(arm, seed, line, composed, folder, found, fault))
    return cells


def _seeds(study: Study, overrides: Sequence[str]) -> tuple[list[int], list[str]]:
    """Take `seed=0,1` out of the overrides."""
    typed = [word for word in overrides if not word.startswith("seed=")]
    given = [word for word in overrides if word.startswith("seed=")]
    if not given:
        return study.seeds, typed
    try:
        seeds = [int(text) for text in given[-1].removeprefix("seed=").split(",")]
    except ValueError:
        raise UserError(f"{given[-1]!r}: whole numbers, such as seed=0,1,2") from None
    if len({*seeds}) < len(seeds):
        raise UserError(f"{given[-1]!r}: a seed stands twice")
    return seeds, typed


def _later_wins(words: Sequence[str]) -> list[str]:
    """Leave out a word whose setting a later one says again: an arm may change what all share, and
    the command line what an arm says.
    """
    last = {word.partition("=")[0].lstrip("+~"): word for word in words}
    return list(last.values())


def _outcome(folder: Path, config: Config, metric: str) -> tuple[Numbers | None, str]:
    """Return the numbers of a run, or why there are none."""
    try:
        result = read_result(folder)
    except UserError as error:
        return None, f"damaged: {error}"
    if result is not None and result["settings"] == settings_hash(config):
        return numbers_of(result, [metric]), ""
    return None, "not finished" if has_begun(folder) else "not run"


def run_study(
    name: str,
    overrides: Sequence[str],
    hydra_words: list[str],
    config_dir: str | None,
    out: Path | None = None,
) -> int:
    """Run what is missing and print the report; return 0, or 1 when a run failed.

    Raises:
        UserError: a run has a mistake; nothing was started.
    """
    study = load_study(name, config_dir)
    cells = study_cells(study, overrides, config_dir, out)
    missing = [cell for cell in cells if cell.numbers is None]
    print(_plan(name, study, cells))
    if not missing:
        print(study_report(name, study, cells, out))
        return 0
    lines = Names(config_dir).lines([cell.words for cell in missing], hydra_words)
    _, failed = run_cells(lines, [cell.composed for cell in missing], hydra_words, config_dir)
    cells = study_cells(study, overrides, config_dir, out)
    print("\n" + study_report(name, study, cells, out))
    return name_failures(failed)


def _plan(name: str, study: Study, cells: Sequence[Cell]) -> str:
    """Return what will run, and what it will cost as far as the finished runs say."""
    done = [cell.numbers for cell in cells if cell.numbers is not None]
    arms = list(dict.fromkeys(cell.arm for cell in cells))
    seeds = sorted({cell.seed for cell in cells})
    lines = [
        f"study {name}: {study.about}",
        f"arms: {', '.join(arms)}; control: {study.control}",
        f"runs: {len(cells)} = {len(arms)} arms x {len(seeds)} seeds "
        f"({', '.join(map(str, seeds))}); {len(done)} finished, {len(cells) - len(done)} to run",
    ]
    lines += _faults(cells)
    if done and len(done) < len(cells):
        mean = statistics.mean(found["seconds"] for found in done)
        lines.append(f"time: about {clock(mean * (len(cells) - len(done)))}, one after another")
    return "\n".join(lines)


def study_report(name: str, study: Study, cells: Sequence[Cell], out: Path | None = None) -> str:
    """Return what the finished runs show, as Markdown; with `out`, write it there as `report.md`
    and the runs as `runs.csv`, which keeps the rows it has.

    Raises:
        UserError: `out` cannot be written, or its `runs.csv` is damaged.
    """
    text = _markdown(name, study, cells)
    if out is not None:
        rows = {cell.key: _row(cell) for cell in cells if cell.numbers is not None}
        try:
            write_runs(out / "runs.csv", list({**read_runs(out / "runs.csv"), **rows}.values()))
            write_text(out / "report.md", text + "\n")
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror}; type another --out") from None
    return text


def _row(cell: Cell) -> dict[str, Any]:
    """Return what `runs.csv` keeps of a finished run."""
    settings, seed = cell.key
    command = shlex.join(["python", "-m", "ghosttrain", *cell.words])
    labels = {"arm": cell.arm, "seed": seed, "settings": settings, "command": command}
    return {**labels, **(cell.numbers or {})}


def _markdown(name: str, study: Study, cells: Sequence[Cell]) -> str:
    """Return the report.

    An arm is compared with the control over the seeds that both finished: the mean difference, its
    95 % interval (paired t), and p corrected for the number of arms (Holm). Runs that did not
    finish are listed below the table and are in no mean.
    """
    values = _values(study, cells)
    control = values[study.control]
    differences = {
        arm: paired_difference(of_arm, control)
        for arm, of_arm in values.items()
        if arm != study.control and of_arm.keys() & control.keys()
    }
    p_values = dict(zip(differences, holm([d.p for d in differences.values()]), strict=True))
    metric = title_of(study.metric)
    rows = [["arm", "n", metric, "less control", "95 % interval", "p (Holm)"]]
    rows[0] += ["MACs", "parameters", "images/s", "time"]
    for arm, of_arm in values.items():
        rows.append([arm, str(len(of_arm)), spread(list(of_arm.values()) or [None])])
        rows[-1] += _difference(differences.get(arm), p_values.get(arm), arm == study.control)
        rows[-1] += _cost([c.numbers for c in cells if c.arm == arm and c.numbers is not None])
    faults = _faults(cells)
    heading = [f"# {name}: {_setting(cells)}", "", study.about, ""]
    note = [
        "",
        f"Control: {study.control}. n: finished seeds; ±: standard deviation over them; the",
        "difference, its interval and p are paired over the seeds that both finished; MACs and",
        "parameters after fusing; images/s and time in training, on the machine of each run.",
    ]
    return "\n".join([*heading, *markdown(rows), *note, *(["", *faults] if faults else [])])


def _values(study: Study, cells: Sequence[Cell]) -> dict[str, dict[int, float]]:
    """Return arm -> seed -> metric of the finished runs."""
    values: dict[str, dict[int, float]] = {}
    for cell in cells:
        of_arm = values.setdefault(cell.arm, {})
        if cell.numbers is not None and study.metric in cell.numbers:
            of_arm[cell.seed] = cell.numbers[study.metric]
    return values


def _faults(cells: Sequence[Cell]) -> list[str]:
    """Return a line for each arm and reason why runs of it are missing."""
    missing: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        if cell.fault:
            missing.setdefault((cell.arm, cell.fault), []).append(cell)
    return [
        f"- {fault}: {arm}, seed {', '.join(str(cell.seed) for cell in found)}"
        for (arm, fault), found in missing.items()
    ]


def _setting(cells: Sequence[Cell]) -> str:
    """Return data, budget and length: what the numbers hold for."""
    configs = [cell.composed.config for cell in cells]
    said: dict[str, set[str]] = {
        "data": {config.data.name for config in configs},
        "model": {config.model.name for config in configs},
        "budget": {config.budget for config in configs},
        "length": {_length(config.train) for config in configs},
        "px": {str(config.data.eval_size) for config in configs},
    }
    same = {key: next(iter(found)) for key, found in said.items() if len(found) == 1}
    return ", ".join(f"{key} {text}" for key, text in same.items())


def _length(train: TrainConfig) -> str:
    return f"{train.epochs} epochs" if train.max_steps is None else f"{train.max_steps} steps"


def _difference(difference: Difference | None, p: float | None, is_control: bool) -> list[str]:
    if is_control:
        return ["control", "", ""]
    if difference is None:
        return ["-", "-", "-"]
    mean = f"{difference.mean:+.2f}"
    if p is None or math.isnan(p):
        return [mean, "n < 2", "-"]
    return [mean, f"{difference.low:+.2f} to {difference.high:+.2f}", f"{p:.3f}"]


def _cost(runs: Sequence[Numbers]) -> list[str]:
    if not runs:
        return ["-"] * 4
    return [
        f"{runs[0]['macs'] / 1e6:.1f} M",
        f"{runs[0]['parameters'] / 1e6:.2f} M",
        f"{statistics.mean(run['images_per_second'] for run in runs):.0f}",
        clock(statistics.mean(run["seconds"] for run in runs)),
    ]


def study_power(study: Study, cells: Sequence[Cell], difference: float) -> str:
    """Return how many seeds would find this difference, from the spread so far, as Markdown.

    Args:
        study: what is compared.
        cells: its runs.
        difference: the smallest that matters, in the unit of the metric.

    Raises:
        UserError: no arm has two seeds in common with the control yet.
    """
    finished = _values(study, cells)
    control = finished.pop(study.control)
    rows = [["arm", "pairs", "deviation of the differences", "seeds needed"]]
    for arm, of_arm in finished.items():
        pairs = [of_arm[seed] - control[seed] for seed in of_arm if seed in control]
        if len(pairs) > 1:
            needed = seeds_needed(difference, statistics.stdev(pairs))
            text = "more than 1000" if needed is None else str(needed)
            rows.append([arm, str(len(pairs)), f"{statistics.stdev(pairs):.2f}", text])
    if len(rows) == 1:
        raise UserError(
            f"no arm has two finished seeds in common with the control {study.control!r}: run the "
            "study first"
        )
    head = f"To find a difference of {difference:g} with a chance of 80 % (paired t-test at 5 %):"
    return "\n".join([head, "", *markdown(rows)])


def list_studies(config_dir: str | None) -> str:
    """Return a line for each study."""
    names = study_names(Names(config_dir))
    studies = {name: load_study(name, config_dir) for name in names}
    rows = [["study", "arms", "seeds", "question"]]
    rows += [
        [name, listed(list(_arms(study)), 9), str(len(study.seeds)), study.about]
        for name, study in studies.items()
    ]
    return "\n".join(markdown(rows))

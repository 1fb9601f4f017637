"""`study run`: what is missing of a study, through the sweep."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path

from ghosttrain.config.names import Names
from ghosttrain.study.cost import Known, run_cost
from ghosttrain.study.studies import Cell, Study, kept_runs, load_study, looked_at, study_cells
from ghosttrain.study.study_report import keep_rows, study_report
from ghosttrain.study.study_words import faults_of
from ghosttrain.study.sweep import name_failures, run_cells
from ghosttrain.study.trial import kept_trial
from ghosttrain.text import clock, counted


def run_study(
    name: str,
    overrides: Sequence[str],
    hydra_words: list[str],
    config_dir: str | None,
    out: Path | None = None,
    metric: str | None = None,
) -> int:
    """Run what is missing and print the report; return 0, or 1 when a run failed.

    Raises:
        UserError: a run has a mistake; nothing was started.
    """
    study = load_study(name, config_dir, metric)
    cells = study_cells(study, overrides, config_dir, out)
    missing = [cell for cell in cells if cell.numbers is None]
    print(_plan(name, study, cells))
    if not missing:
        print(study_report(name, study, cells, out))
        return 0
    keep_rows(cells, out)  # also to know before the first run that the folder can be written
    lines = Names(config_dir).lines([cell.words for cell in missing], hydra_words)
    try:
        _, failed, elsewhere = run_cells(
            lines, [cell.composed for cell in missing], hydra_words, config_dir
        )
    finally:
        cells = looked_at(study, cells, kept_runs(out))
        keep_rows(cells, out)  # those of a study that was stopped too
    print("\n" + study_report(name, study, cells, out))
    return name_failures(failed, elsewhere)


def _plan(name: str, study: Study, cells: Sequence[Cell]) -> str:
    """Return what will run, and what it will cost as far as the finished runs say."""
    done = [cell.numbers for cell in cells if cell.numbers is not None]
    arms = list(dict.fromkeys(cell.arm for cell in cells))
    seeds = sorted({cell.seed for cell in cells})
    lines = [
        f"study {name}: {study.about}",
        f"arms: {', '.join(arms)}; control: {study.control}",
        f"runs: {len(cells)} = {len(arms)} arms x {counted(len(seeds), 'seed')} "
        f"({', '.join(map(str, seeds))}); {len(done)} finished, {len(cells) - len(done)} to run",
    ]
    lines += faults_of(cells)
    missing = [cell for cell in cells if cell.numbers is None]
    if missing:
        lines.append(_cost(cells, missing))
    return "\n".join(lines)


def _cost(cells: Sequence[Cell], missing: Sequence[Cell]) -> str:
    """Return what is left to do: in time by the finished runs of the same arm, else by a trial of
    such a run on this device (`cost --measure`), else by the finished runs of any arm; in epochs or
    steps where none of them is known.
    """
    seconds: dict[str, list[float]] = {}
    for cell in cells:
        if cell.numbers is not None:
            seconds.setdefault(cell.arm, []).append(cell.numbers["seconds"])
    any_arm = [each for of_arm in seconds.values() for each in of_arm]
    known, left = Known(), 0.0
    for cell in missing:
        of_arm = seconds.get(cell.arm)
        each = statistics.mean(of_arm) if of_arm else _by_trial(cell, known)
        if each is None and not any_arm:
            line = f"{_length(missing)}; the time is known when a run has finished"
            if cell.composed.config.detects:  # `cost` is for classification
                return line
            trial = f"python -m ghosttrain cost {shlex.join(cell.composed.arguments)} --measure"
            return f"{line}, or by a trial: {trial}"
        left += statistics.mean(any_arm) if each is None else each
    return f"time: about {clock(left)}, one after another"


def _by_trial(cell: Cell, known: Known) -> float | None:
    trial = kept_trial(cell.config)
    return None if trial is None else run_cost(cell.composed, known, trial=trial).seconds


def _length(missing: Sequence[Cell]) -> str:
    runs = [cell.composed.config.train for cell in missing]
    steps = [train.max_steps for train in runs if train.max_steps is not None]
    epochs = [train.epochs for train in runs if train.max_steps is None]
    parts = [f"{sum(epochs):,} epochs"] * bool(epochs) + [f"{sum(steps):,} steps"] * bool(steps)
    return f"length: {' and '.join(parts)} in all"

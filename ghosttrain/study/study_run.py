"""`study run`: what is missing of a study, through the sweep."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from ghosttrain.config.names import Names
from ghosttrain.study.studies import Cell, Study, load_study, study_cells
from ghosttrain.study.study_report import faults_of, study_report
from ghosttrain.study.sweep import name_failures, run_cells
from ghosttrain.text import clock


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
    lines += faults_of(cells)
    if done and len(done) < len(cells):
        mean = statistics.mean(found["seconds"] for found in done)
        lines.append(f"time: about {clock(mean * (len(cells) - len(done)))}, one after another")
    return "\n".join(lines)

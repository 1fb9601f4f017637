"""`runs.csv` of a study: its finished runs, as they are kept in a repository beside the report.

A row counts as a finished run wherever the file is, also where the run folder is not: so a study
that was begun on one machine goes on on another.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ghosttrain.engine.metrics import largest
from ghosttrain.errors import UserError
from ghosttrain.files import read_limited, write_text
from ghosttrain.study.report import METRICS, value_of

LARGEST = 100_000_000
"""Bytes that a file may have."""
LABELS = ("arm", "seed", "settings", "command", "curve")
"""Columns that are no numbers; `settings` is the hash in the name of the run folder; `curve` is
`STEP:TOP1 STEP:TOP1 ...`, of detectors AP; held out, averaged weights."""
LATER = ("typed", "code", "started")
"""Columns that a file may lack: the hash of the settings with paths as typed; the program and the
time, of `provenance.json`."""
COSTS = ("macs", "parameters", "images_per_second", "seconds")
"""After fusing; in training; of the whole run."""

Numbers = Mapping[str, float]
"""Column -> number of a finished run; a column that it has not is left out."""
Row = dict[str, str]
"""A finished run as it stands in `runs.csv`."""
Kept = dict[tuple[str, int], Row]
"""(settings, seed) -> row, and (typed, seed) -> row."""


def numbers_of(result: Mapping[str, Any], metrics: Sequence[str]) -> Numbers:
    """Return what is kept of a `result.json`.

    Args:
        result: of a finished run.
        metrics: columns of `report.metrics` besides `METRICS`.
    """
    values = {name: value_of(result, name) for name in [*METRICS, *metrics]}
    return {
        **{name: value for name, value in values.items() if value is not None},
        **_held_out(result["classes"]),
        "macs": result["model"]["macs_fused"],
        "parameters": result["model"]["params_fused"],
        "images_per_second": result["images_per_second"],
        "seconds": result["seconds"],
    }


def _held_out(classes: Mapping[str, Any]) -> Numbers:
    """Return how many images a classifier is judged by, and what always naming the largest class
    would reach.
    """
    if "images" not in classes:
        return {}
    return {"held_out": sum(classes["images"]), "always_top1": largest(classes["images"])[1]}


def curve_text(curve: Mapping[int, float]) -> str:
    """Return a curve as `runs.csv` keeps it, rounded to .01 %."""
    return " ".join(f"{step}:{value:.2f}" for step, value in curve.items())


def read_curve(text: str) -> dict[int, float]:
    """Undo `curve_text`.

    Raises:
        ValueError: the text is damaged.
    """
    points = (point.split(":") for point in text.split())
    return {int(step): float(value) for step, value in points}


def read_runs(path: Path) -> Kept:
    """Return the rows of a file; nothing where there is none.

    Raises:
        UserError: the file is none of a study, or a row is damaged.
    """
    if not path.exists():
        return {}
    text = read_limited(path, LARGEST)
    reader = csv.DictReader(io.StringIO(text.decode(errors="replace")))
    lacking = [name for name in (*LABELS, *COSTS) if name not in (reader.fieldnames or ())]
    if lacking:
        raise UserError(f"{path}: no runs.csv of a study: the column {lacking[0]!r} is missing")
    rows: Kept = {}
    for row in reader:
        try:
            numbers(row), read_curve(row["curve"])
            rows[row["settings"], int(row["seed"])] = row
            if row.get("typed"):
                rows[row["typed"], int(row["seed"])] = row
        except (TypeError, ValueError, AttributeError):
            raise UserError(
                f"{path}, line {reader.line_num}: damaged; delete the line, and its run counts as "
                "not run"
            ) from None
    return rows


def numbers(row: Mapping[str, str]) -> Numbers:
    """Return the numbers of a row.

    Raises:
        TypeError, ValueError: a cell is no finite number, or the row is short or long.
    """
    words = (*LABELS, *LATER)
    found = {key: float(text) for key, text in row.items() if key not in words and text != ""}
    if not {*COSTS} <= found.keys() or not all(map(math.isfinite, found.values())):
        raise ValueError
    return found


def write_runs(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of `LABELS`, metrics, `COSTS` and `LATER`; a column that a row has not stays
    empty.
    """
    every = dict.fromkeys(key for row in rows for key in row)
    metrics = [key for key in every if key not in (*LABELS, *COSTS, *LATER)]
    columns = [*LABELS[:2], *metrics, *COSTS, "settings", *LATER, "command", "curve"]
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, file.getvalue())

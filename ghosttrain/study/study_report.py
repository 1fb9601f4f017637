"""What a study shows: a Markdown table, `runs.csv`, pictures, and one page of HTML that holds them.

Everything is made of the cells of the study; runs that did not finish are listed and in no mean.
"""

from __future__ import annotations

import html
import math
import os
import shlex
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ghosttrain.engine.run_files import read_provenance
from ghosttrain.errors import UserError
from ghosttrain.files import Damaged, write_text
from ghosttrain.study.ledger import Numbers, curve_text, numbers, read_runs, write_runs
from ghosttrain.study.page import figure, page, table
from ghosttrain.study.published import published
from ghosttrain.study.report import (
    LOWER_IS_BETTER,
    judged_in_words,
    spread,
    title_of,
)
from ghosttrain.study.stats import (
    Difference,
    all_equal,
    holm,
    largest_deviation,
    paired_difference,
    seeds_needed,
)
from ghosttrain.study.studies import Cell, Study, controls
from ghosttrain.study.study_pictures import Curve, draw_effects, draw_learning, draw_pareto
from ghosttrain.study.study_words import control_in_words, note_of, setting, what_to_know
from ghosttrain.study.table import markdown
from ghosttrain.text import clock


def study_report(name: str, study: Study, cells: Sequence[Cell], out: Path | None = None) -> str:
    """Return what the finished runs show, as Markdown.

    An arm is compared with its control over the seeds that both finished: the mean difference, its
    95 % interval (paired t), and p corrected for the number of comparisons (Holm).

    Args:
        name: of the study.
        study: what is compared.
        cells: its runs.
        out: folder for `report.md`, `report.html`, the pictures, and `runs.csv`, which keeps the
            rows it has.

    Raises:
        UserError: `out` cannot be written, or its `runs.csv` is damaged.
    """
    rows = _table(study, cells)
    kept = {} if out is None else read_runs(out / "runs.csv")
    title = f"{name}: {setting(cells)}"
    faults, note = what_to_know(cells, kept), note_of(study, cells)
    below = ["", *note, *(["", *faults] if faults else [])]
    text = "\n".join([f"# {title}", "", study.about, "", *markdown(rows), *below])
    if out is None:
        return text
    keep_rows(cells, out)
    try:
        pictures = _draw(study, cells, out)
        shown = [
            line for picture, about in pictures.items() for line in ("", f"![{about}]({picture})")
        ]
        write_text(out / "report.md", "\n".join([text, *shown, *_commands(cells)]) + "\n")
        text_of_page = _page(title, study.about, rows, " ".join(note), faults, pictures, cells, out)
        write_text(out / "report.html", text_of_page)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; type another --out") from None
    return text


def keep_rows(cells: Sequence[Cell], out: Path | None) -> None:
    """Add the finished runs to `runs.csv`. Rows that it has stay as they stand, but for runs whose
    folders say other numbers now.

    Raises:
        UserError: `out` cannot be written, or its `runs.csv` is damaged.
    """
    if out is None:
        return
    kept = read_runs(out / "runs.csv")
    rows: dict[tuple[str, int], Mapping[str, Any]] = {
        (row["settings"], int(row["seed"])): row for row in kept.values()
    }
    for cell in cells:
        if cell.numbers is None or cell.row is not None:
            continue
        old = numbers(kept[cell.key]) if cell.key in kept else {}
        same_run = all(cell.numbers[key] == old[key] for key in cell.numbers.keys() & old.keys())
        if not cell.numbers.keys() <= old.keys() or not same_run:
            rows[cell.key] = {**(old if same_run else {}), **_row(cell)}
    try:
        write_runs(out / "runs.csv", list(rows.values()))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; type another --out") from None


def _row(cell: Cell) -> dict[str, Any]:
    """Return what `runs.csv` keeps of a finished run."""
    (settings, seed), (typed, _) = cell.key, cell.typed_key
    made: dict[str, Any] = {}
    with suppress(Damaged):
        made = read_provenance(cell.folder) or {}
    labels = {"arm": cell.arm, "seed": seed, "settings": settings, "typed": typed}
    labels |= {key: made.get(key, "") for key in ("code", "started")}
    labels |= {"command": _command(cell), "curve": curve_text(cell.curve)}
    return {**labels, **(cell.numbers or {})}


def _commands(cells: Sequence[Cell]) -> list[str]:
    """Return the command of each arm, of its first seed."""
    seeds = list(dict.fromkeys(cell.seed for cell in cells))
    others = f"; other seeds: {', '.join(map(str, seeds[1:]))}" if seeds[1:] else ""
    first = [cell for cell in cells if cell.seed == seeds[0]]
    blocks = [line for cell in first for line in (f"# {cell.arm}", _command(cell))]
    return ["", f"The command of each arm, seed {seeds[0]}{others}.", "", "```", *blocks, "```"]


def _command(cell: Cell) -> str:
    return shlex.join(["python", "-m", "ghosttrain", *cell.composed.arguments])


def _differences(study: Study, cells: Sequence[Cell]) -> dict[str, Difference]:
    """Return arm -> its difference to its control, where they have a seed in common."""
    values = values_of(study, cells)
    return {
        arm: paired_difference(values[arm], values[control])
        for arm, control in controls(study).items()
        if values[arm].keys() & values[control].keys()
    }


def _table(study: Study, cells: Sequence[Cell]) -> list[list[str]]:
    """Return a row for each arm, below their head."""
    differences = _differences(study, cells)
    beside, compared = ["ap50"] * (study.metric == "ap"), controls(study)
    corrected = holm([each.p for each in differences.values()], len(compared))
    p_values = dict(zip(differences, corrected, strict=True))
    rows = [["arm", "n", _metric_title(study.metric), "less control", "95 % interval", "p (Holm)"]]
    rows[0] += [*map(title_of, beside), "MACs", "parameters", "images/s", "time"]
    for arm, of_arm in values_of(study, cells).items():
        finished = [c.numbers for c in cells if c.arm == arm and c.numbers is not None]
        rows.append([arm, str(len(of_arm)), spread(list(of_arm.values()) or [None])])
        rows[-1] += _difference(
            differences.get(arm), p_values.get(arm), len(of_arm), arm not in compared
        )
        rows[-1] += [spread([run.get(name) for run in finished] or [None]) for name in beside]
        rows[-1] += _cost(finished)
    return rows


def _metric_title(metric: str) -> str:
    return title_of(metric) + " (lower is better)" * (metric in LOWER_IS_BETTER)


def _draw(study: Study, cells: Sequence[Cell], out: Path) -> dict[str, str]:
    """Draw what the finished runs allow; return file -> what it shows."""
    metric, pictures = title_of(study.metric), {}
    if differences := _differences(study, cells):
        control = control_in_words(study)[1]
        has_interval = any(each.pairs > 1 for each in differences.values())
        about = f"difference of each arm to {control}" + ", with its interval" * has_interval
        pictures["effects.png"] = about
        draw_effects(out / "effects.png", differences, control, _metric_title(study.metric))
    curves: dict[str, list[Curve]] = {}
    for cell in cells:
        if cell.curve:
            curves.setdefault(cell.arm, []).append(cell.curve)
    if curves:
        judged = judged_in_words([cell.composed.config for cell in cells])
        pictures["learning.png"] = f"held-out {judged} by steps; band: lowest to highest seed"
        draw_learning(out / "learning.png", curves, judged)
    macs = {cell.arm: cell.numbers["macs"] for cell in cells if cell.numbers is not None}
    values = values_of(study, cells)
    points = {
        arm: (macs[arm], statistics.mean(values[arm].values())) for arm in macs if values[arm]
    }
    beside = {
        f"{each.model}, {each.how} (published)": (cell.numbers["macs"], each.top1)
        for cell in cells
        if cell.numbers is not None
        for each in published(cell.config, study.metric)
    }
    if len({cost for cost, _ in points.values()}) > 1 or beside:
        pictures["pareto.png"] = f"{metric} against MACs, with the front"
        lower = study.metric in LOWER_IS_BETTER
        draw_pareto(out / "pareto.png", points, _metric_title(study.metric), beside, lower)
    return pictures


def _page(
    title: str,
    about: str,
    rows: Sequence[Sequence[str]],
    note: str,
    faults: Sequence[str],
    pictures: Mapping[str, str],
    cells: Sequence[Cell],
    out: Path,
) -> str:
    """Return the report as one file of HTML, the pictures in it."""
    missing = [f"<li>{html.escape(fault.removeprefix('- '))}</li>" for fault in faults]
    return page(
        title,
        [
            f"<p>{html.escape(about)}</p>",
            *table(rows),
            f'<p class="note">{html.escape(note)}</p>',
            *(["<h2>What to know of the runs</h2><ul>", *missing, "</ul>"] if missing else []),
            *(figure((out / file).read_bytes(), text) for file, text in pictures.items()),
            "<h2>Runs</h2><ul>",
            *(_run_line(cell, out) for cell in cells),
            "</ul>",
        ],
    )


def _run_line(cell: Cell, out: Path) -> str:
    """Return a run with its command; its name links to its folder where that is here."""
    name = html.escape(f"{cell.arm}, seed {cell.seed}")
    if cell.folder.is_dir():
        link = os.path.relpath(cell.folder.resolve(), out.resolve())
        name = f'<a href="{html.escape(quote(Path(link).as_posix()))}/">{name}</a>'
    return f"<li>{name}<br><code>{html.escape(_command(cell))}</code></li>"


def values_of(study: Study, cells: Sequence[Cell]) -> dict[str, dict[int, float]]:
    """Return arm -> seed -> metric of the finished runs."""
    values: dict[str, dict[int, float]] = {}
    for cell in cells:
        of_arm = values.setdefault(cell.arm, {})
        if cell.numbers is not None and study.metric in cell.numbers:
            of_arm[cell.seed] = cell.numbers[study.metric]
    return values


def _difference(
    difference: Difference | None, p: float | None, seeds: int, is_control: bool
) -> list[str]:
    if is_control:
        return ["control", "", ""]
    if difference is None:
        return ["-", "-", "-"]
    mean, pairs = f"{difference.mean:+.2f}", difference.pairs
    if p is None or math.isnan(p):
        return [mean, "1 pair", "-"]
    if math.isnan(difference.low):
        return [mean, f"{pairs} equal pairs", p_text(p)]
    fewer = f" ({pairs} pairs)" if pairs < seeds else ""
    return [mean, f"{difference.low:+.2f} to {difference.high:+.2f}{fewer}", p_text(p)]


def _cost(runs: Sequence[Numbers]) -> list[str]:
    if not runs:
        return ["-"] * 4
    return [
        f"{runs[0]['macs'] / 1e6:.1f} M",
        f"{runs[0]['parameters'] / 1e6:.2f} M",
        f"{statistics.median(run['images_per_second'] for run in runs):.0f}",
        clock(statistics.median(run["seconds"] for run in runs)),
    ]


def study_power(study: Study, cells: Sequence[Cell], difference: float) -> str:
    """Return how many seeds would find this difference, from the spread so far, as Markdown.

    Args:
        study: what is compared.
        cells: its runs.
        difference: the smallest that matters, in the unit of the metric.

    Raises:
        UserError: no arm has two seeds in common with its control yet.
    """
    finished, compared = values_of(study, cells), controls(study)
    level = 1 - 0.05 / len(compared)
    rows = [["arm", "pairs", "deviation of the differences", "at most", "seeds needed", "at most"]]
    for arm, control in compared.items():
        seeds = finished[arm].keys() & finished[control].keys()
        pairs = [finished[arm][seed] - finished[control][seed] for seed in sorted(seeds)]
        if len(pairs) > 1:
            deviation = 0.0 if all_equal(pairs) else statistics.stdev(pairs)
            row = [arm, str(len(pairs))]
            for each in (deviation, largest_deviation(deviation, len(pairs))):
                needed = seeds_needed(difference, each, level=level) if each else None
                text = str(needed) if needed else "more than 1000" if each else "pairs are equal"
                row += [f"{each:.2f}", text]
            rows.append([*row[:3], row[4], row[3], row[5]])
    if len(rows) == 1:
        raise UserError(
            f"no arm has two finished seeds in common with its control ({study.control}): run the "
            "study first"
        )
    head = f"To find a difference of {difference:g} with a chance of 80 % (paired t-test at 5 %"
    head += f" / {len(compared)} comparisons):" if len(compared) > 1 else "):"
    return "\n".join([head, "", *markdown(rows)])


def p_text(p: float) -> str:
    """Return a p value with three digits; none is 0."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"

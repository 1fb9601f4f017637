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
from pathlib import Path
from typing import Any

from ghosttrain.config.schema import TrainConfig
from ghosttrain.errors import UserError
from ghosttrain.files import write_text
from ghosttrain.study.ledger import Numbers, curve_text, read_runs, write_runs
from ghosttrain.study.page import figure, page, table
from ghosttrain.study.published import published
from ghosttrain.study.report import is_of_boxes, judged_in_words, spread, title_of
from ghosttrain.study.stats import Difference, holm, paired_difference, seeds_needed
from ghosttrain.study.studies import Cell, Study
from ghosttrain.study.study_pictures import Curve, draw_effects, draw_learning, draw_pareto
from ghosttrain.study.table import markdown
from ghosttrain.text import clock


def study_report(name: str, study: Study, cells: Sequence[Cell], out: Path | None = None) -> str:
    """Return what the finished runs show, as Markdown.

    An arm is compared with the control over the seeds that both finished: the mean difference, its
    95 % interval (paired t), and p corrected for the number of arms (Holm).

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
    title, faults = f"{name}: {_setting(cells)}", faults_of(cells)
    note = [*_note(study, cells), *_published(study, cells)]
    below = ["", *note, *(["", *faults] if faults else [])]
    text = "\n".join([f"# {title}", "", study.about, "", *markdown(rows), *below])
    if out is None:
        return text
    kept = read_runs(out / "runs.csv")
    kept |= {cell.key: _row(cell) for cell in cells if cell.numbers is not None}
    try:
        write_runs(out / "runs.csv", list(kept.values()))
        pictures = _draw(study, cells, out)
        shown = [
            line for picture, about in pictures.items() for line in ("", f"![{about}]({picture})")
        ]
        write_text(out / "report.md", "\n".join([text, *shown]) + "\n")
        text_of_page = _page(title, study.about, rows, " ".join(note), faults, pictures, cells, out)
        write_text(out / "report.html", text_of_page)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; type another --out") from None
    return text


def _row(cell: Cell) -> dict[str, Any]:
    """Return what `runs.csv` keeps of a finished run."""
    settings, seed = cell.key
    labels = {"arm": cell.arm, "seed": seed, "settings": settings, "command": _command(cell)}
    return {**labels, "curve": curve_text(cell.curve), **(cell.numbers or {})}


def _command(cell: Cell) -> str:
    return shlex.join(["python", "-m", "ghosttrain", *cell.words])


def _differences(study: Study, cells: Sequence[Cell]) -> dict[str, Difference]:
    """Return arm -> its difference to the control, where they have a seed in common."""
    values = values_of(study, cells)
    control = values.pop(study.control)
    return {
        arm: paired_difference(of_arm, control)
        for arm, of_arm in values.items()
        if of_arm.keys() & control.keys()
    }


def _table(study: Study, cells: Sequence[Cell]) -> list[list[str]]:
    """Return a row for each arm, below their head."""
    differences = _differences(study, cells)
    p_values = dict(zip(differences, holm([d.p for d in differences.values()]), strict=True))
    beside = ["ap50"] * (study.metric == "ap")
    rows = [["arm", "n", title_of(study.metric), "less control", "95 % interval", "p (Holm)"]]
    rows[0] += [*map(title_of, beside), "MACs", "parameters", "images/s", "time"]
    for arm, of_arm in values_of(study, cells).items():
        finished = [c.numbers for c in cells if c.arm == arm and c.numbers is not None]
        rows.append([arm, str(len(of_arm)), spread(list(of_arm.values()) or [None])])
        rows[-1] += _difference(differences.get(arm), p_values.get(arm), arm == study.control)
        rows[-1] += [spread([run.get(name) for run in finished] or [None]) for name in beside]
        rows[-1] += _cost(finished)
    return rows


def _note(study: Study, cells: Sequence[Cell]) -> list[str]:
    data = {cell.composed.config.data.name for cell in cells}
    usual, where = ("coco", "COCO") if is_of_boxes(study.metric) else ("imagenet", "ImageNet")
    return [
        f"Control: {study.control}. n: finished seeds; ±: standard deviation over them; the",
        "difference, its interval and p are paired over the seeds that both finished; MACs and",
        "parameters after fusing; images/s and time in training, on the machine of each run.",
        *_no_look(cells),
        *(
            [f"These are not {where} runs: what holds here need not hold there."]
            if data != {usual}
            else []
        ),
    ]


def _no_look(cells: Sequence[Cell]) -> list[str]:
    """Return a line about what a detector reaches that ignores the picture."""
    finished = [cell.numbers for cell in cells if cell.numbers is not None]
    found = sorted({run["no_look_ap"] for run in finished if "no_look_ap" in run})
    if not found:
        return []
    reached = " to ".join(f"{value:.2f}" for value in dict.fromkeys([found[0], found[-1]]))
    return [f"A detector that ignores the picture reaches {reached} % AP."]


def _published(study: Study, cells: Sequence[Cell]) -> list[str]:
    """Return a line for each published value of the networks of the study."""
    found = [each for cell in cells for each in published(cell.composed.config, study.metric)]
    return [
        f"Published: {each.model}, {each.how}: {each.top1} % ({each.source})."
        for each in dict.fromkeys(found)
    ]


def _draw(study: Study, cells: Sequence[Cell], out: Path) -> dict[str, str]:
    """Draw what the finished runs allow; return file -> what it shows."""
    metric, pictures = title_of(study.metric), {}
    if differences := _differences(study, cells):
        pictures["effects.png"] = f"difference of each arm to {study.control}, with its interval"
        draw_effects(out / "effects.png", differences, study.control, metric)
    curves: dict[str, list[Curve]] = {}
    for cell in cells:
        if cell.curve:
            curves.setdefault(cell.arm, []).append(cell.curve)
    if curves:
        pictures["learning.png"] = "held-out accuracy by steps; band: lowest to highest seed"
        judged = judged_in_words([cell.composed.config for cell in cells])
        draw_learning(out / "learning.png", curves, judged)
    macs = {cell.arm: cell.numbers["macs"] for cell in cells if cell.numbers is not None}
    values = values_of(study, cells)
    points = {
        arm: (macs[arm], statistics.mean(values[arm].values())) for arm in macs if values[arm]
    }
    if len({cost for cost, _ in points.values()}) > 1:
        pictures["pareto.png"] = f"{metric} against MACs, with the front"
        beside = {
            f"{each.model}, {each.how} (published)": (cell.numbers["macs"], each.top1)
            for cell in cells
            if cell.numbers is not None
            for each in published(cell.composed.config, study.metric)
        }
        draw_pareto(out / "pareto.png", points, metric, beside)
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
            *(["<h2>In no mean</h2><ul>", *missing, "</ul>"] if missing else []),
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
        name = f'<a href="{html.escape(Path(link).as_posix())}/">{name}</a>'
    return f"<li>{name}<br><code>{html.escape(_command(cell))}</code></li>"


def values_of(study: Study, cells: Sequence[Cell]) -> dict[str, dict[int, float]]:
    """Return arm -> seed -> metric of the finished runs."""
    values: dict[str, dict[int, float]] = {}
    for cell in cells:
        of_arm = values.setdefault(cell.arm, {})
        if cell.numbers is not None and study.metric in cell.numbers:
            of_arm[cell.seed] = cell.numbers[study.metric]
    return values


def faults_of(cells: Sequence[Cell]) -> list[str]:
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
    return [mean, f"{difference.low:+.2f} to {difference.high:+.2f}", p_text(p)]


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
    finished = values_of(study, cells)
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


def p_text(p: float) -> str:
    """Return a p value with three digits; none is 0."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"

"""`report RUN...`: results of finished runs side by side, mean and standard deviation over seeds.

Reads only `config.yaml` and `result.json`, so a table can be drawn again anywhere.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ghosttrain.config.identity import MOVED, result_settings, settings_hash
from ghosttrain.config.schema import Config
from ghosttrain.detect.coco_numbers import TITLES
from ghosttrain.engine.detection_words import COLUMNS, IGNORES
from ghosttrain.engine.folder import has_begun
from ghosttrain.engine.metrics import TOPS, WORDS, judged_by, verdict
from ghosttrain.engine.rows import read_metrics
from ghosttrain.engine.run_files import read_config, read_result
from ghosttrain.errors import UserError, did_you_mean
from ghosttrain.study.table import markdown
from ghosttrain.text import clock, listed, printable

MOST_CLASSES = 30
"""Lines of the table of classes."""


class Run(NamedTuple):
    """A finished run."""

    folder: Path
    config: Config
    result: dict[str, Any]


class Row(NamedTuple):
    """Runs that differ only in their seed."""

    runs: list[Run]
    label: list[str]
    """Recipe, data, model, image size."""
    settings: str
    """What tells it from the rows of the same recipe, data and model."""


BOX_METRICS = {name: f"EMA {TITLES[name]} %" for name in COLUMNS} | {
    "raw_ap": "raw AP %",
    "fused_ap": "fused AP %",
    "no_look_ap": f"{IGNORES} AP %",
}
"""Of detectors; `no_look_ap` is of the one that ignores the picture."""
METRICS = {
    "top1": "EMA top-1 %",
    "top5": "EMA top-5 %",
    "balanced": "balanced %",
    "macro_f1": "macro F1 %",
    "ece": "ECE %",
    "loss": "loss",
    "raw_top1": "raw top-1 %",
    "fused_top1": "fused top-1 %",
    **BOX_METRICS,
}
"""Choice of `report.metrics` -> its column; of the EMA weights where none is named."""
LOWER_IS_BETTER = ("ece", "loss")
OF_A_CLASS = {"recall": "recall %", "precision": "precision %", "ap": "AP %"}
"""`report.metrics=recall:NAME` -> its column; `ap` is of detectors."""


def report(
    folders: list[Path],
    metrics: Sequence[str] = (),
    classes: bool = False,
    curves: str | None = None,
) -> str:
    """Return a Markdown table, one row per group of runs that differ only in their seed, ordered by
    their settings; below it the runs that are not finished or cannot be read.

    Args:
        folders: runs, or folders that hold some.
        metrics: columns, of `METRICS` or `recall:CLASS`; none: `default_metrics`.
        classes: also a table of the recall of each class (of detectors its AP), and its difference
            to the first row.
        curves: a file: draw held-out accuracy by steps, a line for each row.

    Raises:
        UserError: a folder that is no run and holds none; an unknown column; no finished run to
            draw, or a file that cannot be written.
    """
    validate_metrics(metrics)
    finished, below = _collect(folders)
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in finished:
        groups.setdefault((run.config.recipe, _hash_of_row(run.config)), []).append(run)
    rows = _ordered(list(groups.values()))
    shown = metrics or default_metrics([run.result for run in finished])
    _validate_present(metrics, [run.result for run in finished])
    told_apart = [row.settings for row in rows]
    numbered = classes or curves is not None  # both speak of rows by their number
    head = ["recipe", "data", "model", "px", *(["settings"] if any(told_apart) else []), "seeds"]
    head = [*["row"] * numbered, *head]
    table = [[*head, *(title_of(name) for name in shown), "time"]]
    for number, row in enumerate(rows, 1):
        label = [*row.label, *([row.settings] if any(told_apart) else [])]
        label = [*[str(number)] * numbered, *label]
        results = [run.result for run in row.runs]
        numbers = [spread([value_of(result, name) for result in results]) for name in shown]
        seconds = statistics.mean(result["seconds"] for result in results)
        table.append([*label, _seeds([r.config for r in row.runs]), *numbers, clock(seconds)])
        below += _no_better(row, results)
    lines = [*markdown(table), *below]
    if classes and rows:
        lines += ["", *_classes(rows)]
    if curves is not None:
        lines.append(_draw(rows, curves))
    return "\n".join(lines)


def _collect(folders: list[Path]) -> tuple[list[Run], list[str]]:
    """Return the finished runs, and a line about each other one."""
    found = sorted({run.resolve() for folder in folders for run in _runs(folder)})
    finished, below, starts = [], [], 0
    for run in found:
        try:
            config, result = read_config(run), read_result(run)
        except UserError as error:
            below.append(f"damaged: {error}")
            continue
        if result is not None and result["settings"] == settings_hash(config):
            finished.append(Run(run, config, result))
        elif has_begun(run):
            below.append(f"not finished: {printable(str(run))}")
        else:
            starts += 1
    if starts:
        below.append(f"left out: {starts} start{'s' * (starts > 1)} of which no step was kept")
    return finished, below


def _ordered(groups: Sequence[list[Run]]) -> list[Row]:
    """Return rows by recipe, data, model and image size, then by the values that tell them apart:
    numbers by size, not by their digits.
    """
    differences = _differences([group[0].config for group in groups])
    rows = [
        (_natural([*_label(runs[0].config), *different.values()]), different, runs)
        for different, runs in zip(differences, groups, strict=True)
    ]
    return [
        Row(runs, _label(runs[0].config), " ".join(f"{k}={v}" for k, v in different.items()))
        for _, different, runs in sorted(rows, key=lambda row: row[0])
    ]


def _label(config: Config) -> list[str]:
    return [config.recipe, config.data.name, config.model.name, str(config.data.eval_size)]


def _natural(values: Sequence[object]) -> list[tuple[int, float, str]]:
    """Return what sorts nothing before numbers, and numbers before text."""
    keys = []
    for value in values:
        try:
            keys.append((1, float(str(value)), ""))
        except ValueError:
            keys.append((0 if value is None else 2, 0.0, str(value)))
    return keys


def _classes(rows: Sequence[Row]) -> list[str]:
    """Return a table of recall (of detectors AP) by class, where rows differ most first; rows of
    other classes than the first have no column.
    """
    first = rows[0].runs[0].result["classes"]
    names = first["names"]
    share, counted = ("ap", "boxes") if "ap" in first else ("recall", "images")
    records = [row.runs[0].result["classes"] for row in rows]
    same = [n for n, each in enumerate(records) if each["names"] == names and share in each]
    means = {
        n: [
            _mean([run.result["classes"][share][k] for run in rows[n].runs])
            for k in range(len(names))
        ]
        for n in same
    }
    table = [[f"{OF_A_CLASS[share]} of", counted, *(f"row {n + 1}" for n in same)]]
    table[0][3:] = [f"{title}, less row 1" for title in table[0][3:]]
    order = sorted(
        range(len(names)),
        key=lambda k: -max((abs(_less(means[n][k], means[0][k])) for n in same[1:]), default=0),
    )
    for k in order[:MOST_CLASSES]:
        others = [
            f"{_text(means[n][k])} ({_less(means[n][k], means[0][k]):+.2f})" for n in same[1:]
        ]
        table.append([names[k], str(first[counted][k]), _text(means[0][k]), *others])
    rest = len(names) - MOST_CLASSES
    return [
        *markdown(table),
        *([f"and {rest} more classes, which differ less"] if rest > 0 else []),
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return statistics.mean(numbers) if numbers else None


def _less(value: float | None, first: float | None) -> float:
    return value - first if value is not None and first is not None else 0.0


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _draw(rows: Sequence[Row], path: str) -> str:
    """Draw the rows' learning curves over each other; return a line about it."""
    from ghosttrain.study.study_pictures import draw_learning

    curves = {}
    for number, row in enumerate(rows, 1):
        of_row = [learning_curve(read_metrics(run.folder)) for run in row.runs]
        if all(of_row):
            curves[f"row {number}: {row.label[0]} {row.label[2]}"] = of_row
    if not curves:
        raise UserError("--curves: there is no finished run with a learning curve to draw")
    judged = judged_in_words([run.config for row in rows for run in row.runs])
    draw_learning(Path(path), curves, judged)
    return f"curves: {path}"


def _hash_of_row(config: Config) -> str:
    """Return the hash of what is the same in every run of a row: all but the seed and the fold."""
    if config.data.fold is None:
        return settings_hash(config)
    data = config.data.model_copy(update={"fold": 0})
    return settings_hash(config.model_copy(update={"data": data}))


def _seeds(configs: Sequence[Config]) -> str:
    """Return `3 (0, 1, 2)`, or with folds `5 (0; folds 0, 1, 2, 3, 4)`."""
    seeds = ", ".join(map(str, sorted({each.seed for each in configs} if _folds(configs) else
                                      [each.seed for each in configs])))  # fmt: skip
    folds = ", ".join(map(str, _folds(configs)))
    return f"{len(configs)} ({seeds}; folds {folds})" if folds else f"{len(configs)} ({seeds})"


def _folds(configs: Sequence[Config]) -> list[int]:
    return sorted({each.data.fold for each in configs if each.data.fold is not None})


def default_metrics(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the columns that say something of these results: top-5 where there are more than five
    classes, balanced accuracy where some class has more images than another.
    """
    detectors = ["ignoring" in result for result in results]
    if all(detectors):
        return ["ap", "ap50"]
    classes = [result["classes"] for result in results if "ignoring" not in result]
    names = [*["ap"] * any(detectors), "top1"]
    names += ["top5"] * any(len(each["names"]) > TOPS for each in classes)
    names += ["balanced"] * any(len(set(each["images"])) > 1 for each in classes)
    return [*names, "raw_top1", "fused_top1"]


def validate_metrics(names: Sequence[str]) -> None:
    """Refuse columns that there are not.

    Raises:
        UserError: naming those that there are.
    """
    for name in names:
        kind, _, of_class = name.partition(":")
        if name not in METRICS and not (kind in OF_A_CLASS and of_class):
            known = [*METRICS, *(f"{kind}:CLASS" for kind in OF_A_CLASS)]
            raise UserError(f"there is no metric {name!r}.{did_you_mean(name, known, len(known))}")


def _validate_present(names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> None:
    """Refuse columns of the other kind of network, or of a class that no run knows."""
    for name in names:
        of_class = name.partition(":")[2]
        same_kind = [r for r in results if ("ignoring" in r) == is_of_boxes(name)]
        classes = dict.fromkeys(known for r in same_kind for known in r["classes"]["names"])
        if results and not same_kind:
            raise UserError(f"no finished run here has the metric {name!r}")
        if results and of_class and of_class not in classes:
            raise UserError(
                f"{name!r}: no run here has this class; there are {listed(classes, 12)}"
            )


def is_of_boxes(name: str) -> bool:
    """Whether a column is of detectors."""
    return name.partition(":")[0] in BOX_METRICS


def title_of(name: str) -> str:
    """Return the head of a column."""
    kind, _, of_class = name.partition(":")
    return f"{OF_A_CLASS[kind]} of {of_class}" if of_class else METRICS[name]


def value_of(result: Mapping[str, Any], name: str) -> float | None:
    """Return the number of a column; None where this run has none."""
    kind, _, of_class = name.partition(":")
    classes, weights = result["classes"], result["weights"]
    if of_class:
        names = classes["names"]
        known = kind in classes and of_class in names
        return classes[kind][names.index(of_class)] if known else None
    rows = {"": weights.get("ema"), "no_look_": result.get("ignoring")}
    rows |= {f"{kind}_": weights.get(kind) for kind in ("raw", "fused")}
    prefix = next(prefix for prefix in (*list(rows)[1:], "") if name.startswith(prefix))
    value = (rows[prefix] or {}).get(name.removeprefix(prefix))
    return None if value == -1 else value  # -1: no object of this size


def _no_better(row: Row, results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line where no run of a row beats the largest class."""
    name = " ".join([*row.label[:3], *([row.settings] if row.settings else [])])
    if "ignoring" in results[0]:
        if any(r["weights"]["ema"]["ap"] > r["ignoring"]["ap"] for r in results):
            return []
        return [f"{name}: no better than a detector that ignores the picture"]
    verdicts = [verdict(r["weights"]["ema"]["top1"], r["classes"]) for r in results]
    if not all(line.startswith("note:") for line in verdicts):
        return []
    return [f"{name}: {verdicts[0]}"]


def _is_aside(name: str) -> bool:
    return name.startswith(".") or MOVED.search(name) is not None


def _runs(folder: Path) -> list[Path]:
    """Return the run folders at or below `folder`; those that run.fresh moved aside, and what lies
    in hidden folders, are left out.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found = sorted(
        path.parent
        for path in folder.rglob("config.yaml")
        if not any(map(_is_aside, path.relative_to(folder).parts)) and _is_run(path.parent)
    )
    if not found:
        raise UserError(
            f"{folder} holds no run: a run folder has a config.yaml and a provenance.json"
        )
    return found


def _is_run(folder: Path) -> bool:
    return (folder / "provenance.json").is_file()


def spread(values: Sequence[float | None]) -> str:
    """Return `mean ± standard deviation`; `-` where a run has no value."""
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return "-"
    mean = statistics.mean(numbers)
    return f"{mean:.2f} ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else f"{mean:.2f}"


def _differences(configs: Sequence[Config]) -> list[dict[str, Any]]:
    """Return for each row the settings that tell it from the rows of the same recipe, data and
    model.
    """
    found: list[dict[str, Any]] = [{}] * len(configs)
    labels: dict[tuple[str, str, str], list[int]] = {}
    for place, config in enumerate(configs):
        label = (config.recipe, config.data.name, config.model.name)
        labels.setdefault(label, []).append(place)
    for places in labels.values():
        flat = [result_settings(configs[place]) for place in places]
        every = dict.fromkeys(key for settings in flat for key in settings)
        keys = [k for k in every if len({str(f.get(k)) for f in flat}) > 1]
        for place, settings in zip(places, flat, strict=True):
            found[place] = {key: settings.get(key) for key in keys}
    return found


def judged_in_words(configs: Sequence[Config]) -> str:
    """Return what runs are judged by: `top-1`, `AP`, or of both kinds `AP or top-1`."""
    return " or ".join(sorted({WORDS[judged_by(config)] for config in configs}))


def learning_curve(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Return step -> held-out top-1 % (of detectors AP %) of the averaged weights, of the rows of
    `metrics.jsonl`.
    """
    judged = ("ema_top1", "ema_ap")
    return {row["step"]: row[key] for row in rows for key in judged if key in row}

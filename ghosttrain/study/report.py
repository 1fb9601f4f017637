"""`report RUN...`: results of finished runs side by side, mean and standard deviation over seeds.

Reads only `config.yaml` and `result.json`, so a table can be drawn again anywhere.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ghosttrain.config.identity import result_settings, settings_hash
from ghosttrain.config.schema import Config
from ghosttrain.engine.folder import has_begun
from ghosttrain.engine.metrics import TOPS, verdict
from ghosttrain.engine.run_files import read_config, read_result
from ghosttrain.errors import UserError, did_you_mean
from ghosttrain.study.table import markdown
from ghosttrain.text import clock

Finished = tuple[Config, dict[str, Any]]
"""Settings and result of a run."""
METRICS = {
    "top1": "EMA top-1 %",
    "top5": "EMA top-5 %",
    "balanced": "balanced %",
    "macro_f1": "macro F1 %",
    "ece": "ECE %",
    "loss": "loss",
    "raw_top1": "raw top-1 %",
    "fused_top1": "fused top-1 %",
}
"""Choice of `report.metrics` -> its column; of the EMA weights where none is named."""
OF_A_CLASS = ("recall", "precision")
"""`report.metrics=recall:NAME`."""


def report(folders: list[Path], metrics: Sequence[str] = ()) -> str:
    """Return a Markdown table, one row per group of runs that differ only in their seed; below it
    the runs that are not finished or cannot be read.

    Args:
        folders: runs, or folders that hold some.
        metrics: columns, of `METRICS` or `recall:CLASS`; none: `default_metrics`.

    Raises:
        UserError: a folder that is no run and holds none; an unknown column.
    """
    validate_metrics(metrics)
    runs = sorted({run.resolve() for folder in folders for run in _runs(folder)})
    finished, below, starts = [], [], 0
    for run in runs:
        try:
            config, result = read_config(run), read_result(run)
        except UserError as error:
            below.append(f"damaged: {error}")
            continue
        if result is not None and result["settings"] == settings_hash(config):
            finished.append((config, result))
        elif has_begun(run):
            below.append(f"not finished: {run}")
        else:
            starts += 1
    if starts:
        below.append(f"left out: {starts} start{'s' * (starts > 1)} of which no step was kept")
    groups: dict[tuple[str, str], list[Finished]] = {}
    for config, result in finished:
        groups.setdefault((config.recipe, _hash_of_row(config)), []).append((config, result))
    rows = [group for _, group in sorted(groups.items(), key=lambda item: item[0])]
    shown = metrics or default_metrics([result for _, result in finished])
    told_apart = _differences([group[0][0] for group in rows])
    head = ["recipe", "data", "model", "px", *(["settings"] if any(told_apart) else []), "seeds"]
    table = [[*head, *(title_of(name) for name in shown), "time"]]
    for group, settings in zip(rows, told_apart, strict=True):
        config, results = group[0][0], [result for _, result in group]
        label = [config.recipe, config.data.name, config.model.name, str(config.data.eval_size)]
        label += [settings] if any(told_apart) else []
        numbers = [spread([value_of(result, name) for result in results]) for name in shown]
        seconds = statistics.mean(result["seconds"] for result in results)
        table.append([*label, _seeds([each for each, _ in group]), *numbers, clock(seconds)])
        below += _no_better(config, results)
    return "\n".join([*markdown(table), *below])


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
    classes = [result["classes"] for result in results]
    names = ["top1"]
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
            raise UserError(
                f"report.metrics: there is no {name!r}; there are {', '.join(known)}."
                f"{did_you_mean(name, known)}"
            )


def title_of(name: str) -> str:
    """Return the head of a column."""
    kind, _, of_class = name.partition(":")
    return f"{kind} % of {of_class}" if of_class else METRICS[name]


def value_of(result: Mapping[str, Any], name: str) -> float | None:
    """Return the number of a column; None where this run has none."""
    kind, _, of_class = name.partition(":")
    classes, weights = result["classes"], result["weights"]
    if of_class:
        names = classes["names"]
        return classes[kind][names.index(of_class)] if of_class in names else None
    row, _, key = name.partition("_") if name in ("raw_top1", "fused_top1") else ("ema", "", name)
    return weights.get(row, {}).get(key)


def _no_better(config: Config, results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line where no run of a row beats the largest class."""
    verdicts = [verdict(r["weights"]["ema"]["top1"], r["classes"]) for r in results]
    if not all(line.startswith("note:") for line in verdicts):
        return []
    return [f"{config.recipe} {config.data.name} {config.model.name}: {verdicts[0]}"]


def _runs(folder: Path) -> list[Path]:
    """Return the run folders at or below `folder`; hidden ones (moved aside by run.fresh) are left
    out.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found = sorted(
        path.parent
        for path in folder.rglob("config.yaml")
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and _is_run(path.parent)
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


def _differences(configs: Sequence[Config]) -> list[str]:
    """Return for each row the settings that tell it from the rows of the same recipe, data and
    model.
    """
    texts = [""] * len(configs)
    labels: dict[tuple[str, str, str], list[int]] = {}
    for place, config in enumerate(configs):
        label = (config.recipe, config.data.name, config.model.name)
        labels.setdefault(label, []).append(place)
    for places in labels.values():
        flat = [result_settings(configs[place]) for place in places]
        every = dict.fromkeys(key for settings in flat for key in settings)
        keys = [k for k in every if len({str(f.get(k)) for f in flat}) > 1]
        for place, settings in zip(places, flat, strict=True):
            texts[place] = " ".join(f"{k}={settings.get(k)}" for k in keys)
    return texts

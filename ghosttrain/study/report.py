"""`report RUN...`: results of finished runs side by side, mean and standard deviation over seeds.

Reads only `config.yaml` and `result.json`, so a table can be drawn again anywhere.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from ghosttrain.config.identity import result_settings, settings_hash
from ghosttrain.config.schema import Config
from ghosttrain.engine.folder import has_begun
from ghosttrain.engine.run_files import read_config, read_result
from ghosttrain.errors import UserError
from ghosttrain.study.table import markdown
from ghosttrain.text import clock


def report(folders: list[Path]) -> str:
    """Return a Markdown table, one row per group of runs that differ only in their seed; below it
    the runs that are not finished or cannot be read.

    Raises:
        UserError: a folder that is no run and holds none.
    """
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
    rows: dict[tuple[str, str], list[tuple[Config, dict[str, Any]]]] = {}
    for config, result in finished:
        rows.setdefault((config.recipe, settings_hash(config)), []).append((config, result))
    head = [
        "recipe",
        "data",
        "model",
        "seeds",
        "EMA top-1 %",
        "EMA top-5 %",
        "raw top-1 %",
        "fused top-1 %",
        "time",
    ]
    table = [head]
    ordered = sorted(rows.items(), key=lambda item: item[0])
    for (recipe, _), group in ordered:
        config = group[0][0]
        weights = [result["weights"] for _, result in group]
        table.append(
            [
                recipe,
                config.data.name,
                config.model.name + (" +mixup" if config.augment.policy == "with_mixup" else ""),
                f"{len(group)} "
                f"({', '.join(str(c.seed) for c, _ in sorted(group, key=lambda g: g[0].seed))})",
                _spread([w["ema"]["top1"] for w in weights]),
                _spread([w["ema"]["top5"] for w in weights]),
                _spread([w["raw"]["top1"] for w in weights]),
                _spread([w["fused"]["top1"] for w in weights])
                if all("fused" in w for w in weights)
                else "-",
                clock(statistics.mean(result["seconds"] for _, result in group)),
            ]
        )
    lines = markdown(table)
    lines += _differences([group[0][0] for _, group in ordered])
    return "\n".join([*lines, *below])


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


def _spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:.2f}"


def _differences(configs: list[Config]) -> list[str]:
    """Say which settings tell apart rows that share recipe, data and model."""
    lines = []
    labels: dict[tuple[str, str, str], list[Config]] = {}
    for config in configs:
        labels.setdefault((config.recipe, config.data.name, config.model.name), []).append(config)
    for label, group in labels.items():
        flat = [result_settings(config) for config in group]
        keys = [k for k in flat[0] if len({str(f.get(k)) for f in flat}) > 1]
        if keys:
            rows = [", ".join(f"{k}={f.get(k)}" for k in keys) for f in flat]
            lines.append(f"{' '.join(label)} in order: " + " | ".join(rows))
    return lines

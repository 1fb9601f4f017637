"""The pictures of a study, from plain numbers."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ghosttrain.engine.figures import new_figure, save_figure
from ghosttrain.study.stats import Difference
from ghosttrain.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, DPI = 4.8, 220
"""Inches; dots per inch: letters can be read on a phone 390 points wide."""
Curve = Mapping[int, float]
"""Step -> held-out top-1 (of detectors AP) in percent."""


def draw_effects(
    path: Path, differences: Mapping[str, Difference], control: str, metric: str
) -> None:
    """Draw the difference of each arm to its control with its interval, the first arm on top; an
    arm without an interval is a hollow point.
    """
    names = [_plain(textwrap.fill(arm, 24)) for arm in differences]
    lines = max(name.count("\n") + 1 for name in names)
    figure = new_figure(WIDTH, 1.1 + (0.17 + 0.17 * lines) * len(names))
    axis = figure.subplots()
    for place, each in enumerate(differences.values()):
        axis.plot([each.low, each.high], [place, place], color="tab:blue", linewidth=2)
        style = "none" if math.isnan(each.low) else "full"
        axis.plot(each.mean, place, "o", color="tab:blue", fillstyle=style)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    about = textwrap.fill(f"{metric}, less {control} (95 % interval)", 56)
    figure.supxlabel(_plain(about), fontsize="medium")  # below the names of the arms too
    _finish(axis)
    save_figure(figure, path, DPI)


def draw_learning(path: Path, curves: Mapping[str, Sequence[Curve]], judged: str) -> None:
    """Draw what runs are judged by (`judged`, in words) by steps: a line for the mean of an arm
    over its seeds, a band from the lowest to the highest seed.
    """
    figure = new_figure(WIDTH, 3.4 + 0.1 * len(curves))
    axis = figure.subplots()
    for number, (arm, seeds) in enumerate(curves.items()):
        steps = sorted(set.intersection(*(set(curve) for curve in seeds)))
        values = [[curve[step] for curve in seeds] for step in steps]
        (line,) = axis.plot(
            steps, [statistics.mean(v) for v in values], label=_plain(arm), color=f"C{number % 10}"
        )
        line.set_linestyle(("-", "--", ":")[number // 10 % 3])
        lowest, highest = [min(v) for v in values], [max(v) for v in values]
        axis.fill_between(steps, lowest, highest, color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set_xlabel("step")
    axis.set_ylabel(f"held-out EMA {judged} %")
    _legend(figure, list(curves))
    _finish(axis)
    save_figure(figure, path, DPI)


def draw_pareto(
    path: Path,
    points: Mapping[str, tuple[float, float]],
    metric: str,
    published: Mapping[str, tuple[float, float]],
    lower: bool = False,
) -> None:
    """Draw the metric against the MACs after fusing, and the front: the arms that no other beats at
    the same MACs or fewer, which are full points.

    Args:
        path: of the picture.
        points: arm -> (MACs, mean of the metric).
        metric: its title.
        published: name -> the same, of values from elsewhere: crosses, and in no front.
        lower: whether a lower value is better.
    """
    every = {**points, **published}
    figure = new_figure(WIDTH, 3.4 + 0.1 * len(every))
    axis = figure.subplots()
    sign = -1 if lower else 1
    front = pareto_front({arm: (macs, sign * value) for arm, (macs, value) in points.items()})
    axis.plot(
        [points[arm][0] / 1e6 for arm in front],
        [points[arm][1] for arm in front],
        color="0.7", drawstyle="steps-post", zorder=0,
    )  # fmt: skip
    for number, (arm, (macs, value)) in enumerate(every.items()):
        marker = "x" if arm in published else "os^D"[number // 10 % 4]
        style = "full" if arm in front else "none"
        color = f"C{number % 10}"
        axis.plot(macs / 1e6, value, marker, color=color, fillstyle=style, label=_plain(arm), ls="")
    _legend(figure, list(every))
    axis.set_xlabel("million MACs after fusing")
    axis.set_ylabel(_plain(metric))
    _finish(axis)
    save_figure(figure, path, DPI)


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the arms that no other reaches at the same cost or less, by rising cost."""
    front: list[str] = []
    for arm in sorted(points, key=lambda arm: (points[arm][0], -points[arm][1])):
        if not front or points[arm][1] > points[front[-1]][1]:
            front.append(arm)
    return front


def _plain(text: str) -> str:
    """Return text that matplotlib does not read as mathematics."""
    return printable(text, lines=True).replace("$", r"\$")


def _legend(figure: Figure, names: Sequence[str]) -> None:
    columns = 2 if len(names) > 4 and max(map(len, names)) <= 30 else 1
    figure.legend(frameon=False, fontsize=8, ncols=columns, loc="outside lower center")


def _finish(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)

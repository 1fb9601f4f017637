"""Write what is generated in docs/: python scripts/docs.py

docs/configuration.md from the schema, docs/step_price.png from the table of docs/performance.md.
"""

from __future__ import annotations

import re
from pathlib import Path

from ghosttrain.commands.help import section_text
from ghosttrain.config.schema import Config, Section

DOCS = Path(__file__).resolve().parents[1] / "docs"
ROW = re.compile(r"^\| (?P<side>.+?) \| (?P<ms>\d+) \((?P<low>\d+) to (?P<high>\d+)\)", re.M)


def configuration() -> str:
    """Return every setting: what it takes, its default, its meaning; and the groups' files."""
    sections = [
        name
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    ]
    parts = [
        "# Configuration",
        "Every setting, with its default and what it takes: `python -m ghosttrain help SECTION`. "
        "`seed=0` and the sections below are all there is. A value comes from the schema, from "
        "the file of a group, from the recipe, from the budget of the data or from the command "
        "line, the last of these that names it. Written by `python scripts/docs.py`; a test keeps "
        "it true.",
    ]
    for name in sections:
        parts += [f"## {name}", f"```text\n{section_text(name)}\n```"]
    return "\n\n".join(parts) + "\n"


def measured() -> list[tuple[str, float, float, float]]:
    """Return (side, median, lower and upper quartile) of every row of the table, in ms."""
    text = (DOCS / "performance.md").read_text(encoding="utf-8")
    rows, model = [], ""
    for match in ROW.finditer(text):
        side = match["side"].replace("`", "")
        if ", " in side:
            model, side = side.split(", ")
        side = "here" if side == "forward=auto" else side.removesuffix(" (GhostNetV2)")
        side = "timm" if side.startswith("timm") else side.replace("forward=branches", "branches")
        rows.append((f"{model}\n{side}", *(float(match[key]) for key in ("ms", "low", "high"))))
    return rows


def draw(path: Path) -> None:
    """Draw the rows of the table as bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = measured()
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    models = list(dict.fromkeys(label.split("\n")[0] for label, *_ in rows))
    colours = {"here": "#0a7d4f", "branches": "#b9b9b9", "plain": "#dcdcdc", "timm": "#8a8a8a"}
    for axis, model in zip(figure.subplots(1, len(models)), models, strict=True):
        sides = [(label.split("\n")[1], *rest) for label, *rest in rows if label.startswith(model)]
        for place, (side, ms, low, high) in enumerate(sides):
            error = [[ms - low], [high - ms]]
            axis.bar(place, ms, yerr=error, color=colours[side], capsize=2, width=0.7)
        axis.set_xticks(range(len(sides)), [side for side, *_ in sides], fontsize=8)
        axis.set_title(model, fontsize=9)
        axis.tick_params(axis="y", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylabel("ms a step" if model == models[0] else "", fontsize=8)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    (DOCS / "configuration.md").write_text(configuration(), encoding="utf-8")
    draw(DOCS / "step_price.png")

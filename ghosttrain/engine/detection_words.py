"""Words about what a detector reaches. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ghosttrain.detect.coco_numbers import TITLES
from ghosttrain.engine.metrics import LISTED_CLASSES
from ghosttrain.text import listed, printable

COLUMNS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar100")
"""Those of COCO's numbers that a table of runs or weights has."""
IGNORES = "no look"
"""Name of the row of the detector that ignores the picture."""


def detection_lines(
    weights: Mapping[str, Mapping[str, float]],
    classes: Mapping[str, Any],
    ignoring: Mapping[str, float] | None,
    notes: Mapping[str, str],
) -> list[str]:
    """Return a table of the numbers of COCO, a row for each kind of weights, and one of the
    classes; of many classes those of the lowest AP.

    Args:
        weights: kind of weights -> numbers in per cent; -1 is shown as nothing.
        classes: what `result.json` holds of them.
        ignoring: numbers of a detector that ignores the picture; None: not known.
        notes: kind of weights -> what stands behind its row.
    """
    widths = {key: max(len(TITLES[key]), 6) + 2 for key in COLUMNS}
    head = "".join(f"{TITLES[key]:>{width}}" for key, width in widths.items())
    rows = dict(weights) | ({} if ignoring is None else {IGNORES: ignoring})
    lines = [f"{'weights':<8}{head}   in %"]
    for name, row in rows.items():
        cells = (f"{row[key]:.2f}" if row[key] >= 0 else "-" for key in COLUMNS)
        line = "".join(f"{c:>{w}}" for c, w in zip(cells, widths.values(), strict=True))
        lines.append(f"{name:<8}{line}{notes.get(name, '')}")
    if ignoring is not None:
        lines.append(
            f"{IGNORES}: the same boxes on every image, those that find the most training boxes"
        )
    return lines + _class_lines(classes)


def _class_lines(classes: Mapping[str, Any]) -> list[str]:
    names, boxes, ap = classes["names"], classes["boxes"], classes["ap"]
    if len(names) > LISTED_CLASSES:
        there = [k for k in range(len(names)) if ap[k] is not None]
        worst = sorted(there, key=lambda k: (ap[k], names[k]))
        shown = (f"{printable(names[k])} {ap[k]:.1f} % of {boxes[k]} boxes" for k in worst)
        return [f"lowest AP: {listed(shown, most=5)}"]
    names = [printable(name) for name in names]
    width = max(len("class"), *(len(name) for name in names)) + 2
    lines = [f"{'class':<{width}}{'boxes':>8}{'AP %':>8}"]
    for name, count, value in zip(names, boxes, ap, strict=True):
        shown_ap = "-" if value is None else f"{value:.2f}"
        lines.append(f"{name:<{width}}{count:>8,}{shown_ap:>8}")
    return lines

"""How every picture of a run is begun and written: without a display, and durably."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ghosttrain.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure as PNG, by the one durable writer."""
    with replacing(path) as file:
        file.write(png_of(figure, dpi))


def png_of(figure: Figure, dpi: int) -> bytes:
    """Return a figure as PNG."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in letters the font lacks
        figure.savefig(file, format="png", dpi=dpi)
    return file.getvalue()

"""A picture of small images with words above each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from ghosttrain.data.decode import to_pixels
from ghosttrain.files import replacing
from ghosttrain.terminal import printable

MOST = 40
"""Images in one picture."""
COLUMNS = 5


def draw_gallery(
    shown: Sequence[tuple[Callable[[], Image.Image], str]], path: Path, title: str
) -> None:
    """Draw images, each with its words, into `path`.

    Args:
        shown: what opens each image, and its words; the first `MOST` are drawn.
        path: of the PNG.
        title: above all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = shown[:MOST]
    rows = max(-(-len(shown) // COLUMNS), 1)
    figure = Figure(figsize=(2.4 * COLUMNS, 2.8 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for axis in axes:
        axis.set_axis_off()
    for axis, (opened, words) in zip(axes, shown, strict=False):
        image = to_pixels(opened(), 3)
        image.thumbnail((256, 256))
        axis.imshow(image)
        axis.set_title(printable(words), fontsize=8, parse_math=False)
    figure.suptitle(printable(title), fontsize=9, parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in letters the font lacks
        with replacing(path) as file:
            figure.savefig(file, format="png", dpi=100)

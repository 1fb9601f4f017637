"""A picture of small images with words above each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from ghosttrain.config.schema import DataConfig
from ghosttrain.data.decode import decoded
from ghosttrain.engine.figures import new_figure, save_figure
from ghosttrain.text import printable

MOST = 40
"""Images in one picture."""
COLUMNS = 5


def draw_gallery(
    shown: Sequence[tuple[Callable[[], Image.Image], str]], data: DataConfig, path: Path, title: str
) -> None:
    """Draw images in colour, each with its words, into `path`.

    Args:
        shown: what opens each image, and its words; the first `MOST` are drawn.
        data: how they are decoded.
        path: of the PNG.
        title: above all.
    """
    shown, data = shown[:MOST], data.model_copy(update={"in_chans": 3})
    rows = max(-(-len(shown) // COLUMNS), 1)
    figure = new_figure(2.4 * COLUMNS, 2.8 * rows + 0.4)
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for axis in axes:
        axis.set_axis_off()
    for axis, (opened, words) in zip(axes, shown, strict=False):
        image = Image.fromarray(decoded(opened(), data))
        image.thumbnail((256, 256))
        axis.imshow(image)
        axis.set_title(printable(words, lines=True), fontsize=8, parse_math=False)
    figure.suptitle(printable(title), fontsize=9, parse_math=False)
    save_figure(figure, path, dpi=100)

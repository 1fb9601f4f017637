"""A picture of what is being taught: augmented crops with the teacher's cached outputs.

Shapes: B samples, K classes.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ghosttrain.config.schema import Config
from ghosttrain.data.datasets import Dataset
from ghosttrain.data.loader import train_loader
from ghosttrain.data.order import epoch_order
from ghosttrain.distill.cache import TeacherCache
from ghosttrain.errors import UserError

SAMPLES, DRAWS, BEST = 6, 3, 3
"""Columns of the picture, rows at most, classes named above each crop."""


def draw_picture(cache: TeacherCache, config: Config, train_set: Dataset) -> Path:
    """Draw a few samples under a few draws with the teacher's top-3; return the picture's path.

    Raises:
        UserError: not even one draw of these samples is stored.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    indices = epoch_order(len(train_set), 0, 0)[:SAMPLES].tolist()
    absent = {shard.draw for shard in cache.missing()}
    draws = [draw for draw in range(cache.info.draws) if draw not in absent][:DRAWS]
    if not draws:
        raise UserError(
            f"{cache.folder} holds no whole draw yet: type python -m ghosttrain cache"
            f" {cache.folder} --repair"
        )
    names = [_in_words(name) for name in train_set.classes]
    rows, columns = len(draws), len(indices)
    figure = Figure(figsize=(2.4 * columns, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    mean, std = (
        torch.tensor(values).view(-1, 1, 1) for values in (config.data.mean, config.data.std)
    )
    data = config.data.model_copy(update={"workers": 0})
    cpu = torch.device("cpu")
    with train_loader(train_set, data, config.augment, cpu, cached=cache.read) as loader:
        for row, draw in enumerate(draws):
            (batch,) = loader.batches([indices], draw)
            assert batch.cached is not None
            probabilities_BK = cache.decode(batch.cached).logits.softmax(dim=1)
            for column in range(columns):
                axis = axes[row][column]
                pixels = (batch.images[column] * std + mean).clamp(0, 1).expand(3, -1, -1)
                axis.imshow(np.asarray(pixels.permute(1, 2, 0)))
                axis.set_title(_best(probabilities_BK[column], names), fontsize=8)
                axis.set_xlabel(f"label: {names[int(batch.labels[column])]}", fontsize=8)
                axis.set_xticks([])
                axis.set_yticks([])
            axes[row][0].set_ylabel(f"draw {draw}")
    figure.suptitle(f"{cache.info.notes['teacher']}; {cache.info.codec}", fontsize=8, wrap=True)
    path = cache.folder / "inspect.png"
    figure.savefig(path, dpi=110)
    return path


def _best(probabilities_K: Tensor, names: list[str]) -> str:
    best = probabilities_K.topk(min(BEST, len(names)))
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return "\n".join(f"{names[k]} {100 * p:.1f} %" for p, k in pairs)


def _in_words(name: str) -> str:
    """Return what a class is called: ImageNet's synsets have a name in words."""
    if not re.fullmatch(r"n\d{8}", name):
        return name
    from timm.data.imagenet_info import ImageNetInfo

    words = ImageNetInfo("imagenet-22k").label_name_to_description(name)
    return words.split(",")[0] or name

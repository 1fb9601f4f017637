"""Published ImageNet-1k top-1 of networks that this project has, each with its source."""

from __future__ import annotations

from typing import NamedTuple

from ghosttrain.config.schema import Config, DataConfig
from ghosttrain.data.datasets.selection import SELECTION_SETTINGS


class Published(NamedTuple):
    """One published value."""

    model: str
    how: str
    """How it was trained, in a few words."""
    top1: float
    """Percent, at 224 px."""
    source: str


IFORMER = "https://arxiv.org/abs/2501.15369, table 3"

PUBLISHED = (
    Published("ghostnetv3_100", "600 epochs", 77.1, IFORMER),
    Published(
        "ghostnetv3_100",
        "official weights, EMA",
        77.134,
        "https://github.com/PaddlePaddle/PaddleClas/pull/3413",
    ),
    Published("ghostnetv3_130", "600 epochs", 79.1, "https://arxiv.org/abs/2404.11202"),
    Published("ghostnetv3_160", "600 epochs", 80.4, IFORMER),
    Published("mobilenetv2_100", "labels", 72.2, "https://arxiv.org/abs/2103.05959"),
)


def is_imagenet(config: Config) -> bool:
    """Whether a run sees all of ImageNet-1k, as the published ones did; that the folder holds it is
    taken from `data=imagenet`.
    """
    data, chosen = config.data, {*SELECTION_SETTINGS, "val_classes"}
    usual = DataConfig().model_dump(include=chosen)
    return data.name == "imagenet" and data.model_dump(include=chosen) == usual


def published(config: Config, metric: str) -> list[Published]:
    """Return what stands beside a run: values of its network, where data, size and metric match."""
    if not is_imagenet(config) or config.data.eval_size != 224 or metric != "top1":
        return []
    return [each for each in PUBLISHED if each.model == config.model.name]

"""Published ImageNet-1k top-1 of networks that this project has, each with its source."""

from __future__ import annotations

from typing import NamedTuple

from ghosttrain.config.schema import Config


class Published(NamedTuple):
    """One published value."""

    model: str
    how: str
    """How it was trained, in a few words."""
    top1: float
    """Percent, at 224 px."""
    source: str


PUBLISHED = (
    Published("ghostnetv3_100", "600 epochs", 77.1, "https://arxiv.org/abs/2404.11202"),
    Published("ghostnetv3_130", "600 epochs", 79.1, "https://arxiv.org/abs/2404.11202"),
    Published("ghostnetv3_160", "600 epochs", 80.4, "https://arxiv.org/abs/2404.11202"),
    Published("mobilenetv2_100", "labels", 72.2, "https://arxiv.org/abs/2103.05959"),
    Published("mobilenetv2_100", "SSLD", 76.7, "https://arxiv.org/abs/2103.05959"),
)


def published(config: Config, metric: str) -> list[Published]:
    """Return what stands beside a run: values of its network, where data, size and metric match."""
    if config.data.name != "imagenet" or config.data.eval_size != 224 or metric != "top1":
        return []
    return [each for each in PUBLISHED if each.model == config.model.name]

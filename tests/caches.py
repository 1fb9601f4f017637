"""A small cache of made-up outputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ghosttrain.distill.cache import CacheInfo, TeacherCache, create

SAMPLES, DRAWS, SIZE, R = 25, 3, 10, 12
HEADER = 128
KEY = {
    "teacher": {"a": {"name": "net", "mean": (0.5, 0.5), "weights": "ab" * 32}},
    "images": "cd" * 32,
    "classes": [f"n{i:08d}" for i in range(100)],
}


INFO = CacheInfo(
    key=KEY,
    codec="topk:3",
    num_classes=10,
    widths=(),
    bytes_per_image=R,
    samples=SAMPLES,
    draws=DRAWS,
    shard_size=SIZE,
    notes={"teacher": "net, top-1 80 %"},
)


TABLES = {"mean": torch.full((10,), 0.1)}


def make(folder: Path, fill: bool = True, **changes) -> TeacherCache:
    cache = create(folder, replace(INFO, **changes), TABLES, "seed: 0\n")
    for shard in cache.shards() if fill else ():
        cache.write(shard, content(shard.draw)[list(cache.samples(shard))])
    return cache


def content(draw: int) -> Tensor:
    """Return the cached (SAMPLES, R) of a draw: no two are alike."""
    generator = torch.Generator().manual_seed(draw)
    return torch.randint(256, (SAMPLES, R), generator=generator, dtype=torch.uint8)

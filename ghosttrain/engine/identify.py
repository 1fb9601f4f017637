"""What stands for a path in a run's settings: a digest of what lies there. Imports no torch.

Jobs of a cluster see the same images under another path each time, and two data sets can lie at one
path, one after the other. So the hash of a run holds digests: of data their class names and images
per class, of weights their file, of cached outputs what they were stored for. Listing a million
images takes seconds: what was found is kept in `run.root/.listed/` with the modification times of
all folders, and holds as long as these are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ghosttrain.config.compose import Composed
from ghosttrain.config.schema import NAMED_SOURCES, Config, DataConfig
from ghosttrain.data.datasets import Dataset, build_datasets
from ghosttrain.data.datasets.selection import SELECTION_SETTINGS, selected, unselected
from ghosttrain.data.datasets.splitting import SPLIT_SETTINGS, is_split_here
from ghosttrain.data.datasets.tree import YOUNG_NS
from ghosttrain.errors import UserError
from ghosttrain.files import Damaged, expanded, file_digest, read_json, write_json

LARGEST = 256_000_000
"""Bytes of what is kept of a listing: a million folders take 100 MB."""
_KEEPS = ContextVar("keeps findings", default=True)


@contextmanager
def keeping_nothing() -> Iterator[None]:
    """Write nothing down within the block: for a command that changes no file. What was kept before
    is still read.
    """
    before = _KEEPS.set(False)
    try:
        yield
    finally:
        _KEEPS.reset(before)


def settled(composed: Composed) -> Config:
    """Return the settings of a run as it is trained: what the weights it starts from say of their
    images, and digests in the place of paths.
    """
    return identified(with_view_of_weights(composed.config, composed.free))


def with_view_of_weights(config: Config, free: Collection[str]) -> Config:
    """Return the settings with the image size and normalisation of `model.weights`, where nothing
    in `free` was set: a pretrained network sees images as it was trained to.

    The embedded digits and IDX files keep theirs, which are measured.
    """
    model, data = config.model, config.data
    if model.weights is None or data.name not in ("folder", "table", "imagenet"):
        return config
    about = _about_weights(config)
    size, chans = about["input_size"], data.in_chans
    values: dict[str, Any] = {"interpolation": about["interpolation"]}
    values |= {"train_size": size, "eval_size": size}
    values |= {k: about[k] for k in ("mean", "std") if about[k] and len(about[k]) == chans}
    taken = {k: v for k, v in values.items() if v is not None and f"data.{k}" in free}
    if "train_size" not in taken or "eval_size" not in taken:  # one of them is set: both are
        taken = {k: v for k, v in taken.items() if not k.endswith("_size")}
    return config.model_copy(update={"data": DataConfig(**{**data.model_dump(), **taken})})


def _about_weights(config: Config) -> dict[str, Any]:
    """Return size, mean, std and interpolation of the images that weights were trained on; None for
    what is not known.
    """
    weights, name = str(config.model.weights), config.model.name
    keys = ("input_size", "mean", "std", "interpolation")

    def find() -> tuple[dict[str, Any], Iterable[Path]]:
        from ghosttrain.models.weights.sources import about_weights, timm_info, weights_path

        if weights in NAMED_SOURCES:
            about, files = timm_info(name), []
        else:
            about, files = about_weights(weights), [weights_path(weights, None, "model.weights")]
        return {key: getattr(about, key) for key in keys}, files

    kept = expanded(config.run.root) / ".listed"
    try:
        return _remembered(kept, f"about {weights} {name} {metadata.version('timm')}", find)
    except (UserError, OSError):  # said when the weights are read
        return dict.fromkeys(keys)


def identified(config: Config) -> Config:
    """Return the settings with `data.digest`, `weights_digest` and `cache.digest` filled in.

    What is not there keeps its path alone, unless it was seen before at that path.
    """
    kept = expanded(config.run.root) / ".listed"
    updates: dict[str, Any] = {
        "teacher": config.teacher.model_copy(
            update={
                "weights_digest": _weights_digest(config.teacher.weights, kept),
                "members": {
                    name: member.model_copy(
                        update={"weights_digest": _weights_digest(member.weights, kept)}
                    )
                    for name, member in config.teacher.members.items()
                },
            }
        ),
        "model": config.model.model_copy(
            update={"weights_digest": _weights_digest(config.model.weights, kept)}
        ),
    }
    if config.data.root is not None:
        with suppress(UserError):
            digest = data_listing(config)["digest"]
            updates["data"] = config.data.model_copy(update={"digest": digest})
    if config.cache.dir is not None:
        digest = _cache_digest(expanded(config.cache.dir))
        updates["cache"] = config.cache.model_copy(update={"digest": digest})
    return config.model_copy(update=updates)


def data_listing(config: Config) -> dict[str, Any]:
    """Return what is known of the data without opening an image: `digest` of class names and images
    per class, and of both halves `images` and a `digest` of labels and file names.

    Raises:
        UserError: the data are not there or not whole, and were not seen before.
    """
    data = config.data
    kept = expanded(config.run.root) / ".listed"

    def listing() -> tuple[dict[str, Any], Iterable[Path]]:
        halves = build_datasets(unselected(data))  # what is chosen of them is told by its settings
        train, held_out = (_half(half) for half in selected(data, *halves))
        counts = [np.bincount(half.labels, minlength=len(half.classes)).tolist() for half in halves]
        if is_split_here(data):  # folds of one set are the same data
            counts = [[sum(both) for both in zip(*counts, strict=True)]]
        text = json.dumps([halves[0].classes, *counts])
        found = {"digest": _short(text), "train": train, "held_out": held_out}
        return found, [Path(os.fsdecode(path)) for half in halves for path in half.listed]

    table = data.table and _real(data.table)
    decide = {*SPLIT_SETTINGS, *SELECTION_SETTINGS, "path_column", "label_column"}
    name = [data.name, _real(str(data.root)), table, data.model_dump(mode="json", include=decide)]
    return _remembered(kept, json.dumps(name), listing)


def _half(half: Dataset) -> dict[str, Any]:
    identity = half.identity()
    return {"images": identity["images"], "digest": identity["digest"]}


def _weights_digest(weights: str | None, kept: Path) -> str | None:
    """Return the digest of a file of weights; None for none, a named source, or what is not
    there.
    """
    if weights is None or weights in NAMED_SOURCES:
        return None
    path = expanded(weights)
    path = path / "model.safetensors" if path.is_dir() else path
    with suppress(OSError):
        return _remembered(kept, f"weights {_real(str(path))}", lambda: (
            {"digest": file_digest(path)[:16]}, [path]))["digest"]  # fmt: skip
    return None


def _cache_digest(folder: Path) -> str | None:
    """Return the digest of what cached outputs were stored for; None where they are not there."""
    with suppress(OSError, Damaged):
        info = read_json(folder / "cache.json", LARGEST)
        return _short(json.dumps({k: info[k] for k in sorted(info) if k not in ("draws", "notes")}))
    return None


def _remembered(
    kept: Path, name: str, find: Callable[[], tuple[dict[str, Any], Iterable[Path]]]
) -> dict[str, Any]:
    """Return what `find` finds; what it found before, as long as the modification times of all that
    it looked at are the same, and where it finds nothing now.

    Args:
        kept: the folder where findings are kept.
        name: of what is looked for.
        find: returns what was found, and every folder and file that it depends on.
    """
    path = kept / f"{_short(name)}.json"
    before: dict[str, Any] | None = None
    with suppress(OSError, Damaged):
        before = read_json(path, LARGEST)
    if before is not None and before["name"] == name:
        with suppress(OSError):
            if all(os.stat(each).st_mtime_ns == when for each, when in before["times"].items()):
                return before["found"]
    else:
        before = None
    began = time.time_ns()
    try:
        found, looked_at = find()
    except (UserError, OSError):
        if before is not None and not all(map(os.path.exists, before["times"])):
            return before["found"]
        raise
    times = {str(each): os.stat(each).st_mtime_ns for each in looked_at}
    if _KEEPS.get() and all(when < began - YOUNG_NS for when in times.values()):
        with suppress(OSError, UserError):
            kept.mkdir(parents=True, exist_ok=True)
            write_json(path, {"name": name, "times": times, "found": found})
    return found


def _real(path: str) -> str:
    return os.path.realpath(expanded(path))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]

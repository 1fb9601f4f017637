"""The file of a checkpoint: written whole, with a digest of every tensor, verified when it is read.

`checkpoints/last.pt` is the newest, `last-1.pt` the one before (`train.keep`). A file is read with
`weights_only`: it can hold data, never code. The digests are in the file itself, so that no crash
can part a file from them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from ghosttrain.errors import UserError, raise_if_of_the_system
from ghosttrain.files import open_file, replacing, sync_folder
from ghosttrain.models.weights.packing import tensor_digest
from ghosttrain.text import first_fault, one_line

Checkpoint = dict[str, Any]
"""What `TrainState.snapshot` returns."""
NEWEST = "last.pt"
MOST = 100
"""Checkpoints that `train.keep` may keep."""


class _Content(BaseModel, arbitrary_types_allowed=True):
    """What a checkpoint must hold, and within which bounds."""

    student: dict[str, Tensor]
    projection: dict[str, Tensor]
    ema: dict[str, Any]
    optimizer: dict[str, Any]
    buffers: list[list[Tensor]]
    step: int = Field(ge=0, lt=2**63)
    seconds: float = Field(ge=0, allow_inf_nan=False)
    best: dict[str, float]
    classes: list[str] = Field(min_length=1)
    data: dict[str, Any]
    teacher: dict[str, Any]
    conditions: dict[str, str]
    settings: dict[str, Any]
    total_steps: int = Field(ge=1, lt=2**63)


def write_checkpoint(path: Path, saved: Checkpoint, keep: int = 1) -> None:
    """Write a checkpoint durably; `keep` - 1 earlier ones keep a name of their own.

    Raises:
        UserError: it cannot be written; the earlier ones are as they were.
    """
    content = {**saved, "sha256": content_digests(saved)}
    with replacing(path, size=sum(t.nbytes for _, t in _leaves(saved) if isinstance(t, Tensor)),
                   before=lambda: _make_way(path, keep)) as file:  # fmt: skip
        torch.save(content, file)


def _make_way(path: Path, keep: int) -> None:
    """Move `last.pt` to `last-1.pt`, that to `last-2.pt`: `keep` files with the one to come."""
    names = list(generations(path.parent, keep))
    taken = list(takewhile(Path.exists, names[:-1]))  # a gap takes what comes before it
    for older, newer in reversed(list(zip(names[1:], taken, strict=False))):
        newer.replace(older)
    sync_folder(path.parent)


def generations(folder: Path, keep: int) -> Iterator[Path]:
    """Yield the names that `keep` checkpoints in `folder` take, the newest first."""
    return (folder / (f"last-{age}.pt" if age else NEWEST) for age in range(keep))


def newest_checkpoint(
    folder: Path, taken_before: int | None = None
) -> tuple[Checkpoint, Path, list[str]] | None:
    """Return the newest checkpoint that is whole, its file, and a line for each damaged one.

    None where there is none. With `taken_before` the newest whose last step that was not skipped
    lies before that one.

    Raises:
        UserError: there are some, and none is whole.
        OSError: one cannot be read now: no permission, no memory, a failing disk.
    """
    notes: list[str] = []
    there = [path for path in generations(folder, MOST) if path.exists()]
    for path in there:
        try:
            saved = read_checkpoint(path)
            taken = saved.get("guard", {}).get("last_taken", saved["step"])
            if taken_before is None or taken < taken_before:
                return saved, path, notes
        except UserError as error:
            if path == there[-1]:
                raise
            notes.append(f"{str(error).partition('; move it')[0]}: the one before is used")
    return None


def set_damaged_aside(folder: Path, used: Path | None) -> None:
    """Give the checkpoints newer than `used`, which are damaged, another name: the next one to be
    written must not put them in the place of the good one.
    """
    for path in generations(folder, MOST):
        if used is None or path == used:
            return
        with suppress(FileNotFoundError):
            path.replace(folder / f"damaged-{path.name}")


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and compare every digest.

    Raises:
        UserError: the file is damaged, or is no checkpoint of this project.
        OSError: it cannot be read now: no permission, no memory, a failing disk.
    """
    remedy = "move it away to start this run anew"
    try:
        with open_file(path) as file:
            saved = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler lets anything out: KeyError, struct.error
        raise_if_of_the_system(error, path)
        raise UserError(f"{path} is damaged ({one_line(error)[:80]}); {remedy}") from None
    if not isinstance(saved, dict) or not isinstance(saved.get("sha256"), dict):
        raise UserError(f"{path} is no checkpoint of ghosttrain; {remedy}")
    written = saved.pop("sha256")
    try:
        now = content_digests(saved)
    except (TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)[:80]}); {remedy}") from None
    if now != written:
        other = [key for key in (now | written) if now.get(key) != written.get(key) and key]
        raise UserError(
            f"{path} is damaged ({other[0] if other else 'its content'} is not as it was written)"
            f"; {remedy}"
        )
    try:
        _Content.model_validate(saved, strict=True)
    except ValidationError as error:
        raise UserError(f"{path} is damaged ({first_fault(error)}); {remedy}") from None
    return saved


def content_digests(content: Any) -> dict[str, str]:
    """Return the SHA-256 of every tensor in nested content by its place, `student.conv.weight`, and
    of everything together under "".
    """
    tensors, plain = {}, []
    for place, leaf in _leaves(content):
        if isinstance(leaf, Tensor):
            tensors[place] = tensor_digest(leaf)
        else:
            plain.append([place, type(leaf).__name__, leaf])
    whole = json.dumps([tensors, plain], sort_keys=True)
    return {**tensors, "": hashlib.sha256(whole.encode()).hexdigest()}


def _leaves(content: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every tensor and plain value within dictionaries and lists, with its place."""
    if isinstance(content, Mapping) and content:
        for key, value in content.items():
            yield from _leaves(value, f"{place}.{key}" if place else str(key))
    elif isinstance(content, Sequence) and not isinstance(content, str | bytes) and content:
        for number, value in enumerate(content):
            yield from _leaves(value, f"{place}.{number}")
    else:
        yield place, content

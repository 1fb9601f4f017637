"""Whether a run goes on with the data that it began with. Imports no torch.

A checkpoint and `result.json` hold a record of the data: of the training and of the held-out images
their number and a digest of classes, labels and file names; the checkpoint holds the class names
too. Training images decide the schedule and what a label means, held-out images decide the metric:
both are compared.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ghosttrain.config.schema import Config, DataConfig
from ghosttrain.data.datasets import Dataset, FileDataset
from ghosttrain.data.datasets.splitting import is_split_here
from ghosttrain.engine.identify import data_listing
from ghosttrain.errors import UserError
from ghosttrain.files import write_text
from ghosttrain.text import listed, printable

DataRecord = dict[str, Any]
"""`train` and `held_out`: `Dataset.identity()`; `accepted`: changes that `data.changed=accept` let
pass, one line each."""
HALVES = {"train": "training", "held_out": "held-out"}


def describe_data(train_set: Dataset, held_out: Dataset) -> DataRecord:
    """Return the record of both halves of the data."""
    return {"train": train_set.identity(), "held_out": held_out.identity(), "accepted": []}


def short(data: DataRecord) -> str:
    """Return a record in one line: the same data, wherever they lie, give the same line."""
    halves = [f"{data[key]['images']:,} {HALVES[key]}" for key in HALVES]
    digest = hashlib.sha256("".join(data[key]["digest"] for key in HALVES).encode())
    return f"{' and '.join(halves)} images with digest {digest.hexdigest()[:8]}"


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between two records, in words; [] if nothing does."""
    old, new = (each["train"].get("classes") for each in (before, now))
    lines = [renamed(old, new)] if old and new and old != new else []
    names = "file names" if old else "class names, file names"  # `result.json` holds no classes
    for key, name in HALVES.items():
        if before[key]["images"] != now[key]["images"]:
            lines.append(f"{name} images: {before[key]['images']:,} -> {now[key]['images']:,}")
        elif before[key]["digest"] != now[key]["digest"] and not (lines and old):
            lines.append(f"{names} or labels of the {name} images differ")
    return lines


def validate_same_data(
    saved: Mapping[str, Any] | None, now: DataRecord, changed: str
) -> DataRecord:
    """Return the record of a run's data, with every change that was accepted on the way.

    Args:
        saved: the checkpoint that it resumes from; None: it begins.
        now: the record of the data as they are.
        changed: `data.changed`.

    Raises:
        UserError: the data are not those of the checkpoint.
    """
    if saved is None:
        return now
    before = saved["data"]
    found = "; ".join(changes(before, now))
    if not found:
        return now | {"accepted": before["accepted"]}
    other = f"this run began with other data ({found}): put the earlier data back"
    cannot = None
    if len(before["train"]["classes"]) != len(now["train"]["classes"]):
        cannot = f"its classifier has {len(before['train']['classes']):,} outputs"
    elif (
        saved["step"] >= saved["total_steps"]
        and before["train"]["images"] != now["train"]["images"]
    ):
        cannot = "it has taken all its steps"
    if cannot:
        raise UserError(f"{other}, or type run.fresh=true (it cannot go on with these: {cannot})")
    if changed != "accept":
        raise UserError(
            f"{other}, or type data.changed=accept to go on with these, or run.fresh=true to start "
            "anew"
        )
    line = f"data changed after step {saved['step']}: {found}"
    return now | {"accepted": [*before["accepted"], line]}


def write_split(folder: Path, data: DataConfig, train_set: Dataset, held_out: Dataset) -> None:
    """Write which images are held out into split.csv, where one set was split here or by a table:
    `data=table data.table=split.csv data.split_column=split` reads it.
    """
    if not (is_split_here(data) or data.split_column):
        return
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["path", "label", "split"])
    for half, word in ((train_set, data.train_split), (held_out, data.val_split)):
        assert isinstance(half, FileDataset)
        rows.writerows(
            [printable(half.relative_path(i)), half.classes[half.labels[i]], word]
            for i in range(len(half))
        )
    write_text(folder / "split.csv", text.getvalue())


def without_classes(data: Mapping[str, Any]) -> DataRecord:
    """Return the record without the class names, which the weights' file holds already."""
    halves = {key: {k: v for k, v in data[key].items() if k != "classes"} for key in HALVES}
    return {**data, **halves}


def validate_result(folder: Path, config: Config, result: Mapping[str, Any]) -> str | None:
    """Refuse to show the result of a finished run on other data. Return a line where it is not
    known on which.

    Raises:
        UserError: naming what differs.
    """
    if config.data.root is None:  # embedded data cannot change
        return None
    try:
        found = changes(result["data"], data_listing(config))
    except UserError as error:
        return f"note: its data cannot be compared with today's: {error}"
    if not found:
        return None
    raise UserError(
        f"{folder} holds a run on other data ({'; '.join(found)}): type run.name=NAME for a run on "
        "these, or run.fresh=true to train anew in its place"
    )


def renamed(old: list[str], new: list[str]) -> str:
    """Return in words what differs between two lists of classes that are not the same."""
    gone, come = ([c for c in a if c not in set(b)] for a, b in ((old, new), (new, old)))
    if len(gone) == len(come):
        pairs = [f"{a!r} -> {b!r}" for a, b in zip(gone, come, strict=True)]
    else:
        pairs = [f"{len(old):,} -> {len(new):,}"]
        pairs += [f"{c!r} is gone" for c in gone] + [f"{c!r} is new" for c in come]
    pairs = pairs or ["their order"]
    return f"classes differ: {listed(pairs)}"

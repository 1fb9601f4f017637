"""Image files that a table lists: CSV or JSON lines, a row with a path and a label for each."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ghosttrain.config.schema import DataConfig
from ghosttrain.data.datasets.base import Dataset
from ghosttrain.data.datasets.folder import FileDataset, split_here
from ghosttrain.data.datasets.splitting import is_split_here
from ghosttrain.data.datasets.tree import validate_class_name
from ghosttrain.errors import UserError, did_you_mean
from ghosttrain.files import expanded, no_file
from ghosttrain.text import listed

JSON_LINES = (".jsonl", ".ndjson", ".json")
DELIMITERS = ",;\t|"


def read_table(data: DataConfig, root: Path) -> tuple[Dataset, Dataset]:
    """Return the two halves of what a table lists.

    Raises:
        UserError: no such table or column, rows without a path or label, files that are missing, a
            half without images.
    """
    table = _table(data, root)
    rows = list(_rows(table, data))
    if not rows:
        raise UserError(f"{table} has no rows")
    _validate_files(table, root, [path for path, _, _ in rows])
    known = (data.train_split, data.val_split)
    wanted = [row for row in rows if row[2] in known] if data.split_column else rows
    whole = _images(data, root, table, wanted)
    if is_split_here(data):
        return split_here(data, whole)
    held = np.array([half == data.val_split for _, _, half in wanted], dtype=bool)
    others = Counter(half for _, _, half in rows if half not in known)
    return _halves(data, table, whole, held, others)


def held_out_table(data: DataConfig, root: Path, classes: list[str]) -> Dataset:
    """Return the held-out half alone. Its classes are those of the rows of both halves that there
    are; with `data.val_classes=subset`, which lets it lack some, also `classes`.

    Raises:
        UserError: as `read_table`.
    """
    table = _table(data, root)
    known = (data.train_split, data.val_split)
    rows = [row for row in _rows(table, data) if row[2] in known]
    held = np.array([half == data.val_split for _, _, half in rows], dtype=bool)
    if not held.any():
        raise UserError(
            f"{table}: no row has {data.val_split!r} in column {data.split_column!r}: type "
            "data.val_split=WORD"
        )
    _validate_files(table, root, [path for path, _, half in rows if half == data.val_split])
    more = classes if data.val_classes == "subset" else ()
    return _images(data, root, table, rows, more).part(held)


def _table(data: DataConfig, root: Path) -> Path:
    table = root / expanded(str(data.table))
    if not table.is_file():
        raise UserError(f"data.table={data.table}: {no_file(table)}; give a .csv or .jsonl file")
    return table


def _images(
    data: DataConfig,
    root: Path,
    table: Path,
    rows: Sequence[tuple[str, str, str]],
    more: Sequence[str] = (),
) -> FileDataset:
    """Return the images of some rows. Their classes are those that they name, and `more`."""
    classes = sorted({*(label for _, label, _ in rows), *more})
    for name in classes:
        validate_class_name(name, table)
    number = {name: k for k, name in enumerate(classes)}
    return FileDataset(
        str(root),
        classes,
        np.array([number[label] for _, label, _ in rows], np.int64),
        data.in_chans,
        np.array([os.fsencode(path) for path, _, _ in rows]),
        listed=(os.fsencode(table),),
        bit_depth=data.bit_depth,
        max_pixels=data.max_pixels,
    )


def _halves(
    data: DataConfig, table: Path, whole: FileDataset, held: np.ndarray, others: Counter[str]
) -> tuple[Dataset, Dataset]:
    """Cut a table by its own column."""
    for mask, split in ((~held, data.train_split), (held, data.val_split)):
        if not mask.any():
            raise UserError(
                f"{table}: no row has {split!r} in column {data.split_column!r} (there are "
                f"{listed(map(repr, sorted(others)))}): type data.train_split=WORD "
                "data.val_split=WORD"
            )
    K = len(whole.classes)
    trained, tested = (np.bincount(whole.labels[m], minlength=K) > 0 for m in (~held, held))
    if untrained := [whole.classes[k] for k in np.flatnonzero(~trained)]:
        raise UserError(f"{table}: no training image of {listed(map(repr, untrained))}")
    if data.val_classes == "all" and not tested.all():
        lacking = [whole.classes[k] for k in np.flatnonzero(~tested)]
        raise UserError(
            f"{table}: no held-out image of {listed(map(repr, lacking))}: type "
            "data.val_classes=subset where validation may lack some"
        )
    shown = ", ".join(f"{name!r} {n:,}" for name, n in sorted(others.items()))
    note = (f"left out of {table}: rows of {shown}",) if others else ()
    return whole.part(~held, note), whole.part(held)


def _rows(table: Path, data: DataConfig) -> Iterator[tuple[str, str, str]]:
    """Yield path, label and split (empty without `split_column`) of every row."""
    columns = [data.path_column, data.label_column]
    columns += [data.split_column] if data.split_column else []
    empty: list[int] = []
    for number, row in _records(table):
        for key, column in zip(("path", "label", "split"), columns, strict=False):
            if column not in row:
                hint = did_you_mean(column, list(row))
                raise UserError(
                    f"{table}, row {number}: there is no column {column!r}; type "
                    f"data.{key}_column=NAME.{hint}"
                )
        values = ["" if row[c] is None else str(row[c]).strip() for c in columns]
        if not values[0] or not values[1]:
            empty.append(number)
        yield values[0], values[1], values[2] if len(values) > 2 else ""
    if empty:
        raise UserError(f"{table}: {len(empty):,} rows lack a path or label (rows {listed(empty)})")


def _records(table: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number (from 1, a CSV's header is row 1) and the fields of every row."""
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            if table.suffix.lower() in JSON_LINES:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        record = json.loads(line)
                        if not isinstance(record, dict):
                            raise UserError(f"{table}, row {number}: not an object {{...}}")
                        yield number, record
                return
            head = file.readline()
            delimiter = max(DELIMITERS, key=head.count)
            names = [name.strip() for name in next(csv.reader([head], delimiter=delimiter), [])]
            for number, fields in enumerate(csv.reader(file, delimiter=delimiter), 2):
                if fields:
                    _validate_width(table, number, fields, names)
                    yield number, dict(zip(names, fields, strict=True))
    except UnicodeDecodeError as error:
        raise UserError(f"{table} is not text in UTF-8: save it as UTF-8") from error
    except (csv.Error, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{table} cannot be read: {error}") from error


def _validate_width(table: Path, number: int, fields: Sequence[str], names: Sequence[str]) -> None:
    if len(fields) != len(names):
        raise UserError(
            f"{table}, row {number}: {len(fields)} fields, but the header names {len(names)} "
            f"({', '.join(names)})"
        )


def _validate_files(table: Path, root: Path, paths: Sequence[str]) -> None:
    missing = [path for path in paths if not os.path.isfile(os.path.join(root, path))]
    if missing:
        raise UserError(
            f"{table} lists {len(missing):,} files that are not below {root} (of {len(paths):,}; "
            f"first: {listed(missing)}): type data.root=FOLDER, the folder its paths start from"
        )
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise UserError(
            f"{table} lists {len(twice):,} files more than once (first: {listed(twice)}): leave "
            "one row for each"
        )

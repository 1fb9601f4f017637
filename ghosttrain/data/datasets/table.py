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
    table = root / expanded(str(data.table))
    if not table.is_file():
        raise UserError(f"data.table={data.table}: {no_file(table)}; give a .csv or .jsonl file")
    rows = list(_rows(table, data))
    if not rows:
        raise UserError(f"{table} has no rows")
    paths, labels, halves = zip(*rows, strict=True)
    _validate_files(table, root, paths)
    known = [data.train_split, data.val_split]
    wanted = [half in known for half in halves] if data.split_column else [True] * len(rows)
    classes = sorted({label for label, kept in zip(labels, wanted, strict=True) if kept})
    for name in classes:
        validate_class_name(name, table)
    number = {name: k for k, name in enumerate(classes)}
    whole = FileDataset(
        str(root),
        classes,
        np.array([number[x] for x, kept in zip(labels, wanted, strict=True) if kept], np.int64),
        data.in_chans,
        np.array([os.fsencode(x) for x, kept in zip(paths, wanted, strict=True) if kept]),
        listed=(os.fsencode(table),),
        bit_depth=data.bit_depth,
        max_pixels=data.max_pixels,
    )
    if is_split_here(data):
        return split_here(data, whole)
    held = np.array([x == data.val_split for x, kept in zip(halves, wanted, strict=True) if kept])
    others = Counter(half for half, kept in zip(halves, wanted, strict=True) if not kept)
    return _halves(data, table, whole, held, others)


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

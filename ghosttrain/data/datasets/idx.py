"""IDX files: the format of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from ghosttrain.config.identity import fault_below
from ghosttrain.config.schema import DataConfig
from ghosttrain.data.datasets.base import ArrayDataset, Dataset, splits
from ghosttrain.data.datasets.tree import entries
from ghosttrain.data.decode import image_remedy
from ghosttrain.errors import UserError, did_you_mean
from ghosttrain.files import no_file
from ghosttrain.text import listed

DEFLATES = 1032
"""Bytes that a byte of a gzipped file stands for at most (zlib's technical notes)."""


def read_idx(data: DataConfig, root: Path) -> tuple[Dataset, Dataset]:
    """Return the two halves of data in MNIST's format (http://yann.lecun.com/exdb/mnist/), plain or
    gzipped. The classes are the values that occur among the training labels.

    Raises:
        UserError: a file is missing or damaged, or the files do not fit each other.
    """
    train, val = (_half(data, root, *split) for split in splits(data))
    unknown = sorted({*val.classes} - {*train.classes}, key=int)
    if unknown:
        raise UserError(f"{val.source} has labels that {train.source} lacks: {listed(unknown)}")
    return train, _among(val, train.classes)


def held_out_idx(data: DataConfig, root: Path, classes: list[str]) -> Dataset:
    """Return the held-out half alone. Its classes are `classes` and the values of its labels.

    Raises:
        UserError: as `read_idx`.
    """
    half = _half(data, root, *splits(data)[1])
    return _among(half, sorted({*half.classes, *classes}, key=int))


def _half(data: DataConfig, root: Path, split: str, key: str) -> ArrayDataset:
    """Return one half. Its classes are the values that occur among its labels."""
    image_file, label_file = (
        _idx_file(root, split, key, kind) for kind in ("images-idx3", "labels-idx1")
    )
    images, labels = _read_idx(image_file, 3), _read_idx(label_file, 1)
    if len(images) != len(labels):
        raise UserError(
            f"{image_file} holds {len(images):,} images, "
            f"but {label_file} {len(labels):,} labels: fetch both again"
        )
    if not images.size:
        raise UserError(f"{image_file} holds no images: its header says {images.shape}")
    values, numbers = np.unique(labels, return_inverse=True)
    return ArrayDataset(
        str(image_file),
        [str(value) for value in values],
        numbers,
        data.in_chans,
        images,
        listed=tuple(os.fsencode(file) for file in (image_file, label_file)),
    )


def _among(half: ArrayDataset, classes: list[str]) -> ArrayDataset:
    """Return a half with the labels of more classes."""
    places = np.array([classes.index(name) for name in half.classes])
    return replace(half, classes=classes, labels=places[half.labels])


def _idx_file(root: Path, split: str, key: str, kind: str) -> Path:
    if fault := fault_below(split):
        raise UserError(f"data.{key}={split!r} {fault}: type how a file's name in {root} begins")
    for file in (root / f"{split}-{kind}-ubyte", root / f"{split}-{kind}-ubyte.gz"):
        if file.is_file():
            return file
        if file.exists():
            raise UserError(f"{file} is {no_file(file)}: put the IDX file in its place")
    prefixes = [
        name.split(f"-{kind}-ubyte")[0] for name, _ in entries(root) if f"-{kind}-ubyte" in name
    ]
    hint = did_you_mean(split, prefixes)
    raise UserError(f"no {split}-{kind}-ubyte[.gz] in {root}: type data.{key}=PREFIX.{hint}")


def _decompressed(path: Path, dims: int) -> bytes:
    """Return the content of a gzipped file, at most a byte more than its header promises: a file of
    a few kB may stand for gigabytes.
    """
    with gzip.open(path) as file:
        head = file.read(4 + 4 * dims)
        most = path.stat().st_size * DEFLATES
        return head + file.read(min(math.prod(_shape(head, dims)), most) + 1)


def _shape(head: bytes, dims: int) -> list[int]:
    """Return what a header says of the sizes."""
    return [int.from_bytes(head[at : at + 4], "big") for at in range(4, 4 + 4 * dims, 4)]


def _read_idx(path: Path, dims: int) -> np.ndarray:
    """Return the unsigned bytes of an IDX file with `dims` dimensions."""
    try:
        raw = _decompressed(path, dims) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:  # the file itself may be intact
            raise UserError(
                f"cannot read {path} ({error.strerror}): {image_remedy(error)}"
            ) from error
        raise UserError(f"cannot read {path} ({error}): fetch it again") from error
    magic = bytes([0, 0, 8, dims])  # 8: unsigned bytes
    if raw[:4] != magic:
        raise UserError(
            f"{path} is no IDX file of unsigned bytes in {dims} dimensions: "
            f"it begins with {raw[:4].hex() or 'nothing'}, not {magic.hex()}"
        )
    shape = _shape(raw, dims)
    body = len(raw) - (4 + 4 * dims)
    expected = math.prod(shape)
    if body != expected:
        raise UserError(
            f"{path} is damaged: its header {tuple(shape)} promises {expected:,} bytes, "
            f"it holds {max(body, 0):,}: fetch it again"
        )
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)

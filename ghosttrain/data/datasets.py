"""Sample number -> (image, label): embedded digits, class folders (ImageNet too), IDX files.

Owns what exists on disk and its checks: everything wrong with the data as a whole is said here,
before training starts, in one line. Broken single files show when they are decoded. Knows nothing
of order or augmentation.

Legend: N images, H W map.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ghosttrain.config.errors import UserError, did_you_mean
from ghosttrain.config.schema import Data
from ghosttrain.data.decode import SUFFIXES, open_image, read_file, to_pixels

IMAGENET_CLASSES = 1000
MANIFEST_FILES = 1024  # whose content a manifest covers


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images by number, in an order that never changes."""

    source: str
    """What the user knows it by: a folder, a pair of files, "digits"."""
    classes: list[str]
    """Class names; a label is a position in this list."""
    labels: np.ndarray
    """Label of every image: (N,) int64."""
    in_chans: int
    """3 (RGB) or 1 (grey)."""

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, index: int) -> Image.Image:
        """Return image `index` with its size known; `decode.to_pixels` gives its pixels."""
        raise NotImplementedError

    def load(self, index: int) -> Image.Image:
        """Return image `index`, decoded, in mode RGB or L."""
        return to_pixels(self.open(index), self.in_chans)

    def manifest(self) -> str:
        """Return 64 hexadecimal digits that tell these images and labels from others.

        The same wherever the data lie. How images are shown (`data.*`, `augment.*`) has no part in
        it.

        Raises:
            UserError: an image file cannot be read.
        """
        digest = hashlib.sha256()
        classes = os.fsencode("\0".join(self.classes))
        for part in (classes, self.labels.astype("<i8").tobytes(), *self._contents()):
            # With its length, or a byte that moves from one part to the next would go unseen.
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.hexdigest()

    def _contents(self) -> Iterable[bytes]:
        """What the manifest holds of the images themselves."""
        raise NotImplementedError

    def listing(self) -> dict[str, Any]:
        """Return class names, number of images, and a digest of what lies in memory: labels, file
        names (of IDX files the pixels). JSON values. A cheaper `manifest`: it opens no image.
        """
        digest = hashlib.sha256(self.labels.astype("<i8").tobytes())
        digest.update(self._listed())
        return {"classes": self.classes, "images": len(self), "digest": digest.hexdigest()}

    def _listed(self) -> bytes:
        """What the listing's digest covers besides the labels."""
        raise NotImplementedError

    def describe(self) -> str:
        """Return one line such as `digits, train: 1,437 images, 10 classes`."""
        return f"{self.source}: {len(self):,} images, {len(self.classes):,} classes"


@dataclass(frozen=True, eq=False)
class ArrayDataset(Dataset):
    """Grey images of one size, in memory."""

    images: np.ndarray
    """(N, H, W) uint8."""

    def open(self, index: int) -> Image.Image:
        """Return image `index` in mode L."""
        return Image.fromarray(self.images[index])

    def _contents(self) -> Iterable[bytes]:
        return repr(self.images.shape).encode(), self.images.tobytes()

    def _listed(self) -> bytes:
        return b"".join(self._contents())


@dataclass(frozen=True, eq=False)
class FolderDataset(Dataset):
    """Image files in one folder per class: `source/<class>/<name>`."""

    names: np.ndarray
    """File names: (N,) bytes of fixed width. One array instead of a million Python strings: worker
    processes share its memory, where counting references to strings would copy them into every
    worker."""

    def open(self, index: int) -> Image.Image:
        """Return image `index`, not decoded yet."""
        return open_image(self._path(index))

    def _path(self, index: int) -> str:
        folder, name = self.classes[self.labels[index]], os.fsdecode(self.names[index])
        return os.path.join(self.source, folder, name)

    def _contents(self) -> Iterable[bytes]:
        """All names, and the bytes of evenly spaced files: resized copies keep their names, and
        reading the 140 GB of ImageNet would take too long.
        """
        yield self.names.tobytes()
        last = len(self) - 1
        for index in np.unique(np.linspace(0, last, MANIFEST_FILES).round().astype(int)):
            yield read_file(self._path(index))

    def _listed(self) -> bytes:
        return self.names.tobytes()


def build_datasets(data: Data) -> tuple[Dataset, Dataset]:
    """Return (training images, held-out images); the split never depends on a seed.

    Raises:
        UserError: the data are not there, not complete, or their two halves do not fit each other.
    """
    if data.name == "digits":
        return _digits(data.in_chans)
    root = _root(data)
    return _idx(data, root) if data.name == "idx" else _folder(data, root)


def _root(data: Data) -> Path:
    root = data.root or (os.environ.get("IMAGENET_DIR") if data.name == "imagenet" else None)
    holds = {
        "idx": f"{data.train_split}-images-idx3-ubyte[.gz]",
        "folder": f"{data.train_split}/<class>/*.jpg",
        "imagenet": f"{data.train_split}/<class>/*.JPEG",
    }[data.name]
    if not root:
        also = ", or set IMAGENET_DIR" if data.name == "imagenet" else ""
        raise UserError(
            f"data={data.name} needs its folder: type data.root=/path, which holds {holds}{also}"
        )
    path = Path(root).expanduser()
    if not path.is_dir():
        raise UserError(f"data.root={root} is no folder: type data.root=/path, which holds {holds}")
    return path


# --- digits ---------------------------------------------------------------------------------------


def _digits(in_chans: int) -> tuple[Dataset, Dataset]:
    """Read scikit-learn's 1,797 handwritten digits (8x8, 17 grey levels), enlarged once to 64x64.

    The images are sorted by class, keeping their order otherwise; of this row every fifth is held
    out: 360 images, a fifth of every class. Both halves hold digits by the same writers.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = (digits.images * (255 / 16)).round().astype(np.uint8)
    enlarged = (
        Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC) for image in small
    )
    images = np.stack([np.asarray(image) for image in enlarged])
    labels = digits.target.astype(np.int64)
    by_class = np.argsort(labels, kind="stable")
    held_out = np.zeros(len(labels), dtype=bool)
    held_out[by_class[::5]] = True
    classes = [str(k) for k in range(10)]
    return (
        ArrayDataset("digits, train", classes, labels[~held_out], in_chans, images[~held_out]),
        ArrayDataset("digits, held out", classes, labels[held_out], in_chans, images[held_out]),
    )


# --- folders --------------------------------------------------------------------------------------


def _folder(data: Data, root: Path) -> tuple[Dataset, Dataset]:
    train_dir, val_dir = (_split(root, split, key) for split, key in _splits(data))
    classes, val_classes = _classes(train_dir), _classes(val_dir)
    if data.name == "imagenet" and len(classes) != IMAGENET_CLASSES:
        raise UserError(
            f"{train_dir} has {len(classes):,} class folders, ImageNet has {IMAGENET_CLASSES:,}: "
            f"for other images type data=folder data.root={root}"
        )
    if classes != val_classes:
        missing, unknown = set(classes) - set(val_classes), set(val_classes) - set(classes)
        differ = [f"lacks {_some(sorted(missing))}"] if missing else []
        differ += [f"adds {_some(sorted(unknown))}"] if unknown else []
        raise UserError(
            f"{val_dir} must have the class folders of {train_dir}, but it {' and '.join(differ)}"
        )
    return _scan(train_dir, classes, data.in_chans), _scan(val_dir, classes, data.in_chans)


def _splits(data: Data) -> tuple[tuple[str, str], tuple[str, str]]:
    return (data.train_split, "train_split"), (data.val_split, "val_split")


def _split(root: Path, split: str, key: str) -> Path:
    folder = root / split
    if not folder.is_dir():
        hint = did_you_mean(split, [name for name, is_dir in _entries(root) if is_dir])
        raise UserError(f"there is no folder {split!r} in {root}: type data.{key}=NAME.{hint}")
    return folder


def _classes(folder: Path) -> list[str]:
    classes = sorted(name for name, is_dir in _entries(folder) if is_dir)
    if not classes:
        raise UserError(f"no class folders in {folder}: images must lie in {folder}/<class>/")
    return classes


def _scan(folder: Path, classes: list[str], in_chans: int) -> Dataset:
    names: list[bytes] = []
    counts = []
    for label in classes:
        found = sorted(
            os.fsencode(name)
            for name, is_dir in _entries(folder / label)
            if not is_dir and name.lower().endswith(SUFFIXES)
        )
        if not found:
            raise UserError(
                f"no images in the class folder {folder / label}: add some "
                f"({', '.join(SUFFIXES)}) or remove this class from both splits"
            )
        names += found
        counts.append(len(found))
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    return FolderDataset(str(folder), classes, labels, in_chans, np.array(names))


def _entries(folder: Path) -> list[tuple[str, bool]]:
    """List (name, is a folder), hidden entries left out; no file is looked at for it."""
    try:
        with os.scandir(folder) as entries:
            return [(e.name, e.is_dir()) for e in entries if not e.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}") from error


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + more


# --- IDX files ------------------------------------------------------------------------------------


def _idx(data: Data, root: Path) -> tuple[Dataset, Dataset]:
    """Read the files of MNIST's page (http://yann.lecun.com/exdb/mnist/), plain or gzipped.

    The classes are the values that occur among the training labels.
    """
    loaded = []
    for split, key in _splits(data):
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
        loaded.append((str(image_file), images, labels))
    values = np.unique(loaded[0][2])
    unknown = np.setdiff1d(loaded[1][2], values)
    if unknown.size:
        raise UserError(
            f"{loaded[1][0]} has labels that {loaded[0][0]} lacks: {_some(unknown.tolist())}"
        )
    classes = [str(value) for value in values]
    train, val = (
        ArrayDataset(name, classes, np.searchsorted(values, labels), data.in_chans, images)
        for name, images, labels in loaded
    )
    return train, val


def _idx_file(root: Path, split: str, key: str, kind: str) -> Path:
    for name in (f"{split}-{kind}-ubyte", f"{split}-{kind}-ubyte.gz"):
        if (root / name).is_file():
            return root / name
    found = [
        name.split(f"-{kind}-ubyte")[0] for name, _ in _entries(root) if f"-{kind}-ubyte" in name
    ]
    hint = did_you_mean(split, found)
    raise UserError(f"no {split}-{kind}-ubyte[.gz] in {root}: type data.{key}=PREFIX.{hint}")


def _read_idx(path: Path, dims: int) -> np.ndarray:
    """Return the unsigned bytes of an IDX file with `dims` dimensions."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path} ({reason}): fetch it again") from error
    magic = bytes([0, 0, 8, dims])  # 8: unsigned bytes
    if raw[:4] != magic:
        raise UserError(
            f"{path} is no IDX file of unsigned bytes in {dims} dimensions: "
            f"it begins with {raw[:4].hex() or 'nothing'}, not {magic.hex()}"
        )
    shape = [int.from_bytes(raw[at : at + 4], "big") for at in range(4, 4 + 4 * dims, 4)]
    body = len(raw) - (4 + 4 * dims)
    expected = int(np.prod(shape, dtype=object))
    if body != expected:
        raise UserError(
            f"{path} is damaged: its header {tuple(shape)} promises {expected:,} bytes, "
            f"it holds {max(body, 0):,}: fetch it again"
        )
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)

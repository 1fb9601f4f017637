"""Image files in one folder per class, ImageNet's too: `root/train/<class>/...`, at any depth; or
`root/<class>/...`, of which a part is held out here (`splitting.py`).
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from ghosttrain.config.schema import DataConfig
from ghosttrain.data.datasets.base import Dataset, splits
from ghosttrain.data.datasets.duplicates import near_duplicates
from ghosttrain.data.datasets.splitting import held_out_mask, is_split_here
from ghosttrain.data.decode import MAX_PIXELS, open_image, read_file, suffixes
from ghosttrain.errors import UserError, did_you_mean
from ghosttrain.text import listed

IMAGENET_CLASSES = 1000
DIGEST_FILES = 1024  # whose content a digest covers


@dataclass(frozen=True, eq=False)
class FileDataset(Dataset):
    """Image files: `source/<name>`."""

    names: np.ndarray
    """File names, relative to `source`: (N,) bytes of fixed width. One array instead of a million
    Python strings: worker processes share its memory, where counting references to strings would
    copy them into every worker."""
    _: KW_ONLY
    max_pixels: int = MAX_PIXELS
    """Pixels of the largest image that is decoded."""
    _arrays: ClassVar[tuple[str, ...]] = ("names",)

    def open(self, index: int) -> Image.Image:
        """Return image `index`, not decoded yet."""
        return open_image(self.path(index), self.max_pixels)

    def path(self, index: int) -> str:
        """Return where image `index` lies."""
        return os.path.join(self.source, self.relative_path(index))

    def relative_path(self, index: int) -> str:
        """Return where image `index` lies below `source`."""
        return os.fsdecode(self.names[index])

    def short_name(self, index: int) -> bytes:
        """Return where image `index` lies below `source`."""
        return os.fsencode(self.relative_path(index))

    def name_of(self, index: int) -> str:
        """Return the path of image `index`."""
        return self.path(index)

    def _content(self) -> Iterable[bytes]:
        """All names, and the bytes of evenly spaced files: resized copies keep their names, and
        reading the 140 GB of ImageNet would take too long.
        """
        yield self.names.tobytes()
        last = len(self) - 1
        for index in np.unique(np.linspace(0, last, DIGEST_FILES).round().astype(int)):
            yield read_file(self.path(index))

    def _index(self) -> bytes:
        return self.names.tobytes()


@dataclass(frozen=True, eq=False)
class FolderDataset(FileDataset):
    """Image files in one folder per class: `source/<class>/<name>`; `names` are relative to the
    class folder.
    """

    def relative_path(self, index: int) -> str:
        """Return where image `index` lies below `source`."""
        return os.path.join(self.classes[self.labels[index]], os.fsdecode(self.names[index]))


def read_folders(data: DataConfig, root: Path) -> tuple[Dataset, Dataset]:
    """Return the two halves of a tree of class folders; of ImageNet with all its classes.

    Raises:
        UserError: a split or a class is missing, empty, or cannot be listed.
    """
    if is_split_here(data):
        return _split_folder(data, root)
    train_dir, val_dir = (_split(root, split, key) for split, key in splits(data))
    left_out = _LeftOut(), _LeftOut()
    classes, val_classes = _classes(train_dir, left_out[0]), _classes(val_dir, left_out[1])
    if data.name == "imagenet" and len(classes) != IMAGENET_CLASSES:
        raise UserError(
            f"{train_dir} has {len(classes):,} class folders, ImageNet has {IMAGENET_CLASSES:,}: "
            f"for other images type data=folder data.root={root}"
        )
    missing, unknown = set(classes) - set(val_classes), set(val_classes) - set(classes)
    if unknown or (missing and data.val_classes == "all"):
        differ = [f"lacks {listed(map(repr, sorted(missing)))}"] if missing else []
        differ += [f"adds {listed(map(repr, sorted(unknown)))}"] if unknown else []
        raise UserError(
            f"{val_dir} must have the class folders of {train_dir}, but it {' and '.join(differ)}"
            + ("; type data.val_classes=subset where it may lack some" * (not unknown))
        )
    train = _scan(train_dir, classes, data, left_out[0])
    return train, _scan(val_dir, classes, data, left_out[1], only=val_classes)


def _split_folder(data: DataConfig, root: Path) -> tuple[Dataset, Dataset]:
    """Return the two halves of one folder of classes."""
    left_out = _LeftOut()
    classes = _classes(root, left_out)
    if {data.train_split, data.val_split} <= set(classes):
        raise UserError(
            f"data.root={root} holds {data.train_split}/ and {data.val_split}/: it is split "
            "already; leave data.split and data.fold out, or name the folder of the classes "
            f"(data.root={root / data.train_split})"
        )
    return split_here(data, _scan(root, classes, data, left_out))


def split_here(data: DataConfig, whole: FileDataset) -> tuple[FileDataset, FileDataset]:
    """Return the training and the held-out part of one set (`splitting.held_out_mask`)."""
    paths = [whole.short_name(i) for i in range(len(whole))]
    alike = near_duplicates(whole) if data.near_duplicates == "together" else ()
    held = held_out_mask(data, paths, whole.labels, whole.classes, alike)
    return whole.part(~held, whole.left_out), whole.part(held)


def _split(root: Path, split: str, key: str) -> Path:
    folder = root / split
    if not folder.is_dir():
        hint = did_you_mean(split, [name for name, is_dir in entries(root) if is_dir])
        raise UserError(
            f"there is no folder {split!r} in {root}: type data.{key}=NAME, or, if its folders are "
            f"the classes, data.split=0.2 to hold a fifth of each out.{hint}"
        )
    return folder


NO_SUFFIX = "without an image's suffix"


class _LeftOut:
    """Counts what lies in a tree of images and is not used, by reason, and remembers the first; and
    which folders were listed.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.suffixes: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.folders: list[bytes] = []  # all that were listed

    def add(self, reason: str, path: bytes) -> None:
        self.counts[reason] += 1
        name = os.fsdecode(path)
        self.first[reason] = min(self.first.get(reason, name), name)

    def add_file(self, path: bytes) -> None:
        self.add(NO_SUFFIX, path)
        _, dot, suffix = os.path.basename(path).rpartition(b".")
        self.suffixes[os.fsdecode(dot + suffix) if dot else "none"] += 1

    def notes(self, folder: Path) -> tuple[str, ...]:
        """Return one line that says what was left out of `folder` and why, or none."""
        if not self.counts:
            return ()
        parts = []
        ranked = sorted(self.suffixes.items(), key=lambda item: (-item[1], item[0]))
        for reason, count in sorted(self.counts.items()):
            # A few of the suffixes say more than one of the paths.
            common = listed((f"{suffix} {n:,}" for suffix, n in ranked), most=4)
            detail = f"first: {self.first[reason]}"
            if reason == NO_SUFFIX:
                detail = f"{common}; {detail}"
            parts.append(f"{count:,} {reason} ({detail})")
        return (f"left out of {folder}: {', '.join(parts)}",)


def _classes(folder: Path, left_out: _LeftOut) -> list[str]:
    classes = []
    for path, is_folder in _scanned(os.fsencode(folder), left_out):
        if is_folder:
            classes.append(os.fsdecode(os.path.basename(path)))
        else:
            left_out.add("outside the class folders", path)
    if not classes:
        raise UserError(f"no class folders in {folder}: images must lie in {folder}/<class>/")
    return sorted(classes, key=os.fsencode)


def _scan(
    folder: Path,
    classes: list[str],
    data: DataConfig,
    left_out: _LeftOut,
    only: Sequence[str] | None = None,
) -> FileDataset:
    """List the images of all classes, at any depth, as torchvision's ImageFolder does; with `only`,
    of these classes.
    """
    names: list[bytes] = []
    counts = []
    known = suffixes()
    for label in classes:
        if only is not None and label not in only:
            counts.append(0)
            continue
        top = os.fsencode(folder / label)
        paths = sorted(path[len(top) + 1 :] for path in _images(top, known, left_out))
        if not paths:
            content = listed(map(repr, sorted(os.listdir(folder / label))))
            raise UserError(
                f"no images in the class folder {folder / label} ({content or 'it is empty'}): add "
                "some (.jpg, .png, ...) or remove this class from both splits"
            )
        names += paths
        counts.append(len(paths))
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    return FolderDataset(
        str(folder),
        classes,
        labels,
        data.in_chans,
        np.array(names),
        left_out=left_out.notes(folder),
        listed=tuple(left_out.folders),
        bit_depth=data.bit_depth,
        max_pixels=data.max_pixels,
    )


def _images(
    folder: bytes, known: frozenset[bytes], left_out: _LeftOut, above: tuple[bytes, ...] = ()
) -> Iterator[bytes]:
    """Yield the paths of the images below `folder`; `above` are the real paths of the folders that
    it lies in.
    """
    real_path = os.path.realpath(folder)
    if real_path in above:
        return left_out.add("linked in a circle", folder)
    for path, is_folder in _scanned(folder, left_out):
        if is_folder:
            yield from _images(path, known, left_out, (*above, real_path))
        elif path.rpartition(b".")[2].lower() in known:
            yield path
        else:
            left_out.add_file(path)


def _scanned(folder: bytes, left_out: _LeftOut) -> Iterator[tuple[bytes, bool]]:
    """Yield (path, whether it is a folder) of what is not hidden; of all files, only links are
    looked up.

    Raises:
        UserError: a link points nowhere. What it pointed to may be an image or a whole class:
            going on without it would train on other data than the user has in mind.
    """
    nowhere = []
    left_out.folders.append(folder)
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    left_out.add("hidden", entry.path)
                elif entry.is_symlink() and not _leads_somewhere(entry):
                    nowhere.append(entry.path)
                elif entry.is_dir() or entry.is_file():
                    yield entry.path, entry.is_dir()
                else:
                    left_out.add("neither file nor folder", entry.path)
    except OSError as error:
        raise UserError(
            f"cannot list {os.fsdecode(folder)} ({error.strerror}): its images would be missing; "
            "make it readable"
        ) from error
    if nowhere:
        first, shown = min(nowhere), os.fsdecode(folder)
        raise UserError(
            f"{len(nowhere):,} of the links in {shown} lead nowhere, so images are missing (first: "
            f"{os.fsdecode(first)} -> {os.fsdecode(os.readlink(first))}): bring back what they "
            f"point to, or remove them: find {shlex.quote(shown)} -xtype l -delete"
        )


def _leads_somewhere(link: os.DirEntry[bytes]) -> bool:
    try:
        return link.is_dir() or link.is_file() or os.path.exists(link.path)
    except OSError:  # a circle of links
        return False


def entries(folder: Path) -> list[tuple[str, bool]]:
    """Return (name, is a folder), hidden entries left out; no file is looked at for it."""
    try:
        with os.scandir(folder) as entries:
            return [(e.name, e.is_dir()) for e in entries if not e.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}") from error

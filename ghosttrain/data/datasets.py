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
import shlex
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ghosttrain.config.errors import UserError, did_you_mean
from ghosttrain.config.paths import expanded
from ghosttrain.config.schema import DataConfig
from ghosttrain.data.decode import (
    BIT_DEPTH,
    MAX_PIXELS,
    image_remedy,
    is_deep_colour,
    open_image,
    read_file,
    reduction,
    stated_depth,
    suffixes,
    to_pixels,
)

IMAGENET_CLASSES = 1000
MANIFEST_FILES = 1024  # whose content a manifest covers
LOOKED_AT = 64  # images decoded before training starts, of each split


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
    _: KW_ONLY
    left_out: tuple[str, ...] = ()
    """What lies beside the images and is not used, and why: a line each."""
    bit_depth: int = BIT_DEPTH
    """Bits that the values of 16-bit images use."""

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What the user should hear about these data, a line each. Decodes a few images when it is
        first asked for: ranks that print nothing need not.
        """
        return self.left_out + look(self)

    def open(self, index: int) -> Image.Image:
        """Return image `index` with its size known; `decode.to_pixels` gives its pixels."""
        raise NotImplementedError

    def load(self, index: int) -> Image.Image:
        """Return image `index`, decoded, in mode RGB or L."""
        return to_pixels(self.open(index), self.in_chans, bit_depth=self.bit_depth)

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
        """Return class names, number of images, and a digest of what lies in memory: classes,
        labels, file names (of IDX files the pixels). JSON values. A cheaper `manifest`: it opens no
        image.
        """
        digest = hashlib.sha256(os.fsencode("\0".join(self.classes)))
        digest.update(self.labels.astype("<i8").tobytes())
        digest.update(self._listed())
        return {"classes": self.classes, "images": len(self), "digest": digest.hexdigest()}

    def _listed(self) -> bytes:
        """What the listing's digest covers besides classes and labels."""
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
    """File names, relative to the class folder: (N,) bytes of fixed width. One array instead of a
    million Python strings: worker processes share its memory, where counting references to strings
    would copy them into every worker."""
    _: KW_ONLY
    max_pixels: int = MAX_PIXELS
    """Pixels of the largest image that is decoded."""

    def open(self, index: int) -> Image.Image:
        """Return image `index`, not decoded yet."""
        return open_image(self.path(index), self.max_pixels)

    def path(self, index: int) -> str:
        """Return where image `index` lies."""
        folder, name = self.classes[self.labels[index]], os.fsdecode(self.names[index])
        return os.path.join(self.source, folder, name)

    def _contents(self) -> Iterable[bytes]:
        """All names, and the bytes of evenly spaced files: resized copies keep their names, and
        reading the 140 GB of ImageNet would take too long.
        """
        yield self.names.tobytes()
        last = len(self) - 1
        for index in np.unique(np.linspace(0, last, MANIFEST_FILES).round().astype(int)):
            yield read_file(self.path(index))

    def _listed(self) -> bytes:
        return self.names.tobytes()


def build_datasets(data: DataConfig) -> tuple[Dataset, Dataset]:
    """Return (training images, held-out images); the split never depends on a seed.

    No image is decoded.

    Raises:
        UserError: the data are not there, not complete, or their two halves do not fit each other.
    """
    if data.name == "digits":
        return _digits(data.in_chans)
    root = _root(data)
    train, held_out = _idx(data, root) if data.name == "idx" else _folder(data, root)
    if len(train.classes) < 2:
        raise UserError(
            f"{train.source} has one class, {train.classes[0]!r}: there is nothing to tell apart, "
            "and the loss is 0 from the start; add images of another class (of what it is not, for "
            "example)"
        )
    return train, held_out


def _root(data: DataConfig) -> Path:
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
    path = expanded(root)
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


def _folder(data: DataConfig, root: Path) -> tuple[Dataset, Dataset]:
    train_dir, val_dir = (_split(root, split, key) for split, key in _splits(data))
    left_out = _LeftOut(), _LeftOut()
    classes, val_classes = _classes(train_dir, left_out[0]), _classes(val_dir, left_out[1])
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
    train = _scan(train_dir, classes, data, left_out[0])
    return train, _scan(val_dir, classes, data, left_out[1])


def _splits(data: DataConfig) -> tuple[tuple[str, str], tuple[str, str]]:
    return (data.train_split, "train_split"), (data.val_split, "val_split")


def _split(root: Path, split: str, key: str) -> Path:
    folder = root / split
    if not folder.is_dir():
        hint = did_you_mean(split, [name for name, is_dir in _entries(root) if is_dir])
        raise UserError(f"there is no folder {split!r} in {root}: type data.{key}=NAME.{hint}")
    return folder


NO_SUFFIX = "without an image's suffix"


class _LeftOut:
    """Counts what lies in a tree of images and is not used, by reason, and remembers the first."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.suffixes: Counter[str] = Counter()
        self.first: dict[str, str] = {}

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
        said = []
        ranked = sorted(self.suffixes.items(), key=lambda item: (-item[1], item[0]))
        for reason, count in sorted(self.counts.items()):
            # A few of the suffixes say more than one of the paths.
            common = [f"{suffix} {n:,}" for suffix, n in ranked[:4]]
            more = ", ..." if len(self.suffixes) > 4 else ""
            detail = f"first: {self.first[reason]}"
            if reason == NO_SUFFIX:
                detail = f"{', '.join(common)}{more}; {detail}"
            said.append(f"{count:,} {reason} ({detail})")
        return (f"left out of {folder}: {', '.join(said)}",)


def _classes(folder: Path, left_out: _LeftOut) -> list[str]:
    classes = []
    for path, is_folder in _listed(os.fsencode(folder), left_out):
        if is_folder:
            classes.append(os.fsdecode(os.path.basename(path)))
        else:
            left_out.add("outside the class folders", path)
    if not classes:
        raise UserError(f"no class folders in {folder}: images must lie in {folder}/<class>/")
    return sorted(classes, key=os.fsencode)


def _scan(folder: Path, classes: list[str], data: DataConfig, left_out: _LeftOut) -> Dataset:
    """List the images of all classes, at any depth, as torchvision's ImageFolder does."""
    names: list[bytes] = []
    counts = []
    known = suffixes()
    for label in classes:
        top = os.fsencode(folder / label)
        found = sorted(path[len(top) + 1 :] for path in _images(top, known, left_out))
        if not found:
            there = _some(sorted(os.listdir(folder / label)))
            raise UserError(
                f"no images in the class folder {folder / label} ({there or 'it is empty'}): add "
                "some (.jpg, .png, ...) or remove this class from both splits"
            )
        names += found
        counts.append(len(found))
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    return FolderDataset(
        str(folder),
        classes,
        labels,
        data.in_chans,
        np.array(names),
        left_out=left_out.notes(folder),
        bit_depth=data.bit_depth,
        max_pixels=data.max_pixels,
    )


def _images(
    folder: bytes, known: frozenset[bytes], left_out: _LeftOut, above: tuple[bytes, ...] = ()
) -> Iterator[bytes]:
    """Yield the paths of the images below `folder`; `above` are the real paths of the folders that
    it lies in.
    """
    here = os.path.realpath(folder)
    if here in above:
        return left_out.add("linked in a circle", folder)
    for path, is_folder in _listed(folder, left_out):
        if is_folder:
            yield from _images(path, known, left_out, (*above, here))
        elif path.rpartition(b".")[2].lower() in known:
            yield path
        else:
            left_out.add_file(path)


def _listed(folder: bytes, left_out: _LeftOut) -> Iterator[tuple[bytes, bool]]:
    """Yield (path, whether it is a folder) of what is not hidden; of all files, only links are
    looked up.

    Raises:
        UserError: a link points nowhere. What it pointed to may be an image or a whole class:
            going on without it would train on other data than the user has in mind.
    """
    nowhere = []
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


# --- a look at a few images -----------------------------------------------------------------------


def look(dataset: Dataset) -> tuple[str, ...]:
    """Return notes about images that decode to nearly nothing: one colour, or 16-bit values that
    fill only the lower bits.

    Looks at up to `LOOKED_AT` evenly spaced images; those that cannot be decoded are left to
    whoever needs them.
    """
    indices = np.unique(np.linspace(0, len(dataset) - 1, LOOKED_AT).round().astype(int))
    one_colour, deep, highest, deep_colour, brightest, overall = [], 0, 0, 0, 0, 0
    for index in indices.tolist():
        try:
            image = dataset.open(index)
            colour, stated = is_deep_colour(image), stated_depth(image)
            pixels = to_pixels(image, 3, reduction(image, (64, 64)), dataset.bit_depth)
        except UserError:
            continue
        values = np.asarray(pixels)
        high = int(values.max())
        if (values == values[0, 0]).all():
            one_colour.append(index)
        overall = max(overall, high)
        if colour:
            deep_colour, brightest = deep_colour + 1, max(brightest, high)
        elif image.mode.startswith("I") and stated is None:
            deep, highest = deep + 1, max(highest, int(np.asarray(image).max()))
    notes, among = [], f"of {len(indices):,} images looked at in {dataset.source}"
    full = 2**dataset.bit_depth - 1
    if deep and highest <= full // 4:
        notes.append(
            f"note: {deep:,} {among} are 16-bit images whose values reach {highest:,} of "
            f"{full:,}: they are nearly black to the network; if these are all the bits they use, "
            f"type data.bit_depth={max(8, highest.bit_length())}"
        )
    if deep_colour and brightest <= 255 // 4:
        notes.append(
            f"note: {deep_colour:,} {among} are colour images of 16 bits, of which the upper 8 are "
            f"read, and these reach {brightest} of 255: they are nearly black to the network; save "
            "them with 8 bits"
        )
    if 0 < overall < 32 and not notes:
        notes.append(
            f"note: the brightest pixel {among} is {overall} of 255: they are nearly black to the "
            "network; save them with values of 0 to 255"
        )
    if one_colour:
        where = dataset.path(one_colour[0]) if isinstance(dataset, FolderDataset) else one_colour[0]
        notes.append(
            f"note: {len(one_colour):,} {among} {'are' if len(one_colour) > 1 else 'is'} of one "
            f"colour (first: {where})"
        )
    return tuple(notes)


# --- IDX files ------------------------------------------------------------------------------------


def _idx(data: DataConfig, root: Path) -> tuple[Dataset, Dataset]:
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
    shape = [int.from_bytes(raw[at : at + 4], "big") for at in range(4, 4 + 4 * dims, 4)]
    body = len(raw) - (4 + 4 * dims)
    expected = int(np.prod(shape, dtype=object))
    if body != expected:
        raise UserError(
            f"{path} is damaged: its header {tuple(shape)} promises {expected:,} bytes, "
            f"it holds {max(body, 0):,}: fetch it again"
        )
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)

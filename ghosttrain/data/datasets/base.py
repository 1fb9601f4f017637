"""What every data set is: labelled images by number, and what tells them from others."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from PIL import Image

from ghosttrain.config.schema import DataConfig
from ghosttrain.data.datasets.boxes import Boxes
from ghosttrain.data.decode import BIT_DEPTH, to_pixels


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
    listed: tuple[bytes, ...] = ()
    """Folders or files whose modification times tell whether all this must be read again."""
    bit_depth: int = BIT_DEPTH
    """Bits that the values of 16-bit images use."""
    boxes: Boxes | None = None
    """Where the objects are, and of what class; `labels` are then 0. None: an image is of one
    class."""
    _arrays: ClassVar[tuple[str, ...]] = ()
    """Fields besides `labels` that have a value for every image."""

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, index: int) -> Image.Image:
        """Return image `index` with its size known; `decode.to_pixels` gives its pixels."""
        raise NotImplementedError

    def name_of(self, index: int) -> str:
        """Return what a user can find image `index` by."""
        return f"image {index}"

    def short_name(self, index: int) -> bytes:
        """Return the name of image `index` wherever the data lie."""
        return b"%d" % index

    def part(self, mask: np.ndarray, left_out: tuple[str, ...] = ()) -> Self:
        """Return the images where `mask` (N,) is true."""
        chosen = {name: getattr(self, name)[mask] for name in ("labels", *self._arrays)}
        return replace(self, left_out=left_out, **chosen)

    def of_classes(self, kept: np.ndarray) -> Self:
        """Return the images of some classes, by their labels in rising order; these become the
        labels 0, 1, ...
        """
        some = self.part(np.isin(self.labels, kept), self.left_out)
        names = [self.classes[k] for k in kept]
        return replace(some, classes=names, labels=np.searchsorted(kept, some.labels))

    def load(self, index: int) -> Image.Image:
        """Return image `index`, decoded, in mode RGB or L."""
        return to_pixels(self.open(index), self.in_chans, bit_depth=self.bit_depth)

    def content_digest(self) -> str:
        """Return 64 hexadecimal digits that tell these images and labels from others.

        The same wherever the data lie. How images are shown (`data.*`, `augment.*`) has no part in
        it.

        Raises:
            UserError: an image file cannot be read.
        """
        digest = hashlib.sha256()
        classes = os.fsencode("\0".join(self.classes))
        parts = [classes, self.labels.astype("<i8").tobytes()]
        parts += [] if self.boxes is None else [self.boxes.content()]
        for part in (*parts, *self._content()):
            # With its length, or a byte that moves from one part to the next would go unseen.
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.hexdigest()

    def _content(self) -> Iterable[bytes]:
        """What the digest covers of the images themselves."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """Return class names, number of images, and a digest of what lies in memory: classes,
        labels, file names (of IDX files the pixels). JSON values. Cheaper than `content_digest`: it
        opens no image.
        """
        digest = hashlib.sha256(os.fsencode("\0".join(self.classes)))
        digest.update(self.labels.astype("<i8").tobytes())
        digest.update(self._index())
        if self.boxes is not None:
            digest.update(self.boxes.content())
        return {"classes": self.classes, "images": len(self), "digest": digest.hexdigest()}

    def _index(self) -> bytes:
        """What the identity's digest covers besides classes and labels."""
        raise NotImplementedError

    def describe(self) -> str:
        """Return one line such as `digits, train: 1,437 images, 10 classes`."""
        boxes = "" if self.boxes is None else f"{len(self.boxes.labels):,} boxes of "
        return f"{self.source}: {len(self):,} images, {boxes}{len(self.classes):,} classes"


@dataclass(frozen=True, eq=False)
class ArrayDataset(Dataset):
    """Grey images of one size, in memory."""

    images: np.ndarray
    """(N, H, W) uint8."""
    _arrays: ClassVar[tuple[str, ...]] = ("images",)

    def open(self, index: int) -> Image.Image:
        """Return image `index` in mode L."""
        return Image.fromarray(self.images[index])

    def _content(self) -> Iterable[bytes]:
        return repr(self.images.shape).encode(), self.images.tobytes()

    def _index(self) -> bytes:
        return b"".join(self._content())


def evenly(count: int, chosen: int) -> list[int]:
    """Return up to `chosen` numbers below `count`, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, chosen).round().astype(int)).tolist()


def splits(data: DataConfig) -> tuple[tuple[str, str], tuple[str, str]]:
    """Return the names of the training and of the held-out split, each with its setting's name."""
    return (data.train_split, "train_split"), (data.val_split, "val_split")

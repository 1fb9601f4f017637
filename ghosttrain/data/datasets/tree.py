"""The images below class folders, listed: `folder/<class>/...` at any depth, ImageNet's too; and
`data.index`, which keeps a listing for the next start. Imports no torch.

Folders are listed side by side: a network's answer is waited for once, not once for each of a
thousand. What was kept holds as long as no folder has changed: adding, removing or renaming a file
changes the modification time of its folder.

Legend: N images, K classes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ghosttrain.data.decode import suffixes
from ghosttrain.errors import UserError
from ghosttrain.files import expanded, open_file, replacing
from ghosttrain.text import has_controls, listed, printable

THREADS = 16
"""Folders that are listed at a time."""
YOUNG_NS = 2_000_000_000
"""Nanoseconds: a folder changed so shortly before it was listed may change again unseen."""
NO_SUFFIX = "without an image's suffix"


@dataclass(frozen=True)
class Tree:
    """All images below one folder of class folders."""

    classes: list[str]
    counts: list[int]
    """Images of each class."""
    names: np.ndarray
    """Paths below the class folders, class by class, sorted: (N,) bytes of fixed width."""
    left_out: tuple[str, ...]
    """A line about what lies there and is not used; or none."""
    listed: tuple[bytes, ...]
    """All folders that were listed."""


def list_tree(folder: Path, index: str | None = None) -> Tree:
    """List the images of all classes, at any depth, as torchvision's ImageFolder does.

    Args:
        folder: holds the class folders.
        index: folder in which listings are kept (`data.index`); None keeps nothing.

    Raises:
        UserError: a folder cannot be listed, has no images, or holds links that lead nowhere; the
            index cannot be written.
    """
    if index is None:
        return _listed(folder)
    kept = expanded(index) / f"{_digest(os.path.realpath(folder))}.npz"
    tree = _kept(kept, folder)
    if tree is None:
        began = time.time_ns()
        tree = _listed(folder)
        _keep(kept, folder, tree, began)
    return tree


def class_names(folder: Path) -> list[str]:
    """Return the names of the class folders, in the order of their labels.

    Raises:
        UserError: there are none.
    """
    return _class_names(folder, _LeftOut())


def _class_names(folder: Path, left_out: _LeftOut) -> list[str]:
    names = []
    for path, is_folder in _scanned(os.fsencode(folder), left_out):
        if is_folder:
            names.append(os.fsdecode(os.path.basename(path)))
            validate_class_name(names[-1], folder)
        else:
            left_out.add("outside the class folders", path)
    if not names:
        raise UserError(f"no class folders in {folder}: images must lie in {folder}/<class>/")
    return sorted(names, key=os.fsencode)


def validate_class_name(name: str, source: Path) -> None:
    """Refuse a class name that a terminal would obey; names of classes are shown everywhere.

    Raises:
        UserError: naming it, and where it comes from.
    """
    if has_controls(name):
        raise UserError(
            f"{source} has a class '{printable(name)}', whose name holds control characters: "
            "rename it"
        )


def _listed(folder: Path) -> Tree:
    left_out = _LeftOut()
    classes = _class_names(folder, left_out)
    parts = []
    with ThreadPoolExecutor(THREADS) as pool:
        for names, beside in pool.map(lambda label: _class_images(folder / label), classes):
            parts.append(names)
            left_out.merge(beside)
    counts = [len(part) for part in parts]
    names = np.concatenate(parts)
    return Tree(classes, counts, names, left_out.notes(folder), tuple(left_out.folders))


def _class_images(folder: Path) -> tuple[np.ndarray, _LeftOut]:
    """Return the paths of the images below one class folder, sorted, and what else lies there."""
    left_out, top = _LeftOut(), os.fsencode(folder)
    paths = sorted(path[len(top) + 1 :] for path in _images(top, suffixes(), left_out))
    if not paths:
        content = listed(map(repr, sorted(os.listdir(folder))))
        raise UserError(
            f"no images in the class folder {folder} ({content or 'it is empty'}): add "
            "some (.jpg, .png, ...) or remove this class from both splits"
        )
    return np.array(paths), left_out


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
        name = printable(os.fsdecode(path))
        self.first[reason] = min(self.first.get(reason, name), name)

    def add_file(self, path: bytes) -> None:
        self.add(NO_SUFFIX, path)
        _, dot, suffix = os.path.basename(path).rpartition(b".")
        self.suffixes[printable(os.fsdecode(dot + suffix)) if dot else "none"] += 1

    def merge(self, other: _LeftOut) -> None:
        self.counts += other.counts
        self.suffixes += other.suffixes
        self.folders += other.folders
        for reason, name in other.first.items():
            self.first[reason] = min(self.first.get(reason, name), name)

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


# --- data.index -----------------------------------------------------------------------------------


def _keep(path: Path, folder: Path, tree: Tree, began: int) -> None:
    """Keep a listing that began at the time `began`, unless a folder changed just before."""
    times = _times(tree.listed)
    if times is None or max(times) > began - YOUNG_NS:
        return
    about = {
        "folder": str(folder), "suffixes": _suffixes(), "classes": tree.classes,
        "counts": tree.counts, "left_out": tree.left_out,
        "listed": [os.fsdecode(each) for each in tree.listed], "times": times,
    }  # fmt: skip
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.index={path.parent} cannot be made: {error.strerror}") from error
    content = io.BytesIO()
    text = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez(content, about=text, names=tree.names)
    with replacing(path) as file:
        file.write(hashlib.sha256(content.getvalue()).digest())
        file.write(content.getvalue())


def _kept(path: Path, folder: Path) -> Tree | None:
    """Return the listing that was kept of `folder`; None where there is none that still holds."""
    try:
        with open_file(path) as file:
            content = file.read()
    except OSError:
        return None
    digest, arrays = content[:32], content[32:]
    if hashlib.sha256(arrays).digest() != digest:
        return None
    with np.load(io.BytesIO(arrays), allow_pickle=False) as found:
        about: dict[str, Any] = json.loads(found["about"].tobytes())
        names = found["names"]
    listed_then = tuple(os.fsencode(each) for each in about["listed"])
    same = about["folder"] == str(folder) and about["suffixes"] == _suffixes()
    if not same or _times(listed_then) != about["times"]:
        return None
    return Tree(about["classes"], about["counts"], names, tuple(about["left_out"]), listed_then)


def _times(folders: tuple[bytes, ...]) -> list[int] | None:
    """Return when folders changed; None where one is not there any more."""
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(lambda folder: os.stat(folder).st_mtime_ns, folders))
    except OSError:
        return None


def _suffixes() -> str:
    return _digest(b",".join(sorted(suffixes())).decode("latin-1"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]

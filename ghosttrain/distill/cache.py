"""The folder of a teacher's cached outputs: written once, read by every run and worker.

Owns the files, their identity and their checks; not the bytes of an output (codecs.py), nor which
key a run has and when to write (engine/).

    cache.json                    what is stored, and for what (`CacheInfo`); written last: it makes
                                  the folder a cache
    tables.safetensors            what all outputs share (`Codec.tables`)
    config.yaml                   the settings it was made with, for people
    draws/00003/000017.shard      outputs for samples [17 S, 18 S) of draw 3, S = shard_size

A shard is a line of text with the version of the format, filled to 64 bytes; 32 bytes of identity,
a hash of what the cache is for and of the shard's place in it; the SHA-256 of the body; the body,
R bytes a sample. So a file that was cut, damaged, or copied from another cache or
place is found. Every file is written beside its name, and takes it when it is whole and on disk.

Shapes: B batch, R bytes of a sample's output.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ghosttrain.distill.codecs import Codec, make_codec
from ghosttrain.distill.teacher_output import TeacherOutput
from ghosttrain.errors import UserError, raise_if_of_the_system
from ghosttrain.files import (
    expanded,
    open_file,
    read_json,
    read_limited,
    remove_parts,
    write_bytes,
    write_json,
    write_text,
)
from ghosttrain.locks import locked
from ghosttrain.models.weights.packing import packed
from ghosttrain.text import first_fault, one_line

FORMAT = 1
LARGEST = 64_000_000
"""Bytes that cache.json and tables.safetensors may have: a thousand classes take less than one."""
MOST_SHARDS = 10**7
"""Files of outputs that a cache may have: 600 draws of ImageNet in files of 100 images."""
OPEN_FILES = 512
"""Shards that a process keeps open: each holds a file descriptor, of which 1024 are usual."""
_MAGIC = f"ghosttrain cache {FORMAT}\n".encode().ljust(64, b"\0")
_HEADER = len(_MAGIC) + 2 * 32  # identity and checksum; the body starts at a multiple of 64
_OWN = {"cache.json", "tables.safetensors", "config.yaml", "draws"}


class Shard(NamedTuple):
    """One file of outputs."""

    draw: int
    number: int


@dataclass(frozen=True)
class CacheInfo:
    """What a cache holds, and for what."""

    key: dict[str, Any]
    """Everything the outputs depend on, by name: JSON values."""
    codec: str
    num_classes: Annotated[int, Field(ge=1, le=10**7)]
    widths: tuple[int, ...]
    """Of the teacher's pooled features, where they are what is stored."""
    bytes_per_image: Annotated[int, Field(ge=1, le=10**7)]
    """R"""
    samples: Annotated[int, Field(ge=1, le=10**10)]
    draws: Annotated[int, Field(ge=1, le=10**5)]
    """Draws of each sample. Not part of a shard's identity: a cache may be given more."""
    shard_size: Annotated[int, Field(ge=1, le=10**7)]
    """Samples in a shard; the last one of a draw may have fewer."""
    notes: dict[str, Any]
    """For people; not part of a shard's identity."""


def is_cache(folder: str | Path) -> bool:
    """Whether there are cached outputs, or at least their beginning, in `folder`."""
    return (expanded(folder) / "cache.json").is_file()


def validate_folder(folder: str | Path) -> None:
    """Raise UserError where a folder that is no cache yet holds something else."""
    folder = expanded(folder)
    if is_cache(folder) or not folder.is_dir():
        return
    if any(path.name not in _OWN and not path.name.startswith(".") for path in folder.iterdir()):
        raise _taken(folder)


def create(
    folder: str | Path, info: CacheInfo, tables: Mapping[str, Tensor], settings: str
) -> TeacherCache:
    """Make a folder a cache without outputs yet, and return it.

    Args:
        folder: a new one, or an empty one.
        info: what will be stored.
        tables: of the codec.
        settings: the text of config.yaml.

    Raises:
        UserError: the folder holds something, or cannot be written; the codec does not fit.
    """
    folder = expanded(folder)
    info = replace(info, key=_as_json(info.key), notes=_as_json(info.notes))
    codec = make_codec(info.codec, info.num_classes, info.widths, tables)
    tables_file = packed({name: x.cpu() for name, x in codec.tables.items()})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            validate_folder(folder)
            if is_cache(folder):
                raise _taken(folder)
            write_bytes(folder / "tables.safetensors", tables_file)
            write_text(folder / "config.yaml", settings)
            _write_info(folder, info, hashlib.sha256(tables_file).hexdigest())
    except OSError as error:
        raise UserError(f"cannot write cached outputs to {folder}: {_why(error)}") from None
    return TeacherCache(folder, info, codec)


def open_cache(folder: str | Path) -> TeacherCache:
    """Return the cache in `folder`.

    Raises:
        UserError: no folder, no cache in it, one of another version, or a damaged one.
    """
    folder = expanded(folder)
    if not folder.is_dir():
        raise UserError(f"cache.dir={folder} is no folder: {_how_to_store(folder)}")
    if not is_cache(folder):
        raise UserError(f"cache.dir={folder} holds no cached outputs: {_how_to_store(folder)}")
    try:
        fields = read_json(folder / "cache.json", LARGEST)
        found, digest = fields.pop("format"), fields.pop("tables", "")
        info = TypeAdapter(CacheInfo).validate_python(fields) if found == FORMAT else None
        if info and info.samples * info.draws > MOST_SHARDS * info.shard_size:
            raise ValueError(f"more than {MOST_SHARDS:,} files")
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise _damaged(folder / "cache.json", error) from None
    if info is None:
        raise UserError(
            f"{folder} was stored in format {found}, this version reads {FORMAT}: store anew in"
            " another cache.dir"
        )
    path = folder / "tables.safetensors"
    try:
        packed = read_limited(path, LARGEST)
        if hashlib.sha256(packed).hexdigest() != digest:
            raise ValueError("its checksum is wrong")
        codec = make_codec(info.codec, info.num_classes, info.widths, load(packed))
        if codec.bytes_per_image != info.bytes_per_image:
            raise ValueError(f"{info.codec} makes {codec.bytes_per_image} bytes an image")
    except (OSError, ValueError, SafetensorError) as error:
        raise _damaged(path, error) from None
    return TeacherCache(folder, info, codec)


def stored_bytes(samples: int, draws: int, bytes_per_image: int, shard_size: int) -> int:
    """Return the size on disk of all shards of a complete cache (`CacheInfo` explains each)."""
    return draws * (samples * bytes_per_image + -(-samples // shard_size) * _HEADER)


class TeacherCache:
    """Cached outputs. May be sent to other processes; each opens the files that it reads itself."""

    def __init__(self, folder: Path, info: CacheInfo, codec: Codec) -> None:
        self.folder = folder
        self.info = info
        self.codec = codec
        self._verified: set[Shard] = set()
        self._draw = -1
        self._open: dict[int, _File] = {}  # shards of this draw by number

    def __reduce__(self) -> tuple[Any, ...]:
        return TeacherCache, (self.folder, self.info, self.codec.to("cpu"))

    def to(self, device: torch.device | str) -> TeacherCache:
        """Return the cache that decodes on `device`."""
        return TeacherCache(self.folder, self.info, self.codec.to(device))

    def decode(self, cached_BR: Tensor) -> TeacherOutput:
        """Return the outputs that cached bytes (B, R) on the cache's device hold."""
        return self.codec.decode(cached_BR)

    # --- what there is ----------------------------------------------------------------------------

    def shards(self) -> list[Shard]:
        """Return all shards that a complete cache has, draw by draw."""
        numbers = range(-(-self.info.samples // self.info.shard_size))
        return [Shard(draw, number) for draw in range(self.info.draws) for number in numbers]

    def samples(self, shard: Shard) -> range:
        """Return the samples whose outputs are in `shard`."""
        start = shard.number * self.info.shard_size
        return range(start, min(start + self.info.shard_size, self.info.samples))

    def path(self, shard: Shard) -> Path:
        """Return the file of `shard`."""
        return self.folder / "draws" / f"{shard.draw:05d}" / f"{shard.number:06d}.shard"

    def digest(self) -> str:
        """Return the codec and 16 hexadecimal digits that tell this cache from others."""
        digest = hashlib.sha256(self._identity(Shard(0, 0)))
        for name in sorted(self.codec.tables):
            digest.update(self.codec.tables[name].cpu().numpy().tobytes())
        return f"{self.info.codec} {digest.hexdigest()[:16]}"

    def total_bytes(self) -> int:
        """Return the size on disk of all shards of the complete cache."""
        info = self.info
        return stored_bytes(info.samples, info.draws, info.bytes_per_image, info.shard_size)

    def missing(self) -> list[Shard]:
        """Return the shards that are not there, or not whole: by their size, nothing is read."""
        return [shard for shard in self.shards() if self._size(shard) != self._whole(shard)]

    def damaged(self) -> list[tuple[Shard, str]]:
        """Read all shards that are there; return those that are not as written, and why."""
        found = []
        for shard in self.shards():
            if self._size(shard) is not None and (why := self._look(shard)[1]):
                found.append((shard, why))
        return found

    def difference(self, key: Mapping[str, Any]) -> list[str]:
        """Return a line `name: stored X, now Y` for each value that is another one now; names of
        nested values are joined by points.
        """
        old, new = dict(_leaves(self.info.key)), dict(_leaves(_as_json(key)))
        lines = []
        for name in sorted(old | new):
            if name not in old or name not in new or old[name] != new[name]:
                was, now = _shortened(_shown(old, name), _shown(new, name))
                lines.append(f"{'.'.join(name)}: stored {was}, now {now}")
        return lines

    # --- writing ----------------------------------------------------------------------------------

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only job that writes here, until the block or the process ends; what a killed one
        left half written is removed.

        Raises:
            UserError: another one does.
        """
        with _locked(self.folder):
            for folder in (self.folder, *(self.folder / "draws").glob("*")):
                remove_parts(folder)
            yield

    def extended(self, draws: int) -> TeacherCache:
        """Return the cache with room for `draws` draws of each image (on disk too); never fewer."""
        if draws <= self.info.draws:
            return self
        info = replace(self.info, draws=draws)
        path = self.folder / "cache.json"
        try:
            _write_info(self.folder, info, read_json(path, LARGEST)["tables"])
        except OSError as error:
            raise UserError(f"cannot write {path}: {_why(error)}") from None
        return TeacherCache(self.folder, info, self.codec)

    def write(self, shard: Shard, cached: Tensor) -> None:
        """Write the bytes (samples, R) of a shard, whole or not at all.

        Raises:
            UserError: it cannot be written.
            ValueError: bytes of another shape, or not uint8 on the CPU.
        """
        shape = (len(self.samples(shard)), self.info.bytes_per_image)
        if tuple(cached.shape) != shape or cached.dtype != torch.uint8:
            raise ValueError(f"{shard} takes uint8 {shape}, got {cached.dtype} {cached.shape}")
        body = cached.contiguous().numpy().data
        path = self.path(shard)
        header = _MAGIC + self._identity(shard) + hashlib.sha256(body).digest()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, header, body)
        except OSError as error:
            raise UserError(f"cannot write {path}: {_why(error)}") from None

    # --- reading ----------------------------------------------------------------------------------

    def read(self, draw: int, indices: Sequence[int]) -> Tensor:
        """Return the cached bytes (B, R), uint8, of one draw of these samples, in their order.

        A process verifies the checksum of a shard when it first reads it, and keeps shards of one
        draw open, the last one that was asked for: at most `OPEN_FILES`.

        Raises:
            UserError: a shard is missing or damaged, naming it and how to mend it.
            IndexError: no such sample.
        """
        if draw != self._draw:
            self._draw, self._open = draw, {}
        size, count = self.info.shard_size, self.info.samples
        cached = np.empty((len(indices), self.info.bytes_per_image), np.uint8)
        for row, index in enumerate(indices):
            if not 0 <= index < count:
                raise IndexError(f"sample {index} of {count}")
            number, place = divmod(index, size)
            if number not in self._open:
                if len(self._open) >= OPEN_FILES:
                    del self._open[next(iter(self._open))]  # the one opened first
                self._open[number] = self._verified_file(Shard(draw, number))
            record = self._record(Shard(draw, number), place)
            cached[row] = np.frombuffer(record, np.uint8)
        return torch.from_numpy(cached)

    def _record(self, shard: Shard, place: int) -> bytes:
        """Return the bytes of one sample of an open shard. It is read, not mapped: of a mapped file
        that is cut meanwhile, or of a failing disk, the system would kill this process.
        """
        size = self.info.bytes_per_image
        try:
            record = self._open[shard.number].read(size, _HEADER + place * size)
        except OSError as error:
            raise self._unreadable(shard, f"cannot be read: {_why(error)}") from None
        if len(record) != size:
            raise self._unreadable(shard, "became shorter while it was read")
        return record

    def _verified_file(self, shard: Shard) -> _File:
        """Return the open file of a shard, whose checksum was found right in this process."""
        file, why = self._look(shard, verify=shard not in self._verified)
        if file is None or why:
            raise self._unreadable(shard, why)
        self._verified.add(shard)
        return file

    def _unreadable(self, shard: Shard, why: str) -> UserError:
        return UserError(
            f"{self.path(shard)} {why}: type python -m ghosttrain cache"
            f" {shlex.quote(str(self.folder))} --repair"
        )

    def _look(self, shard: Shard, verify: bool = True) -> tuple[_File | None, str]:
        """Return the open file of a shard, and what is wrong with it, if anything.

        With `verify` the whole body is read and its checksum compared.
        """
        try:
            file = _File(self.path(shard))
            size, whole = file.size(), self._whole(shard)
            if size != whole:
                return None, f"is not whole: {size:,} bytes instead of {whole:,}"
            header = file.read(_HEADER, 0)
            magic, at = header[: len(_MAGIC)], len(_MAGIC)
            if magic != _MAGIC:
                return None, "is no file of cached outputs of this version"
            if header[at : at + 32] != self._identity(shard):
                return None, "belongs to another cache or to another place in this one"
            if verify and file.digest(_HEADER) != header[at + 32 :]:
                return None, "is damaged: its checksum is wrong"
        except FileNotFoundError:
            return None, "is missing"
        except OSError as error:
            return None, f"cannot be read: {_why(error)}"
        return file, ""

    def _size(self, shard: Shard) -> int | None:
        try:
            return self.path(shard).stat().st_size
        except OSError:
            return None

    def _whole(self, shard: Shard) -> int:
        return _HEADER + len(self.samples(shard)) * self.info.bytes_per_image

    def _identity(self, shard: Shard) -> bytes:
        """Return 32 bytes that tell this shard from all others of this and other stores."""
        stored = asdict(replace(self.info, draws=0, notes={}))
        return hashlib.sha256(json.dumps([stored, *shard], sort_keys=True).encode()).digest()


# --- Fingerprints ---------------------------------------------------------------------------------


def _as_json(value: Any) -> Any:
    """Return what is left of a value when it was written to JSON and read again."""
    return json.loads(json.dumps(value))


def _leaves(value: Any, name: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, (*name, key))
    else:
        yield name, value


def _shown(leaves: Mapping[tuple[str, ...], Any], name: tuple[str, ...]) -> str:
    return json.dumps(leaves[name]) if name in leaves else "nothing"


def _shortened(a: str, b: str, most: int = 40) -> tuple[str, str]:
    """Cut long texts to where they begin to differ."""
    if max(len(a), len(b)) <= most:
        return a, b
    start = max(0, len(os.path.commonprefix([a, b])) - 8)

    def cut(text: str) -> str:
        end = start + most
        return "..." * (start > 0) + text[start:end] + "..." * (end < len(text))

    return cut(a), cut(b)


# --- Files ----------------------------------------------------------------------------------------


class _File:
    """A file that is open as long as somebody refers to it. Several processes may read it."""

    def __init__(self, path: Path) -> None:
        with open_file(path) as file:
            self.handle = os.dup(file.fileno())

    def __del__(self) -> None:
        if hasattr(self, "handle"):  # it could be opened
            os.close(self.handle)

    def size(self) -> int:
        return os.fstat(self.handle).st_size

    def read(self, size: int, at: int) -> bytes:
        """Return up to `size` bytes from place `at` on."""
        return os.pread(self.handle, size, at)

    def digest(self, at: int) -> bytes:
        """Return the SHA-256 of what follows place `at`."""
        digest = hashlib.sha256()
        while block := self.read(1 << 20, at):
            digest.update(block)
            at += len(block)
        return digest.digest()


def _write_info(folder: Path, info: CacheInfo, tables: str) -> None:
    fields = {"format": FORMAT, "tables": tables, **asdict(info)}
    write_json(folder / "cache.json", fields)


def _locked(folder: Path) -> AbstractContextManager[None]:
    return locked(
        folder,
        f"{{owner}} is storing outputs in {folder}: wait for it, or type another cache.dir",
    )


def _taken(folder: Path) -> UserError:
    return UserError(
        f"{folder} is not empty: cached outputs need a folder of their own, type another cache.dir"
    )


def _how_to_store(folder: Path) -> str:
    return (
        "type python -m ghosttrain cache, the settings of the run and"
        f" cache.dir={shlex.quote(str(folder))} cache.draws=N"
    )


def _damaged(path: Path, error: Exception) -> UserError:
    """Return what to raise where a file of a cache is damaged; OSError where the system failed."""
    raise_if_of_the_system(error, path)
    return UserError(f"{path} cannot be read ({_why(error)}): store anew in another cache.dir")


def _why(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, ValidationError):
        return first_fault(error)
    if isinstance(error, KeyError):
        return f"no {error}"
    return one_line(error)[:120]

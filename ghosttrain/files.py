"""Files and folders: where they are, the one durable writer.

Everything that a run or a cache leaves is written by `replacing`: a file is either the old one or
complete, also after a power cut. Imports no torch; `--help` has to be instant.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ghosttrain.errors import UserError, remedy
from ghosttrain.text import byte_size, one_line

PACKAGE = Path(__file__).resolve().parent
PART = ".part"
"""How the name of a file ends that is being written; it begins with a dot."""
FULL = {errno.ENOSPC, errno.EDQUOT}
"""What the system says where there is no room."""


# --- where ----------------------------------------------------------------------------------------


def shipped(folder: str) -> Path:
    """Return `conf` or `recipes`: inside the package in a wheel, beside it in a checkout."""
    inside = PACKAGE / folder
    return inside if inside.is_dir() else PACKAGE.parent / folder


def extra(name: str) -> str:
    """Return what pip installs for an extra: of this checkout, or of the package."""
    checkout = (PACKAGE.parent / "pyproject.toml").is_file()
    return f"'{PACKAGE.parent if checkout else 'ghosttrain'}[{name}]'"


def expanded(path: str | Path) -> Path:
    """Return `path` with `~` replaced by the user's home and `$NAME` by that environment variable;
    `~nobody` and a variable that is not set stay as they are, and will not be found.
    """
    return Path(os.path.expanduser(os.path.expandvars(path)))


def resolved(path: str | Path) -> Path:
    """Return an expanded path from the root without links on the way; of links that lead in a
    circle, which whoever opens it is told about, the path itself.
    """
    return Path(os.path.realpath(expanded(path)))


def nearest(path: Path) -> Path:
    """Return what exists, of `path` and the folders above it, nearest to it: a folder, or what is
    in the way of one.
    """
    return next(each for each in (path, *path.parents) if os.path.lexists(each))


def no_file(path: Path) -> str:
    """Return why `path` is no file whose bytes can be read, in words: `no such file`."""
    if path.is_dir():
        return "a folder, not a file"
    return NOT_REGULAR if path.exists() else "no such file"


def no_folder(path: Path) -> str:
    """Return why `path` is no folder, in words; "" where it is one."""
    if path.is_dir():
        return ""
    if path.is_symlink() and not path.exists():
        return "a link that leads nowhere"
    return f"{'a file' if path.is_file() else 'a FIFO, a device or a socket'}, not a folder"


@contextmanager
def utf8_name(path: Path) -> Iterator[Path]:
    """Give a file a name that libraries which know only UTF-8 can open: its own, or inside this
    block a link to it.

    Raises OSError where it cannot be opened: safetensors calls any reason for that "no such file".
    """
    with open_file(path):
        pass
    try:
        str(path).encode()
        yield path
    except UnicodeEncodeError:
        import tempfile

        with tempfile.TemporaryDirectory(prefix="ghosttrain-") as folder:
            link = Path(folder) / "file"
            link.symlink_to(path.absolute())
            yield link


# --- writing --------------------------------------------------------------------------------------


@contextmanager
def replacing(
    path: Path, size: int | None = None, before: Callable[[], object] | None = None
) -> Iterator[BinaryIO]:
    """Write a file that is either the old one or complete: it is on disk before it takes the old
    one's name, the name is on disk before this returns, and a failed attempt leaves nothing behind.

    Args:
        path: the file.
        size: about how many bytes it will have, for messages.
        before: done when the new file is on disk, before it takes its name.

    Raises:
        UserError: it cannot be written, a full disk for instance.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PART}")
    try:
        # No file that was there before is written into, no link is followed.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with os.fdopen(os.open(part, flags, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if before is not None:
            before()
        part.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        # torch.save meets a failed write, and then fails itself to end its archive.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        reason = f"{cause.strerror or cause}{_room(path, size) if cause.errno in FULL else ''}"
        raise UserError(
            f"cannot write {path} ({reason}); "
            + (remedy(cause) or f"{path.parent} must be a folder that you may write")
        ) from cause


def _room(path: Path, size: int | None) -> str:
    """Return how many bytes a file needs and how many are free, as far as both are known."""
    needed = "" if size is None else f", {byte_size(size)} needed"
    try:
        return f"{needed}, {byte_size(shutil.disk_usage(path.parent).free)} free"
    except OSError:
        return needed


def not_through_links(path: str, flags: int) -> int:
    """Open a file, as `opener` of `open`; a link is an error (ELOOP), and so is a FIFO that nobody
    reads (ENXIO), which is not waited for.
    """
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def remove_parts(folder: Path) -> None:
    """Remove what writers that were killed left in `folder`, which this process owns."""
    for part in folder.glob(f".*{PART}"):
        with suppress(OSError):
            part.unlink()


def write_bytes(path: Path, *parts: Any) -> None:
    """Write a file of several parts (bytes or buffers), durably."""
    with replacing(path, size=sum(memoryview(part).nbytes for part in parts)) as file:
        for part in parts:
            file.write(part)


def write_text(path: Path, text: str) -> None:
    """Write a text file, durably."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file durably, with a digest of what it holds under `sha256`."""
    value = json.loads(json.dumps(value))  # as it is read again
    write_text(path, json.dumps({**value, "sha256": _json_digest(value)}, indent=1) + "\n")


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk; some file systems have nothing like it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# --- reading --------------------------------------------------------------------------------------


class Damaged(ValueError):
    """A file is not as it was written."""


NOT_REGULAR = "a FIFO, a device or a socket, not a file"


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file that somebody else may have put there, to read its bytes: a FIFO is not waited
    for, a device not read without end.

    Raises:
        OSError: it cannot be opened, or is no file.
    """
    try:
        file = open(path, "rb", opener=_at_once)
    except OSError as error:
        if error.errno != errno.ENXIO:  # a socket, a device that is not there
            raise
    else:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
    raise OSError(errno.ENXIO, f"it is {NOT_REGULAR}", os.fspath(path))


def _at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


def read_json(path: Path, largest: int) -> dict[str, Any]:
    """Return what `write_json` wrote, at most `largest` bytes.

    Raises:
        Damaged: it is not as it was written.
        OSError: it cannot be read now.
    """
    try:
        value = json.loads(read_limited(path, largest))
        digest = value["sha256"]
        del value["sha256"]
        if _json_digest(value) == digest:
            return value
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise Damaged(one_line(error)[:120]) from None
    raise Damaged("it is not as it was written")


def read_limited(path: Path, largest: int) -> bytes:
    """Return the bytes of a file.

    Raises:
        Damaged: it is larger than `largest` bytes.
        OSError: it cannot be read, or is no file.
    """
    with open_file(path) as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise Damaged(f"it is larger than {byte_size(largest)}")
    return content


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file; OSError where it cannot be read, or is none."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _json_digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --- who else may change it -----------------------------------------------------------------------


def changeable_by_others(path: Path, is_made: bool = True) -> str | None:
    """Return why somebody else than this user and root could change or replace what lies at `path`,
    a file, or a folder and the names in it; None: nobody can.

    Looked at are the owner and the mode of `path` and of all folders above it: whoever may write
    one of them may put another thing in its place. Below a folder that only its owner may enter,
    modes grant nobody anything. In a folder with the sticky bit, such as /tmp, everybody may add
    names but only their owners replace them. Where a file has an access list (POSIX), its mode says
    what the list grants at most.

    Args:
        path: the file or folder.
        is_made: whether it must be there; else the folders that are there, above it, decide.

    Raises:
        OSError: there is no such file or folder.
    """
    if path.is_symlink() and not path.is_dir():
        return f"{path} is a link"
    real = Path(os.path.realpath(path, strict=is_made))
    reached = True  # by others
    for each in (*reversed(real.parents), real):
        if not is_made and not os.path.lexists(each):
            return None
        about = each.lstat()
        if about.st_uid not in (0, os.geteuid()):
            return f"{each} belongs to another user (number {about.st_uid})"
        shared = about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if reached and shared and (each == real or not about.st_mode & stat.S_ISVTX):
            return f"others may write {each} (mode {stat.S_IMODE(about.st_mode):o})"
        reached = reached and bool(about.st_mode & (stat.S_IXGRP | stat.S_IXOTH))
    return None

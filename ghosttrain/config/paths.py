"""Where the shipped YAML lies, and paths that are no UTF-8. Imports next to nothing, because
`--help` has to be instant.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def shipped(folder: str) -> Path:
    """Return `conf` or `recipes`: inside the package in a wheel, beside it in a checkout."""
    inside = PACKAGE / folder
    return inside if inside.is_dir() else PACKAGE.parent / folder


def expanded(path: str | Path) -> Path:
    """Return `path` with `~` replaced by the user's home; `~nobody` stays as it is, and will not be
    found.
    """
    return Path(os.path.expanduser(path))


@contextmanager
def utf8_name(path: Path) -> Iterator[Path]:
    """Give a file a name that libraries which know only UTF-8 can open: its own, or inside this
    block a link to it.

    Raises OSError where it cannot be opened: safetensors calls any reason for that "no such file".
    """
    with open(path, "rb"):
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

"""Small pieces of messages. Imports nothing heavy."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


def listed(items: Iterable[object], most: int = 3, joiner: str = ", ") -> str:
    """Return `a, b, c and 4 more`: the first items and how many there are besides."""
    texts = [str(item) for item in items]
    rest = len(texts) - most
    return joiner.join(texts[:most]) + (f" and {rest} more" if rest > 0 else "")


def one_line(value: object) -> str:
    """Return a text, or what an error says, without line breaks and repeated spaces; of an error
    without a message its name.
    """
    text = " ".join(str(value).split())
    return text or (type(value).__name__ if isinstance(value, BaseException) else "")


_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""What no name needs and a terminal obeys: C0 and C1 (they clear, move, retitle, answer), line and
paragraph separators, marks that turn the direction of the text around them."""


def printable(text: str, lines: bool = False) -> str:
    r"""Return `text` as Unicode that every file takes and no terminal obeys: ESC becomes \x1b, a
    byte that is no UTF-8 \udce9. With `lines`, line breaks and tabs stay as they are.
    """
    if not (text.isascii() and text.isprintable()):
        text = _CONTROLS.sub(lambda found: _escaped(found[0], lines), text)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _escaped(char: str, lines: bool) -> str:
    if lines and char in "\n\t":
        return char
    return f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}"


def has_controls(name: str) -> bool:
    """Whether a name holds characters that a terminal would obey."""
    return _CONTROLS.search(name) is not None


def first_fault(error: ValidationError) -> str:
    """Return where the first value that pydantic refuses stands, and why."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def clock(seconds: float) -> str:
    """Return `h:mm:ss` or `m:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def counted(number: int, noun: str) -> str:
    """Return `1 file` or `2 files`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def byte_size(count: float) -> str:
    """Return `512 bytes`, `1.5 kB` or `2.3 GB`: powers of 1000."""
    if count < 1000:
        return f"{count:.0f} bytes"
    power = min(int(math.log10(count)) // 3, 4)
    return f"{count / 1000**power:.1f} {' kMGT'[power]}B"

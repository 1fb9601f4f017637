"""Small pieces of messages. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable


def listed(items: Iterable[object], most: int = 3, joiner: str = ", ") -> str:
    """Return `a, b, c and 4 more`: the first items and how many there are besides."""
    texts = [str(item) for item in items]
    rest = len(texts) - most
    return joiner.join(texts[:most]) + (f" and {rest} more" if rest > 0 else "")


def one_line(value: object) -> str:
    """Return a text, or what an error says, without line breaks and repeated spaces."""
    return " ".join(str(value).split())


def clock(seconds: float) -> str:
    """Return `h:mm:ss` or `m:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

"""Where the shipped YAML lies. Imports next to nothing, because `--help` has to be instant."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def shipped(folder: str) -> Path:
    """Return `conf` or `recipes`: inside the package in a wheel, beside it in a checkout."""
    inside = PACKAGE / folder
    return inside if inside.is_dir() else PACKAGE.parent / folder

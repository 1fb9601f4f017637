"""The rows of metrics.jsonl: how one is written, and what is read of a file. Imports no torch."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
"""The file, in the folder of a run."""


def row_line(row: Mapping[str, Any]) -> str:
    """Return a row as a line of metrics.jsonl, with the CRC-32 of its text without it."""
    crc = zlib.crc32(json.dumps(dict(row)).encode())
    return json.dumps({**row, "crc32": crc})


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl, none where there is none; a line that is damaged (the last
    one, cut short by a kill) is left out.
    """
    return read_rows(folder)[0]


def read_rows(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the rows of metrics.jsonl, and how many lines before the last one are damaged."""
    rows: list[dict[str, Any]] = []
    path, damaged = folder / METRICS, 0
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            crc = row.pop("crc32")
            if zlib.crc32(json.dumps(row).encode()) != crc:
                raise ValueError
            rows.append(row)
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            damaged += number < len(lines)
    return rows, damaged

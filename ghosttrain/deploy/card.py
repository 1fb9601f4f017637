"""The part of a run's card.md that tells of its exported files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ghosttrain.deploy.formats import folder_name
from ghosttrain.engine.metrics import WORDS, headline
from ghosttrain.engine.run_files import damaged_products, read_result
from ghosttrain.files import Damaged, file_digest, read_json, write_json, write_text

HEADING = "## Exported files"


def update_card(run: Path) -> None:
    """Write what the reports in RUN/export say into RUN/card.md, in place of what it said before.

    A card that is missing or damaged stays as it is: the command of the run makes it anew.
    """
    result, card = read_result(run), run / "card.md"
    if result is None or not card.is_file() or "card.md" in damaged_products(run, result):
        return
    text = card.read_text("utf-8").partition(f"\n{HEADING}\n")[0]
    reports = [
        report for report in map(_report, sorted(run.glob("export/*/report.json"))) if report
    ]
    if reports:
        text += "\n".join(["", HEADING, "", *_rows(reports), ""])
    write_text(card, text)
    files = {**result["files"], "card.md": file_digest(card)}
    write_json(run / "result.json", {**result, "files": files})


def _report(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path, 2**24)
    except (OSError, Damaged, json.JSONDecodeError):
        return None


def _rows(reports: list[dict[str, Any]]) -> list[str]:
    """Return a Markdown table, one row for each file."""
    judged = next((headline(r["comparison"]) for r in reports if "comparison" in r), "top1")
    lines = [
        f"| file | size | {WORDS[judged]} % | PyTorch | largest difference | one pass | |",
        "|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        found, latency = report.get("comparison"), report.get("latency_ms")
        precision = report["precision"]
        name = folder_name(report["format"], precision, report.get("nms", False))
        cells = [f"`export/{name}/{report['file']}`", f"{report['bytes'] / 1e6:.1f} MB"]
        if found is None:
            cells += ["", "", "", "", report.get("note", "")]
        else:
            share = (
                f"{report['int8_share']:.0f} % of the MACs in INT8" if precision == "int8" else ""
            )
            cells += [
                f"{found[judged + '_exported']:.2f}",
                f"{found[judged]:.2f}",
                f"{found['largest']:.1e} of {found['scale']:.3g}",
                "" if latency is None else f"{latency:.2f} ms",
                share if report["passed"] else f"{share} not good enough".strip(),
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "One pass: median of 20, one image, one thread, on the machine of the export.",
    ]

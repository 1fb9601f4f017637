"""`report RUN...`: results side by side."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ghosttrain.commands.arguments import Arguments, folders_and_overrides
from ghosttrain.errors import UserError

ARGUMENTS = Arguments(
    "report",
    "RUN ...",
    "Print the results of runs side by side: mean and standard deviation over seeds. A RUN is a\n"
    "run folder, or a folder that holds some.",
    takes_folders=True,
)


def run(options: Namespace) -> int:
    """Print the table; return 0."""
    folders, overrides = folders_and_overrides(options.words)
    if overrides:
        raise UserError(f"report takes run folders, not {overrides[0]!r}")
    if not folders:
        raise UserError("report needs run folders: python -m ghosttrain report runs/compact_kd/*")
    from ghosttrain.study.report import report

    print(report([Path(folder) for folder in folders]))
    return 0

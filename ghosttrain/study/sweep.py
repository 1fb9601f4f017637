"""`-m`: every combination of the listed values, one run after another, each in its own folder.

All cells are composed (and checked) before the first one starts. A finished cell is shown, not
repeated; a cell that fails is named at the end and the others still run.
"""

from __future__ import annotations

import re
import sys
import traceback

from ghosttrain.config.compose import cells, compose
from ghosttrain.engine.folder import run_folder
from ghosttrain.engine.launch import launch
from ghosttrain.errors import UserError, mistake
from ghosttrain.study.report import report


def sweep(overrides: list[str], config_dir: str | None) -> int:
    """Run all cells; return 0, or 1 when a cell failed.

    Raises:
        UserError: a cell has a mistake; nothing was started.
        KeyboardInterrupt: Ctrl-C ends the sweep, not only the cell that runs.
    """
    every = cells(overrides, config_dir)
    runs = []
    for cell in every:
        try:
            runs.append(compose(cell, config_dir))
        except UserError as error:
            distinct = [word for word in cell if any(word not in other for other in every)]
            where = f"{' '.join(distinct)}: " if distinct else ""
            raise UserError(f"{where}{error}{_leave_out(cell, overrides, str(error))}") from None
    done, failed = [], []
    for number, run in enumerate(runs, start=1):
        print(f"\n=== {number}/{len(runs)}: {' '.join(run.arguments)}", flush=True)
        try:
            code = launch(run)
        except Exception as error:  # the other cells still run
            message = mistake(error)
            if message is None:
                traceback.print_exc()
            else:
                print(f"ghosttrain: error: {message}", file=sys.stderr)
            code = 1 if message is None else 2
        if code:
            failed.append(f"{' '.join(run.arguments)} (exit code {code})")
        else:
            done.append(run_folder(run.config))
    if done:
        print(f"\n=== {len(done)} of {len(runs)} runs finished\n" + report(done))
    for line in failed:
        print(f"ghosttrain: failed: {line}", file=sys.stderr)
    return int(bool(failed))


def _leave_out(cell: list[str], overrides: list[str], message: str) -> str:
    """Return how to leave out what a `glob(*)` brought into this cell, if it is what was said."""
    values = {key: value for key, _, value in (word.partition("=") for word in cell)}
    for word in overrides:
        key, _, value = word.partition("=")
        match = re.fullmatch(r"glob\(([^,=\[\]]+)\)", value)
        if match and message.startswith(f"{key}."):
            return f"; to leave it out: '{key}=glob({match[1]},exclude={values[key]})'"
    return ""

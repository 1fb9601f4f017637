"""`-m`: every combination of the listed values, one run after another, each in its own folder.

All cells are composed (and checked) before the first one starts. A finished cell is shown, not
repeated; a cell that fails is named at the end and the others still run.
"""

from __future__ import annotations

import sys
import traceback

from ghosttrain.config.compose import cells, compose
from ghosttrain.config.errors import mistake
from ghosttrain.engine.folder import run_folder
from ghosttrain.engine.launch import launch
from ghosttrain.study.report import report


def sweep(overrides: list[str], config_dir: str | None) -> int:
    """Run all cells; return 0, or 1 when a cell failed.

    Raises:
        KeyboardInterrupt: Ctrl-C ends the sweep, not only the cell that runs.
    """
    runs = [compose(cell, config_dir) for cell in cells(overrides, config_dir)]
    done, failed = [], []
    for number, run in enumerate(runs, start=1):
        print(f"\n=== {number}/{len(runs)}: {' '.join(run.arguments)}", flush=True)
        try:
            code = launch(run)
        except Exception as error:  # the other cells still run
            said = mistake(error)
            if said is None:
                traceback.print_exc()
            else:
                print(f"ghosttrain: error: {said}", file=sys.stderr)
            code = 1 if said is None else 2
        if code:
            failed.append(f"{' '.join(run.arguments)} (exit code {code})")
        else:
            done.append(run_folder(run.config))
    if done:
        print(f"\n=== {len(done)} of {len(runs)} runs finished\n" + report(done))
    for line in failed:
        print(f"ghosttrain: failed: {line}", file=sys.stderr)
    return int(bool(failed))

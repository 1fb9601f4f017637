"""From composed settings to a run: show a finished one, start the ranks, or train in this process.
Imports no torch: a finished run answers at once.
"""

from __future__ import annotations

import textwrap

from ghosttrain import ranks
from ghosttrain.config.compose import Composed
from ghosttrain.engine.folder import (
    made_by_other_code,
    opened,
    read_result,
    result_lines,
    run_folder,
    validate_same_run,
)
from ghosttrain.engine.same_data import note_on_result
from ghosttrain.engine.spawn import spawn
from ghosttrain.terminal import go_on_without


def launch(composed: Composed) -> int:
    """Train, finish or show this run; return the exit code."""
    config = composed.config
    folder = run_folder(config)
    result = None if config.run.fresh else read_result(folder)
    if result is not None:
        validate_same_run(folder, config)
        print(f"finished: {folder}")
        notes_on_it = (made_by_other_code(folder), note_on_result(config, result))
        print("\n".join([*filter(None, notes_on_it), *result_lines(result)]))
        if ranks.is_launched():
            from ghosttrain.engine import distributed

            distributed.start()
            distributed.broadcast(None)  # tells the other ranks that there is nothing to do
            distributed.stop()
        return 0
    go_on_without()
    if ranks.must_spawn(config.launch.nproc):
        return spawn(composed.arguments, config.launch.nproc)
    notes = replaced_lines(composed)
    with opened(config, notes):
        from ghosttrain.engine.classification import CLASSIFICATION
        from ghosttrain.engine.train import train

        train(CLASSIFICATION, config, notes)
    return 0


def replaced_lines(composed: Composed) -> list[str]:
    """Return which values of the recipe the budget replaced, in a few lines; none where it has
    none.
    """
    config = composed.config
    if not composed.replaced:
        return []
    why = f"the budget {config.budget!r} of data={config.data.name} replaces values"
    return [
        f"{why} of the recipe (budget=full leaves them):",
        *textwrap.wrap(
            "; ".join(composed.replaced),
            width=98,
            initial_indent="  ",
            subsequent_indent="  ",
            break_on_hyphens=False,
        ),
    ]

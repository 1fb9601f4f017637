"""`study run|report|power|list`: a declared comparison, run and reported."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path

from ghosttrain.commands.arguments import Arguments, with_config_dir
from ghosttrain.errors import UserError

ACTIONS = ("run", "report", "power", "list")
ARGUMENTS = with_config_dir(
    Arguments(
        "study",
        "run|report|power NAME [key=value ...] | list",
        "run     run what is missing of a study, then report; seed=0,1 chooses other seeds\n"
        "report  the finished runs: mean, difference to the control, 95 % interval\n"
        "power   how many seeds find a difference, from the spread so far\n"
        "list    the studies there are\n"
        "A study is a file: conf/study/NAME.yaml, or study/NAME.yaml in your --config-dir.",
        actions=ACTIONS,
    )
)
ARGUMENTS.add_argument(
    "--out",
    metavar="FOLDER",
    help="runs of its runs.csv count as finished; run and report write it, report.html, report.md",
)
ARGUMENTS.add_argument(
    "--metric", metavar="NAME", help="a column of report.metrics, in place of the study's: balanced"
)
ARGUMENTS.add_argument(
    "--difference", type=float, default=0.3, metavar="0.3", help="power: in the metric's unit"
)


def run(options: Namespace) -> int:
    """Run, report, or list; return the exit code."""
    from ghosttrain.config.hydra_words import split_words
    from ghosttrain.study import studies, study_report, study_run, sweep

    names = [word for word in options.words if "=" not in word]
    action, *rest = names or [""]
    if action not in ACTIONS:
        raise UserError(
            f"{f'study {action}'.strip()}: type study {', '.join(ACTIONS[:-1])} or {ACTIONS[-1]}"
        )
    if action == "list":
        if options.words[1:]:
            raise UserError(f"study list takes no other words, not {options.words[1]!r}")
        print(studies.list_studies(options.config_dir))
        return 0
    if len(rest) != 1:
        raise UserError(f"study {action} needs one name: python -m ghosttrain study list")
    words = [word for word in options.words if "=" in word]
    overrides, hydra_words = split_words(words, multirun=True)
    out = None if options.out is None else Path(options.out)
    name, folder, metric = rest[0], options.config_dir, options.metric
    if action == "run":
        return sweep.on_all_ranks(
            lambda: study_run.run_study(name, overrides, hydra_words, folder, out, metric)
        )
    if action == "power" and not 0 < options.difference < math.inf:
        raise UserError(f"--difference {options.difference:g}: give a number above 0")
    study = studies.load_study(name, folder, metric)
    cells = studies.study_cells(study, overrides, folder, out, to_run=False)
    if action == "report":
        print(study_report.study_report(name, study, cells, out))
    else:
        print(study_report.study_power(study, cells, options.difference))
    return 0

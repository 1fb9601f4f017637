"""`doctor`: whether a run could start here, and what to type where it could not."""

from __future__ import annotations

import json
from argparse import Namespace

from ghosttrain import ranks
from ghosttrain.commands.arguments import Arguments, with_config_dir
from ghosttrain.errors import UserError, mistake
from ghosttrain.text import one_line

MAIN_JOB = ("+recipe=compact_kd", "model=ghostnetv3_130")
ARGUMENTS = with_config_dir(
    Arguments(
        "doctor",
        "[+recipe=NAME] [key=value ...] [--json]",
        "Look at all that a run with these words needs, and change nothing: a line for each\n"
        "thing, OK, note or FAIL, with what was found and what to type. Without words: the main\n"
        "job. Exit code 1 where the run could not start.",
    )
)
ARGUMENTS.add_argument(
    "--json", action="store_true", help="print one JSON object in place of lines"
)


def run(options: Namespace) -> int:
    """Print what is found; return 0, or 1 where the run could not start."""
    from ghosttrain.config.compose import compose
    from ghosttrain.config.hydra_words import split_words
    from ghosttrain.study.findings import Finding, finding
    from ghosttrain.study.packages import look_at_extras, look_at_versions

    words, _ = split_words(options.words, multirun=False)
    if ranks.is_launched():
        raise UserError("doctor is for one process: type launch.nproc=N in place of torchrun")
    composed = compose(words or MAIN_JOB, options.config_dir, needs_data=False)
    findings: list[Finding] = []

    def tell(each: Finding) -> None:
        findings.append(each)
        if not options.json:
            print(each.line(), flush=True)

    tell(finding("versions", look_at_versions))
    tell(finding("extras", look_at_extras))
    fault = None if findings[0].state != "FAIL" else "versions"
    try:
        from ghosttrain.study.doctor import examine
    except Exception as error:  # a broken PyTorch raises whatever it likes
        text = mistake(error) or f"{type(error).__name__}: {one_line(error)}"
        tell(Finding("imports", "FAIL", text))
        fault = "imports"
    else:
        fault = ", ".join(filter(None, [fault, examine(composed, tell)])) or None
    command = " ".join(composed.arguments)
    if options.json:
        checks = [each._asdict() for each in findings]
        print(json.dumps({"can_start": not fault, "command": command, "checks": checks}, indent=1))
    elif fault:
        print(f"the run cannot start: {fault}")
    else:
        print(f"the run can start: python -m ghosttrain {command}")
    return int(bool(fault))

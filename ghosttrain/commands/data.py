"""`data show|stats|check`: look at the images of a command before it trains."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

from ghosttrain.commands.arguments import Arguments, validate_counts, with_config_dir
from ghosttrain.errors import UserError
from ghosttrain.terminal import go_on_without

ACTIONS = ("show", "stats", "check")
ARGUMENTS = with_config_dir(
    Arguments(
        "data",
        "show|stats|check [+recipe=NAME] [key=value ...] [options]",
        "show   draw some training images under several draws of the augmentation, with what was\n"
        "       done to each: a policy that destroys the images is seen at once\n"
        "stats  sizes, formats, classes, and the mean and std of what the network sees\n"
        "check  read each image once: which cannot be used, are grey, CMYK, too large; which have\n"
        "       the same content, under two labels or in both halves. Exit code 1 where a run\n"
        "       would end at an image, or would train on held-out ones",
        actions=ACTIONS,
    )
)
ARGUMENTS.add_argument("--samples", type=int, default=8, metavar="8", help="show: images (rows)")
ARGUMENTS.add_argument("--draws", type=int, default=8, metavar="8", help="show: draws of each")
ARGUMENTS.add_argument(
    "--images", type=int, default=512, metavar="512", help="stats: images looked at"
)
ARGUMENTS.add_argument("--out", metavar="FILE", help="show: the picture")
ARGUMENTS.add_argument("--json", action="store_true", help="check: print one JSON object")


def run(options: Namespace) -> int:
    """Draw or print; return 0, or 1 where `check` finds what a run would fail at."""
    from ghosttrain.config.hydra_words import split_words

    names = [word for word in options.words if "=" not in word]
    if len(names) != 1 or names[0] not in ACTIONS:
        raise UserError(
            f"data {' '.join(names)}: type python -m ghosttrain data show, data stats or data "
            "check, with the words of the command that trains"
        )
    words, _ = split_words([word for word in options.words if "=" in word], multirun=False)
    validate_counts(samples=options.samples, draws=options.draws, images=options.images)
    if options.json and names[0] != "check":
        raise UserError(f"--json is for data check, not for data {names[0]}: leave it out")
    if names[0] != "check":
        go_on_without()
    from ghosttrain.config.compose import compose
    from ghosttrain.config.detection import validate_classifies

    config = compose(words, options.config_dir, trains=False).config
    if names[0] == "stats":
        validate_classifies(config, "data stats")
    if names[0] == "check":
        from ghosttrain.study.data_check import as_json, check_data, describe

        report = check_data(config.data, say=lambda line: print(line, file=sys.stderr))
        if options.json:
            print(json.dumps(as_json(report, with_class=not config.detects), indent=1))
        else:
            print("\n".join(describe(report)))
        return int(bool(report.faults))
    from ghosttrain.study.data_look import draw_sheet, statistics

    if names[0] == "stats":
        print("\n".join(statistics(config.data, options.images)))
    else:
        out = None if options.out is None else Path(options.out)
        print(draw_sheet(config, options.samples, options.draws, out))
    return 0

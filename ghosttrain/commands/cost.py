"""`cost`: what a run or a sweep will cost, before it runs."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ghosttrain import ranks
from ghosttrain.commands.arguments import Arguments, validate_counts, with_config_dir
from ghosttrain.errors import UserError

ARGUMENTS = with_config_dir(
    Arguments(
        "cost",
        "[+recipe=NAME] [key=value ...] [options]",
        "Estimate what a command would cost: steps, images, multiply-accumulates of student and\n"
        "teacher, bytes read, disk, memory, and hours on 1 to 64 devices; with -m the sum of what\n"
        "is missing of a sweep, and what storing the teacher's outputs saves. Trains nothing; of\n"
        "ImageNet, and of weights from a hub, nothing has to be on this machine.",
    )
)
ARGUMENTS.add_argument(
    "-m", "--multirun", action="store_true", help="of every combination of the listed values"
)
ARGUMENTS.add_argument(
    "--measure", action="store_true",
    help="train 20 steps of it here for the speed of this device; kept, and used again",
)  # fmt: skip
ARGUMENTS.add_argument(
    "--images-per-second", type=float, metavar="X", help="the speed of one device, in training"
)
ARGUMENTS.add_argument(
    "--images", type=int, metavar="N", help="training images, where they are not on this machine"
)
ARGUMENTS.add_argument("--classes", type=int, metavar="K", help="of these images")
ARGUMENTS.add_argument("--json", metavar="FILE", help="write the figures as JSON")


def run(options: Namespace) -> int:
    """Print what it costs; return 0."""
    from ghosttrain.config.hydra_words import split_words

    overrides, hydra_words = split_words(options.words, options.multirun)
    if not overrides:
        raise UserError(
            "name what would be trained: python -m ghosttrain cost +recipe=compact_kd "
            "model=ghostnetv3_130"
        )
    if ranks.is_launched():
        raise UserError("cost is for one process: type launch.nproc=N in place of torchrun")
    speed = options.images_per_second
    if speed is not None and not 0 < speed < float("inf"):
        raise UserError(f"--images-per-second {speed:g}: give a number above 0")
    if speed is not None and options.measure:
        raise UserError("--measure and --images-per-second both say the speed: type one of them")
    given = {name: getattr(options, name) for name in ("images", "classes")}
    validate_counts(**{name: count for name, count in given.items() if count is not None})
    if (options.images is None) != (options.classes is None):
        raise UserError("--images and --classes belong together: type both")
    from ghosttrain.study.cost import Known
    from ghosttrain.study.cost_report import cost_of_command, describe_run, describe_sweep, json_of

    costs = cost_of_command(
        overrides, hydra_words, options.config_dir, is_sweep=options.multirun,
        known=Known(**given), speed=speed, measure=options.measure,
    )  # fmt: skip
    print(describe_sweep(costs) if options.multirun else describe_run(costs[0]))
    if options.json:
        import json

        from ghosttrain.files import write_text

        write_text(
            Path(options.json), json.dumps(json_of(costs), indent=1, ensure_ascii=False) + "\n"
        )
    return 0

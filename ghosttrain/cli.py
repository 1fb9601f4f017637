"""The command line: a table of verbs, and one-line errors. `train` is the default verb.

A verb is a module of `commands/` with `ARGUMENTS` (its parser) and `run`. Nothing heavy is imported
before the verb is known: `--help` imports no pydantic, a typo in a setting no torch.
"""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from pathlib import Path

from ghosttrain import ranks
from ghosttrain.commands.arguments import (
    OPTIONS_WITH_VALUE,
    Arguments,
    validate_known,
    validate_not_hydras,
)
from ghosttrain.errors import Stopped, UserError, did_you_mean, mistake
from ghosttrain.terminal import Output, lasting_output, reason
from ghosttrain.threads import wait_asleep

VERBS = {
    "train": "train a run; the same command again resumes it, or shows its result",
    "eval": "evaluate a run again, exactly",
    "detect": "train a detector, or evaluate one again",
    "fuse": "write the inference model of a run",
    "export": "convert a run for a device, and prove that the file answers alike",
    "quantize": "write a run in INT8, and measure what it costs",
    "latency": "time one pass of a run, a model or a file",
    "pareto": "accuracy against MACs, parameters and measured latency",
    "publish": "write a folder that timm and the hub take",
    "predict": "classify images by the network of a run",
    "wrong": "the held-out images a run is most certain of and wrong about",
    "report": "results side by side",
    "doctor": "whether a run could start here, and what to type where not",
    "recipes": "list the recipes: what for, what they reach, what they cost",
    "study": "run a declared study, and report what it shows",
    "cost": "estimate what a run or a sweep will cost",
    "lr_find": "try learning rates in a short run",
    "data": "look at the images: augmented, their statistics, or each of them once",
    "cache": "store the teacher's outputs once",
    "bench": "time training steps, optimizers, data, distillation",
    "help": "this help; help VERB, help SECTION, help SECTION.SETTING",
    "version": "the version",
}
"""Verb -> one line about it; its module is `ghosttrain.commands.<verb>`."""


def main(argv: list[str] | None = None) -> int:
    """Run a verb; return the exit code: 0, 1 (a run of a sweep failed), 2 (a mistake of the user,
    or what was asked for could not be printed), 69 (another process does it), 75 (asked to end by a
    signal, or stood still; the same command goes on), 130 (Ctrl-C).
    """
    args = list(sys.argv[1:] if argv is None else argv)
    wait_asleep()
    with lasting_output():
        try:
            return _main(args) or _unprinted()
        finally:
            if distributed := sys.modules.get("ghosttrain.engine.distributed"):
                distributed.stop_soon()


def _main(args: list[str]) -> int:
    verb = "train"
    try:
        verb, rest = find_verb(args)
        command = importlib.import_module(f"ghosttrain.commands.{verb}")
        options = parse(command.ARGUMENTS, rest)
        if verb in ("train", "doctor", "lr_find"):
            validate_overrides(options.words)
        return command.run(options)
    except (UserError, OSError, ImportError) as error:
        line = mistake(error)
        if line is None:
            raise
        where = f" (rank {ranks.rank()})" if ranks.rank() else ""
        print(f"ghosttrain: error{where}: {line}", file=sys.stderr)
        return error.exit_code if isinstance(error, UserError) else 2
    except RuntimeError as error:
        if ranks.world_size() == 1 or not _lost_a_peer(error):
            raise
        print(f"ghosttrain: rank {ranks.rank()} stops because another rank did", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Stopped) as stopped:
        if ranks.rank() == 0 and ranks.parent() is None:  # else who started it says it
            kept = "file" if verb == "cache" else "checkpoint"
            why = str(stopped) or "interrupted"
            print(
                f"\nghosttrain: {why}; the same command goes on from its last {kept}",
                file=sys.stderr,
            )
        return stopped.exit_code if isinstance(stopped, Stopped) else 130


def find_verb(args: list[str]) -> tuple[str, list[str]]:
    """Split a command line into its verb and the rest; `VERB --help` is `help VERB`.

    The verb is the first word that is one: it may stand anywhere between the `key=value`.

    Raises:
        UserError: two verbs.
    """
    if "--version" in args:
        return "version", []
    places = [
        i
        for i, word in enumerate(args)
        if word in VERBS and not (i and args[i - 1] in OPTIONS_WITH_VALUE)
    ]
    asks_for_help = bool({"-h", "--help"} & {*args})
    if not places and asks_for_help:
        return "help", [word for word in args if "=" not in word and word not in ("-h", "--help")]
    if not places:
        return "train", args
    verb, rest = args[places[0]], [*args[: places[0]], *args[places[0] + 1 :]]
    arguments = importlib.import_module(f"ghosttrain.commands.{verb}").ARGUMENTS
    if rest[places[0] : places[0] + 1] and rest[places[0]] in arguments.actions:
        places = [i for i in places if i != places[0] + 1]
    others = [args[i] for i in places[1:]]
    if "help" in (verb, *others):
        return "help", [word for word in args if word not in ("help", "-h", "--help")]
    if asks_for_help:
        return "help", [verb]
    for word in others:
        if not (arguments.takes_folders and Path(word).exists()):
            raise UserError(f"two verbs, {verb!r} and {word!r}: type one")
    return verb, rest


def parse(arguments: Arguments, args: list[str]) -> Namespace:
    """Return the options and words of a verb.

    Raises:
        UserError: an unknown option, one of another verb, one without its value, or with an
            empty one, as `--out "$UNSET"` has.
    """
    validate_not_hydras(args)
    options, unknown = arguments.parse_known_intermixed_args(args)
    if unknown:
        validate_known(arguments, unknown[0], VERBS)
    for name, value in vars(options).items():
        if value == "":
            raise UserError(
                f"--{name.replace('_', '-')} is empty: give it a value, or leave it out"
            )
    return options


def validate_overrides(words: list[str]) -> None:
    """Raise UserError about a word that is neither a verb nor `key=value`."""
    for word in words:
        if "=" not in word and not word.startswith("~"):
            hint = did_you_mean(word, VERBS)
            raise UserError(f"{word!r} is neither a verb nor key=value.{hint}")


def _unprinted() -> int:
    """Return 2, with a line, when printing was all that was asked for and failed; else 0.

    A closed pipe is no failure: `report | head` has read what it wanted.
    """
    out = sys.stdout
    if not isinstance(out, Output) or out.leaves_more:
        return 0
    out.flush()
    if out.failure is None or isinstance(out.failure, BrokenPipeError):
        return 0
    print(f"ghosttrain: error: {out.name}: {reason(out.failure)}", file=sys.stderr)
    return 2


def _lost_a_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because the process at its other end is gone."""
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "connection closed by peer"))

"""What the verbs share: a parser that raises one line, and words that may be folders."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ghosttrain.errors import UserError, did_you_mean

OPTIONS_WITH_VALUE = (
    *("-c", "--cfg", "-p", "--package", "--info", "-cd", "--config-dir", "--out", "--to"),
    *("-sc", "--shell-completion"),
    *("--rounds", "--threads", "--forwards", "--images", "--steps", "--difference", "--metric"),
    *("--samples", "--draws", "--precision", "--size", "--backend", "--max-drop", "--calibration"),
    *("--seed", "--to-folder", "--to-hub", "--library", "--models"),
    *("--images-per-second", "--classes"),
    *("--top", "--batch", "--curves", "--csv", "--json", "--picture", "--weights", "--confirm"),
)
"""Options that take the next word: it is no verb, even where it is called like one."""


class Arguments(argparse.ArgumentParser):
    """The options and words of one verb; a mistake is a `UserError`.

    Args:
        verb: its name.
        words: what stands on the command line besides options, for the usage line.
        description: what the verb does.
        takes_folders: whether its words may be folders.
        actions: what its first word may be; it is no verb, even where it is called like one.
    """

    def __init__(
        self,
        verb: str,
        words: str,
        description: str,
        takes_folders: bool = False,
        actions: Sequence[str] = (),
    ) -> None:
        super().__init__(
            prog=f"python -m ghosttrain {verb}",
            usage=f"python -m ghosttrain {verb} {words}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.verb, self.takes_folders, self.actions = verb, takes_folders, actions
        self.add_argument("words", nargs="*", help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        """Raise the mistake as a `UserError`, in place of a usage text."""
        if missing := re.match(r"argument (\S+): expected one argument", message):
            names = missing[1].split("/")
            action = next(a for a in self._actions if names[0] in a.option_strings)
            example = action.metavar or (list(action.choices)[0] if action.choices else "VALUE")
            raise UserError(f"{names[-1]} needs a value: {names[-1]} {example}")
        choice = re.match(r"argument (\S+): invalid choice: '?(.*?)'? \(", message)
        if choice:
            name = choice[1].split("/")[-1]
            action = next(a for a in self._actions if name in a.option_strings)
            *most, last = map(str, action.choices or ())
            raise UserError(f"{name} {choice[2]}: choose {', '.join(most)} or {last}")
        if number := re.match(r"argument (\S+): invalid (int|float) value: (.*)", message):
            kind = {"int": "whole number", "float": "number"}[number[2]]
            raise UserError(f"{number[1]} {number[3]} is no {kind}")
        raise UserError(f"{message}; see {self.prog} --help")


def with_config_dir(arguments: Arguments) -> Arguments:
    """Add the option for the user's own groups and recipes."""
    arguments.add_argument(
        "-cd",
        "--config-dir",
        metavar="FOLDER",
        help="your own groups (FOLDER/optim/x.yaml) and recipes (FOLDER/recipe/x.yaml)",
    )
    return arguments


HYDRAS = {
    ("-cn", "--config-name"): "a recipe is +recipe=NAME",
    ("-cp", "--config-path"): "your own groups and recipes are --config-dir FOLDER",
    ("--hydra-help",): "help is python -m ghosttrain --help",
    ("--experimental-rerun",): "the same command again goes on, or shows the result",
    ("-r", "--run"): "leave it out: without -m one run is trained",
}
"""Options of Hydra that a program with one way does not have -> that way."""


def validate_not_hydras(words: Iterable[str]) -> None:
    """Raise UserError about an option of Hydra's, before `-cn` is read as `-c n`."""
    for word in words:
        for names, way in HYDRAS.items():
            if word.partition("=")[0] in names:
                raise UserError(f"{word} is an option of Hydra's that does nothing here: {way}")


def validate_known(arguments: Arguments, word: str, verbs: Iterable[str]) -> None:
    """Raise UserError about a word that starts like an option and is none of this verb."""
    flag = word.partition("=")[0]
    every: dict[str, list[str]] = {}
    for verb in verbs:
        other: Any = importlib.import_module(f"ghosttrain.commands.{verb}").ARGUMENTS
        for name in other._option_string_actions:
            every.setdefault(name, []).append(verb)
    if flag in every:
        raise UserError(
            f"{flag} does not belong to {arguments.verb}, but to {' and '.join(every[flag])}; see "
            f"{arguments.prog} --help"
        )
    hint = did_you_mean(flag, [name for name in every if name.startswith("--")])
    raise UserError(f"unknown option {flag!r}.{hint}")


def folders_and_overrides(
    words: Sequence[str], groups: bool = False
) -> tuple[list[str], list[str]]:
    """Split words into folders and `key=value`.

    A word with `=` is a folder if it exists, or if no setting has a name like it: with a `/` before
    the `=`, unless `groups` (whose names may hold one) can be set.
    """
    folders = [
        word
        for word in words
        if "=" not in word or Path(word).exists() or ("/" in word.partition("=")[0] and not groups)
    ]
    return folders, [word for word in words if word not in folders]


def validate_counts(**counts: int) -> None:
    """Refuse numbers of options (`top`: that of `--top`) below 1."""
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"--{name} {count}: give a whole number of 1 or more")


def parsed_size(text: str | None) -> tuple[int, int] | None:
    """Return height and width of `224` or `256x320`; UserError where it is neither."""
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if match is None:
        raise UserError(f"--size {text}: give a side in pixels, 224, or height x width, 256x320")
    return int(match[1]), int(match[2] or match[1])


def one_folder(verb: str, folders: Sequence[str]) -> Path:
    """Return the one run folder; UserError where there are none or several."""
    if len(folders) != 1:
        raise UserError(
            f"{verb} needs one run folder: python -m ghosttrain {verb} runs/compact_kd/NAME"
        )
    return Path(folders[0])

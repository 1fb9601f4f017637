"""`recipes`: what each recipe is for, what it reaches and what it costs."""

from __future__ import annotations

import itertools
from argparse import Namespace

from ghosttrain.commands.arguments import Arguments, with_config_dir
from ghosttrain.errors import UserError

ARGUMENTS = with_config_dir(
    Arguments(
        "recipes",
        "",
        "List all recipes: what for, the command, what they reach, what they cost. It is the head\n"
        "of each file in recipes/; the values stand below it there, each with its source.",
    )
)

VALUES = ("values", "all values", "the values", "sources", "what its parent")
"""How the line begins, without capitals, from which a recipe's head speaks of single values."""


def run(options: Namespace) -> int:
    """Print the list, ablations last; return 0."""
    from ghosttrain.config.names import Names

    if options.words:
        raise UserError(f"recipes takes no word, got {options.words[0]!r}")
    names = Names(options.config_dir)
    for name in sorted(names.choices("recipe"), key=lambda name: ("/" in name, name)):
        head = head_of(names.recipe_file(name).read_text(encoding="utf-8"))
        print("\n".join([name, *(f"    {line}".rstrip() for line in head), ""]))
    return 0


def head_of(text: str) -> list[str]:
    """Return the comment that a recipe begins with, up to where it speaks of its single values."""
    comment = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    lines = [line[1:].removeprefix(" ") for line in comment]
    about = itertools.takewhile(lambda line: not line.lower().startswith(VALUES), lines)
    return "\n".join(line for line in about if line != "@package _global_").strip().splitlines()

"""`version`: print it."""

from __future__ import annotations

from argparse import Namespace

from ghosttrain.commands.arguments import Arguments
from ghosttrain.errors import UserError
from ghosttrain.version import __version__

ARGUMENTS = Arguments("version", "", "Print the version.")


def run(options: Namespace) -> int:
    """Print the version; return 0."""
    if options.words:
        raise UserError(f"version takes no words, got {options.words[0]!r}: leave it out")
    print(f"ghosttrain {__version__}")
    return 0

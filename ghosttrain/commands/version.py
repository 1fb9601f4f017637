"""`version`: print it."""

from __future__ import annotations

from argparse import Namespace

from ghosttrain.commands.arguments import Arguments

ARGUMENTS = Arguments("version", "", "Print the version.")


def run(options: Namespace) -> int:
    """Print the version; return 0."""
    from ghosttrain import __version__

    print(f"ghosttrain {__version__}")
    return 0

"""A user's mistake becomes one clear line and exit code 2; a bug keeps its stack trace.

Anything the user can mend (a name, a value, a path, a file) is raised as `UserError` with a message
that says what was given, what was expected and what to type. `cli.main` prints that message and
nothing else.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake the user can mend. `str(error)` is one line; `cli.main` prints it and exits with
    code 2.
    """


def did_you_mean(given: str, names: Iterable[str], limit: int = 12) -> str:
    """Return " Did you mean 'x'?" for a near miss, else " Choose from: a, b, c." (both start with a
    space).
    """
    names = sorted(set(names))
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]!r}?"
    shown = ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
    return f" Choose from: {shown}." if names else ""

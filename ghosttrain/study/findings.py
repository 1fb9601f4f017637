"""What a check finds: fine, worth a word, or what keeps a run from starting. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

from ghosttrain.errors import mistake
from ghosttrain.terminal import printable
from ghosttrain.text import one_line

State = Literal["OK", "note", "FAIL"]
"""Fine; the run can start, but the user should know; the run cannot start."""
Thing = TypeVar("Thing")


class Finding(NamedTuple):
    """One line of `doctor`."""

    check: str
    state: State
    text: str
    """What was found, and where it is not good what to type."""

    def line(self) -> str:
        """Return it as it is printed."""
        return f"{self.state:<4}  {self.check:<13}  {self.text}"


class NotLookedAt(Exception):
    """What a check needs was not found by an earlier one, which said so."""


def needed(thing: Thing | None, check: str) -> Thing:
    """Return what an earlier check found; NotLookedAt where it found nothing."""
    if thing is None:
        raise NotLookedAt(f"not looked at: it needs {check}, see above")
    return thing


def finding(check: str, look: Callable[[], tuple[State, str]]) -> Finding:
    """Return what a check finds. One that raises, whatever it is, has found what keeps a run from
    starting.
    """
    try:
        state, text = look()
    except NotLookedAt as error:
        state, text = "note", str(error)
    except Exception as error:
        state, text = "FAIL", mistake(error) or f"{type(error).__name__}: {one_line(error)}"
    return Finding(check, state, printable(one_line(text)))

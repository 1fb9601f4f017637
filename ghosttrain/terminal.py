"""Standard output and standard error that end no command: `... | head`, a full disk, a terminal
that is gone, a locale without the letters of a name. No terminal is told to do anything by a name:
what it would obey is shown as text.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from ghosttrain.text import one_line, printable


class Output:
    r"""A stream of the terminal that never raises: what fails once is switched off. It takes text
    only: ESC is shown as `\x1b`.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self.stream, self.name = stream, name
        self.failure: Exception | None = None
        self.other: Output | None = None
        """Where a failure is said."""
        self.leaves_more = False
        """Whether the command leaves more behind than what it prints (`go_on_without`)."""
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")  # shows a letter the locale lacks as \xdf

    def write(self, text: str) -> int:
        """Write `text`; return its length, as a text stream does."""
        self.pass_on(printable(text, lines=True))
        return len(text)

    def pass_on(self, text: str) -> None:
        """Write `text` as it is."""
        if self.failure is None:
            try:
                self.stream.write(text)
            except (OSError, ValueError) as error:  # ValueError: the stream was closed
                self._switch_off(error)

    def isatty(self) -> bool:
        """Return False: libraries send no colours, which would be shown as text."""
        return False

    def flush(self) -> None:
        """Pass on what was written."""
        if self.failure is None:
            try:
                self.stream.flush()
            except (OSError, ValueError) as error:
                self._switch_off(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _switch_off(self, error: Exception) -> None:
        self.failure = error
        with suppress(OSError, ValueError):  # else Python itself would complain at its end
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
        if self.other is not None:
            message = (
                f"{self.name} cannot be written ({reason(error)}); the work goes on without it"
            )
            self.other.write(f"ghosttrain: {message}\n")


class _Screen:
    """What a progress bar writes to: it moves the cursor."""

    def __init__(self, output: Output) -> None:
        self.output = output

    def write(self, text: str) -> int:
        """Write `text` as it is; return its length."""
        self.output.pass_on(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.output, name)


def screen() -> TextIO | None:
    """Return where a progress bar is drawn: the error output, where that is a terminal."""
    output = sys.stderr
    stream = output.stream if isinstance(output, Output) else output
    if stream is None or not stream.isatty():
        return None
    return cast("TextIO", _Screen(output)) if isinstance(output, Output) else stream


CELL = "GHOSTTRAIN_CELL"
"""Variable with the label of a cell of which only lines that begin with it are shown: cells that
run at once would mix theirs."""


def cell() -> str | None:
    """Return the label of the cell that runs in this process; None where all is shown."""
    return os.environ.get(CELL)


class LinesOf:
    """A stream that passes the lines that begin with a label."""

    def __init__(self, stream: TextIO, label: str) -> None:
        self.stream, self.label, self.line = stream, label, ""

    def write(self, text: str) -> int:
        """Keep `text`; pass on the lines that are complete."""
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            if line.startswith(self.label):
                self.stream.write(f"{line}\n")
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def only_lines_of(label: str | None) -> Iterator[None]:
    """Show inside this block, in the processes it starts too, nothing but lines of a cell; all
    where `label` is None.
    """
    if label is None:
        yield
        return
    before, out = os.environ.get(CELL), sys.stdout
    os.environ[CELL] = label
    sys.stdout = LinesOf(out, label)
    try:
        yield
    finally:
        sys.stdout = out
        if before is None:
            del os.environ[CELL]
        else:
            os.environ[CELL] = before


@contextmanager
def lasting_output() -> Iterator[None]:
    """Let nothing inside this block fail because its output cannot be written."""
    while (handle := os.open(os.devnull, os.O_RDWR)) < 3:
        pass  # started with `>&-`: else a file of the run would become descriptor 1 or 2
    os.close(handle)
    before, hangup = (sys.stdout, sys.stderr), signal.getsignal(signal.SIGHUP)
    if sys.stdout is not None:  # None: closed by whoever started this process
        shown = sys.stdout if (label := cell()) is None else LinesOf(sys.stdout, label)
        sys.stdout = Output(cast("TextIO", shown), "the standard output")
    if sys.stderr is not None:
        sys.stderr = Output(sys.stderr, "the error output")
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before
        if signal.getsignal(signal.SIGHUP) is not hangup:
            signal.signal(signal.SIGHUP, hangup)


def go_on_without() -> None:
    """From here on something is made that matters more than what is printed about it.

    A stream that fails is said once on the other one, and a terminal that is closed (SIGHUP) does
    not end this process: a lost connection does not cost a night of training.
    """
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, Output)]
    for stream, other in zip(streams, reversed(streams), strict=True):
        stream.leaves_more = True
        stream.other = None if other is stream else other
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


def failures() -> dict[str, Exception]:
    """Return name -> reason of the streams that are switched off."""
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, Output)]
    return {s.name: s.failure for s in streams if s.failure is not None}


def reason(error: BaseException) -> str:
    """Return why something failed, in one line: `No space left on device`.

    An error that was raised in place of one of the system tells that one's reason.
    """
    if not isinstance(error, OSError) and isinstance(error.__context__, OSError):
        error = error.__context__
    meaning = error.strerror if isinstance(error, OSError) else None
    return one_line(meaning or error)[:300]

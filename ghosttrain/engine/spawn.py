"""`launch.nproc=N`: N copies of the same command as ranks; one that fails ends all.

The ranks get torchrun's environment variables and meet through a file. Imports no torch.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from ghosttrain import ranks
from ghosttrain.engine.devices import taken
from ghosttrain.errors import SAVED, Stopped

GRACE = 3.0
"""Seconds in which ranks may end by themselves when another one has failed."""
PATIENCE = 10.0
"""Seconds in which ranks may end after another one has failed."""
SAVING = 120.0
"""Seconds in which ranks that were asked to end may save and do so; a second signal is faster."""


def spawn(arguments: tuple[str, ...], nproc: int, devices: Sequence[int] = ()) -> int:
    """Run `python -m ghosttrain ARGUMENTS` as ranks 0..nproc-1; return the exit code of the rank
    that failed, else 0. With `devices` (`launch.devices`) each rank has one of them, which no other
    run has; waits until so many are free.

    Rank 0 writes to this terminal. Another rank's error output is shown when that rank failed and
    rank 0 did not. The ranks hold Ctrl-C back: this process alone decides, and ends them.

    Raises:
        Stopped: a signal asked to end; all ranks saved and have ended.
        KeyboardInterrupt, SystemExit: Ctrl-C, another signal (exit code 128 + its number) before
            there was something to save, or a second one; all ranks have ended.
    """
    processes: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        held = stack.enter_context(taken(devices, nproc)) if devices else {}
        at_once = len(devices) // nproc
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ghosttrain-")))
        errors = [
            stack.enter_context(open(scratch / f"rank{r}", "w+", errors="replace"))
            for r in range(nproc)
        ]
        for each in (signal.SIGTERM, signal.SIGUSR1):
            stack.callback(signal.signal, each, signal.signal(each, raise_exit))
        try:
            # A blocked signal stays blocked in the processes that are started meanwhile.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                for rank in range(nproc):
                    quiet = errors[rank] if rank else None
                    meeting = f"file://{scratch}/rendezvous"
                    env = ranks.environment(rank, nproc, meeting, [*held], at_once)
                    processes.append(start(arguments, env, quiet, held.values()))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            codes = _wait(processes)
        except (KeyboardInterrupt, SystemExit) as asked:
            end(processes, SAVING)
            if any(process.returncode == SAVED for process in processes):
                raise Stopped(_number(asked)) from None
            raise
        finally:
            end(processes, PATIENCE)
        if not any(codes.values()):
            return 0
        cause = cause_of(codes)
        errors[cause].seek(0)
        sys.stderr.write(errors[cause].read())
        if codes[cause] < 0:
            name = signal.Signals(-codes[cause]).name
            guess = "; out of memory?" if name == "SIGKILL" else ""
            print(f"ghosttrain: rank {cause} was killed by {name}{guess}", file=sys.stderr)
            return 128 - codes[cause]
        return codes[cause]


def cause_of(codes: Mapping[int, int]) -> int:
    """Return the rank that made the others fail, of rank -> exit code: a mistake of the user (2),
    or a rank that was killed, breaks the others' connections.
    """
    failed = [rank for rank, code in codes.items() if code]
    return min(failed, key=lambda rank: (codes[rank] != 2, codes[rank] >= 0, rank))


def start(
    arguments: tuple[str, ...],
    env: Mapping[str, str],
    quiet: IO[str] | None = None,
    files: Iterable[int] = (),
) -> subprocess.Popen[bytes]:
    """Start one rank with these environment variables; `quiet` takes its output, and it holds the
    open `files` too.
    """
    command = [sys.executable, "-m", "ghosttrain", *arguments]
    return subprocess.Popen(command, env=env, stdout=quiet, stderr=quiet, pass_fds=[*files])


def raise_exit(number: int, frame: object) -> None:
    """Handle a signal: end as an error does, with the exit code of that signal."""
    raise SystemExit(128 + number)


def _number(asked: KeyboardInterrupt | SystemExit) -> int:
    """Return the signal that asked."""
    return signal.SIGINT if isinstance(asked, KeyboardInterrupt) else int(asked.code or 0) - 128


def _wait(processes: list[subprocess.Popen[bytes]]) -> dict[int, int]:
    """Wait for all; once one has failed the others get `GRACE` seconds to end by themselves.

    Returns rank -> exit code of those that did.
    """
    while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
        time.sleep(0.05)
    until = time.monotonic() + GRACE
    while any(p.poll() is None for p in processes) and time.monotonic() < until:
        time.sleep(0.05)
    return {rank: p.returncode for rank, p in enumerate(processes) if p.poll() is not None}


def end(processes: list[subprocess.Popen[bytes]], patience: float) -> None:
    """Ask those that still run to end; kill those that do not, or all at a second signal."""
    try:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        until = time.monotonic() + patience
        while any(p.poll() is None for p in processes) and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()

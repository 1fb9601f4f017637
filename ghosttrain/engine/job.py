"""A sweep under torchrun: its cells, one after another, on all ranks of the job.

The processes that torchrun starts stay for the whole sweep and train nothing: rank 0 goes through
the cells, and for each one every rank starts a process of its own. These are the ranks of that
cell. Whatever ends one of them (a mistake, no memory, a kill) ends that cell on all ranks; the
next one begins with new processes. What the ranks tell each other goes through torchrun's store.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import count

import torch.distributed as dist

from ghosttrain import ranks
from ghosttrain.engine.spawn import GRACE, PATIENCE, SAVING, cause_of, end, raise_exit, start

POLL = 0.1
"""Seconds between two looks at the store and at the process of this rank."""
END = "end"
"""What rank 0 announces after the last cell."""


@contextmanager
def leading() -> Iterator[None]:
    """Inside this block rank 0 says what runs (`run_everywhere`); then the other ranks end."""
    try:
        with _ending_at_sigterm():
            yield
    finally:
        with suppress(RuntimeError):  # the store is gone: so are they
            _announce(END)
            until = time.monotonic() + PATIENCE  # with this rank goes the store that they ask
            others = ranks.world_size() - 1
            while _store().add("ended", 0) < others and time.monotonic() < until:
                time.sleep(POLL)


def run_everywhere(arguments: tuple[str, ...]) -> int:
    """Run `python -m ghosttrain ARGUMENTS` on all ranks; return the exit code of the rank that
    failed, else 0. Only for rank 0.
    """
    cell = _announce(json.dumps(arguments))
    _run(cell, arguments)
    said = {rank: _waited(f"{cell}/code{rank}") for rank in range(ranks.world_size())}
    codes = {rank: int(code) for rank, code in said.items() if code != END}
    if not any(codes.values()):
        return 0
    code = codes[cause_of(codes)]
    return code if code > 0 else 128 - code


def follow() -> int:
    """Run on this rank what rank 0 announces, until it has no more; return 0, or 1 where rank 0 is
    gone.
    """
    try:
        with _ending_at_sigterm():
            for cell in count(1):
                said = _waited(f"{cell}")
                if said == END:
                    break
                _run(cell, tuple(json.loads(said)))
    except RuntimeError:
        print(f"ghosttrain: rank {ranks.rank()} stops because rank 0 did", file=sys.stderr)
        return 1
    finally:
        with suppress(RuntimeError):
            _store().add("ended", 1)
    return 0


def _run(cell: int, arguments: tuple[str, ...]) -> None:
    """Run this rank of a cell, and tell its exit code to the store.

    Once another rank has failed, this one gets `GRACE` seconds to end by itself.
    """
    # A blocked signal stays blocked in the process: at Ctrl-C this one alone decides, and ends it.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process = start(arguments, ranks.environment_of_cell(f"{_prefix()}/{cell}"))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    until = None
    try:
        while process.poll() is None and (until is None or time.monotonic() < until):
            if until is None and _store().check([f"{cell}/failed"]):
                until = time.monotonic() + GRACE
            time.sleep(POLL)
    except (KeyboardInterrupt, SystemExit):
        end([process], SAVING)
        raise
    finally:
        code = process.poll()
        end([process], PATIENCE)
        if code != 0:
            _store().set(f"{cell}/failed", "")
    _store().set(f"{cell}/code{ranks.rank()}", END if code is None else str(code))


@contextmanager
def _ending_at_sigterm() -> Iterator[None]:
    """End inside this block as an error does: no process of a cell outlives that of its rank."""
    before = signal.signal(signal.SIGTERM, raise_exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _announce(text: str) -> int:
    """Tell the other ranks what comes next; return its number."""
    number: int = _store().add("announced", 1)
    _store().set(f"{number}", text)
    return number


def _waited(key: str) -> str:
    """Return what another rank writes under `key`, however long that takes."""
    while not _store().check([key]):
        time.sleep(POLL)
    return _store().get(key).decode()


@cache
def _store() -> dist.Store:
    store, _, _ = next(dist.rendezvous("env://"))
    return dist.PrefixStore(_prefix(), store)


def _prefix() -> str:
    """Return what the keys of this start begin with: torchrun may restart all ranks of a job."""
    return f"ghosttrain/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

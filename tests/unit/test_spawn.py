"""`spawn`: which exit code counts, what is shown, and that no rank outlives it.

The ranks are shell scripts: $RANK says which one runs.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ghosttrain.engine import spawn as spawn_module
from ghosttrain.engine.spawn import spawn

Ranks = Callable[[str, str], None]


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    """Set what rank 0 and rank 1 run; each leaves its process id in a file."""

    def write(rank0: str, rank1: str) -> None:
        script = tmp_path / "python"
        body = f"cd {tmp_path}; echo $$ >pid$RANK"
        script.write_text(f"#!/bin/sh\n{body}\nif [ $RANK = 0 ]; then\n{rank0}\nelse\n{rank1}\nfi")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return write


def interrupt_when_both_run(folder: Path, number: int) -> threading.Thread:
    def send() -> None:
        while not all((folder / f"ready{rank}").exists() for rank in (0, 1)):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def gone(folder: Path) -> bool:
    """Whether the processes of both ranks have ended."""
    for rank in (0, 1):
        try:
            os.kill(int((folder / f"pid{rank}").read_text()), 0)
        except ProcessLookupError:
            continue
        return False
    return True


AFTER_RANK_0 = "while [ ! -e pid0 ]; do sleep .02; done"


@pytest.mark.parametrize(
    ("rank0", "rank1", "code", "expected"),
    [
        ("exit 0", "echo unseen >&2", 0, ""),
        ("exit 1", "echo the mistake >&2; exit 2", 2, "the mistake\n"),
        ("exit 2", "echo lost a peer >&2; exit 1", 2, ""),
        ("exit 0", "echo a bug >&2; exit 1", 1, "a bug\n"),
        ("exit 1", "kill -9 $$", 137, "ghosttrain: rank 1 was killed by SIGKILL; out of memory?\n"),
        ("exec sleep 600", f"{AFTER_RANK_0}; echo alone >&2; exit 2", 2, "alone\n"),
    ],
)
def test_the_rank_that_is_the_cause_gives_exit_code_and_words(
    ranks, capfd, monkeypatch, tmp_path, rank0, rank1, code, expected
):
    # Only a rank that never ends is waited for so long.
    monkeypatch.setattr(spawn_module, "GRACE", 0.2 if "sleep" in rank0 else 600)
    ranks(rank0, rank1)
    assert spawn((), 2) == code
    assert capfd.readouterr().err == expected
    assert gone(tmp_path)


def test_ctrl_c_and_sigterm_end_every_rank(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(spawn_module, "PATIENCE", 600)
    before = signal.getsignal(signal.SIGTERM), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    asked = "trap 'echo asked >asked; exit 143' TERM; touch ready0; while :; do sleep .02; done"
    for number, raised in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)):
        for path in tmp_path.iterdir():
            path.unlink()
        ranks(asked, "kill -INT $$; touch ready1; exec sleep 600")  # a rank holds Ctrl-C back
        thread = interrupt_when_both_run(tmp_path, number)
        with pytest.raises(raised) as stopped:
            spawn((), 2)
        thread.join()
        assert gone(tmp_path) and (tmp_path / "asked").exists()
        if raised is SystemExit:
            assert stopped.value.code == 143
    after = signal.getsignal(signal.SIGTERM), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert after == before


def test_a_rank_that_does_not_listen_is_killed(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(spawn_module, "SAVING", 0.3)
    monkeypatch.setattr(spawn_module, "PATIENCE", 0.3)
    ranks("trap '' TERM; touch ready0; while :; do sleep .02; done", "touch ready1; exec sleep 600")
    thread = interrupt_when_both_run(tmp_path, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        spawn((), 2)
    thread.join()
    assert gone(tmp_path)

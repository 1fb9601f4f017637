"""One process at a time owns a folder, whatever the file system, and however the last one ended."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ghosttrain import locks
from ghosttrain.errors import Busy
from ghosttrain.locks import is_locked, locked

OWN = "import time; from pathlib import Path; from ghosttrain import locks\nlocks.BEAT = 0.1"
NO_LOCKS = (
    "import errno, fcntl\ndef no(*_): raise OSError(errno.ENOSYS, 'no locks')\nfcntl.flock = no"
)


@pytest.fixture(params=["flock", "lease"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system with locks, and one without."""
    monkeypatch.setattr(locks, "BEAT", 0.1)
    if request.param == "lease":

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOSYS, "no locks here")

        monkeypatch.setattr(fcntl, "flock", refuse)
    return request.param


def owner(folder: Path, system: str, then: str = "time.sleep(600)") -> subprocess.Popen[str]:
    """Start a process that owns `folder`."""
    code = f"{NO_LOCKS if system == 'lease' else ''}\n{OWN}\n"
    code += f"with locks.locked(Path({str(folder)!r}), 'busy'):\n"
    code += f"    print('owned', flush=True)\n    {then}"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "owned\n"
    return process


def test_the_owner_is_named_and_leaves_nothing(tmp_path: Path, system: str) -> None:
    assert not is_locked(tmp_path)
    process = owner(tmp_path, system)
    assert is_locked(tmp_path)
    for _ in range(2):  # a refusal leaves the lock as it is
        with pytest.raises(Busy) as refused, locked(tmp_path, "{owner} has it", patience=0.3):
            pass
        assert str(refused.value) == f"process {process.pid} on {socket.gethostname()} has it"
    with locked(tmp_path, None, patience=0.3):  # work that may be done twice
        assert is_locked(tmp_path)
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert not list(tmp_path.iterdir())
    with locked(tmp_path, "busy"):
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path) and not list(tmp_path.iterdir())


def test_a_killed_owner_is_no_owner(tmp_path: Path, system: str) -> None:
    process = owner(tmp_path, system)
    process.kill()
    process.communicate()
    assert not is_locked(tmp_path)
    with locked(tmp_path, "busy"):
        assert locks.owner_of(tmp_path).startswith(f"process {os.getpid()} on ")


def test_one_who_waits_gets_it(tmp_path: Path, system: str) -> None:
    process = owner(tmp_path, system, "time.sleep(1)")
    with locked(tmp_path, "busy", patience=60):
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert not list(tmp_path.iterdir())


def test_a_worker_does_not_keep_the_lock_of_a_killed_owner(tmp_path: Path) -> None:
    """The data workers of a run are forked, and live for seconds after it."""
    then = "import os; pid = os.fork(); print(pid, flush=True) if pid else None; time.sleep(600)"
    process = owner(tmp_path, "flock", then)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    try:
        process.kill()
        process.wait()
        with locked(tmp_path, "busy", patience=60):  # it may not have begun to run yet
            os.kill(worker, 0)  # it lives
    finally:
        os.kill(worker, signal.SIGKILL)
        process.stdout.close()


def test_an_owner_elsewhere_that_stopped_counting_is_gone(tmp_path, monkeypatch, system):
    """Whether it lives cannot be asked: it is of another machine."""
    if system == "flock":
        pytest.skip("the system knows")
    monkeypatch.setattr(locks, "STALE", 0.5)
    (tmp_path / locks.LOCK).touch()
    (tmp_path / locks.LEASE).write_text("4711 elsewhere 0123456789abcdef 7")
    assert not is_locked(tmp_path)  # in two counts it would have counted
    began = time.monotonic()
    with locked(tmp_path, "busy", patience=0):
        assert time.monotonic() - began >= 0.5
        assert "4711" not in (tmp_path / locks.LEASE).read_text()
    assert not list(tmp_path.iterdir())


def test_an_owner_that_died_while_it_wrote_locks_nobody_out(tmp_path, monkeypatch, system):
    """An empty file, or none that is text."""
    if system == "flock":
        pytest.skip("it writes nothing that counts")
    monkeypatch.setattr(locks, "STALE", 0.3)
    for content in (b"", b"\xff\xfe"):
        (tmp_path / locks.LEASE).write_bytes(content)
        with locked(tmp_path, "busy", patience=0):
            (tmp_path / locks.LEASE).unlink()  # by somebody who tidies up: it comes back
            time.sleep(3 * locks.BEAT)
            assert is_locked(tmp_path)
        assert not list(tmp_path.iterdir())


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """Its owner gives it back between our opening and our locking of it."""
    flock, calls = locks._flock, []

    def late(handle: int) -> bool | None:
        calls.append(handle)
        if len(calls) == 1:
            (tmp_path / locks.LOCK).unlink()
        return flock(handle)

    monkeypatch.setattr(locks, "_flock", late)
    with locked(tmp_path, "busy", patience=60):
        assert len(calls) == 2 and (tmp_path / locks.LOCK).is_file()


def test_two_that_ask_do_not_see_each_other(tmp_path: Path) -> None:
    (tmp_path / locks.LOCK).touch()  # left by one that was killed
    handle = os.open(tmp_path / locks.LOCK, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    assert not is_locked(tmp_path)
    os.close(handle)


def _own_then_lose(folder: Path, name: str) -> None:
    with locked(folder, "busy"):
        (folder / name).write_text("4712 elsewhere fedcba9876543210 0")
        time.sleep(60)


def test_an_owner_whose_lease_was_taken_ends(tmp_path, monkeypatch, system, capfd):
    """It stood still so long that another one took its place."""
    if system == "flock":
        pytest.skip("the system keeps it")
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=_own_then_lose, args=(tmp_path, locks.LEASE))
    child.start()
    child.join(60)
    assert child.exitcode == 69
    assert "was taken by another process while this one stood still" in capfd.readouterr().err


def test_two_that_begin_at_once(tmp_path: Path, system: str) -> None:
    """Of ten processes at a time one owns the folder: each counts in a file, unguarded."""
    count = tmp_path / "count"
    count.write_text("0")
    folder = tmp_path / "folder"
    folder.mkdir()
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_count, args=(folder, count)) for _ in range(10)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0] * 10 and count.read_text() == "30"


def _count(folder: Path, count: Path) -> None:
    for _ in range(3):
        with locked(folder, "busy", patience=100):
            value = int(count.read_text())
            time.sleep(0.01)
            count.write_text(str(value + 1))


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / locks.LOCK).symlink_to(tmp_path / "victim")
    with pytest.raises(OSError), locked(tmp_path, "busy"):
        pass
    assert not (tmp_path / "victim").exists()

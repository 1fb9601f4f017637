"""When checkpoints are written, what a failed write does, and which of several is used."""

from __future__ import annotations

import errno
import resource
import signal
import threading

import pytest
import torch
from test_state import checkpoint

from ghosttrain.config.schema import TrainConfig
from ghosttrain.engine import saving
from ghosttrain.engine.checkpoint import (
    newest_checkpoint,
    read_checkpoint,
    set_damaged_aside,
    write_checkpoint,
)
from ghosttrain.engine.conditions import changed_conditions
from ghosttrain.engine.saving import Saver, validate_room
from ghosttrain.errors import Stopped, UserError


class Clock:
    """Time that the tests set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    monkeypatch.setattr(saving, "time", clock := Clock())
    return clock


def saver(folder, lines=None, **settings) -> Saver:
    said = [] if lines is None else lines
    cpu = torch.device("cpu")
    return Saver(TrainConfig(**settings), folder, 0, cpu, lambda: None, said.append)


@pytest.mark.parametrize(
    ("setting", "due"),
    [
        # (step, seconds since the last one, epochs ended) at which one is written
        ("500steps", [(499, 0, None, False), (500, 0, None, True), (9, 59, 1, False)]),
        ("500steps", [(9, 60, 1, True), (9, 9999, None, False)]),
        ("10min", [(1, 599, None, False), (1, 600, None, True), (1, 60, 2, True)]),
        ("2epochs", [(1, 9999, None, False), (1, 9999, 1, False), (1, 0, 2, True)]),
    ],
)
def test_a_checkpoint_is_written_when_the_setting_says(tmp_path, clock, setting, due):
    one = saver(tmp_path, save_every=setting)
    for step, seconds, epochs, expected in due:
        clock.now = one.since + seconds
        assert one.is_due(step, epochs) is expected, (step, seconds, epochs)


def test_a_write_under_way_is_waited_for_and_never_doubled(tmp_path, monkeypatch):
    running, most, gate = [], [], threading.Event()
    real = saving.write_checkpoint

    def slow(*args):
        running.append(1)
        most.append(len(running))
        assert gate.wait(60)
        real(*args)
        running.pop()

    monkeypatch.setattr(saving, "write_checkpoint", slow)
    with saver(tmp_path) as one:
        one.save(1, lambda: checkpoint(step=1))
        assert not (tmp_path / "last.pt").exists()  # training goes on meanwhile
        threading.Timer(0.05, gate.set).start()
        one.save(2, lambda: checkpoint(step=2))
        assert read_checkpoint(tmp_path / "last.pt")["step"] in (1, 2)
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 2
    assert read_checkpoint(tmp_path / "last-1.pt")["step"] == 1
    assert most == [1, 1] and one.waited >= 0


def test_a_failed_write_is_said_and_tried_again_until_patience_ends(tmp_path, clock, monkeypatch):
    lines: list[str] = []
    one = saver(tmp_path, lines, patience=3)
    one.save(1, lambda: checkpoint(step=1))
    one.wait()
    real = saving.write_checkpoint

    def full(*args):
        raise UserError("cannot write last.pt (No space left on device)")

    monkeypatch.setattr(saving, "write_checkpoint", full)
    one.save(2, lambda: checkpoint(step=2))
    one.writer.join()
    assert not one.is_due(3)  # a minute has not passed
    clock.now += 60
    assert one.is_due(3)
    one.save(3, lambda: checkpoint(step=3))
    assert lines[0] == (
        "cannot write last.pt (No space left on device): training goes on, the last good "
        "checkpoint stays; tried again for 3 minutes (train.patience)"
    )
    monkeypatch.setattr(saving, "write_checkpoint", real)
    clock.now += 60
    assert not one.finish(int) and one.failure is None  # there is room again
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 3
    monkeypatch.setattr(saving, "write_checkpoint", full)
    one.save(4, lambda: checkpoint(step=4))
    clock.now += 60
    with pytest.raises(UserError, match="for 3 minutes .*No space left on device") as end:
        one.finish(int)
    assert "no checkpoint could be written" in str(end.value)
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 3
    one.writer, clock.now = None, clock.now + 1000
    with pytest.raises(UserError, match="no checkpoint could be written for 3 minutes"):
        one.is_due(5)


def test_the_end_of_a_run_waits_for_a_disk_until_it_is_asked_to_stop(tmp_path, clock, monkeypatch):
    lines: list[str] = []
    asked, real = [], saving.write_checkpoint

    def full(*args):
        raise UserError("cannot write last.pt (No space left on device)")

    def poll():
        asked.append(clock.now)
        if len(asked) == 5:
            monkeypatch.setattr(saving, "write_checkpoint", real)  # there is room again
            raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(saving, "write_checkpoint", full)
    one = saver(tmp_path, lines)
    one.save(1, lambda: checkpoint(step=1))
    began = clock.now
    with pytest.raises(Stopped), one:
        one.finish(poll)
    assert asked == [began + second for second in range(5)]
    assert read_checkpoint(tmp_path / "last.pt")["step"] == 1
    assert lines == [
        "cannot write last.pt (No space left on device): the run ends when it is written, there "
        "is none yet; tried again for 30 minutes (train.patience)"
    ]


def test_patience_begins_with_the_first_failure(tmp_path, clock, monkeypatch):
    """Checkpoints two hours apart: the first one that fails is tried again all the same."""

    def full(*args):
        raise UserError("cannot write last.pt (No space left on device)")

    one = saver(tmp_path, save_every="120min")
    clock.now += 7200
    monkeypatch.setattr(saving, "write_checkpoint", full)
    one.save(1, lambda: checkpoint(step=1))
    one.writer.join()
    clock.now += 60
    assert one.is_due(2)
    clock.now += 30 * 60
    with pytest.raises(UserError, match="for 30 minutes"):
        one.is_due(3)


def test_a_bug_in_the_writer_is_raised(tmp_path, monkeypatch):
    def bug(*args):
        raise TypeError("a bug")

    monkeypatch.setattr(saving, "write_checkpoint", bug)
    one = saver(tmp_path)
    one.save(1, checkpoint)
    with pytest.raises(TypeError, match="a bug"):
        one.finish(int)


def test_other_files_are_on_disk_before_the_checkpoint_that_speaks_of_them(
    tmp_path, clock, monkeypatch
):
    best, lines = tmp_path / "best", []
    with saver(tmp_path, lines) as one:
        one.add(best, b"first")
        one.save(1, lambda: checkpoint(step=1))
        one.finish(int)
        assert best.read_bytes() == b"first"
        best.unlink()
        best.mkdir()  # it cannot be written
        one.add(best, b"second")
        one.save(2, lambda: checkpoint(step=2))
        one._join()
        assert "cannot write" in lines[0] and read_checkpoint(tmp_path / "last.pt")["step"] == 1
        best.rmdir()
        one.finish(int)
        assert best.read_bytes() == b"second" and read_checkpoint(one.path)["step"] == 2
        one.add(best, b"third")
    assert best.read_bytes() == b"third"


def test_generations_and_a_damaged_newest_one(tmp_path):
    for step in range(5):
        write_checkpoint(tmp_path / "last.pt", checkpoint(step=step), keep=3)
    names = ["last-1.pt", "last-2.pt", "last.pt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert [read_checkpoint(tmp_path / name)["step"] for name in names] == [3, 2, 4]
    last = tmp_path / "last.pt"
    last.write_bytes(last.read_bytes()[:-100])
    found = newest_checkpoint(tmp_path)
    assert found is not None
    saved, used, notes = found
    assert saved["step"] == 3 and used.name == "last-1.pt"
    assert f"{last} is damaged" in notes[0] and "the one before is used" in notes[0]
    set_damaged_aside(tmp_path, used)
    write_checkpoint(last, checkpoint(step=9), keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged-last.pt", *names]
    assert [read_checkpoint(tmp_path / name)["step"] for name in names] == [3, 2, 9]
    last.unlink()  # a crash between two names
    assert newest_checkpoint(tmp_path)[1].name == "last-1.pt"
    for name in names[:2]:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"last-2.pt is damaged .*move it away"):
        newest_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path / "none") is None


def test_too_little_room_is_said_at_the_start(tmp_path, monkeypatch):
    validate_room(tmp_path, 1)
    monkeypatch.setattr(resource, "getrlimit", lambda what: (10**6, 10**6))
    with pytest.raises(
        UserError, match=r"may have 1.0 MB here \(ulimit -f\).* ulimit -f unlimited"
    ):
        validate_room(tmp_path, 2 * 10**6)
    monkeypatch.setattr(resource, "getrlimit", lambda what: (resource.RLIM_INFINITY,) * 2)
    with pytest.raises(UserError, match=r"are free, two checkpoints .* 2000.0 TB; make room"):
        validate_room(tmp_path, 10**15)


def test_changed_conditions_are_named():
    before = {"threads": "2", "kernels": "on"}
    assert changed_conditions(before, before) is None
    line = changed_conditions(before, {"threads": "1", "kernels": "off"})
    assert line is not None
    assert line.startswith("conditions changed: threads 2 -> 1; kernels on -> off; from here on")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, number):
    import os

    write_checkpoint(tmp_path / "last.pt", checkpoint(step=1), keep=2)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"cannot write .*last.pt \("):
        write_checkpoint(tmp_path / "last.pt", checkpoint(step=2), keep=2)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

"""Threads: how many are free, what others keep busy, what is said of it. No test reads a clock."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ghosttrain import threads
from ghosttrain.engine import conditions
from ghosttrain.engine.conditions import settle_threads
from ghosttrain.threads import Load, Neighbours, others, threads_for

STAT = """cpu  900 9 90 9000 900 9 9 9 0 0
cpu0 100 1 10 1000 50 2 3 4 7 7
cpu1 200 2 20 2000 60 3 4 5 8 8
cpu12 400 4 40 4000 70 4 5 6 9 9
intr 12345
"""


def test_busy_ticks_are_those_of_the_cores_that_may_be_used() -> None:
    assert threads._busy(STAT, {0}) == 100 + 1 + 10 + 2 + 3 + 4
    assert threads._busy(STAT, {0, 12}) == 120 + 400 + 4 + 40 + 4 + 5 + 6


def test_what_others_keep_busy_is_without_ones_own() -> None:
    before = Load(at=10.0, busy=100.0, own=5.0)
    assert others(before, Load(at=12.0, busy=103.0, own=6.0)) == 1.0
    assert others(before, Load(at=12.0, busy=101.0, own=7.0)) == 0.0  # counters lag each other
    assert others(None, before) == others(before, before) == 0.0


@pytest.mark.parametrize(
    ("free", "most", "expected"), [(2, 2, 2), (1.4, 2, 1), (1.6, 2, 2), (0.1, 8, 1), (7.9, 4, 4)]
)
def test_as_many_threads_as_free_cores(free: float, most: int, expected: int) -> None:
    assert threads_for(free, most) == expected


def test_own_time_counts_processes_that_were_started() -> None:
    if threads.load() is None:
        pytest.skip("no /proc here")
    code = "import time\nend = time.process_time() + 1\nwhile time.process_time() < end: pass"
    before = threads.load()
    child = subprocess.Popen([sys.executable, "-c", code + "\nprint('done', flush=True)\ninput()"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert child.stdout is not None and child.stdout.readline() == b"done\n"
    while_running = threads.load()
    child.communicate(b"\n")
    afterwards = threads.load()
    assert before is not None and while_running is not None and afterwards is not None
    assert while_running.own - before.own >= 0.9
    assert afterwards.own - before.own >= 0.9


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine of four cores, and nobody has said how many threads."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(threads, "cores", lambda: 4.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(conditions, "default_threads", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    return monkeypatch


def test_a_run_takes_the_free_cores_and_a_resumed_one_what_it_had(
    free: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    free.setattr(threads, "free_cores", lambda: 4.0)
    assert settle_threads(cpu, None) == (4, [])
    free.setattr(threads, "free_cores", lambda: 2.7)
    count, notes = settle_threads(cpu, None)
    assert count == 3 and "OMP_NUM_THREADS=4 before the command takes all" in notes[0]
    assert settle_threads(cpu, {"threads": "2"}) == (2, [])
    assert settle_threads(cpu, {"threads": "of a GPU"})[0] == 3
    assert settle_threads(torch.device("cuda"), None) == (1, [])
    free.setenv("OMP_NUM_THREADS", "4")
    assert settle_threads(cpu, {"threads": "2"}) == (4, [])


def test_a_neighbour_that_comes_later_is_said_once(free: pytest.MonkeyPatch) -> None:
    loads = iter([Load(0, 0, 0), Load(10, 40, 36), Load(20, 80, 61), Load(30, 120, 86)])
    free.setattr(threads, "load", lambda: next(loads))
    neighbours = Neighbours(4)
    assert neighbours.note() == []  # 0.4 cores
    (line,) = neighbours.note()  # 1.5 cores
    assert "keep 1.5 cores busy" in line and "type OMP_NUM_THREADS=3 before" in line
    assert neighbours.note() == []


def test_waiting_threads_sleep_unless_the_user_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    threads.wait_asleep()
    assert os.environ["GOMP_SPINCOUNT"] == threads.SPIN
    for name, value in (("GOMP_SPINCOUNT", "7"), ("OMP_WAIT_POLICY", "active")):
        monkeypatch.delenv("GOMP_SPINCOUNT")
        monkeypatch.setenv(name, value)
        threads.wait_asleep()
        assert os.environ.get("GOMP_SPINCOUNT") == ("7" if name == "GOMP_SPINCOUNT" else None)
        monkeypatch.setenv("GOMP_SPINCOUNT", "1")


def test_the_limit_of_a_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpu.max"
    monkeypatch.setattr(threads, "Path", lambda _: file)
    assert threads._group_limit() == float("inf")
    for text, expected in (("max 100000", float("inf")), ("150000 100000", 1.5), ("5 100", 1.0)):
        file.write_text(text)
        assert threads._group_limit() == expected


def test_the_look_at_the_load_takes_half_a_second_at_least(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(threads, "STARTED", Load(time.monotonic(), 0, 0))
    threads.free_cores()
    monkeypatch.setattr(threads, "STARTED", Load(time.monotonic() - 60, 0, 0))
    threads.free_cores()
    assert len(slept) == 1 and 0 < slept[0] <= threads.LEAST

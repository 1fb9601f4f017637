"""A run that stands still says who is to blame, keeps the stacks, and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ghosttrain.data import loader
from ghosttrain.engine import distributed, watchdog
from ghosttrain.engine.watchdog import UNLIMITED, WAITS, culprit, place_of
from ghosttrain.files import PACKAGE

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["train.stall_minutes=0.1", "train.epochs=2000", "tracker.log_every=1", "run.name=it",
         "train.eval_every=2000", "train.save_every=1000epochs"]  # fmt: skip


def run_until_a_step(*words: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "ghosttrain", *words], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            return process
    raise AssertionError(process.communicate()[1])


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def environment(pid: int) -> str:
    return Path(f"/proc/{pid}/environ").read_text()


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def stopped(process: subprocess.Popen[str], *pids: int) -> str:
    """Stop processes of a run; return what the run said at its end."""
    below = {*pids, *children(process.pid)}
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        _, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    assert process.returncode == 75, err
    until = time.monotonic() + 30
    while not all(map(is_gone, below)) and time.monotonic() < until:
        time.sleep(0.1)
    assert all(map(is_gone, below)), "an orphan"
    return err


def test_a_worker_that_is_stopped(tiny, tmp_path):
    process = run_until_a_step(*tiny, *WORDS, "data.workers=1")
    workers = children(process.pid)  # of the training and of the evaluation
    err = stopped(process, *workers)
    blame = next(
        blame
        for worker in workers
        if (blame := f"this process waits for images (data worker {worker} is stopped)") in err
    )
    note, error = err.strip().splitlines()[-2:]
    assert note.startswith("ghosttrain: note: no step for 3 s: ") and blame in note
    assert note.endswith("stacks are in stacks-rank0.txt of the run folder; after 0.1 minutes the "
                         "run ends (train.stall_minutes)")  # fmt: skip
    assert error == (
        f"ghosttrain: error: no step for 0.1 minutes (train.stall_minutes): {blame}; the same "
        "command goes on from the last checkpoint"
    )
    assert "loader.py" in (tmp_path / "runs" / "it" / "stacks-rank0.txt").read_text()


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_that_is_stopped(tiny, rank):
    words = ["launch.nproc=2", "launch.device=cpu", "train.global_batch=8"]
    process = run_until_a_step(*tiny, *WORDS, *words)
    (pid,) = (p for p in children(process.pid) if f"\0RANK={rank}\0" in f"\0{environment(p)}\0")
    err = stopped(process, pid)
    assert f"(train.stall_minutes): rank {rank} does not answer (it is stopped, or its" in err


def test_who_is_to_blame():
    waits = {0: WAITS, 1: WAITS, 2: "evaluates"}
    assert culprit(3, WAITS, waits) == "rank 2 evaluates"
    assert culprit(3, "waits for images", waits) == "rank 2 evaluates"
    assert culprit(3, WAITS, {**waits, 1: ""}).startswith("rank 1 does not answer")
    assert culprit(1, WAITS, {0: WAITS}) == "all ranks wait for each other"
    assert culprit(0, "evaluates", {}) == "this process evaluates"


def frames(*places: str) -> list[tuple[str, str]]:
    """Frames of `file:function`, the innermost first; a file of the package where it begins so."""
    named = (place.split(":") for place in places)
    return [(str(PACKAGE / file) if file[0] != "/" else file, name) for file, name in named]


def test_where_a_thread_stands_is_read_from_its_stack(monkeypatch):
    train = "engine/train.py:train"
    cases = {
        "computes a step": ["/torch/nn/functional.py:conv2d", "models/layers.py:forward", train],
        "waits for images": ["/torch/queue.py:get", "data/loader.py:batches", train],
        "evaluates": ["/torch/nn/x.py:forward", "engine/evaluate.py:evaluate", train],
        "waits for the checkpoint that is being written": [
            "/threading.py:join", "engine/saving.py:_join", "engine/saving.py:save", train
        ],
        "writes to Weights & Biases": [
            "/site/wandb/sdk/run.py:log", "engine/track.py:_attempt", "engine/track.py:log", train
        ],
        "writes to the run folder or the terminal": ["engine/track.py:flush", train],
        UNLIMITED: ["/torch/_inductor/compile_fx.py:run", "engine/evaluate.py:evaluate", train],
    }  # fmt: skip
    for place, stack in cases.items():
        assert place_of(frames(*stack)) == place
    assert place_of(frames("engine/saving.py:finish", train)) == UNLIMITED
    compiled = frames("models/layers.py:forward", "/torch/_dynamo/eval_frame.py:wrapper", train)
    assert place_of(compiled) == "computes a step"  # what was compiled runs below it
    backward = frames("/torch/autograd/__init__.py:backward", "engine/guard.py:backward", train)
    assert place_of(backward) == "computes a step"
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert place_of(backward) == WAITS
    assert place_of(frames("engine/track.py:read", train)) == WAITS
    assert place_of(frames("engine/stop.py:_told", train)) == WAITS


def test_a_store_that_hangs_lies_with_rank_0(monkeypatch):
    """It is a thread of rank 0 under srun; who asks it is not waited for."""

    class Hanging:
        def set(self, *_: str) -> None:
            threading.Event().wait()

    monkeypatch.setattr(distributed, "rank", lambda: 1)
    others = watchdog._Others.__new__(watchdog._Others)
    others.store, others.count, others.heard, others.asking = Hanging(), 0, {}, None
    for _ in range(2):
        said = others.look("waits for images", 0.05)
        assert said == {0: ""}
    assert culprit(1, "waits for images", said).startswith("rank 0 does not answer")


def test_a_process_that_was_stopped_as_a_whole_is_none_that_stands_still(tmp_path, capfd):
    """Its clock has jumped by an hour; looks are counted."""
    dog = watchdog.Watchdog(tmp_path, 10)
    waits = iter([*[False] * 5, True])
    dog.ended.wait = lambda _: next(waits)  # type: ignore[method-assign]
    dog.beats = 3
    dog._watch()
    assert not list(tmp_path.iterdir()) and capfd.readouterr().err == ""


def test_a_loader_waits_no_longer_than_its_patience(monkeypatch):
    error = RuntimeError("DataLoader timed out after 300 seconds")
    line = loader._what_failed(error)
    assert line is not None and "no batch for a long time" in line and "data.workers=0" in line

"""A run that is asked to end saves, ends, and goes on as if nobody had asked: to the bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_resume_within_an_epoch import assert_equal

from ghosttrain.data.loader import Loader
from ghosttrain.engine import train as train_module
from ghosttrain.engine.checkpoint import read_checkpoint
from ghosttrain.engine.evaluate import HeldOutImages
from ghosttrain.engine.saving import Saver
from ghosttrain.engine.stop import Stop
from ghosttrain.errors import Stopped
from ghosttrain.optim.ema import Ema

ROOT = Path(__file__).resolve().parents[2]
# Rows every second step, checkpoints at the end alone: what a signal saves lies between.
WORDS = ["train.save_every=9epochs", "tracker.log_every=2", "train.epochs=2", "data.workers=1"]


def send_at(patch: pytest.MonkeyPatch, step: int, *numbers: int) -> None:
    """Let signals arrive within the step of this number, counted from 1."""
    done, update = [], Ema.update

    def updating(self: Ema, model: torch.nn.Module) -> None:
        update(self, model)
        done.append(1)
        if len(done) == step:
            for number in numbers:
                signal.raise_signal(number)

    patch.setattr(Ema, "update", updating)


def test_a_run_that_is_asked_to_end_saves_and_goes_on(ghosttrain, tiny, tmp_path):
    """6 steps, 3 an epoch: in the first batch, within a row, at the end of an epoch, within one, in
    the evaluation, in the last save, while the network is fused."""
    words = [*tiny, *WORDS, "run.name=it"]
    assert ghosttrain(*words, f"run.root={tmp_path}/whole").code == 0
    ours = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = [signal.getsignal(each) for each in ours]
    cases = (
        (signal.SIGUSR1, (Loader, "_delivered"), 1),
        (signal.SIGTERM, 1, 1),
        (signal.SIGUSR1, 3, 3),
        (signal.SIGINT, 5, 5),
        (signal.SIGTERM, (HeldOutImages, "__iter__"), 3),
        (signal.SIGINT, (Saver, "save"), 6),
        (signal.SIGTERM, (train_module, "fuse"), 6),
    )
    for case, (number, moment, saved) in enumerate(cases):
        root = tmp_path / f"stopped{case}"
        with pytest.MonkeyPatch.context() as patch:
            if isinstance(moment, int):
                send_at(patch, moment, number)
            else:
                patch.setattr(*moment, asked_before(getattr(*moment), number))
            stopped = ghosttrain(*words, f"run.root={root}")
        assert stopped.code == (130 if number == signal.SIGINT else 75)
        why = "interrupted" if number == signal.SIGINT else number.name
        line = f"ghosttrain: {why}; the same command goes on from its last checkpoint"
        assert stopped.err.strip() == line
        assert [signal.getsignal(each) for each in ours] == before
        run = root / "it"
        assert read_checkpoint(run / "checkpoints" / "last.pt")["step"] == saved, moment
        resumed = ghosttrain(*words, f"run.root={root}")
        assert resumed.code == 0, resumed.err
        assert "are lost" not in resumed.out  # the checkpoint holds what was not a row yet
        assert_equal(run, tmp_path / "whole" / "it")


def asked_before(call, number):
    """Let a signal arrive where `call` is first called."""
    calls = []

    def asked(*args):
        if not calls:
            calls.append(1)
            signal.raise_signal(number)
        return call(*args)

    return asked


def test_a_second_signal_ends_at_once(ghosttrain, tiny, tmp_path, monkeypatch):
    send_at(monkeypatch, 1, signal.SIGINT, signal.SIGINT)
    assert ghosttrain(*tiny, *WORDS).code == 130
    assert not list((tmp_path / "runs").rglob("last*.pt"))


def test_a_handler_of_somebody_else_stays(monkeypatch):
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        stop = Stop(torch.device("cpu"), 10)
        with stop.saving(lambda: None):
            signal.raise_signal(signal.SIGUSR1)
            stop.poll(1)
            assert heard == [signal.SIGUSR1]
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(Stopped):
                stop.poll(1)
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("torchrun", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_ranks_save_after_the_same_step(ghosttrain, tiny, tmp_path, torchrun):
    """One rank alone hears the signal (torchrun), or who started both does (launch.nproc)."""
    words = [*tiny, *WORDS, "train.global_batch=8", "launch.device=cpu", "train.epochs=4",
             "run.name=it"]  # fmt: skip
    nproc = [] if torchrun else ["launch.nproc=2"]
    start = [sys.executable, "-m", "ghosttrain"]
    if torchrun:
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m",
                 "ghosttrain"]  # fmt: skip

    def go(*more: str) -> subprocess.Popen[str]:
        return subprocess.Popen([*start, *words, *nproc, *more], cwd=ROOT, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    whole = go(f"run.root={tmp_path}/whole")
    _, err = whole.communicate(timeout=600)
    assert whole.returncode == 0, err
    process = go(f"run.root={tmp_path}/stopped")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            os.kill(a_rank(process.pid) if torchrun else process.pid, signal.SIGTERM)
            break
    _, err = process.communicate(timeout=600)
    if torchrun:
        assert process.returncode != 0
    else:
        assert process.returncode == 75, err
        line = "ghosttrain: SIGTERM; the same command goes on from its last checkpoint"
        assert err.strip() == line
    run = tmp_path / "stopped" / "it"
    saved = read_checkpoint(run / "checkpoints" / "last.pt")
    assert 0 < saved["step"] < saved["total_steps"]
    assert len(saved["meter"]) == len(saved["buffers"]) == 2
    resumed = go(f"run.root={tmp_path}/stopped")
    _, err = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, err
    assert_equal(run, tmp_path / "whole" / "it")


def a_rank(agent: int) -> int:
    """Return a process that torchrun started and that is not rank 0."""
    for _ in range(600):
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                values = path.read_bytes().split(b"\0")
            except OSError:
                continue
            parent = (path.parent / "stat").read_text().rpartition(")")[2].split()[1]
            if b"RANK=1" in values and int(parent) == agent:
                return int(path.parent.name)
        time.sleep(0.1)
    raise AssertionError("no rank was found")

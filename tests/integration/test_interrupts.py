"""Ctrl-C, as a terminal sends it: to every process of the command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_ctrl_c_ends_a_sweep_of_two_processes_and_starts_no_other_cell(tiny):
    args = ["-m", *tiny, "seed=1,2", "launch.nproc=2", "launch.device=cpu", "train.epochs=500"]
    command = [sys.executable, "-m", "ghosttrain", *args]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("length: "):
                os.killpg(process.pid, signal.SIGINT)
                break
        out, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    assert err.strip() == (
        "ghosttrain: interrupted; the same command goes on from its last checkpoint"
    )
    assert "=== 2/2" not in out
    assert not still_there(process.pid)


def still_there(group: int) -> bool:
    """Whether a process of the group is left, given the time a killed one takes to go."""
    for _ in range(3000):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True

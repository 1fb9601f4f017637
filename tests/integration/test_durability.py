"""Short forms of scripts/chaos, scripts/crashpoints, scripts/powercut; and disks that fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import load_script

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def durability():
    return load_script("durability")


def proof(*words: object) -> str:
    """Run a proof in a process of its own: its forks have one thread."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "durability.py", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_run_stopped_before_a_file_operation_ends_the_same():
    """Every 61st of them; scripts/crashpoints stops before each."""
    assert "0 faults" in proof("crashpoints", 61)


def test_a_run_whose_file_operation_fails_ends_the_same():
    """ENOSPC, EIO and EFBIG in turn, at every 61st operation; scripts/crashpoints fails each."""
    assert "0 faults" in proof("failures", 61)


def test_a_disk_whose_power_is_cut_keeps_what_was_saved(durability):
    if reason := durability.no_powercut():
        pytest.skip(reason)
    assert "0 faults" in proof("powercut", 61)


@pytest.mark.slow
def test_a_run_killed_at_random_ends_the_same():
    """Killed at one known place, on one rank and on two: test_resume_within_an_epoch."""
    out = proof("chaos", 2)
    assert "1 rank(s), 1 kills" in out and "2 rank(s), 1 kills" in out


def test_what_differs_is_found(durability, ghosttrain, tiny, tmp_path):
    """The comparison itself: two runs of other seeds are not the same."""
    runs = []
    for seed in (0, 1):
        words = [*tiny, "train.max_steps=1", "run.name=run", f"seed={seed}"]
        assert ghosttrain(*words, f"run.root={tmp_path / str(seed)}").code == 0
        runs.append(tmp_path / str(seed) / "run")
    assert durability.differences(runs[0], runs[0]) == []
    found = durability.differences(*runs)
    assert {"model.safetensors", "metrics.jsonl", "result.json"} <= {*found}
    assert any(line.startswith("last.pt student.") for line in found)
    (runs[0] / "card.md").write_text("other")
    assert durability.differences(runs[0], runs[0]) == ["card.md"]
    (runs[0] / "checkpoints" / "last.pt").write_bytes(b"")
    (line,) = durability.differences(runs[0], runs[1])
    assert "last.pt is damaged" in line

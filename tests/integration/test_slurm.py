"""Runs and sweeps under a Slurm that executes what it is given (`fake_slurm.py`): preempted,
requeued, and equal to the bit to a run without it.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import fake_slurm
import pytest
from helpers import load_script, only_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Slurm on the PATH; a job's training waits at its second checkpoint to be preempted."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "slurm"
    for name, value in fake_slurm.install(folder).items():
        monkeypatch.setenv(name, value)
    fake_slurm.pause_at_second_save(folder)
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{ROOT}")
    return folder


@pytest.fixture
def words(tiny):
    return [*tiny, "train.save_every=2steps", "launch.device=cpu"]


def assert_same_run(root: Path, plain: Path) -> None:
    assert load_script("durability").differences(only_run(root), only_run(plain)) == []


def command(*words: str) -> str:
    return " ".join(f"'{word}'" for word in [sys.executable, "-m", "ghosttrain", *words])


def batch(folder: Path, script: str) -> str:
    """Submit a script; return what its job wrote when it has ended."""
    (folder / "job.sh").write_text(script)
    done = subprocess.run(["sbatch", folder / "job.sh"], capture_output=True, text=True, check=True)
    assert done.stdout == "Submitted batch job 1\n"
    state = folder / "state-1"
    while not state.exists() or state.read_text() not in ("COMPLETED", "FAILED"):
        time.sleep(0.1)
    return (folder / "1.out").read_text()


def test_a_preempted_cell_goes_on_and_ends_the_same(
    ghosttrain, slurm, words, tmp_path, monkeypatch
):
    """submitit's own way: USR2, `scontrol requeue`, the same job again."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    monkeypatch.setenv("FAKE_SLURM_SIGNAL", "USR2")
    own = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu"]
    root = tmp_path / "jobs"
    outcome = ghosttrain("-m", *words, "seed=1", *own, f"run.root={root}")
    assert outcome.code == 0 and "=== 1 of 1 runs finished" in outcome.out, outcome.err
    assert (slurm / "watch.log").read_text() == "job 1 requeued\n"
    assert "\nresumed after epoch" in (only_run(root) / "log.txt").read_text()
    assert "#SBATCH --partition=gpu\n" in (slurm / "job-1").read_text()
    assert ghosttrain(*words, "seed=1", f"run.root={tmp_path / 'plain'}").code == 0
    assert_same_run(root, tmp_path / "plain")

    refused = ghosttrain(
        "-m", *words, "seed=1", *own, "hydra.launcher.partition=absent", f"run.root={root}"
    )
    assert refused.code == 2
    assert refused.err.splitlines()[-1] == (
        "ghosttrain: error: hydra/launcher=submitit_slurm: sbatch: error: invalid partition "
        "specified: absent"
    )


@pytest.mark.slow
def test_two_nodes_of_srun_preempted_are_two_processes_of_one_machine(
    ghosttrain, slurm, words, tmp_path
):
    """The script of the page, with one task a node."""
    script = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "scale.md").read_text(), re.S)[0]
    parts = re.split(r"python -m ghosttrain .*(?= &$)", script, flags=re.M)
    assert len(parts) == 2
    here = command(*words, f"run.root={tmp_path / 'jobs'}")
    batch(slurm, here.join(parts).replace("--ntasks-per-node=8", "--ntasks-per-node=1"))
    log = (only_run(tmp_path / "jobs") / "log.txt").read_text()
    assert "x 2 processes, on CPU" in log and "\nresumed after epoch" in log
    assert (slurm / "watch.log").read_text() == "job 1 requeued\n"
    plain = [*words, "launch.nproc=2", f"run.root={tmp_path / 'plain'}"]
    assert ghosttrain(*plain).code == 0
    assert_same_run(tmp_path / "jobs", tmp_path / "plain")


@pytest.mark.slow
def test_a_mistake_under_srun_is_one_line_and_ends_all_tasks(slurm, words):
    line = command(*words, "train.global_batch=7")
    out = batch(slurm, f"#!/bin/bash\n#SBATCH --nodes=2\nsrun {line}\n")
    assert (slurm / "state-1").read_text() == "FAILED"
    assert out.count("ghosttrain: error") == 1 and "Traceback" not in out, out


@pytest.mark.slow
def test_a_batch_script_without_srun_is_one_process(slurm, words, tmp_path):
    line = command(*words, "train.max_steps=1", f"run.root={tmp_path / 'jobs'}")
    batch(slurm, f"#!/bin/bash\n#SBATCH --nodes=2\n{line}\n")
    log = (only_run(tmp_path / "jobs") / "log.txt").read_text()
    assert "processes, on CPU" not in log and "\nbatch: 16 = 16 " in log


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["submitit_slurm", "submitit_local"])
def test_the_tasks_of_a_cell_are_its_processes(
    ghosttrain, slurm, words, tmp_path, launcher, monkeypatch
):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    monkeypatch.setenv("WANDB_API_KEY", "a5ecretwordofmine")
    own = [f"hydra/launcher={launcher}", "hydra.launcher.tasks_per_node=2"]
    root = tmp_path / "jobs"
    cells = ["-m", *words, "train.max_steps=1", "seed=1,2", f"run.root={root}"]
    assert "2 of 2 runs finished" in ghosttrain(*cells, *own).out
    logs = [path.read_text() for path in root.rglob("log.txt")]
    assert len(logs) == 2 and all("x 2 processes, on CPU" in log for log in logs)
    written = [path for path in root.rglob("*") if path.is_file()]
    assert not any(b"a5ecretwordofmine" in path.read_bytes() for path in written)
    jobs = [path for path in written if path.name.endswith("submitted.pkl")]
    for path in jobs:  # Hydra's launcher hands over words, and this package's function by its name
        given = pickle.loads(path.read_bytes())
        words_of_cell = json.loads(given.function.config.context)["words"]
        assert [word for word in words_of_cell if word] == [w for w in cells[1:] if w != "seed=1,2"]
        assert all(isinstance(word, str) for word in given.args[0])
        assert path.parents[1].stat().st_mode & 0o777 == 0o700
    assert len(jobs) == 2
    assert "2 of 2 runs finished" in ghosttrain(*cells).out  # they are shown, not repeated

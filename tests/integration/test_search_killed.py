"""A search that is killed with its second trial: the same command takes that trial up again."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_killed_search_goes_on(ghosttrain, tmp_path):
    optuna = pytest.importorskip("optuna")
    words = ["-m", "+recipe=tune_lr", "hydra.sweeper.n_trials=2", "train.max_steps=2",
             "train.global_batch=16", "data.train_size=32", "data.eval_size=32",
             "data.workers=0", "launch.device=cpu",
             f"run.root={tmp_path}"]  # fmt: skip
    command = [sys.executable, "-m", "ghosttrain", *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("=== 2/2"):
                process.send_signal(signal.SIGKILL)
    storage = f"sqlite:///{tmp_path}/.sweeps/optuna.db"
    (summary,) = optuna.get_all_study_summaries(storage)
    study = optuna.load_study(summary.study_name, storage)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "RUNNING"]
    assert len([*tmp_path.rglob("result.json")]) == 1

    again = ghosttrain(*words)
    assert again.code == 0, again.err
    assert "1 of 2 trials complete, 1 to run" in again.out
    killed, second = study.trials[1:]
    assert (killed.state.name, second.state.name) == ("FAIL", "COMPLETE")
    assert killed.params == second.params and len([*tmp_path.rglob("result.json")]) == 2

    shown = ghosttrain(*words)
    assert shown.code == 0 and "2 of 2 trials complete, 0 to run" in shown.out
    assert "===" not in shown.out and len(study.trials) == 3

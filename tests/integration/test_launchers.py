"""Sweeps through Hydra's launchers: what is missing runs, and the report holds."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import refusal

from ghosttrain.study.submitted import jobs_of
from ghosttrain.study.sweep import sweeps_folder

SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY")
MARK = "a5ecretwordofmine"


@pytest.mark.parametrize("launcher", ["basic", pytest.param("joblib", marks=pytest.mark.slow)])
def test_a_launcher_runs_what_is_missing_and_reports(
    ghosttrain, tiny, tmp_path, launcher, monkeypatch
):
    for name in SECRETS:
        monkeypatch.setenv(name, MARK)
    hydra_words = ["hydra/launcher=basic"]
    if launcher == "joblib":
        if importlib.util.find_spec("hydra_plugins.hydra_joblib_launcher") is None:
            pytest.skip("no hydra-joblib-launcher here")
        hydra_words = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    root = tmp_path / "it's $été"
    words = [*tiny, "train.max_steps=1", f"run.root={root}"]
    assert ghosttrain(*words, "seed=2").code == 0
    (first,) = root.rglob("model.safetensors")
    written = first.stat().st_mtime_ns

    # Three micro-batches of 16 do not make 40: a mistake of one cell, known before any starts.
    refused = ghosttrain("-m", *words, *hydra_words, "seed=1,2", "train.micro_batch=16,40")
    assert refused.code == 2 and "seed=1 train.micro_batch=40: " in refused.err
    assert not (root / ".sweeps").exists()

    outcome = ghosttrain("-m", *words, *hydra_words, "seed=1,2,3", "train.epochs=2")
    assert outcome.code == 0, outcome.err
    assert "=== 3 of 3 runs finished" in outcome.out and "3 (1, 2, 3)" in outcome.out
    assert len([*root.rglob("model.safetensors")]) == 3 and first.stat().st_mtime_ns == written
    (folder,) = (root / ".sweeps").iterdir()
    cells = [json.loads((folder / f"{number}.json").read_text()) for number in range(3)]
    assert [cell["exit_code"] for cell in cells] == [0, 0, 0]
    assert [f"seed={seed}" in cells[seed - 1]["words"] for seed in (1, 2, 3)] == [True] * 3
    assert {Path(cell["run"]).parent.parent for cell in cells} == {root}
    assert {path.parent for path in root.rglob("config.yaml")} == {Path(c["run"]) for c in cells}
    assert (root / ".sweeps").stat().st_mode & 0o777 == 0o700
    written = [path for path in root.rglob("*") if path.is_file()]
    assert len(written) > 20 and not any(MARK.encode() in path.read_bytes() for path in written)


def test_only_this_user_enters_the_folder_of_sweeps_and_that_of_jobs(tmp_path):
    (tmp_path / ".sweeps").mkdir(mode=0o755)
    assert sweeps_folder(tmp_path).stat().st_mode & 0o777 == 0o700
    (tmp_path / ".sweeps").rmdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".sweeps").symlink_to(tmp_path / "elsewhere")
    refusal(lambda: sweeps_folder(tmp_path), ".sweeps is a link or belongs to another user")
    if os.geteuid() == 0:  # only root gives files to others
        (tmp_path / ".sweeps").unlink()
        sweeps_folder(tmp_path)
        os.chown(tmp_path / ".sweeps", 65_533, -1)
        refusal(lambda: sweeps_folder(tmp_path), "belongs to another user: type another run.root")
    utils = pytest.importorskip("submitit.core.utils")
    jobs = tmp_path / "mine"  # hydra.sweep.dir
    jobs.mkdir(mode=0o755)
    with jobs_of(["hydra/launcher=submitit_local"]):
        utils.DelayedSubmission(len, [1]).dump(jobs / "job.pkl")
    assert jobs.stat().st_mode & 0o777 == 0o700
    assert utils.DelayedSubmission.load(jobs / "job.pkl").result() == 1


@pytest.mark.slow
def test_cells_at_once_share_made_up_devices(tiny, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = [*tiny, "train.max_steps=1", "launch.device=cpu", "launch.devices=8,9,10",
             "launch.nproc=2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=1,2",
             "optim.lr=0.01,1e38"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "ghosttrain", "-m", *words, "tracker.log_every=1"],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    for number, seed in ((1, 1), (3, 2)):
        label = f"[{number}/4] seed={seed} optim.lr=0.01:"
        assert f"{label} epoch 1/1, 100.0 %, ETA 0:00" in lines, done.stdout
        assert any(line.startswith(f"{label} finished, EMA top-1 ") for line in lines)
    waits = [line for line in lines if "waiting for 2 of the devices 8, 9, 10" in line]
    assert waits and all(line.startswith("[") for line in waits)  # three devices, two a cell
    assert not any(line.startswith("student: ") for line in lines)  # that is in log.txt
    assert {path.parent for path in tmp_path.rglob("log.txt")}
    assert done.returncode == 1 and "=== 2 of 4 runs finished" in done.stdout
    assert done.stderr.count("ghosttrain: failed: ") == 2


def test_the_folder_of_a_sweep_may_be_chosen(ghosttrain, tiny, tmp_path):
    words = [*tiny, "train.max_steps=1", f"hydra.sweep.dir={tmp_path / 'mine'}"]
    assert ghosttrain("-m", *words, "seed=1").code == 0
    assert (tmp_path / "mine" / "multirun.yaml").is_file()
    (run,) = tmp_path.rglob("result.json")
    assert run.parents[1].name == "compact_kd"

"""Sweeps through Hydra's launchers: what is missing runs, and the report holds."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_launcher_runs_what_is_missing_and_reports(ghosttrain, tiny, tmp_path, launcher):
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


def test_the_folder_of_a_sweep_may_be_chosen(ghosttrain, tiny, tmp_path):
    words = [*tiny, "train.max_steps=1", f"hydra.sweep.dir={tmp_path / 'mine'}"]
    assert ghosttrain("-m", *words, "seed=1").code == 0
    assert (tmp_path / "mine" / "multirun.yaml").is_file()
    (run,) = tmp_path.rglob("result.json")
    assert run.parents[1].name == "compact_kd"

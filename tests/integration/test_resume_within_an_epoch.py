"""A run that is killed within an epoch ends as the run that was not, to the bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import only_run
from safetensors.torch import load_file

from ghosttrain.engine.checkpoint import read_checkpoint
from ghosttrain.engine.rows import read_metrics
from ghosttrain.optim.ema import Ema

SAVING = ["train.save_every=2steps", "tracker.log_every=1", "train.epochs=2"]


def assert_equal(run: Path, whole: Path) -> None:
    """Compare weights, state, rows and result of two run folders."""
    for name in ("model.safetensors", "checkpoints/best.safetensors"):
        a, b = load_file(run / name), load_file(whole / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    states = [read_checkpoint(each / "checkpoints" / "last.pt") for each in (run, whole)]
    for part in ("student", "projection"):
        for key, value in states[0][part].items():
            assert torch.equal(value, states[1][part][key]), (part, key)
    rows = [
        [{k: v for k, v in row.items() if k != "images_per_second"} for row in read_metrics(each)]
        for each in (run, whole)
    ]
    assert rows[0] == rows[1]
    results = [json.loads((each / "result.json").read_text()) for each in (run, whole)]
    for result in results:
        del result["seconds"], result["images_per_second"], result["sha256"]
        del result["files"]["card.md"], result["files"]["curves.png"]  # they hold times
    assert results[0] == results[1]


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_run_stopped_at_any_step_ends_the_same(ghosttrain, tiny, tmp_path, monkeypatch, stop):
    """6 steps, 3 an epoch; dropout, accumulation, workers and a features term are on."""
    words = [
        *tiny, *SAVING, "train.micro_batch=8", "model.dropout=0.2", "data.workers=1",
        "augment.erasing_prob=0.5",
    ]  # fmt: skip
    whole = tmp_path / "whole"
    assert ghosttrain(*words, f"run.root={whole}").code == 0
    steps, update = [], Ema.update

    def stopping(self: Ema, model: torch.nn.Module) -> None:
        if len(steps) == stop:
            raise KeyboardInterrupt
        steps.append(1)
        update(self, model)

    with monkeypatch.context() as patch:
        patch.setattr(Ema, "update", stopping)
        assert ghosttrain(*words).code == 130
    checkpoint = only_run(tmp_path / "runs") / "checkpoints" / "last.pt"
    saved = read_checkpoint(checkpoint)["step"] if checkpoint.is_file() else 0
    assert saved == {1: 0, 3: 2, 5: 4}[stop]
    resumed = ghosttrain(*words)
    assert resumed.code == 0, resumed.err
    place = {0: "", 2: "resumed in epoch 1, step 2", 4: "resumed in epoch 2, step 4"}
    assert place[saved] in resumed.out and "conditions changed" not in resumed.out
    assert_equal(only_run(tmp_path / "runs"), only_run(whole))


def test_two_ranks_killed_within_an_epoch_end_the_same(tiny, tmp_path):
    """Running statistics differ between ranks within an epoch."""
    kill_and_compare([*tiny, *SAVING, "train.global_batch=8"], tmp_path)


@pytest.mark.slow
def test_two_ranks_with_stored_outputs_and_features_killed_end_the_same(
    ghosttrain, photos, tmp_path
):
    """EfficientNet-Lite0 teaches; its pooled features are stored and compared too."""
    words = [*photos, f"cache.dir={tmp_path / 'cache'}", "train.global_batch=8"]
    store = ["cache.draws=2", "cache.shard_size=16", "cache.codec=features:8"]
    assert ghosttrain("cache", *words, *store).code == 0
    features = "distill.features_weight=0.5"
    kill_and_compare([*words, features, "train.save_every=2steps", "model.dropout=0.2"], tmp_path)


def kill_and_compare(words: list[str], tmp_path: Path) -> None:
    """Kill a run of two ranks within its first epoch, go on, compare with one that was not."""
    words = [*words, "launch.nproc=2", "launch.device=cpu"]
    command = [sys.executable, "-m", "ghosttrain", *words]
    root = Path(__file__).resolve().parents[2]
    whole = tmp_path / "whole"
    done = subprocess.run([*command, f"run.root={whole}"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    process = subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    path, step = tmp_path / "runs", 0
    while process.poll() is None and step < 2:
        time.sleep(0.01)
        step = max((read_checkpoint(p)["step"] for p in path.rglob("last.pt")), default=0)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    saved = read_checkpoint(only_run(path) / "checkpoints" / "last.pt")
    if saved["step"] < 6:  # within the first epoch, unless this machine was very slow to look
        assert len(saved["buffers"]) == 2
        assert not all(torch.equal(a, b) for a, b in zip(*saved["buffers"], strict=True))
    again = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"step {saved['step']}" in again.stdout
    assert_equal(only_run(path), only_run(whole))


@pytest.mark.parametrize("setting", ["0steps", "10", "10 min", "1.5epochs", "-3min"])
def test_other_settings_are_refused(ghosttrain, tiny, setting):
    outcome = ghosttrain(*tiny, f"train.save_every={setting}")
    assert outcome.code == 2 and outcome.err.startswith("ghosttrain: error: train.save_every=")
    assert "`10min`, `500steps`" in outcome.err and "\n" not in outcome.err.strip()

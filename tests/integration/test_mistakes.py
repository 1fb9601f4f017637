"""Mistakes of a user: one clear line, exit code 2, nothing lost."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import make_images, only_run, refusal
from PIL import Image

from ghosttrain.config.names import Names
from ghosttrain.data.order import train_batches
from ghosttrain.engine.checkpoint import read_checkpoint, write_checkpoint
from ghosttrain.locks import locked
from ghosttrain.study.sweep import run_cells

ROOT = Path(__file__).resolve().parents[2]


def refused(outcome, *expected: str) -> None:
    assert outcome.code == 2, outcome
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("ghosttrain: error: "), outcome.err
    for text in expected:
        assert text in lines[0], lines[0]


def spawned(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ghosttrain", *args]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900
    )


def test_before_torch_is_imported():
    done = subprocess.run(
        [
            sys.executable,
            "-X",
            "importtime",
            "-m",
            "ghosttrain",
            "+recipe=compact_kd",
            "optim.lrr=1",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert lines == ["ghosttrain: error: there is no setting 'optim.lrr'. Did you mean 'optim.lr'?"]
    assert "| torch\n" not in done.stderr and "| timm\n" not in done.stderr


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--multirn"], "Did you mean '--multirun'?"),
        (["-m"], "name what to train"),
        (["seed=18446744073709551616"], "is not less than 9223372036854775808"),
        (["augment.seed=18446744073709551616"], "is not less than 9223372036854775808"),
        (["trian"], "Did you mean 'train'?"),
        (["--cfg"], "--cfg needs a value"),
        (["--cfg", "x"], "choose job, hydra or all"),
        (["eval"], "eval needs one run folder"),
        (["eval", "/absent"], "is no run folder"),
        (["fuse", "a", "b"], "fuse needs one run folder"),
        (["fuse", "a", "--info", "x"], "does not belong to fuse"),
        (["report"], "report needs run folders"),
        (["report", "a=b"], "report takes run folders"),
        (["+recipe=compact_kd", "optim.lr=nan"], "optim.lr=nan is not a finite number"),
        (["+recipe=compact_kd", "train.global_batch=100", "launch.nproc=3"], "99 or 102"),
        (["data=folder", "data.root=/absent"], "data.root=/absent: no such folder"),
        (["teacher=ensemble", "distill=kl"], "type teacher.members.a.name="),
        (["teacher=digits", "distill=kl", "distill.alpha=1"], "would do nothing with distill=kl"),
        (["cache.dir=D"], "would never be read, because distill=none"),
        (
            ["-m", "distill=kl", "teacher.members.a.nmae=X"],
            "Did you mean 'teacher.members.a.name'?",
        ),
        (["-m", "seed=1,2", "optim.lrr=1"], "Did you mean 'optim.lr'?"),
    ],
)
def test_on_the_command_line(ghosttrain, args, expected):
    refused(ghosttrain(*args), expected)


def test_wrong_folders_of_images(ghosttrain, tiny, tmp_path):
    make_images(tmp_path / "d", classes=2, train=8, val=1)
    rooted = [a for a in tiny if not a.startswith("data.root")] + [f"data.root={tmp_path / 'd'}"]
    (tmp_path / "d" / "train" / "class9").mkdir()
    refused(ghosttrain(*rooted), "class9")
    (tmp_path / "d" / "train" / "class9").rmdir()
    (tmp_path / "d" / "val").rename(tmp_path / "d" / "test")
    refused(ghosttrain(*rooted), "val")


def test_a_truncated_jpeg_is_named_and_earlier_epochs_are_kept(ghosttrain, tiny, tmp_path):
    make_images(tmp_path / "d", classes=3)
    rooted = [a for a in tiny if not a.startswith("data.root")] + [f"data.root={tmp_path / 'd'}"]
    assert ghosttrain(*rooted, "train.max_steps=1").code == 0
    bad = tmp_path / "d" / "val" / "class1" / "3.JPEG"
    bad.write_bytes(bad.read_bytes()[:400])
    for workers in (0, 1):
        refused(ghosttrain(*rooted, f"data.workers={workers}"), "class1", "3.JPEG")


def test_other_formats_under_the_name_jpeg_decode_like_any_other(ghosttrain, tiny, tmp_path):
    make_images(tmp_path / "d", classes=3)
    folder = tmp_path / "d" / "train" / "class0"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "0.JPEG", format="PNG")
    Image.fromarray(pixels).convert("CMYK").save(folder / "1.JPEG", format="JPEG")
    rooted = [a for a in tiny if not a.startswith("data.root")] + [f"data.root={tmp_path / 'd'}"]
    outcome = ghosttrain(*rooted, "train.epochs=1")
    assert outcome.code == 0, outcome.err


def test_classes_that_differ_from_the_teachers(ghosttrain, tiny, tmp_path):
    make_images(tmp_path / "d", classes=9, train=4, val=1)
    args = [a for a in tiny if not a.startswith(("data.root", "teacher", "distill"))]
    args += [f"data.root={tmp_path / 'd'}", "teacher=digits"]
    refused(ghosttrain(*args), "10 classes", "9")


def test_a_run_folder_that_cannot_be_written(ghosttrain, tiny, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    refused(
        ghosttrain(*tiny[:-1], f"run.root={blocker}"), "cannot write the run folder", "run.root="
    )
    assert blocker.read_text() == "not a folder"


def test_a_checkpoint_of_another_model(ghosttrain, tiny, tmp_path):
    named = [*tiny, "run.name=mine", "train.max_steps=1"]
    assert ghosttrain(*named).code == 0
    result = (tmp_path / "runs" / "mine" / "result.json").read_bytes()
    refused(
        ghosttrain(*named, "model=ghostnetv3_100"),
        "model.name: shufflenetv2_050 -> ghostnetv3_100",
        "run.name",
    )
    assert (tmp_path / "runs" / "mine" / "result.json").read_bytes() == result

    last = tmp_path / "runs" / "mine" / "checkpoints" / "last.pt"
    refused(ghosttrain(*tiny, "model=ghostnetv3_100", f"model.weights={last}"), str(last))

    run = tmp_path / "runs" / "mine"
    (run / "result.json").unlink()
    state = read_checkpoint(last)
    state["student"].pop(next(iter(state["student"])))
    write_checkpoint(last, state)
    refused(ghosttrain(*named), "does not fit the network of these settings")
    last.write_bytes(b"PK\x03\x04 cut short")
    refused(ghosttrain(*named), "is damaged", "move it away")


def test_a_folder_that_another_process_trains_in(ghosttrain, tiny, tmp_path):
    assert ghosttrain(*tiny, "train.max_steps=1", "run.name=mine").code == 0
    run = tmp_path / "runs" / "mine"
    (run / "result.json").unlink()
    with locked(run, "busy"):
        for fresh in ("false", "true"):
            again = ghosttrain(*tiny, "train.max_steps=1", "run.name=mine", f"run.fresh={fresh}")
            assert again.code == 69
            me = f"process {os.getpid()} on {socket.gethostname()} is training in {run}; wait"
            assert again.err.startswith(f"ghosttrain: error: {me}")
    resumed = ghosttrain(*tiny, "train.max_steps=1", "run.name=mine")
    assert resumed.code == 0
    message = resumed.out  # of an epoch that did not end, one number in both lines
    assert "resumed after epoch 1, step 1" in message and "epoch 1/1  held-out" in message


def test_training_that_diverges_says_so(ghosttrain, tiny):
    """6 steps an epoch, a row for each; from the second on nothing is finite, and there is no
    checkpoint to go back to."""
    words = ["optim=sgd", "optim.lr=1e30", "train.global_batch=8", "tracker.log_every=1"]
    ended = ghosttrain(*tiny, *words, "train.max_skips=3")
    refused(ended, "4 steps in a row were skipped before step 6 (train.max_skips=3)", "diverged")
    assert "note: step 2 was skipped: label is not finite; metrics.jsonl has" in ended.out


def test_weights_that_are_not_finite_are_never_saved(ghosttrain, tiny, tmp_path):
    """The first loss is finite, the step after it breaks the weights: no checkpoint may hold
    them."""
    broken = [
        *tiny,
        "optim=sgd",
        "optim.lr=1e38",
        "train.global_batch=48",
        "schedule.warmup_epochs=0",
    ]
    refused(ghosttrain(*broken), "not finite at step 1: training diverged; try a lower optim.lr")
    assert not list(tmp_path.rglob("last.pt")) and not list(tmp_path.rglob("*.safetensors"))


def test_a_run_without_a_finished_epoch(ghosttrain, tiny, tmp_path):
    assert ghosttrain(*tiny, "data.std=[1e-45,1,1]", "train.max_skips=0").code == 2
    run = only_run(tmp_path)
    for verb in ("eval", "fuse"):
        refused(ghosttrain(verb, run), "has no weights yet")
    assert "left out: 1 start of which no step" in ghosttrain("report", run).out


def test_batches_that_do_not_fit(ghosttrain, tiny):
    refused(ghosttrain(*tiny, "train.global_batch=64"), "48", "train.global_batch=8")
    small = ["model=ghostnetv3_050", "data.train_size=32"]
    refused(ghosttrain(*tiny[:1], *tiny[2:], *small), "33")


def test_a_failing_rank_ends_the_others_with_one_line(tiny, tmp_path):
    args = [*tiny, "launch.nproc=2", "launch.device=cpu", "train.global_batch=64"]  # of 48 images
    done = spawned(*args)
    assert done.returncode == 2
    assert sum(line.startswith("ghosttrain: error") for line in done.stderr.splitlines()) == 1, (
        done.stderr
    )


def test_a_mistake_on_one_rank_is_shown_whatever_happens_to_the_others(tiny, tmp_path):
    make_images(tmp_path / "d", classes=3)
    on_rank_1 = next(train_batches(48, 0, 0, 16, 8, rank=1, world=2))[0]
    bad = tmp_path / "d" / "train" / f"class{on_rank_1 // 16}"
    bad = sorted(bad.iterdir())[on_rank_1 % 16]
    bad.write_bytes(bad.read_bytes()[:400])
    args = [a for a in tiny if not a.startswith("data.root")] + [f"data.root={tmp_path / 'd'}"]
    done = spawned(*args, "launch.nproc=2", "launch.device=cpu")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("ghosttrain: error")]
    assert len(errors) == 1 and str(bad) in errors[0], done.stderr
    assert "Traceback" not in done.stderr


def test_a_launcher_of_its_own_under_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    cells = Names(None).cells(["seed=1,2"])
    words = ["hydra/launcher=joblib"]
    refusal(lambda: run_cells(cells, [], words, None), "joblib: under torchrun", "launch.nproc=N")


def test_a_failing_cell_does_not_stop_a_sweep(ghosttrain, tiny, tmp_path):
    outcome = ghosttrain("-m", *tiny, "train.max_steps=1", "train.global_batch=64,16")
    assert outcome.code == 1
    assert "1 of 2 runs finished" in outcome.out
    assert "failed: " in outcome.err and "train.global_batch=64" in outcome.err
    assert json.loads((only_finished(tmp_path) / "result.json").read_text())["steps"] == 1


def only_finished(root: Path) -> Path:
    (path,) = root.rglob("result.json")
    assert only_run  # the shared helper finds unfinished runs too
    return path.parent

"""A run that goes on: after a failed evaluation, with changed data, after a start that failed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import make_images, only_run
from safetensors.torch import load_file
from test_mistakes import refused

from ghosttrain.engine.checkpoint import read_checkpoint, write_checkpoint
from ghosttrain.engine.rows import read_metrics
from ghosttrain.engine.run_files import read_config


@pytest.fixture
def settings(tiny: list[str], tmp_path: Path) -> list[str]:
    """A run smaller than `tiny`, on images of its own."""
    make_images(tmp_path / "d", classes=3)
    kept = [a for a in tiny if not a.startswith(("data.root", "model=", "data.train", "data.eval"))]
    small = ["model=mobilenetv2_050", "reparam=none", "data.train_size=32", "data.eval_size=32"]
    return [*kept, *small, f"data.root={tmp_path / 'd'}", "train.save_every=1epoch", "run.name=a"]


def stopped_after_an_epoch(ghosttrain, settings: list[str], tmp_path: Path) -> Path:
    """Leave a run whose first epoch is saved and whose evaluation failed; its data are whole."""
    bad = tmp_path / "d" / "val" / "class2" / "6.JPEG"  # the last image: not in the first batch
    whole = bad.read_bytes()
    bad.write_bytes(whole[:400])
    refused(ghosttrain(*settings, "train.eval_batch=5"), "class2", "6.JPEG")
    bad.write_bytes(whole)
    run = only_run(tmp_path)
    assert read_checkpoint(run / "checkpoints" / "last.pt")["step"] == 3
    return run


def test_a_failed_evaluation_is_repeated_and_nothing_else_differs(ghosttrain, settings, tmp_path):
    run = stopped_after_an_epoch(ghosttrain, settings, tmp_path)
    assert [row["kind"] for row in read_metrics(run)] == ["train"]
    resumed = ghosttrain(*settings, "train.eval_batch=5")
    assert resumed.code == 0 and "resumed after epoch 1, step 3" in resumed.out, resumed.err
    assert "epoch 1/2  held-out top-1" in resumed.out

    whole = tmp_path / "whole"
    assert ghosttrain(*settings, "train.eval_batch=5", f"run.root={whole}").code == 0
    other = only_run(whole)
    for name in ("model.safetensors", "checkpoints/best.safetensors"):
        a, b = load_file(run / name), load_file(other / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    rows = [
        [{k: v for k, v in row.items() if k != "images_per_second"} for row in read_metrics(each)]
        for each in (run, other)
    ]
    assert rows[0] == rows[1] and [r["kind"] for r in rows[0]] == ["train", "eval"] * 2
    results = [json.loads((each / "result.json").read_text()) for each in (run, other)]
    for result in results:
        del result["seconds"], result["images_per_second"], result["sha256"]
        del result["files"]["card.md"], result["files"]["curves.png"]  # they hold times
    assert results[0] == results[1] and results[0]["data"]["accepted"] == []
    assert results[0]["data"]["train"]["images"] == 48

    before = read_metrics(run)  # killed in the evaluation of the last epoch
    (run / "result.json").unlink()
    assert ghosttrain(*settings, "train.eval_batch=5").code == 0
    again = json.loads((run / "result.json").read_text())
    assert read_metrics(run) == before
    assert all(again[key] == results[0][key] for key in ("weights", "best", "steps"))


def rename_class(images: Path) -> str:
    for split in ("train", "val"):
        (images / split / "class0").rename(images / split / "zebra")
    return "classes differ: 'class0' -> 'zebra'"


def add_a_class(images: Path) -> str:
    for split in ("train", "val"):
        shutil.copytree(images / split / "class0", images / split / "class9")
    return "classes differ: 3 -> 4, 'class9' is new"


def add_images(images: Path) -> str:
    for name in ("x.JPEG", "y.JPEG"):
        shutil.copy(images / "train" / "class1" / "0.JPEG", images / "train" / "class1" / name)
    return "training images: 48 -> 50"


def move_an_image(images: Path) -> str:
    (images / "train" / "class0" / "0.JPEG").rename(images / "train" / "class1" / "z.JPEG")
    return "file names or labels of the training images differ"


def drop_a_held_out_image(images: Path) -> str:
    (images / "val" / "class1" / "0.JPEG").unlink()
    return "held-out images: 21 -> 20"


def test_changed_data_are_refused_by_name_and_accepted_on_record(ghosttrain, settings, tmp_path):
    run = stopped_after_an_epoch(ghosttrain, settings, tmp_path)
    images, last = tmp_path / "d", run / "checkpoints" / "last.pt"
    kept = {p: p.read_bytes() for p in (last, run / "metrics.jsonl")}
    shutil.copytree(images, tmp_path / "before")

    def restore() -> None:
        shutil.rmtree(images)
        shutil.copytree(tmp_path / "before", images)

    for change in (rename_class, add_images, move_an_image, drop_a_held_out_image, add_a_class):
        found = change(images)
        refused(ghosttrain(*settings), found, "run.fresh=true")
        assert all(path.read_bytes() == content for path, content in kept.items())
        if change is add_a_class:
            refused(ghosttrain(*settings, "data.changed=accept"), found, "has 3 outputs")
        restore()

    add_images(images)
    drop_a_held_out_image(images)
    found = "data changed after step 3: training images: 48 -> 50; held-out images: 21 -> 20"
    write_checkpoint(
        last, read_checkpoint(last) | {"best": {"top1": 101.0, "epoch": 1}}
    )  # on other images
    accepted = ghosttrain(*settings, "data.changed=accept")
    assert accepted.code == 0, accepted.err
    assert found in accepted.out and found in (run / "card.md").read_text()
    result = json.loads((run / "result.json").read_text())
    assert result["data"]["accepted"] == [found] and result["weights"]["ema"]["n"] == 20
    assert read_checkpoint(last)["data"]["accepted"] == [found]
    tops = [row["ema_top1"] for row in read_metrics(run) if row["kind"] == "eval"]
    assert result["best"]["top1"] == max(tops) and len(tops) == 2

    again = ghosttrain(*settings)  # finished; these data are the recorded ones
    assert again.code == 0 and "note:" not in again.out
    assert "note:" not in ghosttrain("eval", run).out
    drop = images / "val" / "class2" / "6.JPEG"
    kept_image = drop.read_bytes()
    drop.unlink()
    assert "not the held-out images of the run (20 then, 19 now)" in ghosttrain("eval", run).out
    drop.write_bytes(kept_image)
    shutil.move(images / "train", tmp_path / "train")
    alone = ghosttrain("eval", run)  # the held-out images are enough
    assert alone.code == 0 and alone.out.count("as reported") == 3, alone.err
    shutil.move(tmp_path / "train", images / "train")
    rename_class(images)
    refused(ghosttrain(*settings), "a run on other data (class names, file names or labels of the")
    refused(ghosttrain("eval", run), "(classes differ: 'class0' -> 'zebra'): type data.root=")
    (run / "result.json").unlink()
    restore()
    drop_a_held_out_image(images)
    refused(ghosttrain(*settings, "data.changed=accept"), "50 -> 48", "has taken all its steps")


def test_a_start_that_failed_before_its_first_step_gives_its_name_back(
    ghosttrain, settings, tmp_path
):
    """Held-out images are tried first: nothing was trained when a broken one is named."""
    named = [*settings, "run.name=mine", "train.max_steps=1"]
    bad = tmp_path / "d" / "val" / "class0" / "3.JPEG"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:400])
    refused(ghosttrain(*named, "data.workers=1"), "class0", "3.JPEG")
    run = tmp_path / "runs" / "mine"
    assert not read_metrics(run) and not list(run.rglob("last.pt"))
    assert "left out: 1 start of which no step" in ghosttrain("report", run).out
    bad.write_bytes(whole)
    other = ghosttrain(*named, "seed=7")
    assert other.code == 0, other.err
    assert read_config(run).seed == 7
    refused(ghosttrain(*named), "seed: 7 -> 0")

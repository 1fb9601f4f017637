"""Training with cached outputs, and the verb `cache`, through the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import simplejpeg
import timm
import torch
from helpers import only_run, raw_weights, stop_after_saves, train_rows
from safetensors.torch import save_file

from ghosttrain.config.compose import compose
from ghosttrain.data.datasets import build_datasets
from ghosttrain.data.loader import train_loader
from ghosttrain.distill.cache import open_cache
from ghosttrain.distill.teacher import build_teacher


@pytest.fixture
def stored(photos, tmp_path) -> list[str]:
    """The arguments with cached outputs: 2 draws, files of 16 images."""
    return [*photos, f"cache.dir={tmp_path / 'cache'}"]


WRITE = ["cache.draws=2", "cache.shard_size=16"]


def test_stored_outputs_train_what_a_live_teacher_trains(ghosttrain, photos, stored, tmp_path):
    outcome = ghosttrain("cache", *stored, *WRITE, "cache.codec=logits:16")
    assert outcome.code == 0, outcome.err
    assert "8 files" in outcome.out
    still = ["optim=sgd", "optim.lr=1e-12"]  # else training amplifies the rounding
    outcome = ghosttrain(*stored, *still, f"run.root={tmp_path / 'stored'}")
    assert outcome.code == 0, outcome.err
    assert "cached outputs of tf_efficientnet_lite0" in outcome.out
    assert f"; JPEGs decoded by simplejpeg {simplejpeg.__version__}" in outcome.out
    assert ghosttrain(*photos, *still, f"run.root={tmp_path / 'live'}").code == 0
    for first, other in zip(train_rows(tmp_path / "stored"), train_rows(tmp_path / "live"),
                          strict=True):  # fmt: skip
        assert first["soft_ce"] == pytest.approx(other["soft_ce"], rel=5e-4)
        assert first["label"] == pytest.approx(other["label"], rel=1e-5)


def test_stored_outputs_are_the_teachers_on_the_same_pixels(ghosttrain, stored, tmp_path):
    """Pixel for pixel what training sees; logits:16 is the live output rounded to float16."""
    assert ghosttrain("cache", *stored, *WRITE, "cache.codec=logits:16").code == 0
    config = compose(stored).config
    train_set = build_datasets(config.data)[0]
    teacher = build_teacher(config.teacher, train_set.classes, config.data, "cpu")
    cache = open_cache(tmp_path / "cache")
    cpu = torch.device("cpu")
    plan = [[3, 40, 17], [59, 0]]
    with train_loader(train_set, config.data, config.augment, cpu, views=teacher.views,
                      cached=cache.read) as loader:  # fmt: skip
        for draw in (0, 1):
            for batch in loader.batches(plan, draw):
                exact = teacher(batch.images, batch.views).logits
                output = cache.decode(batch.cached).logits
                torch.testing.assert_close(output, exact.half().float(), rtol=1e-3, atol=2e-3)
        (first,), (again,) = loader.batches([[5]], 0), loader.batches([[5]], 1)
    assert not torch.equal(first.images, again.images)


@pytest.fixture
def seen(monkeypatch) -> list[dict[str, torch.Tensor]]:
    """What reaches the loss: images and the teacher's logits of every forward pass."""
    import ghosttrain.engine.classification as classification

    passes: list[dict[str, torch.Tensor]] = []
    real = classification.objective

    def spy(config, progress, forward, output, images, targets, *more):
        passes.append({"images": images.clone(), "logits": output.logits.clone()})
        return real(config, progress, forward, output, images, targets, *more)

    monkeypatch.setattr(classification, "objective", spy)
    return passes


def samples(passes: list[dict[str, torch.Tensor]]) -> dict[bytes, torch.Tensor]:
    """Return the teacher's logits by the bytes of their image, whatever the batches were."""
    return {
        image.contiguous().numpy().tobytes(): logits
        for first in passes
        for image, logits in zip(first["images"], first["logits"], strict=True)
    }


def assert_same(first: dict[bytes, torch.Tensor], other: dict[bytes, torch.Tensor]) -> None:
    """The same pixels bit by bit; logits up to rounding, which may depend on the batch's size."""
    assert first.keys() == other.keys()
    for image, logits in first.items():
        torch.testing.assert_close(logits, other[image], rtol=1e-4, atol=1e-4)


def test_epochs_beyond_the_stored_draws_replay_them(ghosttrain, stored, seen):
    assert ghosttrain("cache", *stored, *WRITE, "cache.codec=topk:2").code == 0
    assert ghosttrain(*stored, "train.epochs=5", "train.global_batch=60").code == 0
    epochs = [samples([single]) for single in seen]
    assert len(epochs) == 5 and [len(epoch) for epoch in epochs] == [60] * 5
    for first, again in ((0, 2), (0, 4), (1, 3)):
        assert_same(epochs[first], epochs[again])
    assert not epochs[0].keys() & epochs[1].keys()


def test_batches_of_any_size_and_workers_get_the_same_outputs(ghosttrain, stored, seen, tmp_path):
    assert ghosttrain("cache", *stored, *WRITE, "cache.codec=features:8").code == 0
    runs = []
    for number, extra in enumerate(([], ["train.micro_batch=5"], ["train.global_batch=12"],
                                   ["data.workers=2"])):  # fmt: skip
        seen.clear()
        outcome = ghosttrain(*stored, *extra, f"run.root={tmp_path / str(number)}")
        assert outcome.code == 0, outcome.err
        runs.append(samples(seen))
    assert len(runs[0]) == 120
    for run in runs[1:]:
        assert_same(runs[0], run)


@pytest.mark.slow
def test_ranks_get_the_same_outputs(ghosttrain, stored, tmp_path):
    assert ghosttrain("cache", *stored, *WRITE, "cache.codec=features:8").code == 0
    still = ["launch.device=cpu", "optim=sgd", "optim.lr=1e-12", "model.dropout=0",
             "train.sync_bn=true"]  # fmt: skip
    command = [sys.executable, "-m", "ghosttrain", *stored, *still, "launch.nproc=2",
               f"run.root={tmp_path / 'two'}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert ghosttrain(*stored, *still, f"run.root={tmp_path / 'one'}").code == 0
    first, two = train_rows(tmp_path / "one"), train_rows(tmp_path / "two")
    assert [r["soft_ce"] for r in first] == pytest.approx([r["soft_ce"] for r in two], rel=1e-3)


def test_a_killed_cache_goes_on_and_writes_no_file_twice(stored, tmp_path):
    command = [sys.executable, "-m", "ghosttrain", "cache", *stored, *WRITE,
               "cache.codec=logits:8", "cache.shard_size=4"]  # fmt: skip
    killed_at_the_fourth_file = (
        "import os, sys; from pathlib import Path; from ghosttrain.cli import main\n"
        "replace, seen = Path.replace, []\n"
        "def counted(part, path):\n"
        "    seen.extend([path] * (path.suffix == '.shard'))\n"
        "    os.kill(os.getpid(), 9) if len(seen) == 4 else replace(part, path)\n"
        "Path.replace = counted\n"
        "main(sys.argv[1:])\n"
    )
    killed = [sys.executable, "-c", killed_at_the_fourth_file, *command[3:]]
    assert subprocess.run(killed, stdout=subprocess.DEVNULL).returncode == -9
    draws = tmp_path / "cache" / "draws"
    before = {path: path.stat().st_mtime_ns for path in draws.rglob("*.shard")}
    assert len(before) == 3 and len(list(draws.rglob(".*.part"))) == 1
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"wrote {30 - len(before)} files" in done.stdout
    assert len(list(draws.rglob("*.shard"))) == 30
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    assert not open_cache(tmp_path / "cache").damaged()


def test_two_ranks_write_each_file_once(ghosttrain, stored, tmp_path):
    alone = [x.replace(str(tmp_path / "cache"), str(tmp_path / "alone")) for x in stored]
    write = [*WRITE, "cache.codec=logits:16"]
    assert ghosttrain("cache", *alone, *write).code == 0
    command = [sys.executable, "-m", "ghosttrain", "cache", *stored, *write, "launch.nproc=2",
               "launch.device=cpu"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "wrote 8 files" in done.stdout
    first, two = open_cache(tmp_path / "alone"), open_cache(tmp_path / "cache")
    assert not two.missing() and not two.damaged()
    for draw in (0, 1):
        outputs = (cache.decode(cache.read(draw, range(60))).logits for cache in (first, two))
        torch.testing.assert_close(*outputs, rtol=2e-3, atol=2e-3)


def test_a_damaged_file_is_named_and_only_that_one_is_made_again(ghosttrain, stored, tmp_path):
    assert ghosttrain("cache", *stored, *WRITE, "cache.codec=logits:8").code == 0
    cache = open_cache(tmp_path / "cache")
    path = cache.path(cache.shards()[1])
    good = path.read_bytes()
    path.write_bytes(good[:-3] + bytes([good[-3] ^ 1]) + good[-2:])
    outcome = ghosttrain(*stored)
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert str(path) in line and "--repair" in line
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.shard")}
    outcome = ghosttrain("cache", str(tmp_path / "cache"), "--repair")
    assert outcome.code == 0, outcome.err
    assert f"damaged: {path}" in outcome.out and "wrote 1 file " in outcome.out
    changed = [p for p, at in before.items() if p.stat().st_mtime_ns != at]
    assert changed == [path]
    assert path.read_bytes() == good
    assert ghosttrain(*stored, "train.max_steps=2").code == 0


def test_dry_run_measures_and_writes_nothing(ghosttrain, stored, tmp_path):
    outcome = ghosttrain("cache", *stored, *WRITE, "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "<- chosen" in outcome.out and "will take about" in outcome.out
    assert not (tmp_path / "cache").exists()


def test_inspect_draws_a_picture(ghosttrain, stored, tmp_path):
    assert ghosttrain("cache", *stored, *WRITE, "cache.codec=features:4").code == 0
    outcome = ghosttrain("cache", str(tmp_path / "cache"), "--inspect")
    assert outcome.code == 0, outcome.err
    picture = tmp_path / "cache" / "inspect.png"
    assert str(picture) in outcome.out and picture.stat().st_size > 50_000


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["augment.seed=1"], "augment.seed: stored 0, now 1"),
        (["augment.erasing_prob=0"], "augment.erasing_prob"),
        (["augment=autoaugment"], 'augment.operations: stored "randaugment", now "autoaugment"'),
        (["data.decoder=pillow"], 'versions.jpeg: stored "simplejpeg 1.'),
        (["data.orientation=apply"], 'data.orientation: stored nothing, now "apply"'),
        (["data.train_size=96"], "data.train_size: stored 64, now 96"),
        (["teacher.input_size=128"], "teacher.teacher.input_size: stored 96, now 128"),
        (["teacher=efficientnet_lite1", "teacher.input_size=96"], "tf_efficientnet_lite1"),
        (["cache.draws=3"], "holds 2 draws"),
        (["augment=with_mixup"], "cache.dir"),
        (["distill.features_weight=1"], "features:8"),
    ],
)
def test_other_settings_than_the_stores_are_refused(ghosttrain, cache, stored, changes, expected):
    outcome = ghosttrain(*stored, *changes)
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert expected in line, line


@pytest.fixture
def cache(ghosttrain, stored, tmp_path) -> Path:
    outcome = ghosttrain("cache", *stored, *WRITE, "cache.codec=topk:2")
    assert outcome.code == 0, outcome.err
    return tmp_path / "cache"


def test_a_cache_for_other_images_or_incomplete_is_refused(ghosttrain, cache, stored, tmp_path):
    from photos import make_photos

    make_photos(tmp_path / "more", train=13, val=4)
    outcome = ghosttrain(*stored, f"data.root={tmp_path / 'more'}")
    assert outcome.code == 2 and "images" in outcome.err
    next(cache.rglob("*.shard")).unlink()
    outcome = ghosttrain(*stored)
    assert outcome.code == 2
    assert "1 of its files missing" in outcome.err and "--repair" in outcome.err
    outcome = ghosttrain(*stored, f"cache.dir={tmp_path / 'nowhere'}")
    assert outcome.code == 2 and "nowhere" in outcome.err


def test_the_teacher_need_not_be_there_but_must_not_be_another(ghosttrain, photos, tmp_path):
    """Cached outputs serve a machine without the weights; replaced weights are noticed."""
    weights_file = tmp_path / "teacher.safetensors"

    def write_weights(seed: int) -> None:
        torch.manual_seed(seed)
        save_file(timm.create_model("test_resnet", num_classes=5).state_dict(), weights_file)

    arguments = [x for x in photos if not x.startswith("teacher")]
    arguments += ["teacher=timm", "teacher.name=test_resnet", f"teacher.weights={weights_file}",
                  "teacher.trust=true", f"cache.dir={tmp_path / 'cache'}",
                  "train.max_steps=2"]  # fmt: skip
    write_weights(0)
    outcome = ghosttrain("cache", *arguments, "cache.draws=1", "cache.codec=logits:4")
    assert outcome.code == 0, outcome.err
    write_weights(1)
    outcome = ghosttrain(*arguments)
    assert outcome.code == 2 and "teacher.teacher.weights: stored" in outcome.err
    weights_file.unlink()
    outcome = ghosttrain(*arguments, f"teacher.weights={tmp_path / 'another.safetensors'}")
    assert outcome.code == 2 and "not on this machine" in outcome.err
    outcome = ghosttrain("cache", str(tmp_path / "cache"), "--inspect")
    assert outcome.code == 0, outcome.err
    outcome = ghosttrain(*arguments)
    assert outcome.code == 0, outcome.err
    assert "cached outputs of test_resnet" in outcome.out


def test_more_draws_are_added_to_a_cache(ghosttrain, cache, stored):
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.shard")}
    outcome = ghosttrain("cache", *stored, "cache.draws=3", "cache.shard_size=16")
    assert outcome.code == 0, outcome.err
    assert "wrote 4 files" in outcome.out
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    assert json.loads((cache / "cache.json").read_text())["draws"] == 3


def test_repair_adds_no_draws_and_needs_a_cache(ghosttrain, cache, stored, tmp_path):
    path = next(cache.rglob("*.shard"))
    path.write_bytes(b"cut")
    outcome = ghosttrain("cache", *stored, "train.epochs=9", "cache.shard_size=16", "--repair")
    assert outcome.code == 0, outcome.err
    assert "wrote 1 file " in outcome.out and len(list(cache.rglob("*.shard"))) == 8
    nowhere = f"cache.dir={tmp_path / 'nowhere'}"
    outcome = ghosttrain("cache", *stored, nowhere, "--repair")
    assert outcome.code == 2 and "nothing to repair" in outcome.err
    assert not (tmp_path / "nowhere").exists()


def test_a_locked_cache_is_left_as_it_is(ghosttrain, cache, stored):
    before = (cache / "cache.json").read_text()
    with open_cache(cache).locked():
        outcome = ghosttrain("cache", *stored, "cache.draws=50", "cache.shard_size=16")
    assert outcome.code == 69 and f"process {os.getpid()} on " in outcome.err
    assert (cache / "cache.json").read_text() == before


def test_a_part_of_the_draws_suffices_for_a_part(ghosttrain, cache, stored):
    for path in (cache / "draws" / "00001").iterdir():
        path.unlink()
    assert ghosttrain(*stored, "train.max_steps=2").code == 2
    outcome = ghosttrain(*stored, "cache.draws=1", "train.max_steps=2")
    assert outcome.code == 0, outcome.err
    outcome = ghosttrain("cache", *stored, "cache.draws=1", "cache.shard_size=16")
    assert outcome.code == 0 and "nothing to write" in outcome.out


def test_a_resumed_run_keeps_the_draws_it_began_with(ghosttrain, stored, tmp_path, monkeypatch):
    """Also where the cache was given more draws since; another cache is refused."""
    write = ["cache.shard_size=16", "cache.codec=logits:8"]
    assert ghosttrain("cache", *stored, *write, "cache.draws=1").code == 0
    stored = [*stored, "run.name=a"]
    whole = f"run.root={tmp_path / 'whole'}"
    assert ghosttrain(*stored, whole, "train.epochs=3").code == 0

    with monkeypatch.context() as patch:
        stop_after_saves(patch, 1)
        assert ghosttrain(*stored, "train.epochs=3", "train.save_every=1epoch").code == 130
    assert ghosttrain("cache", *stored, *write, "cache.draws=3").code == 0
    outcome = ghosttrain(*stored, "train.epochs=3")
    assert outcome.code == 0, outcome.err
    assert "goes on with 1" in outcome.out
    assert torch.equal(raw_weights(tmp_path / "runs"), raw_weights(tmp_path / "whole"))

    last = only_run(tmp_path / "runs") / "result.json"
    last.unlink()
    shutil.rmtree(tmp_path / "cache")
    assert ghosttrain("cache", *stored, "cache.draws=1", "cache.codec=topk:2").code == 0
    outcome = ghosttrain(*stored, "train.epochs=3")
    assert outcome.code == 2 and "other settings (cache.digest: " in outcome.err


def test_a_run_is_told_that_the_codec_was_measured_with_another_loss(ghosttrain, cache, stored):
    outcome = ghosttrain(*stored, "distill=kl", "train.max_steps=1")
    assert "the codec was measured with distill=soft_ce at T = 1.0" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["cache.dir="], "cache.dir"),
        (["teacher=none", "distill=none"], "distill=soft_ce"),
        (["cache.codec=topk"], "topk:K"),
        (["cache.codec=topk:5"], "topk"),
        (["cache.codec=logits:9"], "logits:BITS"),
        (["--dry-run", "--repair"], "one of --dry-run"),
        (["--dryrun"], "Did you mean '--dry-run'"),
        (["/nowhere", "--repair"], "no cache"),
    ],
)
def test_mistakes_in_cache(ghosttrain, stored, tmp_path, arguments, expected):
    stored = [] if arguments[0] == "/nowhere" else [*stored, "cache.draws=1"]
    outcome = ghosttrain("cache", *stored, *arguments)
    assert outcome.code == 2, outcome.out
    (line,) = outcome.err.splitlines()
    assert expected in line, line
    assert not (tmp_path / "cache").exists()

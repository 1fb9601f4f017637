"""`cost`: estimates against finished runs, files and caches; sums; what is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from helpers import only_run

from ghosttrain.config.compose import compose
from ghosttrain.data.datasets import build_datasets
from ghosttrain.distill.teacher import build_teacher
from ghosttrain.engine.plan import make_plan
from ghosttrain.engine.rows import read_metrics
from ghosttrain.models.cost import count_macs
from ghosttrain.models.create import create_model
from ghosttrain.study import study_run, trial
from ghosttrain.study.cost import Known, run_cost, student_of
from ghosttrain.study.cost_report import savings
from ghosttrain.study.harness import peak_mib
from ghosttrain.study.studies import load_study, study_cells


@pytest.fixture
def tiny(tiny):
    """A network whose memory is that of its maps, as of those that are trained in earnest."""
    return [word.replace("shufflenetv2_050", "mobilenetv2_050") for word in tiny]


@pytest.fixture
def cost(ghosttrain, tmp_path):
    """Run `cost ... --json FILE`; return the figures and the text."""

    def run(*args):
        path = tmp_path / "cost.json"
        outcome = ghosttrain("cost", *args, "--json", path)
        assert outcome.code == 0, outcome.err
        return json.loads(path.read_text()), outcome.out

    return run


@pytest.fixture
def alone(cost):
    """Return the figures of one run."""
    return lambda *args: cost(*args)[0]["runs"][0]


def close(estimate: float, measured: float) -> bool:
    return abs(estimate / measured - 1) < 0.25


def test_a_finished_run_is_what_was_estimated(alone, cost, ghosttrain, tiny, image_folder) -> None:
    args = [*tiny, "train.save_every=1epoch", "train.eval_every=1"]
    before = alone(*args, "--images-per-second", "10")
    assert ghosttrain(*args).code == 0
    run = only_run(Path(tiny[-1].partition("=")[2]))
    result, rows = json.loads((run / "result.json").read_text()), read_metrics(run)
    assert (before["steps"], before["images"]) == (result["steps"], 2 * 48)
    assert before["student_params"] == result["model"]["params_train"]
    assert before["student_macs"] == result["model"]["macs_train"]
    assert before["macs"]["student"] == 3 * 96 * result["model"]["macs_train"]
    on_the_way = sum(row["kind"] == "eval" for row in rows)
    assert before["evaluations"] == on_the_way + 1
    branches, fused = result["model"]["macs_train"], result["model"]["macs_fused"]
    assert before["macs"]["evaluation"] == 21 * ((2 * 2 + 1) * fused + 2 * branches)
    # Time at a given speed: an image of training is 3 forward passes.
    images = 96 + before["macs"]["evaluation"] / (3 * branches)
    assert before["seconds"] == pytest.approx(images / 10)

    saved = sorted((run / "checkpoints").glob("last*.pt"))
    assert len(saved) == before["checkpoints"] == 2
    assert all(close(before["checkpoint_bytes"], path.stat().st_size) for path in saved)
    files = [path for path in run.rglob("*") if path.is_file()]
    assert close(before["disk_bytes"], sum(path.stat().st_size for path in files))
    train, val = (
        sum(path.stat().st_size for path in (image_folder / split).rglob("*.*"))
        for split in ("train", "val")
    )
    assert before["read_bytes"] == pytest.approx(2 * train + before["evaluations"] * val)

    figures, text = cost(*args)
    after = figures["runs"][0]
    assert after["is_finished"] and after["seconds"] == result["seconds"]
    assert "measured: this run has finished" in text

    # A sweep sums what has not finished; `seed` says which run is which.
    figures, text = cost("-m", *args, "seed=0,1,2", "--images-per-second", "10")
    total, left = figures["sum"], figures["runs"][1:]
    assert figures["runs"][0]["is_finished"] and total["finished"] == 1
    for name in ("steps", "images", "read_bytes", "disk_bytes", "seconds"):
        assert total[name] == pytest.approx(sum(run[name] for run in left)), name
    assert total["macs"] == sum(run["all_macs"] for run in left)
    assert figures["hours"]["8"] == pytest.approx(total["seconds"] / 3600 / 8)
    assert "| seed=1 | to run " in text and "runs: 3, of which 1 finished" in text


def test_a_cache_is_as_large_as_estimated(alone, cost, ghosttrain, photos, tmp_path) -> None:
    folder = tmp_path / "cache"
    live = cost("-m", *photos, "seed=1,2")
    for run in live[0]["runs"]:
        assert run["cache"]["is_guess"] and run["cache"]["images"] == 2 * 60
        assert run["macs"]["teacher"] == 2 * 60 * run["teacher_macs"]
    share = 2 * 60 * run["teacher_macs"] / live[0]["sum"]["macs"]
    assert "shown 120 images in place of 240: " in live[1]
    assert f"less, {100 * share:.0f} % of these 2 runs" in live[1]
    config = compose(photos).config
    teacher = build_teacher(
        config.teacher, build_datasets(config.data)[0].classes, config.data, "cpu"
    )
    (member,) = teacher.members.values()
    assert run["teacher_macs"] == count_macs(member.network, 96)

    cached = [*photos, f"cache.dir={folder}", "cache.draws=2"]
    before = alone(*cached)
    assert before["macs"]["teacher"] == 0 and before["cache"]["images"] == 120
    sums = cost("-m", *cached, "seed=1,2")[0]["sum"]
    assert sums["teacher_macs"] == 120 * run["teacher_macs"]  # stored once for both
    assert ghosttrain("cache", *cached).code == 0
    figures, text = cost(*cached)
    after = figures["runs"][0]
    stored = sum(path.stat().st_size for path in (folder / "draws").rglob("*.shard"))
    assert close(before["cache"]["bytes"], stored) and after["cache"]["bytes"] == stored
    assert after["cache"]["images"] == 0 and f"stored in {folder}" in text


def test_imagenet_and_its_teacher_need_not_be_here(alone, monkeypatch) -> None:
    monkeypatch.delenv("IMAGENET_DIR", raising=False)
    words = ["+recipe=compact_kd", "model=mobilenetv2_050", "data=imagenet", "launch.nproc=8"]
    run = alone(*words, "--images-per-second", "1000")
    assert run["steps"] == 600 * (1_281_167 // 2048) and run["micro_batch"] == 256
    assert run["macs"]["teacher"] == run["images"] * run["teacher_macs"]
    assert run["teacher_macs"] == pytest.approx(17.56e9, rel=1e-3)  # ViT-B/16 at 224
    assert run["read_bytes"] == pytest.approx(run["images"] * 147.9e9 / 1_281_167, rel=0.1)
    run = alone(*words, "--images", "4096", "--classes", "7")
    assert run["steps"] == 600 * 2 and run["read_bytes"] is None and run["seconds"] is None


def test_smaller_images_count_for_less(tiny) -> None:
    composed = compose([*tiny, "data.size_schedule=[[0,32],[0.5,64]]"])
    run = run_cost(composed, Known())
    sizes = [count_macs(create_model("mobilenetv2_050", 3), side) for side in (32, 64)]
    assert run.macs["student"] == 3 * 48 * sum(sizes) and run.student_macs == sizes[1]


def test_memory_is_that_of_a_step(tiny) -> None:
    name, batch, side = "mobilenetv2_050", 16, 128
    config = compose([*tiny, f"data.train_size={side}", f"train.global_batch={batch}"]).config
    memory = student_of(config, [str(k) for k in range(1000)], 0, batch, 1).memory
    weights = sum(p.nbytes for p in create_model(name).parameters())
    assert memory.gradients == weights and memory.moments == 2 * weights
    step = ["auto", name, "standard", "none", batch, side, 1, "cpu"]
    peak = peak_mib("ghosttrain.study.bench_step", "one_step", step, torch.device("cpu"))
    estimate = memory.gradients + memory.activations + memory.allowance
    assert close(estimate / 2**20, peak)


def test_a_trial_is_kept_and_used(alone, tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(trial, "STEPS", 7)
    args = [*tiny, "train.epochs=5", "seed=4"]
    measured = alone(*args, "--measure")
    (file,) = (tmp_path / "runs" / ".trials").glob("*.json")
    kept = json.loads(file.read_text())
    passes = 21 * (measured["evaluations"] - 1) * kept["evaluation_seconds"]
    passes += 21 * kept["final_seconds"]
    expected = measured["images"] / kept["images_per_second"] + passes
    assert measured["seconds"] == pytest.approx(expected)
    assert not list(tmp_path.rglob("result.json"))  # no run was begun
    # Another seed, length and learning rate cost as much a step; other images do not.
    other = alone(*tiny, "seed=5", "optim.lr=0.1")
    assert other["speed"] == measured["speed"]
    assert alone(*tiny, "data.train_size=96")["seconds"] is None

    study = tmp_path / "own" / "study"
    study.mkdir(parents=True)
    shared = ", ".join(f"'{word}'" for word in tiny)
    (study / "rates.yaml").write_text(
        f"about: x\noverrides: [{shared}]\ncontrol: low\nseeds: [0, 1]\n"
        "axes: {rate: {low: [optim.lr=0.1], high: [optim.lr=0.2]}}\n"
    )
    cells = study_cells(load_study("rates", str(study.parent)), [], str(study.parent))
    seconds = 4 * run_cost(cells[0].composed, Known(), trial=trial.Trial(**_known(kept))).seconds
    assert (
        study_run._cost(cells, cells)
        == f"time: about {study_run.clock(seconds)}, one after another"
    )
    file.unlink()
    line = study_run._cost(cells, cells)
    assert line.startswith("length: 8 epochs in all") and line.endswith(" --measure")


def _known(fields):
    return {name: fields[name] for name in trial.Trial.__dataclass_fields__}


@pytest.mark.slow
def test_the_time_of_a_run_is_that_of_its_trial(alone, ghosttrain, tmp_path, monkeypatch) -> None:
    # In CPU seconds of this process: neighbours on the machine do not count.
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    args = ["+recipe=compact_kd", "model=mobilenetv2_050", "train.epochs=4"]
    args += [f"run.root={tmp_path / 'runs'}"]
    estimate = alone(*args, "--measure")
    assert ghosttrain(*args).code == 0
    finished = alone(*args)
    assert close(estimate["seconds"], finished["seconds"])


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "name what would be trained"),
        (["+recipe=compact_kd", "--images-per-second", "0"], "give a number above 0"),
        (["+recipe=compact_kd", "--images-per-second", "nan"], "give a number above 0"),
        (["+recipe=compact_kd", "--images-per-second", "x"], "is no number"),
        (["+recipe=compact_kd", "--measure", "--images-per-second", "9"], "type one of them"),
        (["+recipe=compact_kd", "--images", "9"], "--images and --classes belong together"),
        (["+recipe=compact_kd", "--images", "0", "--classes", "2"], "--images 0: give a whole"),
        (["+recipe=compact_kd", "--images", "99", "--classes", "2"], "data=digits is here"),
        (["+recipe=compact_kd", "data=folder"], "or --images N --classes K"),
        (["+recipe=compact_kd", "data=folder", "data.root=/nowhere"], "/nowhere is no folder"),
        (["+recipe=compact_kd", "data=imagenet", "data.fraction=0.1"], "is not known"),
        (["+recipe=compact_kd", "train.global_batch=9999"], "more than the 1,437 training images"),
        (["+recipe=compact_kd", "launch.nproc=5"], "does not divide over 5 processes"),
        (["+recipe=compact_kd", "seed=1,2"], "seed"),
        (["+recipe=compact_kd", "teacher.weights=/no/file"], "no such file"),
        (["+recipe=compact_kd", "cache.dir=/no/cache", "--measure"], "no folder"),
        (["+recipe=compact_kd", "data=imagenet", "--measure"], "needs its folder"),
    ],
)
def test_mistakes_are_one_line(ghosttrain, monkeypatch, args, says) -> None:
    monkeypatch.delenv("IMAGENET_DIR", raising=False)
    monkeypatch.setattr("ghosttrain.study.cost.student_of", lambda config, *_: _any_student(config))
    outcome = ghosttrain("cost", *args)
    assert outcome.code == 2 and outcome.err.count("\n") == 1, outcome.err
    assert says in outcome.err


def _any_student(config):
    """What `student_of` would say after seconds: the mistakes of this test lie elsewhere."""
    from ghosttrain.study.cost import Memory, Student

    sizes = dict.fromkeys({*config.data.train_sizes, config.data.eval_size}, 1)
    return Student(1, sizes, (1, 1), 1, 1, Memory(1, 1, 1, 1, 1, 0, 0, "nothing"))


def test_savings_are_of_runs_that_share_a_teacher(tiny) -> None:
    words = [w for w in tiny if not w.startswith(("teacher", "distill", "data", "train"))]
    known = Known()
    runs = [
        run_cost(compose([*words, "train.epochs=3", *more]), known)
        for more in (["seed=1"], ["seed=2"], ["augment.seed=1"], ["teacher=none", "distill=none"])
    ]
    steps = make_plan(compose(words).config, 1437, 1).steps_per_epoch
    found = {saving.runs: saving for saving in savings(runs)}
    assert found.keys() == {1, 2}
    assert found[2].live_images == 2 * 3 * steps * 64 and found[2].stored_images == 3 * 1437
    assert found[2].macs == (found[2].live_images - 3 * 1437) * runs[0].teacher_macs
    assert found[1].macs < 0  # three draws of its own for three epochs

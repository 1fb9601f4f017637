"""`detect` from the command line: train, resume, evaluate again, on one and on two processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from boxes import make_coco, read_annotations, write_coco
from helpers import only_run
from safetensors.torch import load_file
from test_resume_within_an_epoch import assert_equal

from ghosttrain import load_run
from ghosttrain.data.datasets import build_datasets
from ghosttrain.data.loader import eval_loader
from ghosttrain.detect.coco_numbers import NAMES, Found, measure
from ghosttrain.engine.load import load_detector
from ghosttrain.engine.rows import read_metrics
from ghosttrain.engine.run_files import read_config
from ghosttrain.errors import UserError
from ghosttrain.models.create import create_model
from ghosttrain.optim.ema import Ema

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    make_coco(root)
    return root


@pytest.fixture
def words(coco, tmp_path):
    return [
        "+recipe=detect_ssdlite",
        "model=ghostnetv3_050",
        "data=coco",
        f"data.root={coco}",
        "data.train_size=64",
        "data.eval_size=64",
        "data.workers=0",
        "train.global_batch=8",
        "train.epochs=2",
        "schedule.warmup_epochs=0",
        "tracker.log_every=1",
        "launch.device=cpu",
        f"run.root={tmp_path / 'runs'}",
    ]


def test_a_run_leaves_what_a_run_leaves_and_is_measured_again(ghosttrain, words, coco, tmp_path):
    """The reported numbers are those of the saved weights, computed image by image."""
    done = ghosttrain("detect", *words)
    assert done.code == 0, done.err
    run = only_run(tmp_path / "runs")
    result = json.loads((run / "result.json").read_text())
    assert {*result["weights"]} == {"raw", "ema", "fused"} and result["fuse_max_diff"] < 1e-3
    assert {*NAMES} < {*result["weights"]["ema"]} and result["ignoring"]["n"] == 8
    assert "detector: ssdlite on ghostnetv3_050" in done.out and "no look" in done.out
    assert (run / "curves.png").is_file() and "detect eval" in (run / "card.md").read_text()
    rows = read_metrics(run)
    first = next(row for row in rows if row["kind"] == "train")
    assert first["loss"] == pytest.approx(first["class"] + first["box"], rel=1e-5)
    assert [row["ema_ap"] for row in rows if row["kind"] == "eval"]

    config = read_config(run)
    detector = load_detector(run)
    saved = load_file(run / "model.safetensors")
    assert all(torch.equal(value, saved[key]) for key, value in detector.state_dict().items())
    held_out, found = build_datasets(config.data)[1], {}
    with eval_loader(held_out, config.data, torch.device("cpu")) as loader, torch.no_grad():
        for batch in loader.batches([[i] for i in range(len(held_out))]):
            (each,) = detector(batch.images)
            corners = each["boxes"].double().numpy() * [80 / 64, 1, 80 / 64, 1]
            found[int(batch.indices)] = Found(
                corners, each["scores"].double().numpy(), each["labels"].numpy() - 1
            )
    alone = measure(held_out.boxes, held_out.classes, found).row
    assert result["weights"]["ema"]["ap"] == pytest.approx(alone["ap"], abs=0.5)

    again = ghosttrain("detect", "eval", run)
    assert again.code == 0 and again.out.count("as reported") == 3, again.out
    page = ghosttrain("detect", "show", run, "--top", "3")
    assert page.code == 0 and "Worst first: the lowest F1 of an image" in page.out, page.err
    assert f"AP {result['weights']['ema']['ap']:.2f} % of 8 held-out images" in page.out
    worst = [float(line.split("F1 ")[1][:4]) for line in page.out.splitlines()[1:-1]]
    assert len(worst) == 3 and worst == sorted(worst)
    text = (run / "detections.html").read_text()
    assert text.count("<article>") == text.count("data:image/jpeg") == 3 and "http" not in text
    for kind in ("raw", "ema", "fused"):
        assert f"<td>{result['weights'][kind]['ar10']:.2f}</td>" in text
    assert all(f"<tr><td>{name}</td>" in text for name in ("disc", "bar", "AR small"))
    other = tmp_path / "other"
    shutil.copytree(coco, other)
    cut = other / "val2017" / "0001.jpg"
    cut.write_bytes(cut.read_bytes()[:600])
    elsewhere = [f"data.root={other}", "data.on_error=skip"]
    skipped = ghosttrain("detect", "show", run, *elsewhere, "--out", tmp_path / "skipped.html")
    assert skipped.code == 0 and "1 of 8 held-out images cannot be read" in skipped.out, skipped.err
    text = (tmp_path / "skipped.html").read_text()
    assert (text.count("<article>"), text.count("data:image/jpeg")) == (8, 7)
    (article,) = (part for part in text.split("<article>") if "0001.jpg" in part)
    boxes = held_out.boxes.corners[held_out.boxes.of(1)]
    assert 'viewBox="0 0 320 256"' in article and ">cannot be read</text>" in article
    assert all(f'x="{left * 4:.1f}" y="{top * 4:.1f}"' in article for left, top, *_ in boxes)
    assert "<th>no look</th>" in text and "other images" not in skipped.out

    content = read_annotations(other, "val2017")
    content["images"][2]["width"] = 90  # not what the file has: its boxes cannot be placed
    content["images"].pop()
    write_coco(other, "val2017", content)
    foreign = ghosttrain("detect", "show", run, *elsewhere, "--out", tmp_path / "foreign.html")
    assert "These are other images" in foreign.out and "2 of 7" in foreign.out, foreign.err
    text = (tmp_path / "foreign.html").read_text()
    ap = foreign.out.splitlines()[-1].split()[1]
    assert f"<tr><td>AP</td><td>{ap}</td></tr>" in text and "no look" not in text
    assert "These are other images" in text and text.count("data:image/jpeg") == 5
    measured = ghosttrain("detect", "eval", run, *elsewhere)
    assert measured.code == 0 and ap in measured.out, measured.err
    assert "no look" not in measured.out and "as reported" not in measured.out

    half = tmp_path / "half"
    shutil.copytree(run, half)
    (half / "result.json").unlink()
    for words_of_it, said in (
        (["show", half], "has no result yet"),
        (["show", run, "--top", "0"], "--top 0"),
        (["eval", run, "--out", "x.html"], "type detect show RUN --out x.html"),
        (["eval", run, "--top", "16"], "type detect show RUN --top 16"),
        (["--top", "3"], "type detect show RUN --top 3"),
        (["show", run, "launch.nproc=2"], "for one process, not for 2"),
    ):
        wrong = ghosttrain("detect", *words_of_it)
        assert wrong.code == 2 and said in wrong.err and wrong.err.count("\n") == 1, wrong.err
    held_out_only = tmp_path / "held_out_only"
    shutil.copytree(coco, held_out_only, ignore=shutil.ignore_patterns("*train2017*"))
    alone = ghosttrain("detect", "eval", run, f"data.root={held_out_only}")
    assert alone.code == 0 and alone.out.count("   as reported") == 3, alone.err
    content = read_annotations(held_out_only, "val2017")
    content["categories"] = [{**row, "name": "x" + row["name"]} for row in content["categories"]]
    write_coco(held_out_only, "val2017", content)
    none_known = ghosttrain("detect", "eval", run, f"data.root={held_out_only}")
    assert none_known.code == 2 and none_known.err.count("\n") == 1, none_known.err
    assert "no box of a class that" in none_known.err and "(disc, bar)" in none_known.err
    larger = ghosttrain("detect", "eval", run, "data.eval_size=96")
    assert larger.code == 2 and larger.err.count("\n") == 1
    assert "the anchors of this run are those of 64 px" in larger.err
    shown = ghosttrain("detect", *words)
    assert shown.code == 0 and shown.out.startswith("finished: ")
    reported = ghosttrain("report", run)
    assert reported.code == 0 and "EMA AP %" in reported.out
    for verb in ("eval", "predict", "fuse", "wrong"):
        refused = ghosttrain(verb, run, *([f"{coco}/val2017"] if verb == "predict" else []))
        assert refused.code == 2 and "detect eval" in refused.err, (verb, refused.err)
        assert refused.err.count("\n") == 1
    with pytest.raises(UserError, match="detect eval"):
        load_run(run)


def test_a_detector_stopped_within_an_epoch_ends_the_same(ghosttrain, words, tmp_path, monkeypatch):
    """Accumulation, workers, crops and jitter are on; the backbone is trained collapsed."""
    words = [
        *words, "train.save_every=1steps", "train.micro_batch=4", "data.workers=1",
        "augment.scale_jitter=0.2", "augment.photometric=true", "augment.zoom_out=2",
    ]  # fmt: skip
    whole = tmp_path / "whole"
    assert ghosttrain("detect", *words, f"run.root={whole}").code == 0
    steps, update = [], Ema.update

    def stopping(self: Ema, model: torch.nn.Module) -> None:
        if len(steps) == 3:
            raise KeyboardInterrupt
        steps.append(1)
        update(self, model)

    with monkeypatch.context() as patch:
        patch.setattr(Ema, "update", stopping)
        assert ghosttrain("detect", *words).code == 130
    resumed = ghosttrain("detect", *words)
    assert resumed.code == 0 and "resumed in epoch 2, step 3" in resumed.out, resumed.out
    assert_equal(only_run(tmp_path / "runs"), only_run(whole))


def test_two_processes_measure_what_one_does(ghosttrain, words, tmp_path):
    """SSDLite, which keeps boxes of low scores after a step already; shares of 4 and of 3 images,
    one at a time, so that both ways compute the same of each.
    """
    make_coco(tmp_path / "seven", val=7)
    words = [*words, "model=mobilenetv2_050", "reparam=none", "train.max_steps=1",
             "train.sync_bn=true", "train.eval_batch=1"]  # fmt: skip
    words.remove("model=ghostnetv3_050")
    words = [f"data.root={tmp_path / 'seven'}" if w.startswith("data.root") else w for w in words]
    command = [sys.executable, "-m", "ghosttrain", "detect", *words, "launch.nproc=2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "of all ranks together" in done.stdout
    table = json.loads((only_run(tmp_path / "runs") / "result.json").read_text())["weights"]
    assert all(row["n"] == 7 and row["ar100"] > 0 for row in table.values()), table
    again = ghosttrain("detect", "eval", only_run(tmp_path / "runs"))
    assert again.code == 0 and again.out.count("   as reported") == 3, again.out


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    [
        ["model=timm", "model.name=mobilenetv3_small_050"],
        ["model=torchvision", "model.name=mobilenet_v3_small"],
    ],
)
def test_backbones_of_others_train(ghosttrain, words, tmp_path, source):
    done = ghosttrain("detect", *words, *source, "train.max_steps=1")
    assert done.code == 0, done.err
    result = json.loads((only_run(tmp_path / "runs") / "result.json").read_text())
    assert {*result["weights"]} == {"raw", "ema"}


@pytest.mark.slow
def test_compiled_it_learns_as_it_does_otherwise(ghosttrain, words, tmp_path):
    words = [*words, "model=mobilenetv2_050", "reparam=none", "train.max_steps=1"]
    words.remove("model=ghostnetv3_050")
    losses = []
    for compiled in ("false", "true"):
        root = tmp_path / compiled
        done = ghosttrain("detect", *words, f"train.compile={compiled}", f"run.root={root}")
        assert done.code == 0, done.err
        rows = read_metrics(only_run(root))
        losses.append(next(row["loss"] for row in rows if row["kind"] == "train"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)  # other orders of sums


@pytest.mark.slow
def test_a_sweep_and_a_search_go_by_ap(ghosttrain, words):
    words = [*words, "model=mobilenetv2_050", "reparam=none", "train.max_steps=1"]
    words.remove("model=ghostnetv3_050")
    swept = ghosttrain("train", "-m", *words, "seed=0,1")
    assert swept.code == 0 and "2 of 2 runs finished" in swept.out, swept.err
    assert "EMA AP50 %" in swept.out and "top-1" not in swept.out
    pytest.importorskip("optuna")
    search = ["hydra/sweeper=optuna", "optim.lr=interval(0.001,0.01)", "hydra.sweeper.n_trials=1"]
    searched = ghosttrain("train", "-m", *words, *search)
    assert searched.code == 0 and "| trial | EMA AP % |" in searched.out, searched.err


def test_a_frozen_backbone_stays_and_the_rest_learns(ghosttrain, words, tmp_path):
    backbone = create_model("mobilenetv2_050", 5, reparam="none")
    torch.save(backbone.state_dict(), tmp_path / "weights.pth")
    words.remove("model=ghostnetv3_050")
    done = ghosttrain(
        "detect", *words, "model=mobilenetv2_050", "reparam=none", "train.max_steps=1",
        f"model.weights={tmp_path / 'weights.pth'}", "model.freeze=backbone", "optim.lr=0.1",
        "optim.layer_decay=0.9",
    )  # fmt: skip
    assert done.code == 0 and "frozen: backbone" in done.out, done.err
    found = load_detector(only_run(tmp_path / "runs"), "raw").state_dict()
    prefix = "backbone.backbone.network."
    kept = {key: value for key, value in found.items() if key.startswith(prefix)}
    assert len(kept) > 100
    for key, value in kept.items():
        assert torch.equal(value, backbone.state_dict()[key.removeprefix(prefix)]), key
    biases = [value for key, value in found.items() if key.startswith("head") and "bias" in key]
    assert len(biases) > 20 and all(value.any() for value in biases)  # they began at 0


def test_a_backbone_that_has_learnt_is_taken_from_a_run(ghosttrain, words, tiny, tmp_path):
    tiny = [word.replace("shufflenetv2_050", "ghostnetv3_050") for word in tiny]
    classes = ghosttrain(*tiny, "train.max_steps=1", f"run.root={tmp_path / 'first'}")
    assert classes.code == 0, classes.err
    run = only_run(tmp_path / "first")
    done = ghosttrain("detect", *words, f"model.weights={run}", "train.max_steps=1",
                      "optim.lr=1e-12", "ema.decay=0")  # fmt: skip
    assert done.code == 0, done.err
    backbone = load_file(run / "model.safetensors")
    found = load_file(only_run(tmp_path / "runs") / "model.safetensors")
    prefix = "backbone.backbone.network."
    own = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
    weights = [k for k in own if k.endswith("conv.weight")]
    assert len(weights) > 50
    for key in weights:
        torch.testing.assert_close(own[key], backbone[key], rtol=0, atol=1e-6)
    other = ghosttrain("detect", *words, f"model.weights={run}", "model=mobilenetv2_050")
    assert other.code == 2 and other.err.count("\n") == 1 and "ghostnetv3_050" in other.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data=digits"], "learns from boxes, and data=digits has none"),
        (["distill=kl", "teacher=digits"], "distill.name=kl is not for detector=ssdlite"),
        (["train.cuda_graph=true"], "type train.cuda_graph=false"),
        (["train.best_by=top1"], "type train.best_by=ap"),
        (["train.label_smoothing=0.2"], "leave train.label_smoothing out"),
        (["data.eval_size=96"], "type data.eval_size=64"),
        (["detector.channels=32"], "detector.channels=32 would do nothing"),
        (["augment.erasing_prob=0.5"], "reads photometric, zoom_out, iou_crop, scale_jitter"),
        (["augment=none", "augment.zoom_out=2"], "augment.zoom_out=2.0 would do nothing"),
        (["augment=compact"], "type augment.policy=boxes"),
        (["model.input_stride=small"], "not of 32"),
        (["train.micro_batch=1"], "train.micro_batch=2 or more"),
        (["data.train_size=8", "data.eval_size=8"], "8"),
        (["data.val_split=x"], "instances_x.json"),
        (["detector=none", "augment=none"], "has boxes, not one class for each image"),
    ],
)
def test_mistakes_are_one_line(ghosttrain, words, tmp_path, changes, message):
    words = [word for word in words if word.partition("=")[0] not in
             {change.partition("=")[0] for change in changes}]  # fmt: skip
    if "data=digits" in changes:
        words = [word for word in words if not word.startswith("data.root=")]
    refused = ghosttrain("detect", *words, *changes)
    assert refused.code == 2 and refused.err.count("\n") == 1, refused.err
    assert message in refused.err and "Traceback" not in refused.err


def test_annotations_that_cannot_be_used_are_one_line(ghosttrain, words, coco, tmp_path):
    content = read_annotations(coco, "val2017")
    bad = {**content, "annotations": [{**content["annotations"][0], "bbox": [float("nan")] * 4}]}
    write_coco(coco, "val2017", bad)
    try:
        refused = ghosttrain("detect", *words)
        assert refused.code == 2 and "not finite" in refused.err
        write_coco(coco, "val2017", {**content, "annotations": []})
        refused = ghosttrain("detect", *words, "run.name=other")
        assert refused.code == 2 and "has no box of a known category" in refused.err
    finally:
        write_coco(coco, "val2017", content)


def test_scenes_train_by_the_command_alone(ghosttrain, tmp_path):
    done = ghosttrain(
        "detect", "model=mobilenetv2_050", "reparam=none", "train.max_steps=1",
        "train.global_batch=2", "data.train_size=32", "data.eval_size=32", "data.workers=0",
        "launch.device=cpu", f"run.root={tmp_path}",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "synthetic scenes" in done.out and "the embedded set; COCO" in done.out
    assert read_config(only_run(tmp_path)).recipe == "detect_ssdlite"
    wrong = ghosttrain("detect", "shoe")
    assert wrong.code == 2 and "detect eval RUN" in wrong.err

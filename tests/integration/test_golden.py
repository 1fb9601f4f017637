"""Two small runs whose losses are kept in golden.json, and the accuracy of their saved weights.

`learner` is a network of timm without batch norm, whose loss falls to less than half. It does not
amplify rounding: between processors (AVX-512, AVX2, neither; 1 and 2 threads; with and without the
C++ kernels) its losses differed by 2e-7 at most, and every step is held to 1e-4. `student` is a
GhostNetV3 with all its branches, taught by it. Its batch norms amplify a rounding error tenfold
with every step: the first two steps differed by 2e-6 at most and are held to 1e-4, the later ones
by 2 % at most and are held to 10 %.

When numbers change on purpose, make the file anew, and say why in the commit:

    .venv/bin/python tests/integration/test_golden.py
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pytest
import timm
import torch
from helpers import only_run
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from ghosttrain import create_model, load_run
from ghosttrain.cli import main
from ghosttrain.models.reparam import fuse

GOLDEN = Path(__file__).with_name("golden.json")
CLASSES, TRAIN, HELD_OUT, SIDE, CROP = 6, 16, 20, 50, 40
MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.2, 0.2)
STUDENT_STEPS, STUDENT_WIDTH = 2, 0.1


@dataclass
class Run:
    folder: Path
    losses: list[float]
    result: dict[str, Any]


def make_images(root: Path) -> None:
    """A bright stripe in noise: where it is, and which way, says the class; the held-out ones are
    faint."""
    rng = np.random.default_rng(0)
    for split, count, contrast in (("train", TRAIN, (30, 60)), ("val", HELD_OUT, (0, 25))):
        for label in range(CLASSES):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 180, (SIDE, SIDE, 3), dtype=np.uint8)
                stripe = slice(8 + 12 * (label % 3), 20 + 12 * (label % 3))
                where = (stripe, slice(None)) if label < 3 else (slice(None), stripe)
                pixels[where] += rng.integers(*contrast, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")


def trained(images: Path, root: Path, *settings: str) -> Run:
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet):
        code = main(
            [
                "+recipe=compact_kd",
                "data=folder",
                "budget=full",
                f"data.root={images}",
                f"data.train_size={CROP}",
                f"data.eval_size={CROP}",
                f"data.crop_pct={CROP / SIDE}",
                f"data.mean={list(MEAN)}".replace(" ", ""),
                f"data.std={list(STD)}".replace(" ", ""),
                "data.flip=false",
                "model.dropout=0.0",  # torch draws its masks otherwise where it has no MKL
                "data.workers=0",
                "train.global_batch=32",
                "optim.lr_batch=32",
                "schedule.warmup_epochs=1",
                "ema.decay=0.8",
                "tracker.log_every=1",
                "launch.device=cpu",
                f"run.root={root}",
                *settings,
            ]
        )
    assert code == 0
    folder = only_run(root)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    return Run(folder, losses, json.loads((folder / "result.json").read_text()))


def train_learner(images: Path, root: Path) -> Run:
    return trained(
        images,
        root,
        "teacher=none",
        "distill=none",
        "model=timm",
        "model.name=test_convnext",
        "optim.lr=0.05",
        "train.epochs=12",
        "augment.scale_min=0.5",
        "augment.randaugment_ops=0",
        "augment.erasing_prob=0.1",
    )


def train_student(images: Path, root: Path, teacher: Path) -> Run:
    return trained(
        images,
        root,
        "model=ghostnetv3_050",
        "teacher=timm",
        "teacher.name=test_convnext",
        f"teacher.weights={teacher / 'model.safetensors'}",
        f"teacher.input_size={CROP}",
        f"teacher.mean={list(MEAN)}".replace(" ", ""),
        f"teacher.std={list(STD)}".replace(" ", ""),
        "distill=kl",
        "optim.lr=0.01",
        "train.epochs=2",
    )


# --- the same accuracy, computed another way ------------------------------------------------------


def networks(run: Run, make: Callable[[], nn.Module]) -> dict[str, nn.Module]:
    """Return the run's networks, from its files of weights alone."""
    raw = torch.load(run.folder / "checkpoints" / "last.pt", weights_only=True)["student"]
    found = {}
    for name, state in (("raw", raw), ("ema", load_file(run.folder / "model.safetensors"))):
        found[name] = make().eval()
        found[name].load_state_dict(state)
    return found


def measured(images: Path, network: nn.Module) -> dict[str, float]:
    """Return top-1, top-5, n and the mean cross-entropy on the held-out images, and how many of
    them are so close to being a hit or a miss that rounding may decide.
    """
    arrays, labels = [], []
    start = (SIDE - CROP) // 2
    for label, folder in enumerate(sorted((images / "val").iterdir())):
        for file in sorted(folder.iterdir()):
            pixels = np.array(Image.open(file), np.float64)
            arrays.append(pixels[start : start + CROP, start : start + CROP] / 255)
            labels.append(label)
    x = ((np.stack(arrays) - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32)
    with torch.no_grad():
        logits = network(torch.from_numpy(x)).double().numpy()
    true_logit = logits[range(len(labels)), labels]
    others = logits[np.arange(CLASSES) != np.array(labels)[:, None]].reshape(len(labels), -1)
    first, _, _, _, fifth = -np.sort(-others, axis=1).T
    log_sum = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
    return {
        "top1": 100 * int((true_logit > first).sum()) / len(labels),
        "top5": 100 * int((true_logit > fifth).sum()) / len(labels),
        "n": len(labels),
        "cross_entropy": float((log_sum - true_logit).mean()),
        "close": int((np.minimum(abs(true_logit - first), abs(true_logit - fifth)) < 1e-4).sum()),
    }


def learner_network() -> nn.Module:
    return timm.create_model("test_convnext", num_classes=CLASSES)


def student_network() -> nn.Module:
    return create_model("ghostnetv3_050", CLASSES)


# --- the tests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stripes")
    make_images(root)
    return root


@pytest.fixture(scope="module")
def learner(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_learner(images, tmp_path_factory.mktemp("learner"))


@pytest.fixture(scope="module")
def student(images: Path, learner: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_student(images, tmp_path_factory.mktemp("student"), learner.folder)


def test_the_learner_learns_as_it_did(learner: Run, golden: dict[str, Any]) -> None:
    assert learner.losses == pytest.approx(golden["learner"], rel=1e-4)
    assert min(learner.losses[-3:]) < learner.losses[0] / 2


def test_the_student_starts_as_it_did(student: Run, golden: dict[str, Any]) -> None:
    first, rest = student.losses[:STUDENT_STEPS], student.losses[STUDENT_STEPS:]
    assert first == pytest.approx(golden["student"][:STUDENT_STEPS], rel=1e-4)
    assert rest == pytest.approx(golden["student"][STUDENT_STEPS:], rel=STUDENT_WIDTH)


@pytest.mark.parametrize("name", ["learner", "student"])
def test_the_reported_accuracy_is_that_of_the_saved_weights(
    images: Path, name: str, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(name)
    found = networks(run, {"learner": learner_network, "student": student_network}[name])
    if name == "student":
        found["fused"] = fuse(found["ema"])
    assert run.result["weights"].keys() == found.keys()
    for which, network in found.items():
        value, reported = measured(images, network), run.result["weights"][which]
        per_image = 100 / value["n"]
        assert reported["n"] == value["n"] and value["close"] <= 2
        for key in ("top1", "top5"):
            assert abs(reported[key] - value[key]) <= value["close"] * per_image + 1e-9


def test_load_run_gives_the_saved_weights(learner: Run, tmp_path: Path) -> None:
    unfinished = tmp_path / "run"
    shutil.copytree(learner.folder, unfinished)
    (unfinished / "model.safetensors").unlink()
    for name, network in networks(learner, learner_network).items():
        for folder in (learner.folder, unfinished):
            state = load_run(folder, weights=name).state_dict()
            for key, tensor in network.state_dict().items():
                assert torch.equal(state[key], tensor), (name, folder, key)


def test_the_learners_accuracy_is_what_it_was(
    images: Path, learner: Run, golden: dict[str, Any]
) -> None:
    for which, network in networks(learner, learner_network).items():
        assert measured(images, network) == pytest.approx(golden["held_out"][which], rel=1e-4)
    assert golden["held_out"]["raw"] != golden["held_out"]["ema"]


def write() -> None:
    """Run both and write the golden file."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_images(root / "images")
        learner = train_learner(root / "images", root / "learner")
        student = train_student(root / "images", root / "student", learner.folder)
        held_out = {
            name: measured(root / "images", network)
            for name, network in networks(learner, learner_network).items()
        }
    golden = {"learner": learner.losses, "student": student.losses, "held_out": held_out}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    print(GOLDEN.read_text())


if __name__ == "__main__":
    write()

"""What the faster way from file to batch costs in quality: decoding costs nothing, it is equal to
the bit; resampling no answer of a network but those that its margin leaves open (slow)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.imagenet_info import ImageNetInfo

from ghosttrain.config.schema import DataConfig, TeacherConfig
from ghosttrain.data.datasets import build_datasets
from ghosttrain.data.loader import eval_loader
from ghosttrain.distill.teacher import build_teacher
from ghosttrain.study.photos import all_photos, write_crops

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.mark.slow
def test_both_decoders_train_the_same_weights(tmp_path: Path) -> None:
    write_crops(all_photos(), tmp_path / "photos", 64, classes=4)
    weights = {}
    for decoder in ("simplejpeg", "pillow"):
        words = [
            "+recipe=compact_kd", "teacher=none", "distill=none", "model=shufflenetv2_050",
            "data=folder", f"data.root={tmp_path / 'photos'}", "data.train_size=64",
            "data.eval_size=64", "train.global_batch=16", "train.epochs=3", "data.workers=1",
            "launch.device=cpu", f"data.decoder={decoder}", f"run.name={decoder}",
        ]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "ghosttrain", *words], cwd=tmp_path, capture_output=True,
            text=True, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"JPEGs decoded by {decoder}" in done.stdout
        weights[decoder] = (tmp_path / "runs" / decoder / "model.safetensors").read_bytes()
    assert weights["simplejpeg"] == weights["pillow"]


@pytest.mark.slow
def test_a_teacher_names_the_same_five_classes_of_photographs(tmp_path: Path) -> None:
    write_crops(all_photos(), tmp_path, 256)
    data = DataConfig(name="folder", root=str(tmp_path), workers=0)
    train, _ = build_datasets(data)
    classes = ImageNetInfo("imagenet-1k").label_names()
    teacher = build_teacher(
        TeacherConfig(name="tf_efficientnet_lite0", weights="efficientnet-lite"), classes, data, CPU
    )
    assert teacher is not None
    logits: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for decoder in ("simplejpeg", "pillow"):
            with eval_loader(train, data.model_copy(update={"decoder": decoder}), CPU) as loader:
                batches = loader.batches([list(range(k, k + 32)) for k in range(0, 256, 32)])
                logits[decoder] = torch.cat([teacher(b.images).logits for b in batches])
        transform = create_transform(
            224, crop_pct=0.875, interpolation="bicubic", mean=data.mean, std=data.std
        )
        images = [transform(Image.open(train.path(k)).convert("RGB")) for k in range(256)]
        logits["timm"] = torch.cat([teacher(torch.stack(x)).logits for x in _chunks(images, 32)])
    assert torch.equal(logits["simplejpeg"], logits["pillow"])
    ours, theirs = logits["simplejpeg"], logits["timm"]
    moved = (ours - theirs).abs().amax(dim=1)
    six = theirs.topk(6).values
    margin = six[:, 4] - six[:, 5]
    same = (ours.topk(5).indices.sort(1).values == theirs.topk(5).indices.sort(1).values).all(1)
    clear = margin > 2 * moved
    print(
        f"top-5 sets: {same.sum()} of 256 equal; {clear.sum()} have a margin above twice the"
        f" difference, of which {(same & clear).sum()} are equal; difference of a logit: mean"
        f" {moved.mean():.4f}, largest {moved.max():.4f}"
    )
    assert same[clear].all() and clear.sum() > 128


def _chunks(items: list[torch.Tensor], size: int) -> list[list[torch.Tensor]]:
    return [items[k : k + size] for k in range(0, len(items), size)]

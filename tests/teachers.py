"""Small teachers on local files."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import nn

from ghosttrain.config import schema
from ghosttrain.distill.teacher import Member, Teacher, build_teacher

CLASSES = ["ant", "bee", "cat", "dog"]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
ARCHITECTURE = "test_resnet"  # timm's own miniature: 160 pixels, bilinear, mean and std 0.5


def network(num_classes: int = 4, in_chans: int = 3, seed: int = 0) -> nn.Module:
    """Return a network with statistics as after training, so that no tensor keeps its start."""
    torch.manual_seed(seed)
    model = timm.create_model(ARCHITECTURE, num_classes=num_classes, in_chans=in_chans).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.1)
    return model


def build(classes: list[str] | None = None, in_chans: int = 3, **settings) -> Teacher:
    cfg = schema.TeacherConfig(**{"name": ARCHITECTURE, **settings})
    mean, std = (MEAN, STD) if in_chans == 3 else (MEAN[:1], STD[:1])
    data = schema.DataConfig(mean=mean, std=std, in_chans=in_chans, train_size=40)
    return build_teacher(cfg, classes or CLASSES, data, "cpu")  # type: ignore[return-value]


def only(teacher: Teacher) -> Member:
    """Return the member of a teacher of one network."""
    (member,) = teacher.members.values()
    return member  # type: ignore[return-value]


def saved(tmp_path: Path, model: nn.Module, name: str = "weights.safetensors") -> str:
    save_file(model.state_dict(), tmp_path / name)
    return str(tmp_path / name)

"""A new family of students is one module and its rows: nothing else knows it.

This file is that module too: its class is what `FAMILIES` names.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ghosttrain.config.schema import ReparamConfig
from ghosttrain.config.students import FAMILIES, STUDENTS, Family, Sides, StudentRow
from ghosttrain.engine.load import load_run
from ghosttrain.models.create import create_model
from ghosttrain.models.layers import Student as StudentModule
from ghosttrain.models.layers import start_small
from ghosttrain.models.reparam import RepConv2d, fuse, make_stem

NAME = "tinynet"  # without a width


class TinyNet(StudentModule):
    """Two re-parameterized convolutions."""

    num_features = 8

    def __init__(
        self,
        name: str,
        channels: int,
        num_classes: int = 10,
        in_chans: int = 3,
        *,
        reparam: ReparamConfig,
        dropout: float = 0.0,
        input_stride: str = "standard",
    ) -> None:
        super().__init__(name, num_classes, in_chans, dropout, input_stride)
        self.stem = make_stem(in_chans, channels, input_stride, reparam)
        self.body = nn.Sequential(
            RepConv2d(channels, channels, 3, 2, channels, reparam=reparam),
            RepConv2d(channels, 8, 1, reparam=reparam),
        )
        self.classifier = nn.Linear(8, num_classes)
        start_small(self.classifier)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to (B, 8, H / 4, W / 4)."""
        return self.body(self.stem(x).relu()).relu()


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = {"standard": Sides(9, 16), "small": Sides(5, 8)}
    monkeypatch.setitem(FAMILIES, "tiny", Family(__name__, "TinyNet", "body.1", sides))
    monkeypatch.setitem(STUDENTS, NAME, StudentRow("tiny", {"channels": 6}))


def test_it_is_created_fused_saved_and_loaded_in_both_forms(family, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model(NAME, 4)
    images = torch.randn(8, 3, 16, 16)
    model(images).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    fused = fuse(model.eval())
    for form, options in ((model, {}), (fused, {"fused": True}), (model, {"fused": True})):
        save_file(form.state_dict(), tmp_path / "x.safetensors")
        weights = str(tmp_path / "x.safetensors")
        loaded = create_model(NAME, 4, weights=weights, **options).eval()
        torch.testing.assert_close(loaded(images), model(images), rtol=1e-4, atol=1e-5)
        assert loaded.weights_dialect == ("fused" if form is fused else "ghosttrain")
    with pytest.raises(ValueError, match="holds fused weights"):
        save_file(fused.state_dict(), tmp_path / "x.safetensors")
        create_model(NAME, 4, weights=str(tmp_path / "x.safetensors"))


def test_a_run_trains_it_and_another_library_has_none(family, ghosttrain, tmp_path: Path) -> None:
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "own" / "model" / f"{NAME}.yaml").write_text(f"name: {NAME}\n")
    small = ["data.train_size=16", "data.eval_size=16", "data.workers=0", f"run.root={tmp_path}"]
    arguments = ["+recipe=baseline", f"model={NAME}", "--config-dir", str(tmp_path / "own"), *small]
    refused = ghosttrain(*arguments, "data.train_size=8")
    assert refused.code == 2 and "takes images of at least 9x9" in refused.err
    outcome = ghosttrain(*arguments, "train.max_steps=2", "train.eval_batch=360", "run.name=tiny")
    assert outcome.code == 0, outcome.err
    result = json.loads((tmp_path / "tiny" / "result.json").read_text())
    assert result["model"]["name"] == NAME and result["fuse_max_diff"] < 1e-4
    assert ghosttrain("fuse", str(tmp_path / "tiny")).code == 0
    weights = str(tmp_path / "tiny" / "model.fused.safetensors")
    again = create_model(NAME, 10, weights=weights, fused=True).eval()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(again(images), load_run(tmp_path / "tiny", "fused")(images))
    refused = ghosttrain("fuse", str(tmp_path / "tiny"), "--to", "timm")
    assert refused.code == 2 and "has no network for tinynet" in refused.err

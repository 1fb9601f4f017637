"""`fuse RUN` writes nothing where the fused form computes something else."""

from __future__ import annotations

import pytest
import torch

from ghosttrain.config.schema import PLAIN, Config, DataConfig, ModelConfig
from ghosttrain.engine import fuse
from ghosttrain.engine.run_files import write_config
from ghosttrain.engine.student import build_student
from ghosttrain.engine.weights_file import describe_weights, write_weights
from ghosttrain.errors import UserError


@pytest.mark.parametrize("fault", ["none", "other", "nan"])
def test_a_fused_form_that_differs_is_not_written(tmp_path, monkeypatch, capsys, fault):
    data = DataConfig(eval_size=32, train_size=32)
    config = Config(model=ModelConfig(name="mobilenetv2_050"), reparam=PLAIN, data=data)
    torch.manual_seed(0)
    model = build_student(config, ["a", "b"])
    write_config(tmp_path, config)
    about = describe_weights(config, ["a", "b"], "ema")
    write_weights(tmp_path / "model.safetensors", model, about)
    real = fuse.load_run

    def load_run(folder, weights):
        loaded = real(folder, weights)
        if weights == "fused" and fault != "none":
            value = 0.1 if fault == "other" else float("nan")
            with torch.no_grad():
                list(loaded.parameters())[-1].add_(value)
        return loaded

    monkeypatch.setattr(fuse, "load_run", load_run)
    if fault == "none":
        assert fuse.fuse_run(tmp_path).is_file()
        assert "largest difference of a logit" in capsys.readouterr().out
        return
    with pytest.raises(UserError, match="differs from the trained one by .*: nothing was written"):
        fuse.fuse_run(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "model.safetensors"]

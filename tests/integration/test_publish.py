"""`publish`: folders that timm and torchvision load, and what goes to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import yaml
from safetensors.torch import load_file

from ghosttrain import load_run
from ghosttrain.cli import main
from ghosttrain.engine.run_files import read_result


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    words = ["train.max_steps=4", "train.global_batch=32", "launch.device=cpu", f"run.root={root}"]
    models = {
        "plain": ["model=mobilenetv2_050"],
        "branches": ["model=ghostnetv3_050", "reparam=full"],
        "shuffle": ["model=shufflenetv2_050"],
        "timm": ["model=timm", "model.name=lcnet_035"],
    }
    for name, model in models.items():
        assert main(["+recipe=baseline", *model, *words, f"run.name={name}"]) == 0
    return {name: root / name for name in models}


@pytest.mark.parametrize("name", ["plain", "branches", "timm"])
def test_timm_loads_the_folder(runs: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = tmp_path / "out"
    assert main(["publish", str(runs[name]), "--to-folder", str(folder)]) == 0
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    ours = load_run(runs[name])
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = ours(images)
        assert torch.allclose(model(images), expected, atol=1e-4 * float(expected.abs().max()))
    if name == "plain":  # fused: what is left of its batch norms adds a bias
        means = [v for k, v in load_file(folder / "model.safetensors").items() if "_mean" in k]
        assert means and not any(mean.any() for mean in means)
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, 64, 64)
    assert list(data["mean"]) == list(ours.transform.data.mean)
    assert model.pretrained_cfg["label_names"] == [str(k) for k in range(10)]
    card = (folder / "README.md").read_text()
    about = yaml.safe_load(card.split("---")[1])
    result = read_result(runs[name])
    assert result is not None
    row = result["weights"].get("fused" if name == "plain" else result["headline"])
    metrics = about["model-index"][0]["results"][0]["metrics"]
    assert metrics[0]["value"] == pytest.approx(row["top1"], abs=0.006)
    assert about["library_name"] == "timm" and "THIS/FOLDER" in card
    assert "Apache License" in (folder / "LICENSE").read_text()


def test_torchvision_takes_a_state_dict(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main(["publish", str(runs["shuffle"]), "--to-folder", str(folder)]) == 0
    assert "torchvision loads it" in capsys.readouterr().out
    model = torchvision.models.get_model("shufflenet_v2_x0_5", num_classes=10).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    images = torch.randn(4, 3, 64, 64)
    with torch.inference_mode():
        assert torch.allclose(model(images), load_run(runs["shuffle"])(images), atol=1e-4)
    words = ["--to-folder", str(tmp_path / "timm"), "--library", "timm"]
    assert main(["publish", str(runs["shuffle"]), *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "'timm' has no network for shufflenetv2_050" in line
    assert not (tmp_path / "timm").exists()


def test_the_hub_gets_the_folder(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    seen: dict[str, Any] = {}

    class Hub:
        def create_repo(self, name: str, **options: Any) -> str:
            seen["repo"] = name, options
            return f"https://hub/{name}"

        def upload_folder(self, repo_id: str, folder_path: str) -> None:
            seen["files"] = repo_id, sorted(path.name for path in Path(folder_path).iterdir())

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    words = ["publish", str(runs["plain"]), "--to-hub", "me/it"]
    assert main([*words, "--dry-run"]) == 0
    assert "model.safetensors" in capsys.readouterr().out and not seen
    assert main([*words, "--private"]) == 0
    assert "https://hub/me/it" in capsys.readouterr().out
    assert seen["repo"] == ("me/it", {"private": True, "exist_ok": True})
    files = ["LICENSE", "README.md", "config.json", "model.safetensors"]
    assert seen["files"] == ("me/it", files)


def test_mistakes_are_one_line(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    run = str(runs["plain"])
    for words, part in {
        (): "publish needs --to-folder D",
        ("--to-hub", "me"): "--to-hub me: give OWNER/NAME",
        ("--to-folder", str(tmp_path / "full")): "give a new or empty folder",
    }.items():
        assert main(["publish", run, *words]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert part in line
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["x"]

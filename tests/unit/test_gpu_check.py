"""scripts/gpu_check: what it says without a GPU, and what it leaves behind."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ghosttrain.files import read_json

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_check.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_lists_what_it_would_run(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    assert script.main() == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == "no CUDA device here; on a machine with one this runs:"
    assert [line.split()[0] for line in lines] == list(script.CHECKS)
    assert all(len(line.split()) > 3 for line in lines)


def test_it_leaves_a_table_and_fails_with_what_failed(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    def broken(device: torch.device) -> list[str]:
        raise AssertionError("off by 1")

    monkeypatch.setitem(script.CHECKS, "broken", broken)
    for names, code in ((["optimizer"], 0), (["optimizer", "broken"], 1)):
        file = tmp_path / f"{len(names)}.json"
        argv = ["gpu_check", *names, "--device", "cpu", "--json", str(file)]
        monkeypatch.setattr(sys, "argv", argv)
        assert script.main() == code
        checks = read_json(file, 100_000)["checks"]
        assert checks["optimizer"]["state"] == "ok" and list(checks) == names
    assert "off by 1" in checks["broken"]["lines"][-1]
    out = capsys.readouterr().out
    assert "broken          FAILED" in out and "2.json: failed: broken" in out

"""Files of weights as other trainers leave them, deployed files, and sources for students."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import pickle
import types
import zipfile
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch
from helpers import prefixed, refusal
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from ghosttrain.models.weights.files import (
    WeightsInfo,
    part_of,
    read_file,
    read_state,
)
from ghosttrain.models.weights.packing import packed

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state": {"model": s, "optimizer": {"state": {0: {"exp_avg": s["a.bias"]}}}}},
        lambda s: {"model_state_dict": s, "epoch": torch.tensor(3)},
        lambda s: {"net": s, "loss_history": torch.zeros(3)},
        lambda s: {"params": s, "ema": {"decay": torch.tensor(0.999)}},
        lambda s: {"a": {"b": {"c": {"anything": s}}}},
        lambda s: {"optimizer": {"buffers": {"x": torch.zeros(99)}}, "weights": s},
        lambda s: collections.OrderedDict(state_dict=collections.defaultdict(dict, s)),
        lambda s: prefixed("model.", s),
        lambda s: {"state_dict": prefixed("net._orig_mod.module.", s)},
        lambda s: {"state_dict": prefixed("student.backbone.model.", s)},
    ],
)
def test_a_state_dict_is_found_wherever_it_lies(tmp_path: Path, wrap: Callable) -> None:
    torch.save(wrap(TENSORS), tmp_path / "x.pth")
    content = read_file(tmp_path / "x.pth", "x")
    assert content.state.keys() == TENSORS.keys() and content.note == ""
    assert all(torch.equal(content.state[key], value) for key, value in TENSORS.items())
    assert content.about == WeightsInfo()


@pytest.mark.parametrize(
    "ema", ["state_dict_ema", "model_ema", "ema", "ema_state_dict", "params_ema"]
)
def test_an_average_is_taken_before_anything_else(tmp_path: Path, ema: str) -> None:
    averaged = {key: value + 1 for key, value in TENSORS.items()}
    torch.save({"net": TENSORS, ema: averaged}, tmp_path / "x.pth")
    content = read_file(tmp_path / "x.pth", "x")
    assert torch.equal(content.state["a.bias"], averaged["a.bias"])
    assert content.note == f"{ema} is taken, not net"


def test_a_part_of_a_larger_module_is_taken_by_the_names_that_fit() -> None:
    state = {
        **prefixed("student.", TENSORS),
        **prefixed("ema_student.", {key: value + 1 for key, value in TENSORS.items()}),
        "criterion.weight": torch.zeros(2),
        "teacher.b.weight": torch.zeros(9),
    }
    part, note = part_of(state, TENSORS.keys())
    assert torch.equal(part["a.bias"], torch.full((2,), 2.0))
    assert note == "'ema_student' of the file is taken, 4 entries beside it are not"
    del state["ema_student.a.weight"], state["ema_student.a.bias"]
    assert torch.equal(part_of(state, TENSORS.keys())[0]["a.bias"], torch.ones(2))
    assert part_of(state, ["other"]) == (state, "")
    extra = {**TENSORS, "b": torch.zeros(1)}
    assert part_of(extra, TENSORS.keys()) == (extra, ""), "unknown names are for fit_state to tell"


def test_what_a_file_without_weights_holds_is_said(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    message = {
        "it holds epoch (int), args (Namespace), best (dict), and no tensor by name": {
            "epoch": 3, "args": argparse.Namespace(lr=1), "best": {"top1": 3.0}},
        "it holds a list": [torch.zeros(2)],
        "it is empty": {},
        "it holds a Tensor": torch.zeros(2),
        "it holds a DictConfig": OmegaConf.create({"dir": "${x:y}"}),
    }  # fmt: skip
    for text, content in message.items():
        torch.save(content, path)
        assert f"holds no state dict: {text}." in refusal(lambda: read_state(path))


@pytest.mark.parametrize(
    "beside",
    [
        [np.float64(2.5), np.int64(3), np.float32(1), np.bool_(True), np.str_("x")],
        [np.zeros(3), np.arange(2, dtype=np.int8), np.random.RandomState(0).get_state()],
        argparse.Namespace(output=PosixPath("/out"), data={"root": Path("rel")}),
        collections.defaultdict(list, {"top1": [1.0]}),
        collections.defaultdict(dict, x=collections.defaultdict(int, y=3)),
        OmegaConf.create({"lr": 0.1, "layers": [1, {"name": "x"}], "none": None, "on": True}),
        OmegaConf.create({"dir": "${hydra:runtime.output_dir}", "seed": "???"}),
        [collections.Counter("aab"), {1, 2}, types.SimpleNamespace(a=1), slice(1, 2), range(3)],
        [datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc), datetime.timedelta(1)],
    ],
    ids=[
        "scalars",
        "arrays",
        "paths",
        "defaultdict",
        "nested",
        "omegaconf",
        "unresolved",
        "plain",
        "times",
    ],
)
def test_plain_data_of_other_trainers_is_read_over(tmp_path: Path, beside: Any) -> None:
    torch.save({"state_dict": TENSORS, "beside": beside}, tmp_path / "x.pth")
    assert read_state(tmp_path / "x.pth").keys() == TENSORS.keys()


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"),
     (b"cpathlib\nPosixPath\n", b"cpathlib._local\nPosixPath\n"),
     (b"cpathlib\nPosixPath\n", b"cpathlib\nWindowsPath\n")],
)  # fmt: skip
def test_names_of_other_versions_and_systems(tmp_path: Path, old: bytes, new: bytes) -> None:
    content = {"state_dict": TENSORS, "acc": np.float64(3.0), "out": PosixPath("/out")}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer) as read, zipfile.ZipFile(tmp_path / "x.pth", "w") as write:
        for name in read.namelist():
            data = read.read(name)
            if name.endswith("data.pkl"):
                data = data.replace(b"cnumpy.core.", b"cnumpy._core.")  # whatever is installed
                assert old in data
                data = data.replace(old, new)
            write.writestr(name, data)
    assert read_state(tmp_path / "x.pth").keys() == TENSORS.keys()


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


class Evaluated:
    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, ("open('executed', 'w')",))


@pytest.mark.parametrize("beside", [Hostile(), Evaluated(), nn.Linear(1, 1)])
def test_code_never_runs_and_the_type_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": TENSORS, "beside": beside}, "x.pth")
    message = refusal(lambda: read_state("x.pth"))
    assert "cannot be read as weights (it holds a " in message and "weights_only" not in message
    assert not Path("executed").exists()
    with open("y.pth", "wb") as file:
        pickle.dump({"state_dict": {}, "beside": beside}, file)
    refusal(lambda: read_state("y.pth"))
    assert not Path("executed").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_by_name(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    state = {"a": torch.ones(3), "n": torch.tensor(1), "b": torch.tensor([1.0, value, 2.0])}
    save_file({key: t.to(dtype) if key != "n" else t for key, t in state.items()},
              tmp_path / "x.safetensors")  # fmt: skip
    message = refusal(lambda: read_state(tmp_path / "x.safetensors"))
    assert "1 of the 3 values of b are NaN or infinite" in message and "x.safetensors" in message


def test_damaged_metadata_are_said(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for text in ("{", "3", '{"model": 3}'):
        path.write_bytes(packed(TENSORS, {"ghosttrain": text}))
        assert "damaged metadata" in refusal(lambda: read_state(path))
        save_file(TENSORS, path, metadata={"ghosttrain": text})
        refusal(lambda: read_state(path), "is damaged", "copy it again or write it anew")
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert read_state(tmp_path / "x.safetensors").keys() == TENSORS.keys()

"""The same tensors are the same file, which the library reads as its own."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import torch
from safetensors import safe_open
from safetensors.torch import load

from ghosttrain.models.weights.packing import packed

TENSORS = {
    "b": torch.arange(6.0).view(2, 3),
    "a": torch.ones(3, dtype=torch.bfloat16),
    "n": torch.tensor(7),
    "empty": torch.empty(0, 4),
}
METADATA = {name: name * 3 for name in "zyxwvutsrqp"} | {"é": '"quoted"\n'}


def test_the_library_reads_what_was_packed(tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(packed(TENSORS, METADATA))
    for name, tensor in load(path.read_bytes()).items():
        assert torch.equal(tensor, TENSORS[name]) and tensor.dtype == TENSORS[name].dtype
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == METADATA and set(file.keys()) == TENSORS.keys()
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    assert load(packed(TENSORS)).keys() == TENSORS.keys()


def test_every_process_packs_the_same_bytes() -> None:
    """The library's own order of the metadata is another one in every process."""
    code = (
        "import hashlib, torch, test_packing as t; from safetensors.torch import save\n"
        "print(hashlib.sha256(t.packed(t.TENSORS, t.METADATA)).hexdigest(),"
        " hashlib.sha256(save(t.TENSORS, t.METADATA)).hexdigest())"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.getcwd()])}
    printed = [
        subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(3)
    ]
    expected = hashlib.sha256(packed(TENSORS, METADATA)).hexdigest()
    assert {ours for ours, _ in printed} == {expected}

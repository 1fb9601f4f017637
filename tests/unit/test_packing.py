"""The same tensors are the same file, which the library reads as its own."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save_file

from ghosttrain.models.weights.packing import Damaged, packed, read_metadata, read_packed

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
        assert file.metadata().items() > METADATA.items() and set(file.keys()) == TENSORS.keys()
        digests = json.loads(file.metadata()["sha256"])
    assert digests.keys() == TENSORS.keys() | {""}
    expected = hashlib.sha256(b"torch.float32 (2, 3)" + struct.pack("<6f", *range(6)))
    assert digests["b"] == expected.hexdigest()
    assert read_packed(path)[1] == METADATA == read_metadata(path)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    assert load(packed(TENSORS)).keys() == TENSORS.keys()


def test_every_flipped_bit_is_found_or_changes_nothing(tmp_path) -> None:
    """Also in the header: a file that still reads holds what was written."""
    path = tmp_path / "x.safetensors"
    whole = packed({"b": TENSORS["b"], "n": TENSORS["n"]}, {"ghosttrain": "{}", "format": "pt"})
    found = 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            tensors, metadata = read_packed(path)
        except Exception:
            found += 1
            continue
        assert metadata == {"ghosttrain": "{}", "format": "pt"}, place
        assert all(torch.equal(tensors[key], TENSORS[key]) for key in ("b", "n")), place
        assert read_metadata(path) == metadata
    assert found > len(whole) - 20  # the header is filled with spaces


def test_a_file_of_this_project_must_have_digests(tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    for metadata, read in (({"format": "pt"}, True), ({"ghosttrain": "{}"}, False)):
        save_file({"b": TENSORS["b"]}, path, metadata=metadata)
        if read:
            assert read_packed(path)[1] == metadata
        else:
            with pytest.raises(Damaged, match="metadata are not as they were written"):
                read_packed(path)


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

"""Tensors as the bytes of a safetensors file: the same tensors, the same bytes, and their digests.

The digests stand in the file's own metadata, under `sha256`: of every tensor by its name, and under
"" of all of them with the rest of the metadata. Files of other programs have none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ghosttrain.files import Damaged, utf8_name

KEY = "sha256"


def packed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a safetensors file of tensors on the CPU.

    The library writes metadata in another order every time; here the header is sorted, so that a
    file's digest says what is in it.
    """
    digests = {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    metadata = dict(metadata or {})
    metadata[KEY] = json.dumps({**digests, "": _whole(digests, metadata)}, sort_keys=True)
    whole = save(dict(tensors), metadata=metadata)
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.dumps(json.loads(whole[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensors begin at a multiple of 8, as they should
    return len(header).to_bytes(8, "little") + header + whole[end:]


def read_packed(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file, after comparing its digests.

    Raises:
        Damaged: it is not as it was written.
        Exception: the library's, the system's: it cannot be read.
    """
    with _opened(path) as (file, metadata, digests):
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        for name, digest in digests.items():
            if name and (name not in tensors or tensor_digest(tensors[name]) != digest):
                raise Damaged(f"{name} is not as it was written")
        if digests and tensors.keys() | {""} != digests.keys():
            raise Damaged("it does not hold the tensors that were written")
        return tensors, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file without reading its tensors; raises as
    `read_packed` does.
    """
    with _opened(path) as (_, metadata, _):
        return metadata


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, str], dict[str, str]]]:
    """Open a file: itself, its metadata without the digests, and the digests, none in a file of
    another program.
    """
    with utf8_name(path) as name, safe_open(name, framework="pt") as file:
        metadata = dict(file.metadata() or {})
        if KEY not in metadata and not {"ghosttrain", "architecture"} & metadata.keys():
            yield file, metadata, {}
            return
        digests = json.loads(metadata.pop(KEY, "{}"))
        tensors = {name: value for name, value in digests.items() if name}
        if digests.get("") != _whole(tensors, metadata):
            raise Damaged("its metadata are not as they were written")
        yield file, metadata, digests


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor: its dtype, its shape, its values in row-major order."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def _whole(digests: Mapping[str, str], metadata: Mapping[str, str]) -> str:
    """Return the digest of everything, from those of the tensors."""
    text = json.dumps([dict(digests), dict(metadata)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()

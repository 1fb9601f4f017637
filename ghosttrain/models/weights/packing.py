"""Tensors as the bytes of a safetensors file: the same tensors, the same bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor


def packed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a safetensors file of tensors on the CPU.

    The library writes metadata in another order every time; here the header is sorted, so that a
    file's digest says what is in it.
    """
    whole = save(dict(tensors), metadata=dict(metadata) if metadata else None)
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.dumps(json.loads(whole[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensors begin at a multiple of 8, as they should
    return len(header).to_bytes(8, "little") + header + whole[end:]

"""A network as the graph that converters take, and what they need changed while it is traced."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def exported(
    network: nn.Module, example: Tensor, dynamic_batch: bool
) -> torch.export.ExportedProgram:
    """Return the graph of a network for images like `example`.

    With `dynamic_batch` it takes any number of images; `example` then has two or more, since a size
    of one would be taken as fixed.
    """
    batch = {0: torch.export.Dim("batch", min=1)} if dynamic_batch else None
    with torch.no_grad():
        return torch.export.export(network, (example,), dynamic_shapes=(batch,))


def traced(network: nn.Module, example: Tensor) -> Any:
    """Return TorchScript of a network for images like `example`: of its exported graph, in which
    every size is a number (of sizes that are computed, Core ML's converter fails with numpy 2.4).
    """
    graph = exported(network, example, dynamic_batch=False).module()
    with torch.no_grad():
        return torch.jit.trace(graph, example, check_trace=False)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep converters from printing and warning within the block: hundreds of lines about their own
    insides, some from C++. What they raise is raised.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            _silent(1),
            _silent(2),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _silent(handle: int) -> Iterator[None]:
    """Let what is written to a file handle of the process vanish within the block."""
    kept, nowhere = os.dup(handle), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, handle)
    try:
        yield
    finally:
        os.dup2(kept, handle)
        os.close(kept)
        os.close(nowhere)


@contextlib.contextmanager
def exact_upsampling() -> Iterator[None]:
    """Write nearest upsampling by no whole factor in operations that every format has alike.

    From (h, w) to (2h, 2w) the factor is whole. GhostNet's attention needs 2h + 1 of h where a map
    is odd; PyTorch then takes rows 0 0 0 1 1 2 2 of 3 for 7: those of factor 2, after the first row
    once more. Equal to the bit for every h (tests/unit/test_tracing.py). Other sizes stay as they
    are.
    """
    ordinary = F.interpolate

    def interpolate(x: Tensor, size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        nearest = kwargs.get("mode", args[1] if len(args) > 1 else "nearest") == "nearest"
        doubled = [2 * side for side in x.shape[2:]]
        if not nearest or not isinstance(size, Sequence) or x.ndim != 4:
            return ordinary(x, size, *args, **kwargs)
        more = [int(wanted) - twice for wanted, twice in zip(size, doubled, strict=True)]
        if any(each not in (0, 1) for each in more):
            return ordinary(x, size, *args, **kwargs)
        x = ordinary(x, doubled, mode="nearest")
        for axis, rows in enumerate(more, 2):
            first = x[:, :, :1] if axis == 2 else x[..., :1]
            x = torch.cat((first, x), axis) if rows else x
        return x

    F.interpolate = interpolate  # type: ignore[assignment]
    try:
        yield
    finally:
        F.interpolate = ordinary

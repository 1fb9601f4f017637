"""torch.export's archive, run by PyTorch: what other compilers of PyTorch take as their input."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
from torch import Tensor, nn

from ghosttrain.deploy.formats import Format, Runner
from ghosttrain.deploy.tracing import exported, quietly
from ghosttrain.errors import UserError
from ghosttrain.text import one_line


def convert(
    network: nn.Module, example: Tensor, path: Path, precision: str, dynamic_batch: bool
) -> None:
    """Write an archive of the exported graph and its weights."""
    import torch

    with quietly():
        torch.export.save(exported(network, example, dynamic_batch), path)


def load(path: Path, threads: int = 1) -> Runner:
    """Return what runs an archive; `threads` are those of this process (torch.set_num_threads)."""
    import torch

    _validate_archive(path)
    with quietly(), _without_unpickling():
        program = torch.export.load(path)
        module = program.module()
    images = next(
        node.meta["val"]
        for node in program.graph.nodes
        if node.name in program.graph_signature.user_inputs
    )

    @torch.inference_mode()
    def run(x: np.ndarray) -> list[np.ndarray]:
        outputs = module(torch.from_numpy(x))
        return [y.numpy() for y in (outputs if isinstance(outputs, tuple | list) else [outputs])]

    shape = tuple(side if isinstance(side, int) else None for side in images.shape)
    return Runner(run, shape, str(images.dtype).removeprefix("torch."))


def _validate_archive(path: Path) -> None:
    """Refuse an archive with machine code (AOTInductor): `export` writes none.

    Raises:
        UserError: it holds some, or is no such archive.
    """
    import torch

    try:
        names = torch._C.PyTorchFileReader(str(path)).get_all_records()
    except RuntimeError as error:
        raise UserError(f"{path} is no archive of torch.export ({one_line(error)[:100]})") from None
    if any("aotinductor" in name for name in names):
        raise UserError(f"{path} holds machine code, which is not run: export the run again")


@contextmanager
def _without_unpickling() -> Iterator[None]:
    """Let torch read tensors and nothing else inside this block: its archives may hold pickled
    objects (torch 2.14 reads weights, constants and example inputs so where they are no plain
    tensors), and unpickling runs what their writer wants. `export` writes none.

    Raises:
        UserError: an archive holds some.
    """
    import torch

    def refuse(*args: object, **options: object) -> None:
        raise pickle.UnpicklingError

    only_weights = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    try:
        with (
            patch.dict(os.environ, only_weights),
            patch.object(pickle, "loads", refuse),
            patch.object(torch._C, "_pickle_load_obj", refuse, create=True),
        ):
            yield
    except pickle.UnpicklingError:
        raise UserError(
            "the archive holds pickled objects, and reading them may run code: export the run again"
        ) from None


FORMAT = Format("torch_export", ".pt2", convert, load, dynamic_batch=True)

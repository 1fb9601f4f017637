"""What the verb `latency` is asked: words that name runs, models and files, and what to time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ghosttrain.config.detection import validate_anchors
from ghosttrain.config.students import STUDENTS
from ghosttrain.deploy.formats import find, is_file, of_file, runnable
from ghosttrain.deploy.formats.onnx import count_nodes
from ghosttrain.deploy.latency import (
    BACKENDS,
    IN_PYTORCH,
    Latency,
    converted,
    file_peak,
    file_side,
    input_of,
    measure,
    network_side,
    table,
)
from ghosttrain.deploy.network import deployed, inference_form, trained_form
from ghosttrain.deploy.profile import Operator, profile_file, profile_lines, profile_network
from ghosttrain.detect.decode import Decoder
from ghosttrain.errors import UserError, did_you_mean
from ghosttrain.models.cost import count_macs, count_params
from ghosttrain.models.create import create_model, create_timm_model
from ghosttrain.models.reparam import using_forward
from ghosttrain.text import byte_size


@dataclass(frozen=True)
class Asked:
    """The words of the command."""

    words: Sequence[str]
    backends: Sequence[str] | None
    threads: Sequence[int]
    size: tuple[int, int] | None
    batch: int
    rounds: int


@dataclass(frozen=True)
class _Networks:
    """One network in both forms."""

    trained: nn.Module
    fused: nn.Module
    size: tuple[int, int]
    channels: int
    decoder: Decoder | None = None
    """What makes boxes of the outputs of a detector."""


def latency_of(asked: Asked, profile: bool = False) -> list[Latency]:
    """Measure, print the table, with `profile` also operators; return the measurements.

    Raises:
        UserError: a word that is no run, model or file; an unknown backend; an input that does not
            fit.
    """
    for backend in asked.backends or ():
        if backend not in BACKENDS:
            raise UserError(f"--backend {backend} is none.{did_you_mean(backend, BACKENDS)}")
    with tempfile.TemporaryDirectory(prefix="ghosttrain-") as scratch:
        sides, notes = _Sides(), []
        for number, word in enumerate(asked.words):
            if is_file(Path(word)):
                notes.append(_add_file(sides, word, asked))
            else:
                folder = Path(scratch) / str(number)
                folder.mkdir()
                notes.append(_add_network(sides, word, asked, folder))
        found = measure(sides.calls, asked.threads, asked.rounds, sides.peaks)
        notes += [
            f"{name}: {count_nodes(path)} nodes after onnxruntime's own optimisation"
            for name, path in sides.files.items()
            if of_file(path) == "onnx"
        ]
        print("\n".join([*notes, *table(found)]), flush=True)
        if profile:
            for name, look in sides.profiles.items():
                print("\n".join([f"{name}: one pass, by operators", *profile_lines(look())]))
    return found


class _Sides:
    """What takes turns: name -> how to make its call, to measure its memory, to profile it."""

    def __init__(self) -> None:
        self.calls: dict[str, Callable[[int], Callable[[], Any]]] = {}
        self.peaks: dict[str, Callable[[int], float]] = {}
        self.profiles: dict[str, Callable[[], list[Operator]]] = {}
        self.files: dict[str, Path] = {}

    def add_file(self, name: str, path: Path, images: np.ndarray) -> None:
        """Add a file."""
        self.files[name] = path
        self.calls[name], self.peaks[name] = file_side(path, images), file_peak(path, images)
        self.profiles[name] = partial(profile_file, path, images)

    def add_network(self, name: str, network: nn.Module, images: Tensor) -> None:
        """Add a network in PyTorch."""
        self.calls[name] = network_side(network, images)
        self.profiles[name] = partial(profile_network, network, images)


def _add_file(sides: _Sides, word: str, asked: Asked) -> str:
    """Add an exported file; return a line about it."""
    path = Path(word)
    images = input_of(path, runnable(path).load(path, 1), asked.size, asked.batch)
    sides.add_file(word, path, images)
    return f"{word}: {byte_size(path.stat().st_size)}, input {list(images.shape)}"


def _add_network(sides: _Sides, word: str, asked: Asked, folder: Path) -> str:
    """Add a network by every backend, converted into `folder` where it has to be; return a line
    about it.
    """
    networks = networks_of(word, asked.size)
    images = torch.randn(asked.batch, networks.channels, *networks.size)
    for backend in asked.backends or default_backends():
        name = f"{word} {backend}" if len(asked.words) > 1 else backend
        if backend in IN_PYTORCH:
            sides.add_network(name, network_for(networks, backend), images)
        else:
            path = converted(network_for(networks, backend), backend, images, folder)
            sides.add_file(name, path, images.numpy())
    if networks.decoder is not None:
        name = f"{word} decoder" if len(asked.words) > 1 else "decoder"
        sides.calls[name] = decoder_side(networks.fused, networks.decoder, images)
    return _about(word, networks, asked.batch)


def networks_of(word: str, size: tuple[int, int] | None) -> _Networks:
    """Return a network by the folder of its run or by its name, as trained and fused."""
    if (Path(word) / "config.yaml").exists():
        source = deployed(word)
        data = source.config.data
        trained = trained_form(source.folder, source.config).requires_grad_(False)
        sides = size or (data.eval_size, data.eval_size)
        validate_anchors(source.config, sides)
        decoder = Decoder(source.box_settings(sides), source.classes) if source.detector else None
        return _Networks(trained, source.network, sides, data.in_chans, decoder)
    own, word = word in STUDENTS, word.removeprefix("timm:")
    if not own:
        import timm

        if not timm.is_model(word):
            hint = did_you_mean(word, [*STUDENTS, *timm.list_models()])
            raise UserError(f"{word} is no run, no exported file and no model.{hint}")
    trained = create_model(word) if own else create_timm_model(word)
    trained = trained.eval().requires_grad_(False)
    return _Networks(trained, inference_form(trained, own), size or (224, 224), 3)


def decoder_side(
    network: nn.Module, decoder: Decoder, images: Tensor
) -> Callable[[int], Callable[[], Any]]:
    """Return a side that makes boxes of what a detector says of images; numpy, on one thread."""
    with torch.inference_mode():
        outputs = [output.numpy() for output in network(images)]
    return lambda threads: lambda: [decoder(*each) for each in zip(*outputs, strict=True)]


def _about(word: str, networks: _Networks, batch: int) -> str:
    height, width = networks.size
    macs = (
        ""
        if height != width
        else (f"{count_macs(networks.fused, height, networks.channels) / 1e6:.1f} M MACs, ")
    )
    return (
        f"{word}: {count_params(networks.fused) / 1e6:.3f} M parameters, {macs}"
        f"{height}x{width} px, {batch} at once"
    )


def default_backends() -> list[str]:
    """Return PyTorch, and onnxruntime where it is installed."""
    try:
        find("onnx")
    except UserError:
        return ["torch"]
    return ["torch", "onnx"]


def network_for(networks: _Networks, backend: str) -> nn.Module:
    """Return the form of a network that a backend runs or converts."""
    if backend.endswith("_unfused"):
        return _Branches(networks.trained)
    if backend == "torch_compile":
        return torch.compile(networks.fused)  # type: ignore[return-value]
    return networks.fused


class _Branches(nn.Module):
    """A training form in evaluation, branch by branch: what is run by who never fused."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> Any:
        """Return the outputs for images (B, C, H, W)."""
        with using_forward(self.network, "branches"):
            return self.network(x)

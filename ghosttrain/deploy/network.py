"""What is exported: the inference form of a finished run, and what a file needs beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghosttrain.config.schema import Config, DataConfig
from ghosttrain.engine.load import classes_of, load_run
from ghosttrain.engine.run_files import damaged_products, read_config, read_result
from ghosttrain.engine.student import has_fused_form
from ghosttrain.errors import UserError
from ghosttrain.files import expanded, write_json

PREPROCESS = "preprocess.json"
"""What has to be done with an image before an exported file takes it."""
KEPT = ("in_chans", "mean", "std", "crop_pct", "interpolation", "orientation", "background")
"""Settings of `data` in it, by their names."""


@dataclass(frozen=True)
class Deployed:
    """A network to export, and the run it comes from."""

    folder: Path
    config: Config
    classes: list[str]
    network: nn.Module
    """In inference form, in eval mode, on the CPU, without gradients: images (B, C, H, W), or with
    its preprocessing uint8 (B, H, W, C), -> logits, or probabilities, (B, K)."""
    include_preprocess: bool = False
    """Whether `network` takes pixels and gives probabilities."""

    @property
    def alone(self) -> nn.Module:
        """The network without its preprocessing."""
        network: Any = self.network
        return network.network if self.include_preprocess else network

    def inputs_of(self, images: Tensor) -> Tensor:
        """Return normalised images (B, C, H, W) as the network takes them."""
        return pixels_of(images, self.config.data) if self.include_preprocess else images


def deployed(folder: str | Path, include_preprocess: bool = False) -> Deployed:
    """Return the network of a finished run, fused.

    Raises:
        UserError: no run there, an unfinished or damaged one.
    """
    folder = expanded(folder)
    config = read_config(folder)
    result = read_result(folder)
    if result is None:
        raise UserError(
            f"{folder} is not finished: the command that began it goes on with it (provenance.json "
            "has it)"
        )
    if damaged := [name for name in damaged_products(folder, result) if name.endswith("tensors")]:
        raise UserError(
            f"{folder / damaged[0]} is missing or damaged: the command of this run makes it anew "
            "from the last checkpoint"
        )
    network = inference_form(load_run(folder, "ema"), has_fused_form(config))
    if include_preprocess:
        network = WithPreprocess(network, config.data)
    return Deployed(folder, config, classes_of(folder), network, include_preprocess)


def inference_form(model: nn.Module, own: bool) -> nn.Module:
    """Return a network in its cheapest equal form: ours fused, timm's after timm's own fusing where
    it has one. In eval mode, without gradients.
    """
    from timm.utils.model import reparameterize_model

    from ghosttrain.models.reparam import fuse

    model.eval()
    form = fuse(model) if own else reparameterize_model(model)
    return form.eval().requires_grad_(False)


class WithPreprocess(nn.Module):
    """Pixels to probabilities: uint8 (B, H, W, C) -> (B, K), what a camera gives to what a person
    reads. Resizing and cropping stay outside.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, data: DataConfig) -> None:
        super().__init__()
        self.network = network
        for name, values in (("mean", data.mean), ("std", data.std)):
            self.register_buffer(name, torch.tensor(values).reshape(-1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the probabilities (B, K) of uint8 pixels (B, H, W, C)."""
        images = pixels.permute(0, 3, 1, 2).float() / 255
        return self.network((images - self.mean) / self.std).softmax(1)


def pixels_of(images: Tensor, data: DataConfig) -> Tensor:
    """Return the uint8 pixels (B, H, W, C) of normalised images (B, C, H, W)."""
    mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (data.mean, data.std))
    return ((images * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)


def example_of(source: Deployed, size: tuple[int, int], batch: int) -> Tensor:
    """Return an input of a network: zeros, as large as asked."""
    return source.inputs_of(torch.zeros(batch, source.config.data.in_chans, *size)).contiguous()


# --- preprocess.json ------------------------------------------------------------------------------


def write_preprocess(folder: Path, source: Deployed, size: tuple[int, int]) -> None:
    """Write beside a file what its user has to do with an image, and what its outputs mean."""
    data, (height, width) = source.config.data, size
    about: dict[str, Any] = {
        "size": [height, width],
        "resize_shorter_side": int(data.eval_size / data.crop_pct),
        "resized_for": data.eval_size,
        **{name: getattr(data, name) for name in KEPT},
        "channel_order": "RGB" if data.in_chans == 3 else "grey",
        "input": (
            "uint8 (B, H, W, C), pixels 0 to 255"
            if source.include_preprocess
            else "float32 (B, C, H, W), (pixel / 255 - mean) / std"
        ),
        "output": "probabilities (B, K)" if source.include_preprocess else "logits (B, K)",
        "model": source.config.model.name,
        "classes": source.classes,
    }
    write_json(folder / PREPROCESS, about)


# --- its layers -----------------------------------------------------------------------------------


class Tapped(nn.Module):
    """A network that also returns what layers within it return: (layers..., output)."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self.names = network, list(names)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the layers in the order of `names`, then that of the network."""
        seen: dict[str, Tensor] = {}
        with watching(self.network, self.names, lambda name, y: seen.setdefault(name, y.clone())):
            y = self.network(x)
        return (*(seen[name] for name in self.names), y)


@contextmanager
def watching(
    network: nn.Module, names: Sequence[str], see: Callable[[str, Tensor], object]
) -> Iterator[None]:
    """Call `see` with name and output of each of these modules whenever one ran."""

    def hook(name: str) -> Any:
        def saw(module: nn.Module, inputs: object, output: Tensor) -> None:
            see(name, output)

        return saw

    handles = [network.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layers_in_order(network: nn.Module, x: Tensor) -> list[str]:
    """Return the names of all modules that run once and return one tensor of their own, in the
    order in which they finish: not what a module within them returned, nor the network's output.
    """
    order: list[tuple[str, object]] = []
    names = [name for name, _ in network.named_modules() if name]
    with torch.inference_mode(), watching(network, names, lambda *seen: order.append(seen)):
        last = network(x)
    ran = [name for name, _ in order]
    kept: dict[int, str] = {}
    for name, output in order:
        if isinstance(output, Tensor) and output is not last and ran.count(name) == 1:
            kept.setdefault(id(output), name)
    return list(kept.values())

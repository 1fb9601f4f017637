"""What is exported: the inference form of a finished run, and what a file needs beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghosttrain.config.schema import Config, DataConfig
from ghosttrain.engine.load import classes_of, load_detector, load_run
from ghosttrain.engine.run_files import damaged_products, read_config, read_result
from ghosttrain.engine.student import has_fused_form
from ghosttrain.errors import UserError
from ghosttrain.files import expanded, write_json

PREPROCESS = "preprocess.json"
"""What has to be done with an image before an exported file takes it."""
KEPT = ("in_chans", "mean", "std", "crop_pct", "interpolation", "orientation", "background")
"""Settings of `data` in it, by their names; a detector's images are not cropped."""
OUTPUT = {
    "classes": "logits (B, K)",
    "probabilities": "probabilities (B, K)",
    "raw": "class logits (B, A, K + 1) of A anchors, the background's first; box deltas (B, A, 4)",
    "nms": "boxes (D, 4): left, top, right, bottom in pixels of the input; scores (D,), the best "
    "first; labels (D,): 0 the background, k classes[k - 1]",
}
"""What the outputs of a file are."""


@dataclass(frozen=True)
class Deployed:
    """A network to export, and the run it comes from."""

    folder: Path
    config: Config
    classes: list[str]
    network: nn.Module
    """In inference form, in eval mode, on the CPU, without gradients: images (B, C, H, W), or with
    its preprocessing uint8 (B, H, W, C), -> logits, or probabilities, (B, K); that of a detector as
    `detect.inference` has it."""
    include_preprocess: bool = False
    """Whether `network` takes pixels; where it classifies, it gives probabilities then."""
    detector: nn.Module | None = None
    """What `network` is made of, whole, where it detects: images -> detections."""
    nms: bool = False
    """Whether `network` chooses boxes: one image -> boxes, scores, labels."""

    @property
    def alone(self) -> nn.Module:
        """The network without its preprocessing."""
        network: Any = self.network
        return network.network if self.include_preprocess else network

    @property
    def output(self) -> str:
        """Which of `OUTPUT` the network gives."""
        if self.detector is not None:
            return "nms" if self.nms else "raw"
        return "probabilities" if self.include_preprocess else "classes"

    def inputs_of(self, images: Tensor) -> Tensor:
        """Return normalised images (B, C, H, W) as the network takes them."""
        return pixels_of(images, self.config.data) if self.include_preprocess else images

    def images_of(self, inputs: Tensor) -> Tensor:
        """Return what the network takes as normalised images (B, C, H, W)."""
        if not self.include_preprocess:
            return inputs
        return normalised(inputs, *_per_channel(self.config.data))

    def box_settings(self, size: tuple[int, int]) -> dict[str, Any]:
        """Return how boxes are made of the outputs of a detector for images of this size
        (`detect.inference.settings_of`).
        """
        from ghosttrain.detect.inference import settings_of

        return settings_of(self.detector, torch.zeros(1, self.config.data.in_chans, *size))

    def with_nms(self, box_settings: dict[str, Any]) -> Deployed:
        """Return a detector that chooses boxes itself, as `box_settings()` has it."""
        from ghosttrain.detect.inference import WithNms

        network = WithNms(self.network, box_settings).eval()
        return replace(self, network=network, nms=True)


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
    network: Any = inference_form(trained_form(folder, config), has_fused_form(config))
    detector = network.detector if config.detects else None
    if include_preprocess:
        network = WithPreprocess(network, config.data)
    return Deployed(folder, config, classes_of(folder), network, include_preprocess, detector)


def validate_classifier(folder: Path, config: Config, what: str) -> None:
    """Raise UserError where a run is one of detection: `what` is for classification."""
    if config.detects:
        raise UserError(
            f"{what} is for classification, and {folder} is a run of detection: type python -m "
            f"ghosttrain export {folder} --to onnx (fp32), or the same with --precision fp16"
        )


def trained_form(folder: Path, config: Config) -> nn.Module:
    """Return the network of a run as it was trained, averaged, in eval mode: images (B, C, H, W) ->
    logits (B, K), or the raw outputs of a detector.
    """
    if not config.detects:
        return load_run(folder, "ema")
    # torchvision's detectors take seconds to import.
    from ghosttrain.detect.inference import RawOutputs

    return RawOutputs(load_detector(folder)).eval()


def inference_form(model: nn.Module, own: bool) -> nn.Module:
    """Return a network in its cheapest equal form: ours fused, timm's after timm's own fusing where
    it has one. In eval mode, without gradients.
    """
    model.eval()
    if own:
        from ghosttrain.models.reparam import fuse

        return fuse(model).eval().requires_grad_(False)
    from timm.utils.model import reparameterize_model

    return reparameterize_model(model).eval().requires_grad_(False)


class WithPreprocess(nn.Module):
    """Pixels to probabilities: uint8 (B, H, W, C) -> (B, K), what a camera gives to what a person
    reads; of a detector, to its outputs. Resizing and cropping stay outside.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, data: DataConfig) -> None:
        super().__init__()
        self.network = network
        self.output_names = getattr(network, "output_names", None)
        for name, values in zip(("mean", "std"), _per_channel(data), strict=True):
            self.register_buffer(name, values)

    def forward(self, pixels: Tensor) -> Any:
        """Return the probabilities (B, K) of uint8 pixels (B, H, W, C), or a detector's outputs."""
        found = self.network(normalised(pixels, self.mean, self.std))
        return found.softmax(1) if isinstance(found, Tensor) else found


def _per_channel(data: DataConfig) -> list[Tensor]:
    """Return mean and standard deviation, each (C, 1, 1)."""
    return [torch.tensor(values).reshape(-1, 1, 1) for values in (data.mean, data.std)]


def normalised(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return uint8 pixels (B, H, W, C) as images (B, C, H, W)."""
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def pixels_of(images: Tensor, data: DataConfig) -> Tensor:
    """Return the uint8 pixels (B, H, W, C) of normalised images (B, C, H, W)."""
    mean, std = _per_channel(data)
    return ((images * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)


def example_of(source: Deployed, size: tuple[int, int], batch: int) -> Tensor:
    """Return an input of a network: zeros, as large as asked."""
    return source.inputs_of(torch.zeros(batch, source.config.data.in_chans, *size)).contiguous()


# --- preprocess.json ------------------------------------------------------------------------------


def write_preprocess(
    folder: Path,
    source: Deployed,
    size: tuple[int, int],
    box_settings: dict[str, Any] | None = None,
) -> None:
    """Write beside a file what its user has to do with an image, and what its outputs mean; of a
    detector with its `box_settings`.
    """
    data, (height, width) = source.config.data, size
    kept = {name: getattr(data, name) for name in KEPT}
    if box_settings is None:
        kept["resize_shorter_side"] = int(data.eval_size / data.crop_pct)
    else:
        del kept["crop_pct"]
        kept["resize"] = "stretched to size, proportions not kept"
        kept["detector"] = box_settings
    about: dict[str, Any] = {
        "size": [height, width],
        "resized_for": data.eval_size,
        **kept,
        "channel_order": "RGB" if data.in_chans == 3 else "grey",
        "input": (
            "uint8 (B, H, W, C), pixels 0 to 255"
            if source.include_preprocess
            else "float32 (B, C, H, W), (pixel / 255 - mean) / std"
        ),
        "output": OUTPUT[source.output],
        "model": source.config.model.name,
        "classes": source.classes,
    }
    write_json(folder / PREPROCESS, about)


# --- its layers -----------------------------------------------------------------------------------


class Tapped(nn.Module):
    """A network that also returns what layers within it return: (layers..., outputs...)."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self.names = network, list(names)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the layers in the order of `names`, then those of the network."""
        seen: dict[str, Tensor] = {}
        with watching(self.network, self.names, lambda name, y: seen.setdefault(name, y.clone())):
            y = self.network(x)
        return (*(seen[name] for name in self.names), *((y,) if isinstance(y, Tensor) else y))


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

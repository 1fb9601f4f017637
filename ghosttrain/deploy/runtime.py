"""An exported file in its own runtime, used as a network: what `predict` and `latency` run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from ghosttrain.config.schema import DataConfig
from ghosttrain.deploy.formats import runnable
from ghosttrain.deploy.network import KEPT, PREPROCESS, pixels_of
from ghosttrain.deploy.parity import run_in_batches
from ghosttrain.engine.predict import AnImage, ImageTransform
from ghosttrain.errors import UserError
from ghosttrain.files import Damaged, read_json


class ExportedModel:
    """A file that `export` wrote: normalised images (B, C, H, W) -> logits (B, K).

    It has `classes` and `transform`, as the network of a run has (`engine.load.load_run`).
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        """Raises UserError: no such file, another one, or its packages or runtime are missing."""
        self.format = runnable(path)
        self.about = read_beside(path, PREPROCESS)
        if "detector" in self.about:
            raise UserError(
                f"{path} is a detector, which predict does not take: docs/detection.md shows how "
                "its outputs become boxes"
            )
        shape = read_beside(path, "report.json")["input"]
        self.batch: int | None = shape[0]
        try:
            self.classes: list[str] = list(self.about["classes"])
            self.size: tuple[int, int] = tuple(self.about["size"])
            self.takes_pixels = self.about["input"].startswith("uint8")
            self.data = DataConfig(
                eval_size=self.about["resized_for"], **{name: self.about[name] for name in KEPT}
            )
        except (KeyError, TypeError, ValidationError) as error:
            raise UserError(
                f"{path.parent / PREPROCESS} does not say what an image needs ({error!r}): export "
                "the run again"
            ) from None
        self.runner = self.format.load(path, threads)

    def transform(self, image: AnImage) -> Tensor:
        """Return an image as a network takes it: (C, H, W) float32."""
        images = ImageTransform(self.data)(image)[None]
        if tuple(images.shape[2:]) != self.size:
            images = stretched(images, self.size)
        return images[0]

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits (B, K) of normalised images (B, C, H, W); for a file that gives
        probabilities, their logarithms.
        """
        inputs = pixels_of(images, self.data) if self.takes_pixels else images
        outputs = run_in_batches(self.runner, inputs.contiguous().numpy(), self.batch)[-1]
        found = torch.from_numpy(outputs).float()
        return found.log() if self.takes_pixels else found


def stretched(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return images (B, C, H, W) of another height and width, proportions not kept."""
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def read_beside(path: Path, name: str) -> dict[str, Any]:
    """Return a JSON file that lies beside an exported one.

    Raises:
        UserError: it is missing or damaged.
    """
    beside = path.parent / name
    try:
        return read_json(beside, 2**26)
    except (OSError, Damaged, json.JSONDecodeError) as error:
        raise UserError(
            f"{path} needs {name} beside it, as export wrote it ({error}): export the run again"
        ) from None

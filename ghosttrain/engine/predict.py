"""Images of one's own, classified by the network of a run: what `load_run` gives its model.

Shapes: B batch, C channels, S side, K classes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ghosttrain.config.schema import DataConfig
from ghosttrain.data.augment import eval_transform, normalise
from ghosttrain.data.datasets.tree import entries
from ghosttrain.data.decode import open_image, suffixes
from ghosttrain.errors import UserError

AnImage = str | os.PathLike[str] | Image.Image | np.ndarray
"""A path, a Pillow image, or an array (H, W, 3) or (H, W) of uint8."""
Prediction = list[tuple[str, float]]
"""(class, probability in [0, 1]) of the best classes, the best first."""


@dataclass(frozen=True)
class ImageTransform:
    """What a run's network sees of an image: resized, cropped, normalised."""

    data: DataConfig

    def __call__(self, image: AnImage) -> Tensor:
        """Return an image as the network takes it: (C, S, S) float32.

        Raises:
            UserError: it cannot be read.
        """
        (pixels,) = eval_transform(self.data)(partial(opened, image, self.data.max_pixels), 0, 0)
        mean, std = (torch.tensor(values) for values in (self.data.mean, self.data.std))
        return normalise(pixels, mean, std).contiguous()


def opened(image: AnImage, max_pixels: int) -> Image.Image:
    """Return a Pillow image that may still have to be decoded."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    return open_image(os.fspath(image), max_pixels)


def give_predictions(model: Any, data: DataConfig, classes: Sequence[str]) -> nn.Module:
    """Give a model `classes`, `transform` and `predict`, and return it."""
    model.classes, model.transform = list(classes), ImageTransform(data)
    model.predict = MethodType(predict, model)
    return model


@torch.inference_mode()
def predict(
    model: Any, images: AnImage | Sequence[AnImage], top: int = 5, batch: int = 64
) -> list[Prediction]:
    """Return for each image its best classes with their probabilities.

    Args:
        model: from `load_run`.
        images: one or several (`AnImage`).
        top: classes for each, at most.
        batch: images in one forward pass.

    Raises:
        UserError: an image cannot be read.
    """
    given = [images] if isinstance(images, str | os.PathLike | Image.Image | np.ndarray) else images
    device = next(model.parameters()).device
    found: list[Prediction] = []
    for start in range(0, len(given), batch):
        inputs = torch.stack([model.transform(each) for each in given[start : start + batch]])
        found += best_classes(model(inputs.to(device)), model.classes, top)
    return found


def best_classes(logits: Tensor, classes: Sequence[str], top: int) -> list[Prediction]:
    """Return the best classes of logits (B, K) with their probabilities."""
    best = logits.double().softmax(dim=1).topk(min(top, len(classes)))
    return [
        [(classes[k], p) for k, p in zip(ks, ps, strict=True)]
        for ks, ps in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def image_files(words: Sequence[str]) -> list[Path]:
    """Return the files that words name: images, and all images of folders, at any depth.

    Raises:
        UserError: a word is no file and no folder; a folder holds no image.
    """
    files: list[Path] = []
    for word in words:
        path = Path(word)
        if path.is_dir():
            inside = sorted(_images(path))
            if not inside:
                raise UserError(f"{path} holds no image (.jpg, .png, ...)")
            files += inside
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"{path}: there is no such image or folder")
    return files


def _images(folder: Path) -> Iterator[Path]:
    for name, is_folder in entries(folder):
        if is_folder:
            yield from _images(folder / name)
        elif os.fsencode(name).rpartition(b".")[2].lower() in suffixes():
            yield folder / name


def predict_files(
    model: Any, files: Sequence[Path], top: int, batch: int, say: Callable[[str], object]
) -> list[tuple[Path, Prediction]]:
    """Return the predictions of all files that can be decoded; `say` gets a line about each of the
    others.
    """
    found: list[tuple[Path, Prediction]] = []
    for start in range(0, len(files), batch):
        good, inputs = [], []
        for file in files[start : start + batch]:
            try:
                inputs.append(model.transform(file))
                good.append(file)
            except UserError as error:
                say(str(error))
        if good:
            with torch.inference_mode():
                logits = model(torch.stack(inputs))
            found += zip(good, best_classes(logits, model.classes, top), strict=True)
    return found

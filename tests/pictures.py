"""Made-up pictures, and draws of the augmentation."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from ghosttrain.data.augment import (
    draw,
)

FILL = (124, 116, 104)


def picture(width=90, height=70, mode="RGB"):
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = [np.sin(x * f + y * g) for f, g in ((9, 2), (3, 11), (5, 5))]
    pixels = 128 + 90 * np.stack(waves, -1) + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def draws(augment, n, flip=True, width=500, height=375):
    return [draw(augment, flip, width, height, 0, i) for i in range(n)]


BOUNDS = {
    "rotate": (-30, 30),
    "posterize": (1, 4),
    "solarize": (0, 256),
    "solarize_add": (0, 110),
    "color": (0.1, 1.9),
    "contrast": (0.1, 1.9),
    "brightness": (0.1, 1.9),
    "sharpness": (0.1, 1.9),
    "shear_x": (-0.3, 0.3),
    "shear_y": (-0.3, 0.3),
    "translate_x": (-0.45, 0.45),
    "translate_y": (-0.45, 0.45),
    "auto_contrast": (0, 0),
    "equalize": (0, 0),
    "invert": (0, 0),
}


def chw(image):
    return torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1).permute(2, 0, 1)

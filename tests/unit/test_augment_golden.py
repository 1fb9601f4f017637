"""Draws and pixels stay what they were: caches of a teacher's outputs depend on them.

What they were lies in augment.json. After a change on purpose raise `augment.VERSION`, make the
file anew, and say why in the commit:

    .venv/bin/python tests/unit/test_augment_golden.py
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pytest
from pictures import FILL
from PIL import Image

from ghosttrain.config.schema import AugmentConfig, DataConfig
from ghosttrain.data.augment import VERSION, Draw, apply, draw, train_transform

GOLDEN = Path(__file__).with_name("augment.json")
DRAWS = [(0, 2), (0, 3), (0, 15), (1, 12), (1, 17), (599, 1281166)]
CHANGED = "the pixels or draws of an image changed: raise augment.VERSION, then keep the new ones"


def picture() -> Image.Image:
    """Whole numbers only: the same picture everywhere."""
    y, x = np.mgrid[:60, :80]
    channels = (x * 3 + (x * y) % 31, y * 4 + (x + y) % 17, 255 - x - 2 * y + (x ^ y) % 23)
    return Image.fromarray(np.stack(channels, -1).clip(0, 255).astype(np.uint8))


def computed() -> dict[str, Any]:
    """Return draws of a 4:3 image under the default policy, the pixels of an 8x8 student, and of
    every operation the argument that draw 0 of image 0 has, with a row of a picture after it.
    """
    draws, pixels, operations = [], [], {}
    transform = train_transform(DataConfig(train_size=8), AugmentConfig())
    for number, index in DRAWS:
        drawn = draw(AugmentConfig(), True, 500, 375, number, index)
        draws.append({"draw": number, "index": index, **asdict(drawn)})
        (out,) = transform(picture, number, index)
        pixels.append(out.permute(1, 2, 0).numpy().tobytes().hex())
    image = np.array(picture())[::8, ::10]
    for name, argument in draw(AugmentConfig(randaugment_ops=150), True, 500, 375, 0, 0).ops:
        out = apply(image, Draw(ops=((name, argument),)), 8, "bicubic", FILL)
        row = out.permute(1, 2, 0)[5].numpy().tobytes().hex()
        operations[name] = {"argument": argument, "row": row}
    golden = {"version": VERSION, "draws": draws, "pixels": pixels, "operations": operations}
    return json.loads(json.dumps(golden))


def levels(digits: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(digits), np.uint8).astype(int)


def test_draws_pixels_and_operations_stay_what_they_were() -> None:
    now, before = computed(), json.loads(GOLDEN.read_text())
    assert now["version"] == before["version"], CHANGED
    for drawn, old in zip(now["draws"], before["draws"], strict=True):
        # Logarithms and cosines may differ in their last bit.
        assert drawn["box"] == pytest.approx(old["box"], abs=1e-12), CHANGED
        assert drawn["erase"] == pytest.approx(old["erase"], abs=1e-12), CHANGED
        assert [name for name, _ in drawn["ops"]] == [name for name, _ in old["ops"]], CHANGED
        arguments = [argument for _, argument in old["ops"]]
        assert [a for _, a in drawn["ops"]] == pytest.approx(arguments, abs=1e-9), CHANGED
        for key in ("draw", "index", "flip", "noise_seed"):
            assert drawn[key] == old[key], CHANGED
    for digits, old in zip(now["pixels"], before["pixels"], strict=True):
        # Resampling may differ by a level between library versions, which operations enhance.
        difference = np.abs(levels(digits) - levels(old))
        assert difference.max() <= 4 and difference.mean() <= 1, CHANGED
    assert now["operations"].keys() == before["operations"].keys(), CHANGED
    for name, old in before["operations"].items():
        operation = now["operations"][name]
        assert operation["argument"] == pytest.approx(old["argument"], abs=1e-9), (name, CHANGED)
        assert np.abs(levels(operation["row"]) - levels(old["row"])).max() <= 1, (name, CHANGED)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(computed(), indent=1) + "\n")

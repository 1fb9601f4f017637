"""A look at a few images before training starts."""

from __future__ import annotations

import numpy as np

from ghosttrain.data.datasets.base import Dataset
from ghosttrain.data.decode import is_deep_colour, reduction, stated_depth, to_pixels
from ghosttrain.errors import UserError

LOOKED_AT = 64
"""Images of each split that are decoded before training starts."""


def notes_on(dataset: Dataset) -> tuple[str, ...]:
    """Return what the user should hear about these data, a line each: what was left out, and what a
    look at a few images shows.
    """
    return dataset.left_out + inspect_images(dataset)


def inspect_images(dataset: Dataset) -> tuple[str, ...]:
    """Return notes about images that decode to nearly nothing: one colour, or 16-bit values that
    fill only the lower bits.

    Looks at up to `LOOKED_AT` evenly spaced images; those that cannot be decoded are left to
    whoever needs them.
    """
    indices = np.unique(np.linspace(0, len(dataset) - 1, LOOKED_AT).round().astype(int))
    one_colour, deep, highest, deep_colour, brightest, overall = [], 0, 0, 0, 0, 0
    for index in indices.tolist():
        try:
            image = dataset.open(index)
            colour, stated = is_deep_colour(image), stated_depth(image)
            pixels = to_pixels(image, 3, reduction(image, (64, 64)), dataset.bit_depth)
        except UserError:
            continue
        values = np.asarray(pixels)
        high = int(values.max())
        if (values == values[0, 0]).all():
            one_colour.append(index)
        overall = max(overall, high)
        if colour:
            deep_colour, brightest = deep_colour + 1, max(brightest, high)
        elif image.mode.startswith("I") and stated is None:
            deep, highest = deep + 1, max(highest, int(np.asarray(image).max()))
    notes, among = [], f"of {len(indices):,} images looked at in {dataset.source}"
    full = 2**dataset.bit_depth - 1
    if deep and highest <= full // 4:
        notes.append(
            f"note: {deep:,} {among} are 16-bit images whose values reach {highest:,} of "
            f"{full:,}: they are nearly black to the network; if these are all the bits they use, "
            f"type data.bit_depth={max(8, highest.bit_length())}"
        )
    if deep_colour and brightest <= 255 // 4:
        notes.append(
            f"note: {deep_colour:,} {among} are colour images of 16 bits, of which the upper 8 are "
            f"read, and these reach {brightest} of 255: they are nearly black to the network; save "
            "them with 8 bits"
        )
    if 0 < overall < 32 and not notes:
        notes.append(
            f"note: the brightest pixel {among} is {overall} of 255: they are nearly black to the "
            "network; save them with values of 0 to 255"
        )
    if one_colour:
        notes.append(
            f"note: {len(one_colour):,} {among} {'are' if len(one_colour) > 1 else 'is'} of one "
            f"colour (first: {dataset.name_of(one_colour[0])})"
        )
    return tuple(notes)

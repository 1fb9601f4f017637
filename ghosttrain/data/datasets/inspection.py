"""A look at a few images before training starts."""

from __future__ import annotations

import numpy as np

from ghosttrain.config.schema import DataConfig
from ghosttrain.data.datasets.base import Dataset, evenly
from ghosttrain.data.datasets.duplicates import near_duplicates
from ghosttrain.data.datasets.splitting import is_split_here
from ghosttrain.data.decode import is_deep_colour, reduction, stated_depth, to_pixels
from ghosttrain.errors import UserError
from ghosttrain.text import listed

MOST_COMPARED = 50_000
"""Images up to which near-duplicates are counted: each is decoded for it."""
WIDE, FEW = 2.0, 20
"""Length through height of images that are said to be wide; images of a class that are few."""
MOST_LISTED = 12
"""Classes up to which all are named."""
LOOKED_AT = 64
"""Images of each split that are decoded before training starts."""


def notes_on(dataset: Dataset) -> tuple[str, ...]:
    """Return what the user should hear about these data, a line each: what was left out, and what a
    look at a few images shows.
    """
    return dataset.left_out + inspect_images(dataset)


def duplicates_note(data: DataConfig, train_set: Dataset, held_out: Dataset) -> tuple[str, ...]:
    """Return a line about held-out images of which the training images hold a near-duplicate, where
    the split was made here; else nothing.
    """
    many = len(train_set) + len(held_out) > MOST_COMPARED
    if not is_split_here(data) or data.near_duplicates != "count" or many:
        return ()
    n, halves = len(train_set), (train_set, held_out)
    apart = [pair for pair in near_duplicates(*halves) if (pair[0] < n) != (pair[1] < n)]
    if not apart:
        return ()
    first, other = (halves[i >= n].name_of(i - n * (i >= n)) for i in apart[0])
    alike = len({max(pair) for pair in apart})
    return (
        f"note: {alike:,} held-out images look like a training image (first: {other}, {first}), so "
        "the held-out accuracy may be too high; data.near_duplicates=together keeps them in one "
        "half, ignore does not look",
    )


def unusual_notes(data: DataConfig, train_set: Dataset) -> tuple[str, ...]:
    """Return advice where the training images are unusual: grey, much smaller than what the network
    sees, very wide or tall, or few of a class. Looks at up to `LOOKED_AT` of them.
    """
    sides, ratios, grey, looked = [], [], 0, 0
    for index in evenly(len(train_set), LOOKED_AT):
        try:
            image = train_set.open(index)
            pixels = np.asarray(to_pixels(image, 3, reduction(image, (64, 64)), data.bit_depth))
        except UserError:
            continue
        looked += 1
        sides.append(min(image.size))
        ratios.append(max(image.size) / min(image.size))
        grey += bool((pixels[..., :1] == pixels).all())
    if not looked:
        return ()
    notes, side, ratio = [], float(np.median(sides)), float(np.median(ratios))
    if grey == looked and data.in_chans == 3:
        notes.append(
            "note: the images are grey: a network that starts from random weights may take one "
            "channel (data.in_chans=1 data.mean=[M] data.std=[S]); a pretrained one keeps three"
        )
    if side <= data.train_size / 2:
        notes.append(
            f"note: the images are about {side:.0f} px high or wide, and are enlarged to "
            f"{data.train_size}: a smaller data.train_size and data.eval_size cost less"
        )
    if ratio >= WIDE:
        notes.append(
            f"note: the images are about {ratio:.1f} times as long as high (or wide): evaluation "
            "sees their centre only; cut them into squares where the object may lie outside"
        )
    counts = np.bincount(train_set.labels, minlength=len(train_set.classes))
    few = [f"{train_set.classes[k]} {counts[k]}" for k in np.flatnonzero(counts < FEW).tolist()]
    if few:
        notes.append(
            f"note: few images of {listed(few)}: recipe=tiny is made for 6 to 100 of a class"
        )
    return tuple(notes)


def classes_note(train_set: Dataset, held_out: Dataset) -> str:
    """Return how many training images each class has, and what always naming the class that has
    the most would reach on the held-out images.
    """
    names = train_set.classes
    if train_set.boxes is not None:
        counts = np.bincount(train_set.boxes.labels, minlength=len(names))
        pairs = zip(names, counts.tolist(), strict=True)
        return (
            f"boxes of {listed((f'{name} {count:,}' for name, count in pairs), most=MOST_LISTED)}"
        )
    counts, held = (np.bincount(d.labels, minlength=len(names)) for d in (train_set, held_out))
    text = listed((f"{n} {c:,}" for n, c in zip(names, counts, strict=True)), most=MOST_LISTED)
    if len(names) > MOST_LISTED:
        text = f"{len(names):,}, of {counts.min():,} to {counts.max():,} images"
    most, whole = int(held.argmax()), max(int(held.sum()), 1)
    share = 100 * int(held[most]) / whole
    return f"{text}; always {names[most]!r} = {share:.2f} % of the held-out images"


def inspect_images(dataset: Dataset) -> tuple[str, ...]:
    """Return notes about images that decode to nearly nothing: one colour, or 16-bit values that
    fill only the lower bits.

    Looks at up to `LOOKED_AT` evenly spaced images; those that cannot be decoded are left to
    whoever needs them.
    """
    indices = evenly(len(dataset), LOOKED_AT)
    one_colour, deep, highest, deep_colour, brightest, overall = [], 0, 0, 0, 0, 0
    for index in indices:
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

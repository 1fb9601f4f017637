"""How far work on many images has come."""

from __future__ import annotations

import time
from collections.abc import Callable

from tqdm import tqdm

from ghosttrain.engine import distributed
from ghosttrain.terminal import screen
from ghosttrain.text import clock

EVERY = 30.0
"""Seconds between two lines where there is no terminal."""


class Progress:
    """A bar on a terminal, a line every half minute elsewhere; on rank 0."""

    def __init__(self, total: int, say: Callable[[str], object] = distributed.say) -> None:
        """`total` images; `say` prints a line."""
        self.total, self.done, self.say = total, 0, say
        self.started = self.printed = time.perf_counter()
        shown_on = None if distributed.rank() else screen()
        self.bar = (
            tqdm(total=total, unit=" images", dynamic_ncols=True, file=shown_on)
            if shown_on is not None
            else None
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def add(self, images: int) -> None:
        """Count images."""
        self.done += images
        now = time.perf_counter()
        if self.bar is not None:
            self.bar.update(images)
        elif now - self.printed > EVERY:
            self.printed, speed = now, self.done / (now - self.started)
            left = clock((self.total - self.done) / speed)
            self.say(f"{self.done:,} of {self.total:,} images, {speed:.0f} images/s, ETA {left}")

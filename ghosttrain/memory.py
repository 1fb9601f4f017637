"""How glibc keeps freed memory, and when Python looks for garbage."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> None:
    """Let this process use freed memory again instead of giving it back to the system (mallopt(3)).

    Decoded images and a network's activations are larger than glibc's threshold, so that the system
    clears the same pages in every step. On a CPU a step of mobilenetv2_100 (16 images, one thread)
    takes 0.88 and 0.92 of the CPU time and 1.06 and 1.08 of the peak memory (measured here, two
    turns: `MALLOC_TRIM_THRESHOLD_=268435456 MALLOC_MMAP_THRESHOLD_=33554432 python -m ghosttrain
    bench step model=mobilenetv2_100` against the same without). Without glibc nothing changes.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)


@contextmanager
def without_collection() -> Iterator[None]:
    """Look for no garbage within the block, which imports packages: what that makes stays, hundreds
    of thousands of objects, and Python would go through all of them again and again. Where torch is
    first imported in it, what is there by then is left out of every later search too.
    """
    was_enabled, had_torch = gc.isenabled(), "torch" in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if "torch" in sys.modules and not had_torch:
            gc.freeze()
        if was_enabled:
            gc.enable()

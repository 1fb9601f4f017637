"""The names of codecs: how a teacher's output for an image is stored. Imports no torch."""

from __future__ import annotations

import re
from typing import NamedTuple

from ghosttrain.errors import UserError

BITS = (2, 3, 4, 5, 6, 7, 8, 16)
_NAME = re.compile(r"topk:[1-9][0-9]*|(?:features|logits):(?:[2-8]|16)")


class CodecName(NamedTuple):
    """A codec's name, taken apart."""

    kind: str
    """`topk`, `features` or `logits`."""
    number: int
    """Classes kept (`topk`), or bits of a value."""


def parse_codec(name: str) -> CodecName:
    """Return kind and number of `topk:K`, `features:BITS` or `logits:BITS`.

    Raises:
        UserError: another kind, K below 1, bits that are not in `BITS`, digits with leading zeros.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"cache.codec={name} is no codec: type topk:K (K of 1 or more), features:BITS or "
            f"logits:BITS (BITS one of {', '.join(map(str, BITS))}), or auto"
        )
    kind, _, number = name.partition(":")
    return CodecName(kind, int(number))

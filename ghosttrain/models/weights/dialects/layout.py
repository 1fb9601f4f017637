"""How a code base names the entries of a student's state dict: plain data.

A layout maps module paths of the students here to those of another code base. Single capital
letters match one segment: S stage, B block, G ghost1 or ghost2, N branch. Of two matching rows the
first counts. A path without its `.branches.0` names the layer of a plain network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Literal, NamedTuple

from ghosttrain.config.schema import PLAIN, ReparamConfig

Dialect = Literal["ghosttrain", "fused", "timm", "official", "torchvision", "deployed", "unknown"]


class Layout(NamedTuple):
    """The names that one code base gives to one family."""

    dialect: Dialect
    family: str
    telltale: str = ""
    """Entry of the state dict by which the layout is recognised."""
    paths: Mapping[str, str] = {}
    """Module path of ours -> theirs; paths that are not in it are the same."""
    reparam: ReparamConfig = PLAIN
    """Branches of the networks that they name."""
    networks: Mapping[str, str] = {}
    """Width of a student -> name of their network, for layouts that are written."""

    def rename(self, key: str) -> str:
        """Return what an entry `key` of our state dict is called there."""
        path, _, leaf = key.rpartition(".")
        matches = ((_pattern(ours).fullmatch(path), theirs) for ours, theirs in self.paths.items())
        renamed = (
            match.expand(_LETTER.sub(r"\\g<\1>", theirs)) for match, theirs in matches if match
        )
        return f"{next(renamed, path)}.{leaf}"


_LETTER = re.compile(r"\b([A-Z])\b")


@cache
def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(_LETTER.sub(r"(?P<\1>\\w+)", re.escape(path)))

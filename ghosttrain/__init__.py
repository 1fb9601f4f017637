"""ghosttrain: one command trains a compact, re-parameterized vision network with a distillation
teacher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ghosttrain.version import __version__

__all__ = ["UserError", "__version__", "compose", "create_model", "fuse", "load_run", "train"]

if TYPE_CHECKING:
    from ghosttrain.api import compose, train
    from ghosttrain.engine.load import load_run
    from ghosttrain.errors import UserError
    from ghosttrain.models.create import create_model
    from ghosttrain.models.reparam import fuse

_HOMES = {
    "UserError": "ghosttrain.errors",
    "compose": "ghosttrain.api",
    "create_model": "ghosttrain.models.create",
    "fuse": "ghosttrain.models.reparam",
    "load_run": "ghosttrain.engine.load",
    "train": "ghosttrain.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import ghosttrain` costs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ghosttrain' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)

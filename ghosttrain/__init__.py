"""ghosttrain: one command trains a compact, re-parameterized vision network with a distillation
teacher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["create_model", "fuse", "load_run"]

if TYPE_CHECKING:
    from ghosttrain.engine.load import load_run
    from ghosttrain.models.create import create_model
    from ghosttrain.models.reparam import fuse

_HOMES = {
    "create_model": "ghosttrain.models.create",
    "fuse": "ghosttrain.models.reparam",
    "load_run": "ghosttrain.engine.load",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import ghosttrain` costs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ghosttrain' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)

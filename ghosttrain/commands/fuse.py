"""`fuse RUN`: write the inference model of a run."""

from __future__ import annotations

from argparse import Namespace

from ghosttrain.commands.arguments import Arguments, folders_and_overrides, one_folder
from ghosttrain.errors import UserError
from ghosttrain.terminal import go_on_without

ARGUMENTS = Arguments(
    "fuse",
    "RUN [options]",
    "Write RUN/model.fused.safetensors, the inference model: every re-parameterized layer is one\n"
    "convolution.",
    takes_folders=True,
)
ARGUMENTS.add_argument("--out", metavar="FILE", help="write it elsewhere")
ARGUMENTS.add_argument(
    "--to", metavar="timm", help="weights for timm's or torchvision's network of the same name"
)


def run(options: Namespace) -> int:
    """Write the file; return 0."""
    folders, overrides = folders_and_overrides(options.words)
    if overrides:
        raise UserError(
            f"fuse takes a run folder, --out FILE and --to LIBRARY, not {overrides[0]!r}"
        )
    folder = one_folder("fuse", folders)
    from ghosttrain.engine.fuse import fuse_run

    go_on_without()
    fuse_run(folder, options.out, options.to)
    return 0

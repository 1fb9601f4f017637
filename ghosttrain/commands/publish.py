"""`publish RUN`: a folder that timm loads, and the hub takes."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from pathlib import Path

from ghosttrain.commands.arguments import Arguments, one_folder
from ghosttrain.errors import UserError
from ghosttrain.files import expanded
from ghosttrain.terminal import go_on_without

ARGUMENTS = Arguments(
    "publish",
    "RUN --to-folder D | --to-hub NAME [options]",
    "Write the network of a finished run as a folder that timm loads (local-dir:D), with its card\n"
    "and licence; a network that timm does not have as a state dict for torchvision.",
    takes_folders=True,
)
ARGUMENTS.add_argument("--to-folder", metavar="D", help="a new or empty folder")
ARGUMENTS.add_argument("--to-hub", metavar="OWNER/NAME", help="upload it to the Hugging Face hub")
ARGUMENTS.add_argument("--private", action="store_true", help="of the hub: only you see it")
ARGUMENTS.add_argument("--dry-run", action="store_true", help="upload nothing; list what would be")
ARGUMENTS.add_argument(
    "--library", choices=("timm", "torchvision"), help="which one loads it (timm where it can)"
)


def run(options: Namespace) -> int:
    """Write the folder, upload it where asked; return 0."""
    folder = one_folder("publish", options.words)
    if not (options.to_folder or options.to_hub):
        raise UserError("publish needs --to-folder D, --to-hub OWNER/NAME, or both")
    if options.to_hub and options.to_hub.count("/") != 1:
        raise UserError(f"--to-hub {options.to_hub}: give OWNER/NAME")
    from ghosttrain.deploy.network import deployed
    from ghosttrain.deploy.publish import listed_files, publish, push

    source = deployed(folder)
    go_on_without()
    with tempfile.TemporaryDirectory(prefix="ghosttrain-") as scratch:
        target = expanded(options.to_folder) if options.to_folder else Path(scratch) / "model"
        library = publish(source, target, options.library)
        print(
            "\n".join([f"{target}: {library} loads it; README.md says how", *listed_files(target)])
        )
        if options.to_hub and options.dry_run:
            print(f"dry run: nothing was uploaded to {options.to_hub}")
        elif options.to_hub:
            print(push(target, options.to_hub, options.private))
    return 0

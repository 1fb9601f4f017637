"""`latency RUN|MODEL|FILE`: time of one pass, measured, in PyTorch and in devices' runtimes."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

from ghosttrain.commands.arguments import Arguments, parsed_size, validate_counts
from ghosttrain.errors import UserError

ARGUMENTS = Arguments(
    "latency",
    "RUN|MODEL|FILE ... [options]",
    "Time one pass of the network of a run, of a model by its name (random weights; ours, else\n"
    "timm's, timm:NAME where both have it), or of an exported file, yours too. Several take\n"
    "turns; elapsed time.",
    takes_folders=True,
)
ARGUMENTS.add_argument(
    "--backend", metavar="B,...",
    help="of runs and models: torch, torch_unfused, torch_compile, onnx_unfused, or a format of"
    " export (torch,onnx)",
)  # fmt: skip
ARGUMENTS.add_argument("--threads", metavar="1,2", default="1", help="numbers of threads (1)")
ARGUMENTS.add_argument("--size", metavar="S|HxW", help="of the images (the run's; 224)")
ARGUMENTS.add_argument("--batch", metavar="B", type=int, default=1, help="images at once (1)")
ARGUMENTS.add_argument("--rounds", metavar="N", type=int, default=50, help="passes that count (50)")
ARGUMENTS.add_argument("--profile", action="store_true", help="where the time goes, by operator")
ARGUMENTS.add_argument("--csv", metavar="FILE", help="write the measurements as a table")
ARGUMENTS.add_argument(
    "--adb", action="store_true",
    help="the commands that time a .tflite or .pte file on a phone; run where adb finds one",
)  # fmt: skip


def run(options: Namespace) -> int:
    """Print the table; return 0."""
    if not options.words:
        raise UserError("latency needs a run, a model or a file: latency ghostnetv3_100")
    size = parsed_size(options.size)
    validate_counts(batch=options.batch, rounds=options.rounds)
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", options.threads):
        raise UserError(f"--threads {options.threads}: give numbers of threads, 1,2")
    threads = [int(count) for count in options.threads.split(",")]
    backends = options.backend.split(",") if options.backend else None
    if options.adb:
        from ghosttrain.deploy.phone import lines

        for word in options.words:
            print("\n".join(lines(Path(word), threads, options.rounds)))
        return 0

    from ghosttrain.deploy.latency_of import Asked, latency_of

    asked = Asked(options.words, backends, threads, size, options.batch, options.rounds)
    found = latency_of(asked, profile=options.profile)
    if options.csv:
        from ghosttrain.deploy.latency import write_csv

        write_csv(Path(options.csv), found)
    return 0

"""`bench step|optim|data|distill`: time parts of training on this machine."""

from __future__ import annotations

from argparse import Namespace

from ghosttrain.commands.arguments import Arguments

ARGUMENTS = Arguments(
    "bench",
    "step|optim|data|distill [key=value ...] [options]",
    "step     time and memory of a training step by every forward, of plain and of timm's:\n"
    "         model= detector= data.train_size= train.micro_batch= model.input_stride=\n"
    "         launch.device=\n"
    "optim    time of LAMB and EMA against timm's: model= launch.device=\n"
    "data     images a second from JPEG files to batches, against timm's loader: data.root=\n"
    "         data.split= data.train_size= data.eval_size= data.decoder=\n"
    "distill  cost of an epoch with cached outputs against none and a live teacher: model=\n"
    "         teacher= cache.codec= data.train_size= train.global_batch= launch.device=",
    actions=("step", "optim", "data", "distill"),
)
ARGUMENTS.add_argument("--rounds", type=int, metavar="10", help="rounds that count")
ARGUMENTS.add_argument("--threads", type=int, default=1, metavar="1", help="threads on a CPU")
ARGUMENTS.add_argument(
    "--forwards", metavar="auto,branches", help="step: which of auto, branches, stacked, collapsed"
)
ARGUMENTS.add_argument(
    "--images", type=int, default=128, metavar="128", help="data, distill: images"
)


def run(options: Namespace) -> int:
    """Print the table; return 0."""
    from ghosttrain.study.bench import Options, bench

    names = [word for word in options.words if "=" not in word]
    overrides = [word for word in options.words if "=" in word]
    given = {key: getattr(options, key) for key in ("rounds", "threads", "forwards", "images")}
    chosen = Options(**{key: value for key, value in given.items() if value is not None})
    print(bench(names, overrides, chosen))
    return 0

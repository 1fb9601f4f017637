"""`bench step|optim|distill`: time parts of training on this machine."""

from __future__ import annotations

from argparse import Namespace

from ghosttrain.commands.arguments import Arguments

ARGUMENTS = Arguments(
    "bench",
    "step|optim|distill [key=value ...]",
    "step     time and memory of a training step by forward (model= batch= size= rounds= threads=\n"
    "         device= forwards= input_stride=)\n"
    "optim    time of LAMB and EMA against timm's (model= rounds= threads= device=)\n"
    "distill  cost of an epoch with cached outputs against none and a live teacher (model=\n"
    "         teacher= codec= images= batch= size= rounds= threads= device=)",
)


def run(options: Namespace) -> int:
    """Print the table; return 0."""
    from ghosttrain.study.bench import bench

    names = [word for word in options.words if "=" not in word]
    print(bench(names, [word for word in options.words if "=" in word]))
    return 0

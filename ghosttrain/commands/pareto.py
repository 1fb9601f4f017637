"""`pareto [RUN...]`: accuracy against MACs, parameters and measured latency."""

from __future__ import annotations

from argparse import Namespace

from ghosttrain.commands.arguments import Arguments, validate_counts
from ghosttrain.errors import UserError, did_you_mean
from ghosttrain.files import expanded

ARGUMENTS = Arguments(
    "pareto",
    "[RUN ...] [options]",
    "Accuracy of runs, and published ones with their source, against MACs, parameters and the\n"
    "latency measured here: of all students and of timm's compact networks, which take turns.",
    takes_folders=True,
)
ARGUMENTS.add_argument("--models", metavar="NAME,...", help="instead of all: ours or timm's; none")
ARGUMENTS.add_argument("--backend", metavar="B", help="as for latency (onnx, or torch without it)")
ARGUMENTS.add_argument("--size", metavar="S", type=int, default=224, help="of their images (224)")
ARGUMENTS.add_argument("--rounds", metavar="N", type=int, default=30, help="passes that count (30)")
ARGUMENTS.add_argument("--out", metavar="FOLDER", help="write pareto.csv and pareto.png there")


def run(options: Namespace) -> int:
    """Print the table; return 0."""
    validate_counts(size=options.size, rounds=options.rounds)
    models = None
    if options.models:
        models = [] if options.models == "none" else options.models.split(",")
    if models == [] and not options.words:
        raise UserError("pareto --models none needs runs: pareto RUN ... --models none")
    from ghosttrain.deploy.latency import BACKENDS
    from ghosttrain.deploy.latency_of import default_backends
    from ghosttrain.deploy.pareto import draw, pareto, table, write_csv

    if options.backend and options.backend not in BACKENDS:
        raise UserError(
            f"--backend {options.backend} is none.{did_you_mean(options.backend, BACKENDS)}"
        )
    backend = options.backend or default_backends()[-1]
    points = pareto(options.words, models, options.size, backend, options.rounds)
    print("\n".join([f"one image, one thread, {backend}; fused", *table(points)]))
    if options.out:
        folder = expanded(options.out)
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(folder / "pareto.csv", points)
        draw(folder / "pareto.png", points, backend)
        print(f"{folder}/pareto.csv, pareto.png")
    return 0

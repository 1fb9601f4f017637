"""`quantize RUN`: the network of a run in INT8, its accuracy measured in its runtime."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

from ghosttrain.commands.arguments import (
    Arguments,
    folders_and_overrides,
    one_folder,
    validate_counts,
)
from ghosttrain.errors import UserError
from ghosttrain.terminal import go_on_without

ARGUMENTS = Arguments(
    "quantize",
    "RUN [--to FORMAT,...] [key=value ...] [options]",
    "Convert the fused network of a finished run to INT8 after training: weights per output\n"
    "channel, ranges of activations from training images. The file runs on the held-out images;\n"
    "the most sensitive layers stay in float until the drop of top-1 is small enough. Left in\n"
    "RUN/export/FORMAT_int8: the file, report.json, sensitivity.csv, int8.png.",
    takes_folders=True,
)
ARGUMENTS.add_argument(
    "--to",
    metavar="FORMAT,...",
    default="onnx",
    help="onnx (default), litert, executorch, openvino",
)
ARGUMENTS.add_argument(
    "--max-drop", metavar="POINTS", type=float, default=1.0, help="of top-1, at most (1)"
)
ARGUMENTS.add_argument(
    "--calibration", metavar="N", type=int, default=256, help="training images for ranges (256)"
)
ARGUMENTS.add_argument("--seed", metavar="N", type=int, default=0, help="of their choice (0)")
ARGUMENTS.add_argument(
    "--finetune", action="store_true",
    help="train it on before, rounded as the file rounds, by the run's own command with a tenth of "
    "its epochs and a hundredth of its learning rate; key=value changes settings of that training",
)  # fmt: skip
ARGUMENTS.add_argument(
    "--include-preprocess", action="store_true",
    help="the file takes uint8 pixels (B, H, W, C) and gives probabilities",
)  # fmt: skip
ARGUMENTS.add_argument(
    "--batch", metavar="B", type=int,
    help="images at once (any number where the format knows it, else 1)",
)  # fmt: skip
ARGUMENTS.add_argument(
    "--images", metavar="N", type=int, help="try it on so many held-out images (all)"
)


def run(options: Namespace) -> int:
    """Write the files; return 0, or 1 where a drop stays too large."""
    folders, overrides = folders_and_overrides(options.words)
    folder = one_folder("quantize", folders)
    given = {"batch": options.batch, "images": options.images, "calibration": options.calibration}
    validate_counts(**{name: count for name, count in given.items() if count is not None})
    if options.max_drop < 0:
        raise UserError(f"--max-drop {options.max_drop:g}: give points of top-1, 0 or more")
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: give a whole number of 0 or more")
    from ghosttrain.deploy.formats import find

    formats = [find(name) for name in dict.fromkeys(options.to.split(","))]

    from ghosttrain.config.compose import override_saved
    from ghosttrain.deploy.export import Wanted
    from ghosttrain.deploy.finetune import finetune
    from ghosttrain.deploy.network import deployed, validate_classifier
    from ghosttrain.deploy.quantize import Calibration, quantize_run, weight_bits

    source, before = deployed(folder, options.include_preprocess), None
    validate_classifier(source.folder, source.config, "quantize")
    if options.finetune:
        bits = min(weight_bits(each) for each in formats)
        trained = finetune(folder, source.config, bits, overrides)
        before, overrides = source.network, []
        source = replace(deployed(trained, options.include_preprocess), folder=source.folder)
    config = override_saved(source.config, overrides, "eval")
    go_on_without()
    wanted = Wanted("int8", None, options.batch, options.images)
    calibration = Calibration(options.calibration, options.seed)
    reports = quantize_run(source, config, formats, wanted, calibration, options.max_drop, before)
    return int(any(not report["passed"] for report in reports))

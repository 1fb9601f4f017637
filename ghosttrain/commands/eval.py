"""`eval RUN`: evaluate a run's weights again, on one process or many, and compare with what it
reported.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from ghosttrain import ranks
from ghosttrain.commands.arguments import Arguments, folders_and_overrides, one_folder
from ghosttrain.errors import UserError

ARGUMENTS = Arguments(
    "eval",
    "RUN [key=value ...]",
    "Evaluate the raw, EMA and fused weights of a run again, exactly. Some settings may differ\n"
    "from the run's: help data, help launch and help train mark them.",
    takes_folders=True,
)


def run(options: Namespace) -> int:
    """Print the table; return the exit code."""
    folders, overrides = folders_and_overrides(options.words)
    return _evaluate(one_folder("eval", folders), overrides)


def _evaluate(folder: Path, overrides: list[str]) -> int:
    """Print top-1 and top-5 of the raw, EMA and fused weights of a run; return 1 where they are not
    those of `result.json`, on the same images and with the same settings.

    Raises:
        UserError: no run there, or a setting that would make it another model.
    """
    from ghosttrain.config.compose import override_saved
    from ghosttrain.config.schema import LaunchConfig
    from ghosttrain.engine.run_files import read_config, read_result
    from ghosttrain.engine.same_data import renamed

    saved, result = read_config(folder), read_result(folder)
    alone = saved.model_copy(update={"launch": LaunchConfig()})  # however many processes trained it
    config = override_saved(alone, overrides, "eval")
    if ranks.must_spawn(config.launch.nproc):
        from ghosttrain.engine.spawn import spawn

        return spawn(("eval", str(folder), *overrides), config.launch.nproc)

    from ghosttrain.data.datasets import build_datasets, notes_on
    from ghosttrain.engine import distributed
    from ghosttrain.engine.evaluate import HeldOutImages, evaluate
    from ghosttrain.engine.load import classes_of, load_run
    from ghosttrain.engine.student import has_fused_form
    from ghosttrain.engine.weights_file import WeightsKind

    code = 0
    distributed.start()
    device = distributed.pick_device(config.launch.device)
    held_out = build_datasets(config.data)[1]
    if (classes := classes_of(folder)) != held_out.classes:
        raise UserError(
            f"{held_out.source} has other classes than {folder} was trained on "
            f"({renamed(classes, held_out.classes)}): type data.root=/the/data/it/was/trained/on"
        )
    kinds: list[WeightsKind] = ["raw", "ema", *(("fused",) if has_fused_form(config) else ())]
    models = {str(kind): load_run(folder, kind).to(device) for kind in kinds}
    batch = config.train.eval_batch or config.train.micro_batch or config.train.global_batch
    with HeldOutImages(held_out, config, device, batch) as held_images:
        table, difference = evaluate(models, held_images, device)
    if distributed.rank() == 0:
        notes = [*notes_on(held_out)]
        identity = result["data"]["held_out"] if result else None
        same_images = identity is not None and identity["digest"] == held_out.identity()["digest"]
        if identity and not same_images:
            notes.append(
                f"note: these are not the held-out images of the run ({identity['images']:,} then, "
                f"{len(held_out):,} now)"
            )
        print("\n".join([*notes, *_lines(table, difference, result)]))
        if result and same_images and not overrides and table != result["weights"]:
            print(
                f"these are not the numbers of {folder / 'result.json'}: its weights, the images' "
                f"pixels or the way they are computed ({result['device']} then) have changed"
            )
            code = 1
    distributed.stop()
    return code


def _lines(
    table: dict[str, dict[str, float]], difference: float, result: dict[str, Any] | None
) -> list[str]:
    lines = [f"{'weights':<10}{'top-1 %':>9}{'top-5 %':>9}{'images':>9}"]
    for name, row in table.items():
        reported = (result or {}).get("weights", {}).get(name)
        note = "" if reported is None else "   as reported"
        if reported not in (None, row):
            note = f"   reported: {reported['top1']:.2f}"
        lines.append(f"{name:<10}{row['top1']:>9.2f}{row['top5']:>9.2f}{row['n']:>9.0f}{note}")
    if "fused" in table:
        lines.append(f"fused vs unfused: largest difference of a logit {difference:.1e}")
    return lines

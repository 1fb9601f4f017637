"""`eval RUN`: evaluate a run's weights again, on one process or many, and compare with what it
reported.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghosttrain import ranks
from ghosttrain.commands.arguments import Arguments, folders_and_overrides, one_folder

if TYPE_CHECKING:
    from ghosttrain.engine.evaluate import Evaluation

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

    saved, result = read_config(folder), read_result(folder)
    alone = saved.model_copy(update={"launch": LaunchConfig()})  # however many processes trained it
    config = override_saved(alone, overrides, "eval")
    if ranks.must_spawn(config.launch.nproc):
        from ghosttrain.engine.spawn import spawn

        return spawn(("eval", str(folder), *overrides), config.launch.nproc)

    from ghosttrain.data.datasets import notes_on
    from ghosttrain.engine import distributed
    from ghosttrain.engine.evaluate import HeldOutImages, evaluate
    from ghosttrain.engine.load import held_out_of, load_run
    from ghosttrain.engine.skipped import all_broken
    from ghosttrain.engine.student import has_fused_form
    from ghosttrain.engine.weights_file import WeightsKind

    code = 0
    distributed.start()
    device = distributed.pick_device(config.launch.device)
    held_out, batch = held_out_of(folder, config)
    classes = held_out.classes
    kinds: list[WeightsKind] = ["raw", "ema", *(("fused",) if has_fused_form(config) else ())]
    models = {str(kind): load_run(folder, kind).to(device) for kind in kinds}
    with HeldOutImages(held_out, config, device, batch) as held_images:
        found = evaluate(models, held_images, device, len(classes))
        unread = all_broken(held_images.loader)
    if distributed.rank() == 0:
        notes = [*notes_on(held_out)]
        identity = result["data"]["held_out"] if result else None
        same_images = identity is not None and identity["digest"] == held_out.identity()["digest"]
        if identity and not same_images:
            notes.append(
                f"note: these are not the held-out images of the run ({identity['images']:,} then, "
                f"{len(held_out):,} now)"
            )
        print("\n".join([*notes, *_lines(found, classes, result), *unread.values()]))
        if unread:
            print(f"note: {len(unread):,} held-out images could not be read and count as wrong")
        as_reported = result is None or _counted(found.table) == _counted(result["weights"])
        if same_images and not overrides and not as_reported:
            then = (result or {}).get("device", "elsewhere")
            print(
                f"these are not the numbers of {folder / 'result.json'}: its weights, the images' "
                f"pixels or the way they are computed ({then} then) have changed"
            )
            code = 1
    distributed.stop()
    return code


def _counted(table: Mapping[str, Mapping[str, float]]) -> dict[str, tuple[float, ...]]:
    """Return what is the same to the last bit where the same images are hits."""
    return {
        name: tuple(row[key] for key in ("top1", "top5", "n", "balanced", "macro_f1"))
        for name, row in table.items()
    }


def _lines(found: Evaluation, classes: list[str], result: dict[str, Any] | None) -> list[str]:
    from ghosttrain.engine.metrics import class_lines, class_record, table_lines, verdict

    reported = _counted((result or {}).get("weights", {}))
    notes = {}
    for name, row in _counted(found.table).items():
        if name in reported:
            same = reported[name] == row
            notes[name] = "   as reported" if same else f"   reported: {reported[name][0]:.2f}"
    record = class_record(found.counts["ema"], classes)
    lines = [f"{sum(record['images']):,} images"]
    lines += table_lines(found.table, len(classes), notes)
    lines += class_lines(record)
    lines.append(verdict(found.table["ema"]["top1"], record))
    if "fused" in found.table:
        lines.append(f"fused vs unfused: largest difference of a logit {found.difference:.1e}")
    return lines

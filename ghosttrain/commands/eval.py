"""`eval RUN`: evaluate a run's weights again, on one process or many, and compare with what it
reported.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghosttrain import ranks
from ghosttrain.commands.arguments import (
    Arguments,
    folders_and_overrides,
    one_folder,
    with_config_dir,
)
from ghosttrain.errors import UserError

if TYPE_CHECKING:
    from ghosttrain.engine.evaluate import Evaluation

ARGUMENTS = with_config_dir(
    Arguments(
        "eval",
        "RUN [key=value ...] | --weights FILE model=NAME data=NAME ...",
        "Evaluate the raw, EMA and fused weights of a run again, exactly. Some settings may\n"
        "differ from the run's: help data, help launch and help train mark them.\n"
        "With --weights there is no run: a file of weights, ours or timm's, on held-out images.",
        takes_folders=True,
    )
)
ARGUMENTS.add_argument(
    "--weights", metavar="FILE", help="evaluate these: a file, a run, hub, efficientnet-lite"
)


def run(options: Namespace) -> int:
    """Print the table; return the exit code."""
    folders, overrides = folders_and_overrides(options.words, groups=bool(options.weights))
    if not options.weights:
        return _evaluate(one_folder("eval", folders), overrides)
    if folders:
        raise UserError(
            f"eval --weights takes no run, and {folders[0]} is one: type model=NAME data=NAME, or "
            f"eval {folders[0]}"
        )
    return _evaluate_weights(options.weights, overrides, options.config_dir)


def _evaluate_weights(weights: str, words: list[str], config_dir: str | None) -> int:
    """Print the accuracy of weights that belong to no run, on the held-out images that the settings
    name, with the size and normalisation that the weights name; return 0.

    Raises:
        UserError: they are not there, are of another network, or have other classes.
    """
    from ghosttrain.config.compose import compose
    from ghosttrain.config.detection import validate_classifies
    from ghosttrain.engine.identify import settled

    composed = compose([*words, f"model.weights={weights}"], config_dir, trains=False)
    validate_classifies(composed.config, "eval --weights")
    config = settled(composed)
    if ranks.must_spawn(config.launch.nproc):
        from ghosttrain.engine.spawn import spawn

        return spawn(("eval", "--weights", weights, *words), config.launch.nproc)

    from ghosttrain.data.datasets import build_datasets, notes_on
    from ghosttrain.engine import distributed
    from ghosttrain.engine.evaluate import HeldOutImages, evaluate
    from ghosttrain.engine.skipped import all_broken
    from ghosttrain.engine.student import build_student, has_fused_form
    from ghosttrain.models.reparam import fuse

    distributed.start()
    device = distributed.pick_device(config.launch.device)
    data, train = config.data, config.train
    held_out = build_datasets(data)[1]
    own = has_fused_form(config)
    fused = own and _is_fused(weights)
    student: Any = build_student(config, held_out.classes, new_classifier=False, fused=fused)
    models = {"weights": student.to(device).eval()}
    if own and not fused:
        models["fused"] = fuse(student)
    batch = train.eval_batch or train.micro_batch or min(train.global_batch, 256)
    with HeldOutImages(held_out, config, device, batch) as held_images:
        found = evaluate(models, held_images, device, len(held_out.classes))
        unread = all_broken(held_images.loader)
    if distributed.rank() == 0:
        mean, std = (", ".join(f"{x:g}" for x in values) for values in (data.mean, data.std))
        note = student.weights_note and f" ({student.weights_note})"
        about = [
            f"{config.model.name}: {weights}{note}",
            f"{held_out.describe()}; {data.eval_size} px, crop {data.crop_pct:g}, "
            f"{data.interpolation}, mean {mean}, std {std}",
        ]
        lines = _lines(found, held_out.classes, None, "weights")
        print("\n".join([*about, *notes_on(held_out), *lines, *_unread(unread)]))
    distributed.stop()
    return 0


def _is_fused(weights: str) -> bool:
    """Whether a file, or a run, holds the inference form of a student."""
    from ghosttrain.config.schema import NAMED_SOURCES
    from ghosttrain.models.weights.dialects import detect
    from ghosttrain.models.weights.files import read_state
    from ghosttrain.models.weights.sources import weights_path

    if weights in NAMED_SOURCES:
        return False
    path = weights_path(weights, None, "model.weights")
    return detect(read_state(path)).dialect in ("fused", "deployed")


def _unread(broken: Mapping[int, str]) -> list[str]:
    """Return why images could not be read, and how many."""
    if not broken:
        return []
    count = f"note: {len(broken):,} held-out images could not be read and count as wrong"
    return [*broken.values(), count]


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
        print("\n".join([*notes, *_lines(found, classes, result), *_unread(unread)]))
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


def _lines(
    found: Evaluation,
    classes: list[str],
    result: dict[str, Any] | None,
    headline: str = "ema",
) -> list[str]:
    from ghosttrain.engine.metrics import class_lines, class_record, table_lines, verdict

    reported = _counted((result or {}).get("weights", {}))
    notes = {}
    for name, row in _counted(found.table).items():
        if name in reported:
            same = reported[name] == row
            notes[name] = "   as reported" if same else f"   reported: {reported[name][0]:.2f}"
    record = class_record(found.counts[headline], classes)
    lines = [f"{sum(record['images']):,} images"]
    lines += table_lines(found.table, len(classes), notes)
    lines += class_lines(record)
    lines.append(verdict(found.table[headline]["top1"], record))
    if "fused" in found.table:
        lines.append(f"fused vs unfused: largest difference of a logit {found.difference:.1e}")
    return lines

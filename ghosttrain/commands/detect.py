"""`detect`: train a detector by the loop that trains classifiers; `detect eval|show RUN`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ghosttrain import ranks
from ghosttrain.commands import train
from ghosttrain.commands.arguments import (
    Arguments,
    folders_and_overrides,
    one_folder,
    validate_counts,
    with_config_dir,
)
from ghosttrain.errors import UserError
from ghosttrain.text import printable

if TYPE_CHECKING:
    from ghosttrain.config.schema import Config
    from ghosttrain.data.datasets import Dataset

RECIPE = "+recipe=detect_ssdlite"
TOP = 16
"""Images that `show` shows where `--top` does not say otherwise."""
ARGUMENTS = with_config_dir(
    Arguments(
        "detect",
        "[+recipe=NAME] [key=value ...] | eval|show RUN [key=value ...]",
        f"Train a detector; without a recipe {RECIPE}, on embedded synthetic\n"
        "scenes. train takes its recipes too, and sweeps (-m). The same command again resumes\n"
        "a run, or shows its result.\n\n"
        "eval RUN  measure the raw, EMA and fused weights of a run again, exactly\n"
        "show RUN  one page of HTML: boxes beside detections on held-out images, worst first,\n"
        "          precision and recall, AP of each class: RUN/detections.html",
        takes_folders=True,
        actions=("eval", "show"),
    )
)
ARGUMENTS.add_argument("--top", metavar="N", type=int, help=f"show: images ({TOP})")
ARGUMENTS.add_argument("--out", metavar="FILE", help="show: write the page elsewhere")


def run(options: Namespace) -> int:
    """Train or evaluate; return the exit code."""
    for name in ("top", "out"):
        value = getattr(options, name)
        if value is not None and options.words[:1] != ["show"]:
            option = f"--{name} {value}"
            raise UserError(f"{option} is for detect show: type detect show RUN {option}")
    if options.words[:1] == ["eval"]:
        folders, overrides = folders_and_overrides(options.words[1:])
        return _evaluate(one_folder("detect eval", folders), overrides)
    if options.words[:1] == ["show"]:
        folders, overrides = folders_and_overrides(options.words[1:])
        top = TOP if options.top is None else options.top
        validate_counts(top=top)
        out = Path(options.out) if options.out else None
        return _show(one_folder("detect show", folders), overrides, top, out)
    words = [word for word in options.words if "=" not in word]
    if words:
        raise UserError(
            f"detect {words[0]}: type python -m ghosttrain detect [key=value ...] to train, "
            "detect eval RUN, or detect show RUN"
        )
    names_recipe = any(word.lstrip("+").startswith("recipe=") for word in options.words)
    asked = [*([] if names_recipe else [RECIPE]), *options.words]
    if options.config_dir:
        asked += ["--config-dir", options.config_dir]
    return train.run(train.ARGUMENTS.parse_args(asked))


def _settings(folder: Path, overrides: list[str], classifying: str) -> Config:
    """Return the settings of a run with overrides, for this process.

    Args:
        folder: of the run.
        overrides: as typed.
        classifying: the verb that does this with a run that classifies.

    Raises:
        UserError: no run of detection there, or a setting that would make it another model.
    """
    from ghosttrain.config.compose import override_saved
    from ghosttrain.config.detection import validate_anchors
    from ghosttrain.config.schema import LaunchConfig
    from ghosttrain.engine.run_files import read_config

    saved = read_config(folder)
    if not saved.detects:
        raise UserError(f"{folder} classifies: type python -m ghosttrain {classifying} {folder}")
    alone = saved.model_copy(update={"launch": LaunchConfig()})
    config = override_saved(alone, overrides, "eval")
    validate_anchors(saved, (config.data.eval_size, config.data.eval_size))
    return config


def _show(folder: Path, overrides: list[str], top: int, out: Path | None) -> int:
    """Write the page about what a run detects; print where it is and the worst images; return 0.

    Raises:
        UserError: no finished run of detection there, several processes, or the page cannot be
            written.
    """
    from ghosttrain.engine.run_files import read_config, read_result

    config, result = _settings(folder, overrides, "wrong"), read_result(folder)
    if (processes := ranks.world_size(config.launch.nproc)) > 1:
        raise UserError(
            f"detect show is for one process, not for {processes}: leave launch.nproc or torchrun "
            "out"
        )
    if result is None:
        raise UserError(
            f"{folder} has no result yet: type the command that began it once more, to finish it"
        )
    from ghosttrain.engine.load import held_out_of
    from ghosttrain.files import write_text
    from ghosttrain.study.detect_page import detection_page, look

    held_out, batch = held_out_of(folder, config)
    seen = look(folder, held_out, config, batch)
    worst = seen.worst_first()[:top]
    same = _is_of(result, held_out) and config.data.eval_size == read_config(folder).data.eval_size
    reported = {**result["weights"], "ignoring": result["ignoring"]} if same else None
    print("\n".join([*seen.remarks(reported), seen.definition()]))
    for index in worst:
        print(f"{printable(held_out.name_of(index))}  {seen.line(index)}")
    path = out or folder / "detections.html"
    title = f"{folder.parent.name}/{folder.name}: detections"
    write_text(path, detection_page(title, seen, held_out, config, reported, worst))
    print(f"AP {seen.numbers.row['ap']:.2f} % of {len(held_out):,} held-out images: {path}")
    return 0


def _is_of(result: dict[str, Any], held_out: Dataset) -> bool:
    """Whether a result was measured on these images, by their names, sizes and boxes."""
    return result["data"]["held_out"]["digest"] == held_out.identity()["digest"]


def _evaluate(folder: Path, overrides: list[str]) -> int:
    """Print the numbers of COCO of the raw, EMA and fused weights of a run; return 1 where they are
    not those of `result.json`, on the same images and with the same settings.

    Raises:
        UserError: no run of detection there, other classes, or a setting that would make it another
            model.
    """
    from ghosttrain.engine.run_files import read_result

    config, result = _settings(folder, overrides, "eval"), read_result(folder)
    if ranks.must_spawn(config.launch.nproc):
        from ghosttrain.engine.spawn import spawn

        return spawn(("detect", "eval", str(folder), *overrides), config.launch.nproc)

    from ghosttrain.data.datasets import notes_on
    from ghosttrain.engine import distributed
    from ghosttrain.engine.detection import evaluate
    from ghosttrain.engine.detection_words import detection_lines
    from ghosttrain.engine.evaluate import HeldOutImages
    from ghosttrain.engine.load import held_out_of, load_detector
    from ghosttrain.engine.student import has_fused_form
    from ghosttrain.engine.weights_file import WeightsKind

    code = 0
    distributed.start()
    device = distributed.pick_device(config.launch.device)
    held_out, batch = held_out_of(folder, config)
    kinds: list[WeightsKind] = ["raw", "ema", *(("fused",) if has_fused_form(config) else ())]
    models = {str(kind): load_detector(folder, kind).to(device) for kind in kinds}
    with HeldOutImages(held_out, config, device, batch) as held_images:
        found = evaluate(models, held_images, device, len(held_out.classes))
    if distributed.rank() == 0:
        record = found.counts["ema"].record(held_out.classes)
        measured = result if result is not None and _is_of(result, held_out) else {}
        reported: dict[str, Any] = measured.get("weights", {})
        notes = {
            name: "   as reported" if row == reported[name] else "   not as reported"
            for name, row in found.table.items()
            if name in reported
        }
        lines = [*notes_on(held_out), held_out.describe()]
        lines += detection_lines(found.table, record, measured.get("ignoring"), notes)
        if "fused" in found.table:
            lines.append(
                f"fused vs unfused: largest difference of an output of the head "
                f"{found.difference:.1e}"
            )
        print("\n".join(lines))
        if measured and not overrides and found.table != reported:
            print(
                f"these are not the numbers of {folder / 'result.json'}: its weights, the images' "
                "pixels or the way they are computed have changed"
            )
            code = 1
    distributed.stop()
    return code

"""What the report of a study says besides its table: what the numbers hold for, and what to know of
the runs.
"""

from __future__ import annotations

from collections.abc import Sequence

from ghosttrain.config.identity import knows_all_paths
from ghosttrain.config.schema import DataConfig, TrainConfig
from ghosttrain.config.small import COUNTED
from ghosttrain.data.datasets.selection import SELECTION_SETTINGS
from ghosttrain.files import expanded
from ghosttrain.study.ledger import Kept
from ghosttrain.study.published import is_imagenet, published
from ghosttrain.study.report import is_of_boxes
from ghosttrain.study.studies import PREVIOUS, Cell, Study, budget_is_typed, controls
from ghosttrain.text import listed

# --- what the numbers hold for --------------------------------------------------------------------


def setting(cells: Sequence[Cell]) -> str:
    """Return what the numbers hold for: data and budget, all where arms differ in them; model,
    length and image size where all runs share them. Where a budget depends on how many images there
    are, and they are not here, nobody knows it, nor the length.
    """
    configs = [cell.config for cell in cells]
    said: dict[str, set[str]] = {
        "data": {_data(config.data) for config in configs},
        "model": {config.model.name for config in configs},
        "budget": {config.budget for config in configs},
        "length": {_length(config.train) for config in configs},
        "px": {str(config.data.eval_size) for config in configs},
    }
    if any(_budget_is_unknown(cell) for cell in cells):
        said |= {"budget": {"not known (its images are not here)"}, "length": set()}
    told = {
        key: found for key, found in said.items() if key in ("data", "budget") or len(found) == 1
    }
    return ", ".join(f"{key} {' or '.join(sorted(found))}" for key, found in told.items())


def _budget_is_unknown(cell: Cell) -> bool:
    data = cell.config.data
    return data.name in COUNTED and data.digest is None and not budget_is_typed(cell.words)


def _data(data: DataConfig) -> str:
    """Return the name of data with that of its folder, and what is chosen of it."""
    usual, names = DataConfig(), (*SELECTION_SETTINGS, "split", "fold")
    chosen = [name for name in names if getattr(data, name) != getattr(usual, name)]
    folder = [] if data.root is None else [expanded(data.root).name]
    return " ".join([data.name, *folder, *(f"{name}={getattr(data, name)}" for name in chosen)])


def _length(train: TrainConfig) -> str:
    return f"{train.epochs} epochs" if train.max_steps is None else f"{train.max_steps} steps"


# --- below the table ------------------------------------------------------------------------------


def control_in_words(study: Study) -> tuple[str, str]:
    """Return a sentence about what an arm is compared with, and its name on an axis."""
    if study.control == PREVIOUS:
        return "Control of an arm: the one before it.", "the arm before"
    if study.control in controls(study).values():
        return f"Control: {study.control}.", study.control
    of_arm = f"Control of an arm: the one with {study.control!r} in place of its own choice."
    return of_arm, f"its {study.control!r}"


def note_of(study: Study, cells: Sequence[Cell]) -> list[str]:
    """Return the lines that say how to read the table."""
    boxes, configs = is_of_boxes(study.metric), [cell.config for cell in cells]
    usual = all(c.data.name == "coco" if boxes else is_imagenet(c) for c in configs)
    where = "COCO" if boxes else "ImageNet"
    return [
        f"{control_in_words(study)[0]} n: finished seeds; ±: standard deviation over them; the",
        "difference, its interval and p are paired over the seeds that both finished; an interval",
        f"is that of one comparison, p is corrected for all {len(controls(study))} of the study;",
        "MACs and parameters after fusing; images/s and time in training: medians, on the machine",
        "of each run, whatever else ran there.",
        *_held_out(cells),
        *_no_look(cells),
        *_of_other_files(cells),
        *([] if usual else [f"These are not {where} runs: what holds here need not hold there."]),
        *_published(study, cells),
    ]


def _of_other_files(cells: Sequence[Cell]) -> list[str]:
    """Return a line about rows of `runs.csv` whose images or weights do not lie here."""
    others = [
        f"{cell.row['settings']} there, {cell.key[0]} here"
        for cell in cells
        if cell.row and cell.row["settings"] != cell.key[0] and knows_all_paths(cell.config)
    ]
    if not others:
        return []
    return [
        f"{len(others)} runs of runs.csv saw other images, another teacher or other weights than",
        f"those that lie here under the same paths (settings {others[0]}).",
    ]


def _held_out(cells: Sequence[Cell]) -> list[str]:
    """Return lines about how many images judge, and which runs do not beat the largest class."""
    finished = [(cell, cell.numbers) for cell in cells if cell.numbers is not None]
    known = {(run["held_out"], run["always_top1"]) for _, run in finished if "held_out" in run}
    if len(known) != 1:
        return []
    (images, share), *_ = known
    top1 = {f"{c.arm} seed {c.seed}": n["top1"] for c, n in finished if "top1" in n}
    worse = [f"{run} ({value:.2f})" for run, value in top1.items() if value <= share]
    return [
        f"Held-out images: {images:,.0f}, one is {100 / images:.2f} points; always naming the",
        f"largest class would reach {share:.2f} % top-1.",
        *([f"Not better than that: {listed(worse, 6)}."] if worse else []),
    ]


def _no_look(cells: Sequence[Cell]) -> list[str]:
    """Return a line about what a detector reaches that ignores the picture."""
    finished = [cell.numbers for cell in cells if cell.numbers is not None]
    found = sorted({run["no_look_ap"] for run in finished if "no_look_ap" in run})
    if not found:
        return []
    reached = " to ".join(f"{value:.2f}" for value in dict.fromkeys([found[0], found[-1]]))
    return [f"A detector that ignores the picture reaches {reached} % AP."]


def _published(study: Study, cells: Sequence[Cell]) -> list[str]:
    """Return a line for each published value of the networks of the study."""
    found = [each for cell in cells for each in published(cell.config, study.metric)]
    return [
        f"Published: {each.model}, {each.how}: {each.top1} % ({each.source})."
        for each in dict.fromkeys(found)
    ]


# --- of the runs ----------------------------------------------------------------------------------


def what_to_know(cells: Sequence[Cell], kept: Kept) -> list[str]:
    """Return lines about runs that are missing or damaged, and about rows of `runs.csv` (`kept`)
    that do not belong together or to these runs.
    """
    return [*faults_of(cells), *_mixed(cells), *_strangers(cells, kept)]


def faults_of(cells: Sequence[Cell]) -> list[str]:
    """Return a line for each arm and reason why runs of it are missing."""
    missing: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        if cell.fault:
            missing.setdefault((cell.arm, cell.fault), []).append(cell)
    return [
        f"- {fault}: {arm}, seed {', '.join(str(cell.seed) for cell in found)}"
        for (arm, fault), found in missing.items()
    ]


def _mixed(cells: Sequence[Cell]) -> list[str]:
    """Return a line for each arm whose runs are of one command and of different files."""
    seeds: dict[str, dict[str, list[str]]] = {}
    for cell in cells:
        if cell.numbers is not None:
            settings = cell.row["settings"] if cell.row else cell.key[0]
            seeds.setdefault(cell.arm, {}).setdefault(settings, []).append(str(cell.seed))
    return [
        f"- {arm}: runs of different images, teachers or other weights under the same paths: "
        + "; ".join(f"seed {', '.join(found)} ({hash_})" for hash_, found in of_arm.items())
        for arm, of_arm in seeds.items()
        if len(of_arm) > 1
    ]


def _strangers(cells: Sequence[Cell], kept: Kept) -> list[str]:
    """Return a line about rows of `runs.csv` that are no run of this command."""
    keys = [key for cell in cells for key in (cell.key, cell.typed_key)]
    used = [kept[key] for key in keys if key in kept]
    strange = {f"{row['arm']} seed {row['seed']}" for row in kept.values() if row not in used}
    if not strange:
        return []
    text = listed(sorted(strange), 6)
    return [f"- in runs.csv, but of other settings or seeds than this command: {text}"]

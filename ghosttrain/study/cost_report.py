"""What runs will cost, as text: of one run, and of a sweep with the sum of what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ghosttrain.config.compose import compose
from ghosttrain.config.detection import validate_classifies
from ghosttrain.config.names import Names
from ghosttrain.engine.identify import settled
from ghosttrain.errors import UserError
from ghosttrain.study.cost import Cache, Known, RunCost, as_json, run_cost
from ghosttrain.study.sweep import compose_cells
from ghosttrain.study.table import markdown
from ghosttrain.study.trial import STEPS, Trial, kept_trial, measure_trial, speed_key
from ghosttrain.text import byte_size, clock, counted, listed

DEVICES = (1, 2, 4, 8, 16, 32, 64)
MOST_ROWS = 40
"""Runs of a sweep that get a row of their own."""


@dataclass(frozen=True)
class Saving:
    """What storing the teacher's outputs once saves runs that share them."""

    runs: int
    teacher: str
    live_images: int
    """That live teachers are shown."""
    stored_images: int
    """That the teacher is shown to store its outputs."""
    macs: int
    """Fewer in all; below 0: more."""
    share: float
    """Of all multiply-accumulates of these runs."""
    seconds: float | None
    """Less on one device, by trials; None without."""
    cache: Cache


def cost_of_command(
    overrides: list[str],
    hydra_words: list[str],
    config_dir: str | None,
    *,
    is_sweep: bool,
    known: Known,
    speed: float | None = None,
    measure: bool = False,
) -> list[RunCost]:
    """Return what each run of a command costs; what has finished is not measured.

    Args:
        overrides: of the runs, `seed=1,2` among them in a sweep.
        hydra_words: overrides of Hydra's launcher and sweeper.
        config_dir: the user's own groups and recipes.
        is_sweep: whether the values are lists.
        known: what was found before; of data that are elsewhere, how many.
        speed: images per second of one device.
        measure: whether to train some steps of each kind of run here.

    Raises:
        UserError: a run has a mistake; nothing was measured.
    """
    if is_sweep:
        cells = Names(config_dir).cells(overrides, hydra_words)
        if cells.listed is None:
            raise UserError(
                "a search chooses its runs while it goes on: type the cost of one run, and take it "
                "times hydra.sweeper.n_trials"
            )
        runs = compose_cells(cells, overrides, config_dir, needs_data=False)
    else:
        runs = [compose(overrides, config_dir, needs_data=False)]
    for composed in runs:
        validate_classifies(composed.config, "cost")
    costs = [run_cost(composed, known, speed) for composed in runs]
    if speed is not None:
        return costs
    trials: dict[str, Trial | None] = {}
    for number, (composed, cost) in enumerate(zip(runs, costs, strict=True)):
        if cost.is_finished:
            continue
        config = settled(composed)
        key = speed_key(config)
        if key not in trials:
            trials[key] = measure_trial(config) if measure else kept_trial(config)
        costs[number] = run_cost(composed, known, trial=trials[key])
    return costs


def describe_run(cost: RunCost) -> str:
    """Return what one run costs, as text."""
    lines = [f"cost of: {cost.command}", f"run folder: {cost.folder}"]
    if cost.is_finished:
        lines.append("the run has finished: what follows is what it was estimated at, not measured")
    processes = f"{cost.ranks} process{'es' * (cost.ranks > 1)}"
    rows = {
        "data": cost.data.about,
        "length": f"{cost.steps:,} steps of {cost.global_batch:,} images, {cost.epochs:,} epochs; "
        f"{cost.micro_batch:,} images at once in {'each of ' * (cost.ranks > 1)}{processes}",
        "images": f"{cost.images:,} in training; "
        f"{cost.evaluations * cost.data.held_out:,} held out, in {cost.evaluations:,} evaluations",
        "student": f"{cost.student}, {cost.student_params / 1e6:.3f} M parameters in training form,"
        f" {_macs(cost.student_macs)} an image forward, about three times as many a step",
        "teacher": _teacher(cost),
        "compute": f"{_macs(cost.all_macs)}: "
        + ", ".join(f"{name} {_macs(count)}" for name, count in cost.macs.items()),
        "read": _read(cost),
        "disk": f"{byte_size(cost.disk_bytes)}: checkpoints of {byte_size(cost.checkpoint_bytes)}, "
        f"{cost.checkpoints} kept at most (and one while it is written); "
        f"model.safetensors and best.safetensors, {byte_size(cost.weights_bytes)} each",
        "cache": "" if cost.cache is None else _cache(cost.cache, cost.teacher_macs),
        "memory": _memory(cost),
    }
    lines += [f"{name:<8} {text}" for name, text in rows.items() if text]
    saving = savings([cost])
    lines += [f"{'saved':<8} {_saving(each)}" for each in saving]
    return "\n".join([*lines, *_time([cost]), ESTIMATED])


ESTIMATED = (
    "All figures are estimates. MACs are those of convolutions and matrix products; memory is that "
    "of tensors, without Python, libraries, images in memory and what CUDA takes for itself."
)


def describe_sweep(costs: Sequence[RunCost]) -> str:
    """Return what the runs of a sweep cost, and the sum of those that have not finished."""
    total = totals(costs)
    rows = [["run", "state", "steps", "images", "MACs", "disk", "memory", "hours"]]
    words = [cost.command.split() for cost in costs]
    same = set(words[0]).intersection(*words[1:]) if len(words) > 1 else set()
    for cost, of_it in list(zip(costs, words, strict=True))[:MOST_ROWS]:
        rows.append(
            [
                " ".join(word for word in of_it if word not in same) or cost.command,
                "finished" if cost.is_finished else "to run",
                f"{cost.steps:,}",
                f"{cost.images:,}",
                _macs(cost.all_macs),
                byte_size(cost.disk_bytes),
                byte_size(cost.memory.total),
                "?" if cost.seconds is None else _hours(cost.seconds),
            ]
        )
    lines = [f"cost of: {' '.join(word for word in words[0] if word in same)}", *markdown(rows)]
    if len(costs) > MOST_ROWS:
        lines.append(f"and {len(costs) - MOST_ROWS} more")
    lines.append(
        f"runs: {len(costs)}, of which {total['finished']} finished; the sum of the others:"
    )
    lines += [
        f"{'length':<8} {total['steps']:,} steps, {total['images']:,} images",
        f"{'compute':<8} {_macs(total['macs'])}, of these teacher {_macs(total['teacher_macs'])}",
    ]
    if total["read_bytes"] is not None:
        lines.append(f"{'read':<8} {byte_size(total['read_bytes'])}")
    lines.append(f"{'disk':<8} {byte_size(total['disk_bytes'])} in run folders")
    left = [cost for cost in costs if not cost.is_finished]
    if left:
        most = max(left, key=lambda cost: cost.memory.total)
        lines.append(f"{'memory':<8} {byte_size(most.memory.total)} a process, where it is most")
    stores = {cost.cache.folder: (cost.cache, cost.teacher_macs) for cost in left if cost.cache}
    for folder, (cache, teacher_macs) in stores.items():
        if folder is not None:
            lines.append(f"{'cache':<8} {_cache(cache, teacher_macs)}")
    lines += [f"{'saved':<8} {_saving(each)}" for each in savings(costs)]
    return "\n".join([*lines, *_time(left), ESTIMATED])


def totals(costs: Sequence[RunCost]) -> dict[str, Any]:
    """Return the sums over the runs that have not finished; a sum with an unknown part is None."""
    left = [cost for cost in costs if not cost.is_finished]
    storing = sum(storing_macs(left).values())
    reads, seconds = [cost.read_bytes for cost in left], [cost.seconds for cost in left]
    return {
        "runs": len(costs),
        "finished": len(costs) - len(left),
        "steps": sum(cost.steps for cost in left),
        "images": sum(cost.images for cost in left),
        "macs": sum(cost.all_macs for cost in left) + storing,
        "teacher_macs": sum(cost.macs["teacher"] for cost in left) + storing,
        "read_bytes": None if None in reads else sum(filter(None, reads)),
        "disk_bytes": sum(cost.disk_bytes for cost in left),
        "seconds": None if None in seconds else sum(filter(None, seconds)),
    }


def storing_macs(costs: Sequence[RunCost]) -> dict[str, int]:
    """Return `cache.dir` -> the teacher's MACs that are still to be spent to fill it."""
    return {
        cost.cache.folder: cost.cache.images * cost.teacher_macs
        for cost in costs
        if cost.cache is not None and cost.cache.folder is not None
    }


def json_of(costs: Sequence[RunCost]) -> dict[str, Any]:
    """Return the figures of all runs, their sum, and the hours on several devices."""
    total = totals(costs)
    hours = {}
    if total["seconds"] is not None:
        hours = {str(n): total["seconds"] / 3600 / n for n in devices(costs)}
    return {"runs": [as_json(cost) for cost in costs], "sum": total, "hours": hours}


def savings(costs: Sequence[RunCost]) -> list[Saving]:
    """Return what storing the teacher's outputs would save the runs with a live teacher that have
    not finished: a saving for those that one cache serves together.
    """
    groups: dict[str, list[tuple[RunCost, Cache]]] = {}
    for cost in costs:
        if not cost.is_finished and cost.cache is not None and cost.cache.folder is None:
            groups.setdefault(cost.alike, []).append((cost, cost.cache))
    found = []
    for group in groups.values():
        largest = max((cache for _, cache in group), key=lambda cache: cache.draws)
        runs, one = [cost for cost, _ in group], group[0][0]
        live = sum(cost.images for cost in runs)
        macs = (live - largest.images) * one.teacher_macs
        seconds = None
        if all(cost.teacher_seconds is not None for cost in runs):
            of_teacher = sum(cost.teacher_seconds or 0.0 for cost in runs)
            seconds = of_teacher * (1 - largest.images / live)
        share = macs / sum(cost.all_macs for cost in runs)
        found.append(
            Saving(len(runs), one.teacher, live, largest.images, macs, share, seconds, largest)
        )
    return found


def devices(costs: Sequence[RunCost]) -> list[int]:
    """Return the numbers of devices over which the global batches divide, two images or more on
    each (or as many as a run has at once).
    """
    batches = {cost.global_batch for cost in costs}
    return [n for n in DEVICES if all(b % n == 0 and (n == 1 or b // n >= 2) for b in batches)]


# --- Words ----------------------------------------------------------------------------------------


def _time(costs: Sequence[RunCost]) -> list[str]:
    """Return how long these runs take one after another, on 1 to 64 devices."""
    if not costs:
        return []
    if any(cost.seconds is None for cost in costs):
        return [
            f"{'time':<8} not known: type --measure, which trains {STEPS} steps here, or "
            "--images-per-second X, of one device"
        ]
    seconds = sum(cost.seconds or 0.0 for cost in costs)
    sources = list(dict.fromkeys(cost.speed for cost in costs))
    lines = [f"{'time':<8} {clock(seconds)} on one device, {listed(sources, joiner='; ')}"]
    several = devices(costs)
    if all(cost.is_finished for cost in costs) or len(several) < 2:
        return lines
    table = [["devices", *map(str, several)], ["hours", *(_hours(seconds / n) for n in several)]]
    return [
        *lines,
        *markdown(table),
        "N devices are taken to be N times as fast; what they wait for each other and for images "
        "is not in it, nor is the start (seconds)",
    ]


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.3g}" if seconds < 3600e3 else f"{seconds / 3600:,.0f}"


def _macs(count: float) -> str:
    """Return `12.3 MMACs`: powers of 1000."""
    power = min(max(len(f"{count:.0f}") - 1, 0) // 3, 6)
    return f"{count / 1000**power:.3g} {' kMGTPE'[power].strip()}MACs"


def _teacher(cost: RunCost) -> str:
    if cost.cache is None:
        return ""
    text = f"{cost.teacher}, {_macs(cost.teacher_macs)} an image"
    if cost.cache.folder is None:
        return f"{text}, asked in every step"
    return f"{text}, not asked in training: its outputs are read from {cost.cache.folder}"


def _read(cost: RunCost) -> str:
    if cost.read_bytes is None:
        return "not known: the images are not on this machine"
    if cost.read_bytes == 0:
        return "nothing: the images are part of a package"
    if not cost.data.bytes_per_image:
        return byte_size(cost.read_bytes)
    return f"{byte_size(cost.read_bytes)}, {byte_size(cost.data.bytes_per_image)} an image"


def _cache(cache: Cache, teacher_macs: int) -> str:
    codec = f"{cache.codec}{' (what cache.codec=auto usually chooses)' if cache.is_guess else ''}"
    text = (
        f"{byte_size(cache.bytes)}: {counted(cache.draws, 'draw')} of each image, {codec}, "
        f"{cache.bytes_per_image} bytes each"
    )
    if cache.folder is None:
        return f"{text}, if they were stored (cache.dir=FOLDER)"
    if cache.images:
        left = f"{cache.images:,} outputs, {_macs(cache.images * teacher_macs)}"
        return f"{text}; still to store (python -m ghosttrain cache): {left}"
    return f"{text}; stored in {cache.folder}"


def _memory(cost: RunCost) -> str:
    memory: Mapping[str, Any] = vars(cost.memory)
    parts = [f"{name} {byte_size(v)}" for name, v in memory.items() if isinstance(v, int) and v]
    return f"{byte_size(cost.memory.total)} a process, {cost.memory.what}: {', '.join(parts)}"


def _saving(saving: Saving) -> str:
    shown = (
        f"a stored teacher is shown {saving.stored_images:,} images in place of "
        f"{saving.live_images:,}"
    )
    of = f" of these {saving.runs} runs" if saving.runs > 1 else ""
    if saving.live_images <= saving.stored_images:
        return f"{shown}: nothing{of}; several runs would share them, or cache.draws be fewer"
    hours = "" if saving.seconds is None else f", {clock(saving.seconds)} on one device"
    return (
        f"{shown}: {_macs(saving.macs)} less, {100 * saving.share:.0f} %{of}{hours}; "
        f"it takes {byte_size(saving.cache.bytes)} (cache.dir=FOLDER)"
    )

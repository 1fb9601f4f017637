"""The looks of `doctor` at the room that a run needs, and at its folder. They change nothing."""

from __future__ import annotations

import os
import shutil

from ghosttrain.config.compose import validate_data_here
from ghosttrain.engine.checkpoint import newest_checkpoint
from ghosttrain.engine.folder import (
    continued,
    has_begun,
    is_running,
    run_folder,
    validate_nothing_planted,
    validate_settings,
    validate_startable,
)
from ghosttrain.engine.launch import finished_result
from ghosttrain.engine.metrics import WORDS, headline, score
from ghosttrain.engine.same_data import describe_data, validate_result, validate_same_data
from ghosttrain.engine.saving import validate_room
from ghosttrain.errors import UserError
from ghosttrain.files import expanded, nearest
from ghosttrain.study.cost import cache_of, folder_bytes, member_of, saved_bytes
from ghosttrain.study.findings import State, needed
from ghosttrain.study.found import Found
from ghosttrain.text import byte_size, counted

PREFETCHED = 2
"""Batches that every worker has ready or under way: `prefetch_factor` of torch's DataLoader."""


# --- Room -----------------------------------------------------------------------------------------


def look_at_shared_memory(found: Found) -> tuple[State, str]:
    """Say whether the batches of the data workers have room in shared memory."""
    config, workers = found.config, found.workers
    if not workers:
        return "OK", "not needed: no data workers"
    plan = needed(found.plan, "length")
    sides = [config.data.train_size]
    sides += [side for side, _ in found.teacher.views] if found.teacher else []
    batch = plan.micro_batch * config.data.in_chans * sum(side * side for side in sides)
    if config.data.workers != "auto":  # which counts the cores of all processes
        workers *= found.processes
    if not os.path.isdir("/dev/shm"):
        return "OK", "this system has no /dev/shm"
    shared = os.statvfs("/dev/shm")
    whole, free = (n * shared.f_frsize for n in (shared.f_blocks, shared.f_bavail))
    least, usual = workers * batch, PREFETCHED * workers * batch
    text = (
        f"{byte_size(free)} of {byte_size(whole)} free; {byte_size(usual)} needed by "
        f"{counted(workers, 'data worker')}, {PREFETCHED} batches of {byte_size(batch)} each"
    )
    remedy = (
        f"{text}: type data.workers=0 or fewer than now, a smaller train.micro_batch, or in Docker "
        "start the container with --shm-size=8g"
    )
    if free < least:
        return "FAIL", remedy
    return ("note", remedy) if free < usual else ("OK", text)


def look_at_disk(found: Found) -> tuple[State, str]:
    """Say whether the disk has room for what the run and its stored outputs take."""
    train_set, _ = needed(found.halves, "data")
    config, place = found.config, nearest(run_folder(found.config))
    saved = saved_bytes(needed(found.network, "student"), config, found.processes)
    validate_room(place, saved.checkpoint)
    free = shutil.disk_usage(place).free
    needs = folder_bytes(config.train.keep + 1, saved.checkpoint, saved.average)
    kept = counted(config.train.keep, "checkpoint")
    text = (
        f"{byte_size(free)} free at {place}, the run takes {byte_size(needs)} ({kept} of "
        f"{byte_size(saved.checkpoint)}, one more while it is written, and weights)"
    )
    if config.distill.name != "none" and config.cache.dir is not None:
        members = [member_of(n, train_set.classes) for n in config.teacher.networks.values()]
        cache = cache_of(config, len(train_set), train_set.classes, members)
        where = nearest(expanded(config.cache.dir))
        left = shutil.disk_usage(where).free
        text += f"; {byte_size(left)} free at {where}, the teacher's outputs take "
        text += byte_size(cache.bytes) + ("" if cache.images else ", which are stored")
        if cache.images and left < cache.bytes:
            return "note", f"{text}: make room, or type cache.dir=/a/larger/disk"
    if free < needs:
        return "note", f"{text}: make room, or type run.root=/a/larger/disk"
    return "OK", text


# --- The run --------------------------------------------------------------------------------------


def look_at_run(found: Found) -> tuple[State, str]:
    """Say whether the run begins, goes on, is finished, or cannot be."""
    config, folder = found.config, run_folder(found.config)
    validate_nothing_planted(config)
    if is_running(folder):
        raise UserError(
            f"another process is training in {folder}; wait for it, or choose another run.name"
        )
    if config.run.fresh:
        validate_startable(config)
        if not has_begun(folder):
            return "OK", f"begins in {folder}"
        return "note", f"run.fresh: the earlier run is moved aside, and {folder} begins anew"
    notes: list[str] = []
    result = finished_result(folder, config, notes, mends=False)
    if result is not None:
        validate_data_here(config.data)
        unknown = validate_result(folder, config, result)
        found.is_finished = True
        word = WORDS[headline(result["weights"][result["headline"]])]
        text = f"finished, {word} {score(result):.2f} %: the command shows the result of {folder}"
        return ("note", f"{text}; {unknown}") if unknown else ("OK", text)
    config = continued(folder, config, [])
    validate_startable(config)
    if not folder.exists():
        return "OK", f"begins in {folder}"
    saved, _, damaged = newest_checkpoint(folder / "checkpoints") or (None, None, [])
    if saved is None:
        return "OK", f"no checkpoint yet: it begins at step 0 in {folder}"
    found.saved = saved
    validate_settings(folder, saved["settings"], config)
    record = describe_data(*needed(found.halves, "data"))
    changed = validate_same_data(saved, record, config.data.changed)["accepted"]
    needed(found.teacher, "teacher").resumed(saved["teacher"])
    place = needed(found.plan, "length").place_of(saved["step"])
    text = f"goes on {place}, of {needed(found.plan, 'length').total_steps:,} steps, in {folder}"
    notes += [*damaged, *changed]
    return ("note", "; ".join([text, *notes])) if notes else ("OK", text)

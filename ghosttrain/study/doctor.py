"""Whether a run could start here: a look at each thing that it needs.

Every look asks by the functions that a run itself uses, so that the two cannot disagree, and
changes nothing on disk. One that fails does not keep the others from looking.
"""

from __future__ import annotations

import netrc
import os
import resource
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import torch

from ghosttrain import native, threads
from ghosttrain.config.compose import Composed, validate_data_here
from ghosttrain.config.losses import compares_features
from ghosttrain.config.schema import DataConfig
from ghosttrain.data.datasets import Dataset, build_datasets
from ghosttrain.data.datasets.base import evenly
from ghosttrain.data.decode import BrokenImage, decoded
from ghosttrain.data.loader import files_of, validate_workers
from ghosttrain.distill.pretrained import validate_published
from ghosttrain.engine.conditions import processor, settle_threads
from ghosttrain.engine.devices import validate_visible
from ghosttrain.engine.distributed import pick_device, validate_gpus
from ghosttrain.engine.identify import keeping_nothing, settled
from ghosttrain.engine.label_loss import class_weights
from ghosttrain.engine.plan import make_plan
from ghosttrain.engine.student import trained_depths
from ghosttrain.engine.tasks import task_of
from ghosttrain.engine.track import summary_writer, wandb_mode
from ghosttrain.errors import UserError
from ghosttrain.models.cost import count_params
from ghosttrain.models.weights.sources import published, weights_path
from ghosttrain.study.doctor_run import look_at_disk, look_at_run, look_at_shared_memory
from ghosttrain.study.findings import Finding, NotLookedAt, State, finding, needed
from ghosttrain.study.found import Found
from ghosttrain.terminal import reason
from ghosttrain.text import byte_size, counted, one_line

MOST_CLASSES, MOST_HELD_OUT, MOST_EACH = 1000, 250, 4
"""Classes of which training images are decoded, of which held-out ones, and images of a class."""
LOADERS, OTHER_FILES = 2, 4
"""Training and held-out images have workers of their own; files that a run opens beside theirs."""
WANDB = "https://api.wandb.ai"
PATIENCE = 5.0
"""Seconds in which a server must answer."""


def examine(composed: Composed, tell: Callable[[Finding], object]) -> str | None:
    """Look at each thing that this run needs; return the names of what keeps it from starting, None
    where nothing does. The command of a finished run shows its result, whatever else is missing.

    Args:
        composed: the run.
        tell: gets each finding as soon as it is known.
    """
    data = composed.config.data.model_copy(update={"index": None})  # where a listing is written
    config = composed.config.model_copy(update={"data": data})
    with keeping_nothing():
        found = Found(settled(replace(composed, config=config)))
        failed = []
        for name, look in LOOKS.items():
            each = finding(name, partial(look, found))
            tell(each)
            failed += [name] if each.state == "FAIL" else []
    return None if found.is_finished or not failed else ", ".join(failed)


# --- The machine ----------------------------------------------------------------------------------


def _look_at_device(found: Found) -> tuple[State, str]:
    launch = found.config.launch
    if launch.devices:
        validate_visible(launch.devices)
    try:
        found.device = pick_device(launch.device)
    except UserError as error:
        raise UserError(f"{error} ({_why_no_cuda()})") from None
    if found.device.type == "cuda":
        validate_gpus(found.processes)
        torch.ones(2, device=found.device).sum().item()  # a build without this GPU's code fails
        free, whole = torch.cuda.mem_get_info(found.device)
        name = torch.cuda.get_device_name(found.device)
        memory = f"{byte_size(free)} of {byte_size(whole)} free"
        return "OK", f"{counted(torch.cuda.device_count(), 'GPU')}, {name}, {memory}"
    if launch.device == "auto" and Path("/proc/driver/nvidia/version").exists():
        return "note", f"CPU, {processor()}; the GPU is not usable: {_why_no_cuda()}"
    return "OK", f"CPU, {processor()}"


def _why_no_cuda() -> str:
    """Return why PyTorch sees no CUDA device, and what to do about it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None:
        return "this PyTorch is built for CPUs alone: https://pytorch.org/get-started has others"
    if hidden is not None and hidden.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={hidden!r} hides all: unset it"
    try:
        torch.cuda.init()
    except Exception as error:  # the driver's words, in whatever class
        return one_line(error)[:200]
    return "the driver shows no device"


def _look_at_kernels(found: Found) -> tuple[State, str]:
    if found.device.type == "cuda":
        try:
            return "OK", f"Triton {metadata.version('triton')}, compiled at the first use"
        except metadata.PackageNotFoundError:
            return (
                "note",
                "Triton is missing, PyTorch's slower operators compute: pip install triton",
            )
    instructions = f"PyTorch computes with {torch.backends.cpu.get_cpu_capability()}"
    if os.environ.get("GHOSTTRAIN_NATIVE") == "0":
        return "OK", f"C++ kernels off (GHOSTTRAIN_NATIVE=0); {instructions}"
    if native.library_path() is None:
        try:
            native.validate_compiler()
        except RuntimeError as error:
            remedy = "pip install ninja" if "ninja" in str(error) else "apt install g++"
            return "note", f"C++ kernels off, a run is slower: {error}: {remedy}; {instructions}"
        when = "by the first run, in about half a minute"
        return "note", f"C++ kernels are compiled {when}; {instructions}"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if native.load() is None:
            return "note", one_line(said[-1].message) if said else "C++ kernels are off"
    return "OK", f"C++ kernels on (-march=native); {instructions}"


def _look_at_threads(found: Found) -> tuple[State, str]:
    count, few = settle_threads(found.device, None)
    if few:
        return "note", few[0].removeprefix("threads: ")
    free = f"{threads.free_cores():.1f} of {threads.cores():.1f} cores are free"
    return "OK", f"{counted(count, 'thread')}; {free}"


def _look_at_files(found: Found) -> tuple[State, str]:
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = "without a limit" if most == resource.RLIM_INFINITY else f"at most {most:,}"
    if not found.workers:
        return "OK", f"{limit}; no data workers"
    every = LOADERS * found.workers
    validate_workers(every, beside=OTHER_FILES)
    files = files_of(every) + OTHER_FILES
    return (
        "OK",
        f"{limit}; {files} and more for {LOADERS} x {counted(found.workers, 'data worker')}",
    )


# --- Data, teacher, student -----------------------------------------------------------------------


def _look_at_data(found: Found) -> tuple[State, str]:
    validate_data_here(found.config.data)
    found.halves = train_set, held_out = build_datasets(found.config.data)
    text = f"{train_set.describe()}; held out {len(held_out):,}"
    left_out = (*train_set.left_out, *held_out.left_out)
    return ("note", f"{text}; {left_out[0]}") if left_out else ("OK", text)


def _look_at_images(found: Found) -> tuple[State, str]:
    train_set, held_out = needed(found.halves, "data")
    data, broken, looked = found.config.data, [], 0
    for half, most in ((train_set, MOST_CLASSES), (held_out, MOST_HELD_OUT)):
        numbers = some_of_each_class(half, most)
        looked += len(numbers)
        broken += [fault for number in numbers if (fault := _fault(half, number, data))]
    if not broken:
        return "OK", f"{looked:,} decoded, some of each class; data check reads all"
    text = f"{len(broken):,} of {looked:,} cannot be read, the first: {broken[0]}; "
    if data.on_error == "skip":
        text += "data.on_error=skip leaves such images out, data check lists all of them"
        return "note", text
    return "FAIL", f"{text}type data.on_error=skip to leave such images out, or see data check"


def _fault(half: Dataset, number: int, data: DataConfig) -> str | None:
    """Return why an image cannot be read; None: it can."""
    try:
        decoded(half.open(number), data)
    except BrokenImage as error:
        return str(error)
    return None


def some_of_each_class(half: Dataset, most: int) -> list[int]:
    """Return the numbers of some images of each class, or of `most` of the classes: `MOST_EACH` of
    each where classes are few, one where they are many.
    """
    order = np.argsort(half.labels, kind="stable")
    present, starts, counts = np.unique(half.labels[order], return_index=True, return_counts=True)
    each = min(max(most // (4 * max(len(present), 1)), 1), MOST_EACH)
    return [
        int(order[starts[k] + place])
        for k in evenly(len(present), most)
        for place in evenly(int(counts[k]), each)
    ]


def _look_at_length(found: Found) -> tuple[State, str]:
    train_set, _ = needed(found.halves, "data")
    config = found.config
    plan = make_plan(config, len(train_set), found.processes, train_set.labels)
    class_weights(config.train, train_set.labels, len(train_set.classes))
    found.plan = plan
    where = f"each of {plan.ranks} processes" if plan.ranks > 1 else "one process"
    text = (
        f"{counted(plan.epochs, 'epoch')}, {plan.total_steps:,} steps of {plan.global_batch:,} "
        f"images, {plan.micro_batch:,} at once in {where}"
    )
    long = plan.long_warmup()
    return ("note", f"{text}; {long.removeprefix('note: ')}") if long else ("OK", text)


def _look_at_teacher(found: Found) -> tuple[State, str]:
    train_set, _ = needed(found.halves, "data")
    config = found.config
    asked = config.distill.name != "none" and config.cache.dir is None
    for network in config.teacher.networks.values() if asked else ():
        validate_published(network, "teacher", train_set.classes)
        _validate_here(network.weights, network.name, "teacher.weights")
    found.teacher = task_of(config).build_teacher(config, train_set, found.device)
    unchecked = asked and not config.teacher.check_samples
    return "note" if unchecked else "OK", found.teacher.about


def _look_at_student(found: Found) -> tuple[State, str]:
    train_set, _ = needed(found.halves, "data")
    plan = needed(found.plan, "length")
    config, features = found.config, 0
    if compares_features(config.distill):
        features = needed(found.teacher, "teacher").num_features
    alone = config.train.model_copy(update={"sync_bn": False})  # there is no rank to ask here
    config = config.model_copy(update={"train": alone})
    _validate_here(config.model.weights, config.model.name, "model.weights")
    network = task_of(config).build_network(
        config, train_set.classes, features, plan.micro_batch, torch.device("cpu")
    )
    trained_depths(network.student, config)
    found.network = network
    size = f"{count_params(network.student) / 1e6:.3f} M parameters in training form"
    weights = getattr(network.student, "weights_note", "")
    start = f"; from {config.model.weights} ({weights})" if config.model.weights else ""
    return "OK", f"{config.model.name}, {size}{start}"


def _validate_here(weights: str | None, name: str | None, setting: str) -> None:
    """Raise NotLookedAt where weights are published ones that a run would fetch: that is no look.

    Raises:
        UserError: the hub does not give them.
    """
    if weights != "hub" or name is None:
        return
    with suppress(UserError):
        weights_path(weights, name, setting, download=False)
        return
    from ghosttrain.models.weights.hub import validate_on_hub

    validate_on_hub(name, published(name, f"{setting.rpartition('.')[0]}.name"), setting)
    raise NotLookedAt(f"{setting}=hub: the run fetches the weights of {name}, which the hub has")


# --- Tracking -------------------------------------------------------------------------------------


def _look_at_tracking(found: Found) -> tuple[State, str]:
    tracker, mode = found.config.tracker, wandb_mode(found.config)
    places = ["metrics.jsonl and log.txt in the run folder"]
    if tracker.tensorboard:
        summary_writer()
        places.append("TensorBoard")
    if mode == "offline":
        places.append("Weights & Biases offline")
    if mode != "online":
        return "OK", ", ".join(places)
    server = os.environ.get("WANDB_BASE_URL") or WANDB
    fault = _fault_of_wandb(server)
    if fault is None:
        return "OK", ", ".join([*places, f"Weights & Biases, {server} answers"])
    text = f"Weights & Biases: {fault}; or type tracker.wandb=offline or off"
    return (
        ("FAIL", text) if found.saved is None else ("note", f"{text}; the run goes on without it")
    )


def _fault_of_wandb(server: str) -> str | None:
    """Return why Weights & Biases would not start, and what to do; None: it answers, and an account
    is known (https://docs.wandb.ai/guides/track/environment-variables).
    """
    try:
        with suppress(urllib.error.HTTPError):  # it answers, whatever it says to nobody
            urllib.request.urlopen(server, timeout=PATIENCE).close()
    except (OSError, ValueError) as error:
        cause = getattr(error, "reason", error)
        told = reason(cause) if isinstance(cause, BaseException) else one_line(cause)
        return f"{server} does not answer ({told}): see to the network"
    host, known = urlparse(server).hostname or "", "WANDB_API_KEY" in os.environ
    with suppress(OSError, netrc.NetrcParseError):
        known = known or netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return None if known else f"nobody is logged in at {host}: type wandb login"


LOOKS: dict[str, Callable[[Found], tuple[State, str]]] = {
    "device": _look_at_device,
    "kernels": _look_at_kernels,
    "threads": _look_at_threads,
    "open files": _look_at_files,
    "data": _look_at_data,
    "images": _look_at_images,
    "length": _look_at_length,
    "teacher": _look_at_teacher,
    "student": _look_at_student,
    "shared memory": look_at_shared_memory,
    "disk": look_at_disk,
    "run": look_at_run,
    "tracking": _look_at_tracking,
}
"""Name of a check -> what looks; later ones use what earlier ones found."""

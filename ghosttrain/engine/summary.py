"""Words about a run: the first lines of its log, the sizes of its model, its card."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ghosttrain.config.identity import run_name, settings_hash
from ghosttrain.config.schema import EMBEDDED_DATA, Config
from ghosttrain.data.datasets import (
    Dataset,
    classes_note,
    duplicates_note,
    notes_on,
    unusual_notes,
)
from ghosttrain.data.datasets.folder import FileDataset
from ghosttrain.data.decode import jpeg_decoder_version
from ghosttrain.detect.coco_numbers import ignoring_the_picture, measure
from ghosttrain.engine.evaluate import Evaluation
from ghosttrain.engine.folder import result_lines, run_folder
from ghosttrain.engine.label_loss import class_weights
from ghosttrain.engine.plan import Plan
from ghosttrain.engine.same_data import without_classes
from ghosttrain.engine.state import TrainState
from ghosttrain.models.cost import count_macs, count_params
from ghosttrain.models.depthwise import compiled
from ghosttrain.text import listed


@dataclass(frozen=True)
class Description:
    """What is known of a run when it starts."""

    config: Config
    plan: Plan
    train_set: Dataset
    held_out: Dataset
    data_record: Mapping[str, Any]
    """What the data are (`same_data.describe_data`)."""
    teacher: str
    """What the teacher is, in one line."""


@dataclass(frozen=True)
class Measured:
    """What was measured when a run ended."""

    evaluation: Evaluation
    """Of every kind of weights, on the held-out images."""
    models: Mapping[str, nn.Module]
    """Kind of weights -> network."""
    seconds: float
    """Of the whole run, evaluations included."""


def head(run: Description, student: nn.Module, notes: Sequence[str]) -> list[str]:
    """Return the first lines of a run: what is trained on what, and what differs from the recipe as
    published.
    """
    config, plan, train_set, held_out = run.config, run.plan, run.train_set, run.held_out
    data, optim, ranks = config.data, config.optim, plan.ranks
    lines = [f"run folder: {run_folder(config)}"]
    jpegs = ""
    if isinstance(train_set, FileDataset):
        jpegs = f"; JPEGs decoded by {jpeg_decoder_version(data.decoder)}"
    lines.append(f"data: {train_set.describe()}; held out {len(held_out):,}{jpegs}")
    lines.append(f"classes: {classes_note(train_set, held_out)}")
    if data.name in EMBEDDED_DATA:
        others = "COCO: type data=coco" if train_set.boxes else "ImageNet: type data=imagenet"
        lines.append(
            f"  no other data was named, so this is the embedded set; {others} data.root=/path"
        )
    lines += [f"  {note}" for note in (*notes_on(train_set), *notes_on(held_out))]
    if data.name in ("folder", "table"):
        lines += [f"  {note}" for note in unusual_notes(data, train_set)]
    lines += [f"  {note}" for note in duplicates_note(data, train_set, held_out)]
    lines += notes
    lines.append(
        f"{_what_it_is(config)}, {count_params(student) / 1e6:.3f} M parameters in training form"
    )
    if config.model.weights:
        known = (getattr(student, "weights_dialect", "timm"), getattr(student, "weights_note", ""))
        lines.append(f"weights: {config.model.weights} ({'; '.join(filter(None, known))})")
        mean, std = (", ".join(f"{x:g}" for x in values) for values in (data.mean, data.std))
        lines.append(
            f"images: {data.train_size} px in training, {data.eval_size} px held out; mean {mean}, "
            f"std {std}"
        )
    if data.size_schedule:
        sides = listed(f"{side} px from {100 * share:g} %" for share, side in data.size_schedule)
        lines.append(f"size: {sides} of the run")
    if data.repeats > 1:
        lines.append(f"repeated augmentation: {data.repeats} draws of an image in a batch")
    lines += training_notes(config, train_set)
    lines.append(f"teacher: {run.teacher}")
    seen = "seen by batch norm" + (", of all ranks together" if config.train.sync_bn else "")
    lines.append(
        f"batch: {config.train.global_batch} = {plan.micro_batch} ({seen}) x {plan.accumulation} "
        f"accumulated x {ranks} {'process' if ranks == 1 else 'processes'}, on "
        f"{device_name(device_of(student))}"
    )
    scaled = "as set"
    if optim.lr_batch is not None and optim.lr_batch != config.train.global_batch:
        rule = "linear" if optim.name == "sgd" else "square root"
        scaled = (
            f"{optim.lr:g} at batch {optim.lr_batch}, scaled by the {rule} rule; optim.lr=X sets it"
        )
    lines.append(f"optimizer: {optim.name}, learning rate {plan.peak_lr:.3g} ({scaled})")
    lines.append(
        f"length: {plan.total_steps} steps, {plan.epochs} epochs of {plan.steps_per_epoch}; "
        f"warm-up {plan.warmup_steps} steps"
    )
    return [*lines, *filter(None, [plan.long_warmup()])]


def _what_it_is(config: Config) -> str:
    """Return `student: NAME`, or `detector: ssdlite on NAME`."""
    kind = f"detector: {config.detector.name} on" if config.detects else "student:"
    return f"{kind} {config.model.name}"


def training_notes(config: Config, train_set: Dataset) -> list[str]:
    """Return lines about what does not learn and about how classes are weighed."""
    freeze, train, lines = config.model.freeze, config.train, []
    if freeze != "none":
        points = freeze if not isinstance(freeze, str) else ((0.0, freeze),)
        parts = (f"{what} from {100 * share:g} % of the run" for share, what in points)
        lines.append(f"frozen: {freeze if isinstance(freeze, str) else ', '.join(parts)}")
    weighed = []
    if config.data.balance != "none":
        weighed.append(f"drawn by data.balance={config.data.balance}")
    weights_K = class_weights(train, train_set.labels, len(train_set.classes))
    if weights_K is not None:
        named = zip(train_set.classes, weights_K.tolist(), strict=True)
        weighed.append(f"weights {listed((f'{name} {w:.2f}' for name, w in named), most=6)}")
    if train.focal_gamma:
        weighed.append(f"focal loss, gamma {train.focal_gamma:g}")
    return lines + ([f"classes are {'; '.join(weighed)}"] if weighed else [])


def result(run: Description, state: TrainState, measured: Measured) -> dict[str, Any]:
    """Return what `result.json` holds: accuracy, sizes and times of a finished run."""
    models, size, chans = measured.models, run.config.data.eval_size, run.config.data.in_chans
    average = models["ema"]
    fused = models.get("fused", average)  # a timm model has no other form
    train, held_out = run.train_set.boxes, run.held_out.boxes
    detection: dict[str, Any] = {}
    if train is not None and held_out is not None:
        blind = ignoring_the_picture(train, len(state.classes), held_out.sizes)
        detection = {
            "ignoring": measure(held_out, state.classes, blind).row,
            "detector": run.config.detector.name,
        }
    return detection | {
        "headline": "ema",
        "weights": measured.evaluation.table,
        "classes": measured.evaluation.counts["ema"].record(state.classes),
        "best": state.best,
        "fuse_max_diff": measured.evaluation.difference,
        "model": {
            "name": run.config.model.name,
            "params_train": count_params(average),
            "params_fused": count_params(fused),
            "macs_train": count_macs(average, size, chans),
            "macs_fused": count_macs(fused, size, chans),
            "eval_size": size,
            "weight_bits": run.config.model.weight_bits,
        },
        "seconds": measured.seconds,
        "images_per_second": state.step * run.plan.global_batch / state.seconds,
        "steps": state.step,
        "data": without_classes(run.data_record),
        "device": device_name(device_of(average)),
        "settings": settings_hash(run.config),
        "seed": run.config.seed,
    }


def card(run: Description, result: dict[str, Any], notes: Sequence[str]) -> str:
    """Return the model card of a finished run, as Markdown."""
    config = run.config
    table = "\n".join(result_lines(result))
    policy = config.augment.policy
    bullets = "\n".join(note.replace("  ", "- ", 1) if note[:2] == "  " else note for note in notes)
    asked = config.teacher.networks.values()
    teacher = " + ".join(str(network.name or network.weights or "none") for network in asked)
    data, classes = config.data, result["classes"]["names"]
    first, shown_classes = classes[0], listed(classes, most=1000)
    size = data.eval_size
    resized = math.floor(data.eval_size / data.crop_pct)
    mixed = " Mixup/CutMix were on." if policy == "with_mixup" else ""
    network = f"`{config.model.name}`"
    use = f"""```python
import ghosttrain

model = ghosttrain.load_run("this/folder")  # EMA; or weights="raw", "fused"
model.predict(["image.jpg"])  # [[({first!r}, 0.98), ...]]
```

`python -m ghosttrain predict this/folder image.jpg` does the same. An image is resized to
{resized} px (shorter side, {data.interpolation}), cropped to {size} x {size}, and normalised:
mean {list(data.mean)}, std {list(data.std)}, of pixels in [0, 1]."""
    if config.detects:
        network = f"`{config.detector.name}` on `{config.model.name}`"
        use = f"""`python -m ghosttrain detect eval this/folder` measures it again. An image is
stretched to {size} x {size} px ({data.interpolation}) and normalised: mean {list(data.mean)},
std {list(data.std)}, of pixels in [0, 1]."""
    return f"""# {run_name(config)}

{network} trained with the recipe `{config.recipe}` on {config.data.name}, seed
{config.seed}, on {result["device"]}. The result is the final EMA weights on {len(run.held_out)}
held-out images.

```
{table}
```

![curves](curves.png)

{bullets}
Teacher: {teacher} ({config.distill.name}). Augmentation: `{policy}`.{mixed}

{use}
Classes: {shown_classes}.

All settings: `config.yaml`; versions, commit, command: `provenance.json`.
"""


def device_of(model: nn.Module) -> torch.device:
    """Return where a network is."""
    return next(model.parameters()).device


def device_name(device: torch.device) -> str:
    """Return what computes: the GPU, or the processor's architecture, threads and kernels."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads, kernels = torch.get_num_threads(), "on" if compiled("cpu") else "off"
    plural = "s" * (threads > 1)
    return f"CPU ({platform.machine()}, {threads} thread{plural}, C++ kernels {kernels})"

"""`bench step`: forward and backward of a student by every forward, against plain and timm's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ghosttrain import native
from ghosttrain.config.schema import PLAIN, Config
from ghosttrain.config.students import validate_sides
from ghosttrain.engine.summary import device_name
from ghosttrain.models.cost import count_macs
from ghosttrain.models.create import create_model, create_timm_model
from ghosttrain.study.harness import Side, peak_mib, quartiles, take_turns, timed
from ghosttrain.study.table import markdown

PLAIN_SIDE, TIMM = "plain", "timm"
WARM_UP = 2
CLASSES = 10
"""Of a detector; each image has two boxes."""


class Work(NamedTuple):
    """What all sides do, as JSON values."""

    model: str
    input_stride: str
    detector: str
    batch: int
    size: int
    threads: int
    device: str


def bench_step(
    config: Config, forwards: Sequence[str], rounds: int, threads: int, device: torch.device
) -> str:
    """Return a table: a row for every forward, for the plain network and, if timm has it, timm's.

    A step is forward and backward of train.micro_batch images (3, S, S) in float32, channels-last,
    S = data.train_size; the plain network is `reparam=none`, trained as PyTorch does it. MACs are
    those of the convolutions per image, as written branch by branch. With a detector the student is
    its backbone, whose own step is timed beside: to the sum of its maps, without the rest.

    Raises:
        UserError: images too small for this student.
    """
    name, stride, size = config.model.name, config.model.input_stride, config.data.train_size
    detector, batch = config.detector.name, config.train.micro_batch or 1
    validate_sides(config.model, config.data, batch)
    names = [*forwards, PLAIN_SIDE]
    if in_timm(name) and stride == "standard":
        names.append(TIMM)
    work = Work(name, stride, detector, batch, size, threads, str(device))
    sides = {side: _timed_side(side, work, device) for side in names}
    times = take_turns(sides, rounds, WARM_UP, threads)
    peaks = {side: peak_mib(__name__, "one_step", [side, *work], device) for side in names}
    has_backbone = detector != "none"
    head = ["side", "CPU ms", "wall ms", "times plain", "peak MiB", "times plain", "MMACs an image"]
    table = [head + ["backbone, CPU ms", "its share"] * has_backbone]
    for side in names:
        time = times[side, "step"]
        row = [
            _shown(side, forwards, name),
            quartiles(time.cpu).text(0),
            quartiles(time.wall).text(0),
            f"{time.ratio(times[PLAIN_SIDE, 'step'], device):.2f}",
            f"{peaks[side]:.0f}",
            f"{peaks[side] / peaks[PLAIN_SIDE]:.2f}",
            f"{count_macs(build(side, name, stride), size) / 1e6:.1f}",
        ]
        if has_backbone:
            part = times[side, "backbone"]
            row += [quartiles(part.cpu).text(0), f"{part.ratio(time, device):.0%}"]
        table.append(row)
    return "\n".join(
        [
            f"{name}{f' in {detector}' if has_backbone else ''}: forward and backward of {batch} "
            f"images of {size} pixels, float32, channels-last; {device_name(device)}, torch "
            f"{torch.__version__}",
            f"median of {rounds} rounds (lower to upper quartile), sides taking turns; "
            "memory: peak above the start, each in a fresh process",
            "",
            *markdown(table),
        ]
    )


def _timed_side(side: str, work: Work, device: torch.device) -> Side:
    parts = {"step": one_step(side, *work)}
    if work.detector != "none":
        parts["backbone"] = one_step(side, *work, part="backbone")
    return lambda number: {name: timed(step, device) for name, step in parts.items()}


def _shown(side: str, forwards: Sequence[str], name: str) -> str:
    if side in forwards:
        return f"`forward={side}`"
    return "timm (plain)" if side == TIMM and not name.startswith("ghostnetv3") else side


def in_timm(name: str) -> bool:
    """Whether timm has a network of this name.

    `ghostnetv3_*` have branches there as here; what else it has is plain.
    """
    import timm

    return timm.is_model(name)


def build(side: str, name: str, input_stride: str) -> nn.Module:
    """Return one side's network, in training mode."""
    torch.manual_seed(0)
    if side == TIMM:
        return create_timm_model(name)
    plain = PLAIN.model_copy(update={"forward": "branches"})
    reparam = plain if side == PLAIN_SIDE else {"forward": side}
    return create_model(name, reparam=reparam, input_stride=input_stride)


def one_step(
    side: str,
    name: str,
    input_stride: str,
    detector: str,
    batch: int,
    size: int,
    threads: int,
    device_text: str,
    part: str = "step",
) -> Callable[[], None]:
    """Return a function that runs forward and backward once, on images made here; of a detector's
    backbone alone with `part="backbone"`.
    """
    device = torch.device(device_text)
    torch.set_num_threads(threads)
    native.load()
    model: nn.Module = build(side, name, input_stride)
    if detector != "none":
        from ghosttrain.detect.detectors import create_detector

        model = create_detector(detector, model, name, CLASSES, size)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator).to(device)
    images = images.contiguous(memory_format=torch.channels_last)
    if detector == "none":
        loss = _loss_of_classes(model, images)
    else:
        loss = _sum_of_maps(model, images) if part == "backbone" else _loss_of_boxes(model, images)

    def step() -> None:
        loss().backward()
        model.zero_grad(set_to_none=True)

    return step


def _loss_of_classes(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    labels = torch.arange(len(images), device=images.device)
    return lambda: nn.functional.cross_entropy(model(images), labels)


def _loss_of_boxes(detector: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    from ghosttrain.detect.detectors import targets_of

    boxes = torch.tensor([[0.1, 0.1, 0.4, 0.5, 3], [0.3, 0.5, 0.9, 0.9, 7]], device=images.device)
    boxes[:, :4] *= images.shape[-1]
    targets = targets_of(boxes.repeat(len(images), 1, 1))
    return lambda: torch.stack([*detector(images, targets).values()]).sum()


def _sum_of_maps(detector: Any, images: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.stack([x.sum() for x in detector.backbone.backbone(images)]).sum()

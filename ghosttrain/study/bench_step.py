"""`bench step`: forward and backward of a student by every forward, against plain and timm's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

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


def bench_step(
    config: Config, forwards: Sequence[str], rounds: int, threads: int, device: torch.device
) -> str:
    """Return a table: a row for every forward, for the plain network and, if timm has it, timm's.

    A step is forward and backward of train.micro_batch images (3, S, S) in float32, channels-last,
    S = data.train_size; the plain network is `reparam=none`, trained as PyTorch does it. MACs are
    those of the convolutions per image, as written branch by branch.

    Raises:
        UserError: images too small for this student.
    """
    name, stride, size = config.model.name, config.model.input_stride, config.data.train_size
    batch = config.train.micro_batch or 1
    validate_sides(config.model, config.data, batch)
    names = [*forwards, PLAIN_SIDE]
    if in_timm(name) and stride == "standard":
        names.append(TIMM)
    what = name, stride, batch, size, threads, str(device)
    sides = {side: _timed_side(one_step(side, *what), device) for side in names}
    times = take_turns(sides, rounds, WARM_UP, threads)
    peaks = {side: peak_mib(__name__, "one_step", [side, *what], device) for side in names}
    head = ["side", "CPU ms", "wall ms", "times plain", "peak MiB", "times plain", "MMACs an image"]
    table = [head]
    for side in names:
        time = times[side, "step"]
        table.append(
            [
                _shown(side, forwards, name),
                quartiles(time.cpu).text(0),
                quartiles(time.wall).text(0),
                f"{time.ratio(times[PLAIN_SIDE, 'step'], device):.2f}",
                f"{peaks[side]:.0f}",
                f"{peaks[side] / peaks[PLAIN_SIDE]:.2f}",
                f"{count_macs(build(side, name, stride), size) / 1e6:.1f}",
            ]
        )
    return "\n".join(
        [
            f"{name}: forward and backward of {batch} images of {size} pixels, float32, "
            f"channels-last; {device_name(device)}, torch {torch.__version__}",
            f"median of {rounds} rounds (lower to upper quartile), sides taking turns; "
            "memory: peak above the start, each in a fresh process",
            "",
            *markdown(table),
        ]
    )


def _timed_side(step: Callable[[], None], device: torch.device) -> Side:
    return lambda number: {"step": timed(step, device)}


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
    side: str, name: str, input_stride: str, batch: int, size: int, threads: int, device_text: str
) -> Callable[[], None]:
    """Return a function that runs forward and backward once, on images made here."""
    device = torch.device(device_text)
    torch.set_num_threads(threads)
    native.load()
    model = build(side, name, input_stride)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator).to(device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device)

    def step() -> None:
        nn.functional.cross_entropy(model(images), labels).backward()
        model.zero_grad(set_to_none=True)

    return step

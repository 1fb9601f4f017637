"""The verb `bench`: its arguments, checked, and the benchmark they name."""

from __future__ import annotations

from collections.abc import Sequence

from ghosttrain.config.schema import FORWARDS
from ghosttrain.config.students import FAMILIES, STUDENTS
from ghosttrain.errors import UserError, did_you_mean

DEFAULTS: dict[str, dict[str, str]] = {
    "step": {
        "model": "ghostnetv3_100",
        "batch": "16",
        "size": "224",
        "rounds": "10",
        "threads": "1",
        "device": "auto",
        "forwards": ",".join(FORWARDS),
        "input_stride": "standard",
    },
    "optim": {"model": "ghostnetv3_130", "rounds": "30", "threads": "1", "device": "auto"},
    "distill": {
        "model": "mobilenetv2_050",
        "teacher": "efficientnet_lite2",
        "codec": "features:4",
        "images": "128",
        "batch": "32",
        "size": "224",
        "rounds": "5",
        "threads": "1",
        "device": "auto",
    },
}


def bench(names: Sequence[str], overrides: Sequence[str]) -> str:
    """Run the benchmark named by `names`, with settings `key=value`; return its table.

    Raises:
        UserError: there is no such benchmark, setting, model, forward or device.
    """
    if len(names) != 1 or names[0] not in DEFAULTS:
        shown = ", ".join(f"bench {name}" for name in DEFAULTS)
        raise UserError(f"bench needs one of: python -m ghosttrain {shown}")
    settings = dict(DEFAULTS[names[0]])
    for override in overrides:
        key, _, value = override.partition("=")
        if key not in settings:
            hint = did_you_mean(key, settings)
            raise UserError(f"bench {names[0]} has no setting {key!r}.{hint}")
        settings[key] = value
    if settings["model"] not in STUDENTS:
        hint = did_you_mean(settings["model"], STUDENTS)
        raise UserError(f"model={settings['model']} is no student.{hint}")
    forwards = tuple(settings.pop("forwards", "").split(","))
    for forward in forwards:
        if names[0] == "step" and forward not in FORWARDS:
            hint = did_you_mean(forward, FORWARDS)
            raise UserError(f"forwards={forward} is no forward.{hint}")
    device = settings.pop("device")
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device={device}: choose auto, cpu or cuda")
    model, stride = settings.pop("model"), settings.pop("input_stride", "standard")
    strides = FAMILIES[STUDENTS[model].family].sides
    if stride not in strides:
        raise UserError(f"input_stride={stride}: choose {' or '.join(strides)}")
    teacher, codec = settings.pop("teacher", ""), settings.pop("codec", "")
    numbers = {key: _positive(key, value) for key, value in settings.items()}

    from ghosttrain.engine.distributed import pick_device

    if names[0] == "optim":
        from ghosttrain.study import bench_optim

        rows = bench_optim.bench_optim(model, **numbers, device=pick_device(device, "device"))
        return bench_optim.describe(rows)
    if names[0] == "distill":
        from ghosttrain.study import bench_distill

        rows = bench_distill.bench_distill(
            model, teacher, codec, **numbers, device=pick_device(device, "device")
        )
        return bench_distill.describe(rows)
    from ghosttrain.study import bench_step

    if numbers["size"] < strides[stride].least:
        raise UserError(
            f"size={numbers['size']} is too small for {model}; type "
            f"size={strides[stride].least} or more"
        )
    rows = bench_step.bench_step(
        model,
        **numbers,
        device=pick_device(device, "device"),
        forwards=forwards,
        input_stride=stride,
    )
    return bench_step.describe(rows)


def _positive(key: str, value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"{key}={value} is not a whole number of 1 or more")
    return int(value)

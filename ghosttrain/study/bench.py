"""The verb `bench`: settings as for a run, composed, and the benchmark they are for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ghosttrain.config.compose import compose
from ghosttrain.config.schema import FORWARDS, Config
from ghosttrain.errors import UserError, did_you_mean

_DEVICE = "launch.device"
DEFAULTS: dict[str, tuple[str, ...]] = {
    "step": ("model=ghostnetv3_100", "data.train_size=224", "train.micro_batch=16"),
    "optim": ("model=ghostnetv3_130",),
    "data": ("data=folder", "data.root=."),  # photographs of its own are made
    "distill": (
        "model=mobilenetv2_050",
        "teacher=efficientnet_lite2",
        "distill=soft_ce",
        "cache.dir=.",  # a place of its own is made
        "cache.codec=features:4",
        "data.train_size=224",
        "train.global_batch=32",
    ),
}
"""Part -> settings of a run that differ from the schema's; what is typed comes after them."""
READ = {
    "step": (
        "model", "detector", "data.train_size", "train.micro_batch", "model.input_stride", _DEVICE,
    ),
    "optim": ("model", _DEVICE),
    "data": ("data.root", "data.split", "data.train_size", "data.eval_size", "data.decoder"),
    "distill": (
        "model", "teacher", "cache.codec", "data.train_size", "train.global_batch", _DEVICE,
    ),
}  # fmt: skip
"""Part -> the settings that it reads."""
ROUNDS = {"step": 10, "optim": 30, "data": 7, "distill": 5}


@dataclass(frozen=True)
class Options:
    """What is no setting of a run."""

    rounds: int | None = None
    """None: those of the part (`ROUNDS`)."""
    threads: int = 1
    forwards: str = ",".join(FORWARDS)
    images: int = 128


def bench(names: Sequence[str], overrides: Sequence[str], options: Options) -> str:
    """Run the benchmark named by `names` and return its table.

    Raises:
        UserError: there is no such benchmark, setting, model, forward or device.
    """
    if len(names) != 1 or names[0] not in DEFAULTS:
        shown = ", ".join(f"bench {name}" for name in DEFAULTS)
        raise UserError(f"bench needs one of: python -m ghosttrain {shown}")
    (part,) = names
    config = compose(composed_words(part, overrides), trains=False).config
    for override in overrides:
        key = override.lstrip("+").partition("=")[0]
        if key not in (*READ[part], f"{READ[part][0]}.name"):
            known = ", ".join(f"{name}=" for name in READ[part])
            raise UserError(f"{override!r} does nothing in bench {part}: it reads {known}")
    if config.model.source != "ghosttrain":
        raise UserError(f"bench {part} is for this project's students, not {config.model.name}")
    for key in ("rounds", "threads", "images"):
        value = getattr(options, key)
        if value is not None and value < 1:
            raise UserError(f"--{key} {value} must be 1 or more")
    forwards = options.forwards.split(",")
    for forward in forwards:
        if forward not in FORWARDS:
            hint = did_you_mean(forward, FORWARDS)
            raise UserError(f"--forwards {options.forwards}: {forward!r} is none.{hint}")
    own_images = any(override.startswith("data.root=") for override in overrides)
    return _run(part, config, forwards, options, own_images)


def composed_words(part: str, overrides: Sequence[str]) -> list[str]:
    """Return the words that the settings of a benchmark are composed of."""
    # What a detector refuses of classification, its recipe replaces.
    detectors = [word for word in overrides if word.startswith(("detector=", "detector.name="))]
    recipe = ["+recipe=detect_ssdlite"] * any(not word.endswith("=none") for word in detectors)
    asked = ["budget=full", *recipe, *DEFAULTS[part], *overrides]
    if recipe:  # its anchors are for one side
        asked += [w.replace("train", "eval") for w in asked if w.startswith("data.train_size=")]
    return asked


def _run(
    part: str, config: Config, forwards: Sequence[str], options: Options, own_images: bool
) -> str:
    from ghosttrain.engine.distributed import pick_device

    device, rounds = pick_device(config.launch.device), options.rounds or ROUNDS[part]
    if part == "step":
        from ghosttrain.study.bench_step import bench_step

        return bench_step(config, forwards, rounds, options.threads, device)
    if part == "optim":
        from ghosttrain.study.bench_optim import bench_optim

        return bench_optim(config, rounds, options.threads, device)
    if part == "data":
        from ghosttrain.study.bench_data import bench_data

        return bench_data(config, own_images, options.images, rounds, options.threads)
    from ghosttrain.study.bench_distill import bench_distill

    return bench_distill(config, options.images, rounds, options.threads, device)

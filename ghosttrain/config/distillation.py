"""What the settings of teacher, distillation and cache contradict in each other.

Imports no torch: a contradiction is named before anything heavy is loaded. Whether weights exist
and fit, and whether a cache holds the right outputs, is for `ghosttrain.distill` to find out.
"""

from __future__ import annotations

from collections.abc import Sequence

from ghosttrain.config import losses
from ghosttrain.config.codec import parse_codec
from ghosttrain.config.schema import (
    NAMED_SOURCES,
    AugmentConfig,
    CacheConfig,
    DistillConfig,
    PretrainedConfig,
    TeacherConfig,
)
from ghosttrain.errors import UserError


def validate_teacher(
    teacher: TeacherConfig, distill: DistillConfig, chosen: str, choices: Sequence[str]
) -> None:
    """Refuse a loss without a teacher, and a teacher that is one network and several.

    `chosen` is the file of the group `teacher`, `choices` are all there are.

    Raises:
        UserError: naming what contradicts what, and what to type.
    """
    members = teacher.members
    if distill.name != "none" and not (_is_named(teacher) or members):
        if chosen == "run":
            raise UserError("teacher=run needs teacher.run=RUN, the folder of a finished run")
        if chosen == "file":
            raise UserError(
                "teacher=file needs weights: type teacher.weights=PATH (the folder of a finished "
                "run, or a .safetensors or .pth file)"
            )
        if chosen == "timm":
            raise UserError("teacher=timm needs a model: type teacher.name=MODEL (any timm model)")
        if chosen == "ensemble":
            raise UserError(
                "teacher=ensemble has no members: type teacher.members.a.name=tf_efficientnet_lite0"
                " teacher.members.a.weights=efficientnet-lite, the same for teacher.members.b, ... "
                "(a, b: names of your choice)"
            )
        raise UserError(
            f"distill={distill.name} needs a teacher: type teacher=NAME "
            f"({', '.join(n for n in choices if n != 'none')}) or distill=none"
        )
    alone = [f"teacher.{name}" for name in PretrainedConfig.model_fields if getattr(teacher, name)]
    if members and alone:
        raise UserError(
            f"{' and '.join(alone)} set up a single teacher, teacher.members "
            f"({', '.join(members)}) an ensemble; type teacher=ensemble for the members, or leave "
            "them out"
        )
    for name, member in members.items():
        if not _is_named(member):
            raise UserError(
                f"teacher.members.{name} is no network yet: type teacher.members."
                f"{name}.name=MODEL (any timm model), or .weights=FILE of a network trained here"
            )
    if not members and teacher.average != TeacherConfig().average:
        raise UserError(
            f"teacher.average={teacher.average} would do nothing: it is for teacher=ensemble, and "
            "teacher.members is empty"
        )


def _is_named(network: PretrainedConfig) -> bool:
    """Whether settings say which network it is, or name a file that may say so itself."""
    return bool(network.name) or network.weights not in (None, *NAMED_SOURCES)


def validate_loss(distill: DistillConfig) -> None:
    """Refuse settings that the losses of this run would never read.

    Raises:
        UserError: naming the setting and what to type.
    """
    name, default, known = distill.name, DistillConfig(), losses.signatures()
    inputs = known[name].inputs if name in known else ()
    for key in losses.setting_names():
        value = getattr(distill, key)
        owners = [loss for loss, signature in known.items() if key in signature.settings]
        if value is not None and name not in owners:
            raise UserError(
                f"distill.{key}={value} would do nothing with distill={name}: it is a setting of "
                f"{' and '.join(owners)}; leave it out"
            )
    idle = {
        "none": ["temperature", "weight", "features_weight"],
        "pkd": ["temperature", "features_weight"],
    }.get(name, [])
    idle += ["temperature"] if name in known and "temperature" not in inputs else []
    for key in idle:
        value = getattr(distill, key)
        if value != getattr(default, key):
            reason = {"none": "asks no teacher", "pkd": "compares pyramids"}.get(
                name, "has no temperature"
            )
            raise UserError(
                f"distill.{key}={_shown(value)} would do nothing with distill={name}, which "
                f"{reason}; leave it out"
            )
    if name == "feature_cosine" and distill.features_weight:
        raise UserError(
            "distill.features_weight adds feature_cosine, which is this run's loss: type "
            f"distill.weight={_shown(distill.features_weight)} in its place"
        )


def validate_cache_settings(
    cache: CacheConfig, distill: DistillConfig, augment: AugmentConfig
) -> None:
    """Refuse cached outputs that cannot be right, or would not be read.

    Raises:
        UserError: naming the setting and what to type.
    """
    if cache.codec != "auto":
        parse_codec(cache.codec)
    if cache.dir is None:
        for key in ("draws", "codec", "shard_size"):
            value = getattr(cache, key)
            if value != getattr(CacheConfig(), key):
                raise UserError(
                    f"cache.{key}={value} would do nothing without a cache: type "
                    "cache.dir=FOLDER too (python -m ghosttrain cache writes one)"
                )
        return
    if distill.name == "none":
        raise UserError(
            f"cache.dir={cache.dir} is for a teacher's outputs and would never be read, "
            "because distill=none; type distill=soft_ce (or kl) teacher=NAME too, or leave it out"
        )
    for key in ("mixup_alpha", "cutmix_alpha"):
        if alpha := getattr(augment, key):
            raise UserError(
                f"cache.dir={cache.dir} holds one output for each image, but with "
                f"augment.{key}={alpha} an image also depends on the batch it is mixed in; type "
                "augment=compact, or leave cache.dir out"
            )


def _shown(value: float | tuple[tuple[float, float], ...]) -> str:
    points = value if isinstance(value, tuple) else ()
    return f"[{','.join(f'[{x:g},{y:g}]' for x, y in points)}]" if points else f"{value:g}"

"""What is refused of settings for detectors, and of a detector's settings elsewhere. Imports no
torch.
"""

from __future__ import annotations

from typing import Any

from ghosttrain.config.schema import (
    BOX_DATA,
    NAMED_SOURCES,
    AugmentConfig,
    Config,
    DetectorConfig,
    TrainConfig,
)
from ghosttrain.errors import UserError

ONLY: dict[str, tuple[Any, ...]] = {
    "distill.name": ("none", "pkd"),
    "teacher.dtype": ("auto",),
    "teacher.compile": (False,),
    "teacher.chunk": (None,),
    "cache.dir": (None,),
    "train.best_by": ("ap",),
    "augment.policy": ("boxes", "none"),
    "train.cuda_graph": (False,),
    "train.class_weights": ("none",),
    "train.label_loss": ("cross_entropy",),
    "train.focal_gamma": (0.0,),
    "train.label_smoothing": (TrainConfig().label_smoothing,),
    "data.crop_pct": (1.0,),
    "data.balance": ("none",),
    "data.size_schedule": ((),),
    "data.classes": ((),),
    "data.fraction": (None,),
    "data.max_per_class": (None,),
    "model.weight_bits": (None,),
    "optim.clip_mode": ("norm",),
}
"""Setting -> what it may be with a detector; the first is what to type. The others are of
classification, or not made for detectors."""
OF_BOXES = ("photometric", "zoom_out", "iou_crop", "scale_jitter")
"""Settings of `augment` that move boxes with the pixels."""


def validate_detection(config: Config) -> None:
    """Refuse a detector without boxes, boxes without a detector, settings that would do nothing.

    Raises:
        UserError: naming the setting and what to type.
    """
    name, data = config.detector.name, config.data.name
    if name == "none":
        _validate_classification(config)
        return
    if data not in BOX_DATA:
        raise UserError(
            f"detector={name} learns from boxes, and data={data} has none: type data=scenes "
            "(embedded), or data=coco or data=voc with data.root=/path"
        )
    tree = config.model_dump()
    for key, allowed in ONLY.items():
        section, setting = key.split(".")
        value = tree[section][setting]
        if value not in allowed:
            absent = allowed[0] in ((), None) or key == "train.label_smoothing"
            what = f"leave {key} out" if absent else f"type {key}={_typed(allowed[0])}"
            raise UserError(f"{key}={_typed(value)} is not for detector={name}: {what}")
    _validate_augment(config)
    if config.distill.name == "pkd":
        _validate_pyramid_teacher(config)
    if name == "ssdlite" and config.data.eval_size != config.data.train_size:
        raise UserError(
            f"data.eval_size={config.data.eval_size}: the anchors of detector=ssdlite are made for "
            f"one side: type data.eval_size={config.data.train_size}"
        )
    if name == "ssdlite" and config.detector.channels != DetectorConfig().channels:
        raise UserError(
            f"detector.channels={config.detector.channels} would do nothing: it is for "
            "+recipe=detect_retinanet; leave it out"
        )
    if config.model.source == "torchvision" and config.data.in_chans != 3:
        raise UserError(
            f"torchvision's {config.model.name} takes colour images, not data.in_chans="
            f"{config.data.in_chans}: type data.in_chans=3"
        )


def _validate_augment(config: Config) -> None:
    """Refuse settings of `augment` that do not move boxes, or that policy=none would not read."""
    augment, default = config.augment, AugmentConfig()
    for key in AugmentConfig.model_fields:
        read = key in OF_BOXES and augment.policy == "boxes"
        if not read and key not in ("policy", "seed"):
            value = getattr(augment, key)
            if value != getattr(default, key):
                reads = ", ".join(OF_BOXES) if augment.policy == "boxes" else "none of them"
                raise UserError(
                    f"augment.{key}={_typed(value)} would do nothing with "
                    f"detector={config.detector.name} and augment.policy={augment.policy}, which "
                    f"reads {reads}: leave it out"
                )


def _validate_pyramid_teacher(config: Config) -> None:
    if config.detector.name != "retinanet":
        raise UserError(
            f"distill=pkd compares feature pyramids, and detector={config.detector.name} has none: "
            "type +recipe=detect_retinanet, or distill=none"
        )
    teacher = config.teacher
    if teacher.name or teacher.members or teacher.weights in NAMED_SOURCES:
        raise UserError(
            "distill=pkd learns from a detector that was trained here: type teacher=run "
            "teacher.run=RUN, the folder of a finished run of +recipe=detect_retinanet"
        )
    for key in ("input_size", "mean", "std"):
        if getattr(teacher, key) is not None:
            raise UserError(
                f"teacher.{key} would do nothing with distill=pkd: the weights of the teacher say "
                "it; leave it out"
            )


def validate_anchors(saved: Config, size: tuple[int, int]) -> None:
    """Refuse images of another size than that which the anchors of a run are made for.

    Raises:
        UserError: naming both.
    """
    side = saved.data.train_size
    if saved.detector.name == "ssdlite" and size != (side, side):
        given = str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
        raise UserError(
            f"{given} px: the anchors of this run are those of {side} px: leave --size and "
            "data.eval_size out"
        )


def validate_classifies(config: Config, verb: str) -> None:
    """Refuse the settings of a detector for a verb that is about classification.

    Raises:
        UserError: naming verb and detector.
    """
    if config.detects:
        raise UserError(
            f"{verb} is for classification, not for detector={config.detector.name}: type python "
            "-m ghosttrain detect to train it, detect eval RUN to measure it"
        )


def _validate_classification(config: Config) -> None:
    if config.data.name in BOX_DATA:
        raise UserError(
            f"data={config.data.name} has boxes, not one class for each image: type python -m "
            f"ghosttrain detect data={config.data.name}"
        )
    if config.distill.name == "pkd":
        raise UserError(
            "distill=pkd compares the feature pyramids of detectors: type distill=soft_ce (or kl), "
            "or python -m ghosttrain detect +recipe=detect_retinanet"
        )
    if config.train.best_by == "ap":
        raise UserError("train.best_by=ap is for detect: type train.best_by=top1 or balanced")
    if config.model.source == "torchvision":
        raise UserError(
            f"torchvision's {config.model.name} is a backbone for detect: type model=timm "
            "model.name=NAME to classify"
        )
    augment, default = config.augment, AugmentConfig()
    given = [key for key in OF_BOXES if getattr(augment, key) != getattr(default, key)]
    if augment.policy == "boxes" or given:
        what = f"{given[0]}={_typed(getattr(augment, given[0]))}" if given else "policy=boxes"
        raise UserError(
            f"augment.{what} is for images with boxes: type augment=compact, or python -m "
            "ghosttrain detect"
        )


def _typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)

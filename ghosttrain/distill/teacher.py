"""The teacher: frozen, pretrained networks, one or several, that are shown the student's images.

Owns what each of them sees (its own input size, interpolation and normalisation), how their outputs
become one, and the proof that they know the classes. It does not own where their weights come from
(pretrained.py) nor the losses.

Shapes: B batch, C channels, H W map, K classes, F pooled features, S side of a view.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ghosttrain.config import schema
from ghosttrain.distill.chance import Score, score
from ghosttrain.distill.features import classify, pool, pooled_width
from ghosttrain.distill.pretrained import PretrainedNetwork, load_pretrained
from ghosttrain.distill.teacher_output import TeacherOutput, concatenated
from ghosttrain.errors import UserError
from ghosttrain.models.ops import computes_in_bf16

Views = Mapping[tuple[int, str], Tensor]
"""(side S, interpolation) -> pixels (B, C, S, S) of the student's view at that size: uint8, or
float in [0, 1]."""


CPU_PIXELS = 2**18
"""Pixels that a CPU is shown at once: activations of more are taken from the system anew in every
layer (measured here, EfficientNet-Lite2 at 260 pixels, one thread: 4 images at once 63 to 91 ms
each, 32 images 105 to 198 ms)."""


class Member(nn.Module):
    """A frozen network that takes the student's images; always in eval mode, without gradients.

    Where its input is larger than the student's, it takes the view at its size that the loader
    replayed from the decoded image. Else it undoes the student's normalisation and resizes
    (antialiased). It repeats a grey channel where it takes three, and normalises as it was trained.
    """

    mean: Tensor
    std: Tensor
    student_mean: Tensor
    student_std: Tensor

    def __init__(
        self,
        loaded: PretrainedNetwork,
        *,
        student_mean: Sequence[float],
        student_std: Sequence[float],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.network: Any = loaded.network
        self.view = (loaded.input_size, loaded.interpolation)
        self.columns = loaded.columns
        self.name, self.classes_note = loaded.name, loaded.classes_note
        self.size_note = loaded.size_note
        for name, values in {
            "mean": loaded.mean,
            "std": loaded.std,
            "student_mean": student_mean,
            "student_std": student_std,
        }.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1))
        self.requires_grad_(False)
        self.eval()
        self.num_features = pooled_width(self.network, len(loaded.mean), loaded.input_size)
        """F where its logits are a linear layer of its pooled features, else 0."""
        self.network.to(dtype)
        self.dtype = dtype

    def train(self, mode: bool = True) -> Member:
        """Stay in eval mode, whatever is asked."""
        return super().train(False)

    def forward(self, images_BCHW: Tensor, views: Views) -> TeacherOutput:
        """Return the output for images normalised with the student's mean and std."""
        x = views.get(self.view)
        if x is None:
            x = images_BCHW.float() * self.student_std + self.student_mean  # pixels in [0, 1]
            size = (self.view[0], self.view[0])
            if x.shape[-2:] != size:
                x = F.interpolate(x, size, mode=self.view[1], antialias=True)
        elif x.dtype == torch.uint8:
            x = x.float() / 255
        x = ((x - self.mean) / self.std).to(self.dtype)  # three means repeat a grey channel
        features = None
        if self.num_features:
            features = pool(self.network, x)
            logits = classify(self.network, features)
        else:
            logits = self.network(x)
        logits = logits.float()
        if self.columns is not None:
            logits = logits[:, self.columns]
        return TeacherOutput(logits, None if features is None else features.float())

    def classifier(self) -> tuple[Tensor, Tensor]:
        """Return weight (K, F) and bias (K,) that make the logits of the features."""
        layer: nn.Linear = self.network.get_classifier()
        rows = slice(None) if self.columns is None else self.columns
        weight = layer.weight.float()
        bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.float()
        return weight[rows], bias[rows]


class Teacher(nn.Module):
    """One network or an ensemble; its output is a weighted mean of its members'.

    The mean is taken of probabilities (at T = 1; the logits are then the log of the mean) or of
    logits. Pooled features are those of all members side by side, and none where probabilities of
    several are averaged: no linear layer makes such logits.
    """

    def __init__(
        self,
        members: Mapping[str, Member],
        weights: Sequence[float] = (1.0,),
        average: str = "probability",
        student_size: int = 0,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.members: Any = nn.ModuleDict(members)  # of `Member`
        self.shares = [weight / math.fsum(weights) for weight in weights]
        self.average = average
        self.chunk = chunk
        sides = [member.view for member in members.values() if member.view[0] > student_size]
        self.views = tuple(dict.fromkeys(sides)) if student_size else ()
        """(side, interpolation) of the views that the loader should replay for it."""
        linear = all(member.num_features for member in members.values())
        one_layer = len(members) == 1 or average == "logit"
        self.widths = (
            tuple(member.num_features for member in members.values())
            if linear and one_layer
            else ()
        )
        """Widths of the members' pooled features; empty where the output has none."""
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode, whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor, views: Views | None = None) -> TeacherOutput:
        """Return the output for images (B, C, H, W) normalised with the student's mean and std."""
        return self.joined(self.each(images_BCHW, views))

    def joined(self, outputs: Sequence[TeacherOutput]) -> TeacherOutput:
        """Return the mean of the members' outputs, in their order."""
        if len(outputs) == 1:
            return outputs[0]
        logits = [output.logits for output in outputs]
        if self.average == "probability":
            shares = [math.log(share) for share in self.shares]
            log_p = [x.log_softmax(dim=1) + share for x, share in zip(logits, shares, strict=True)]
            return TeacherOutput(torch.stack(log_p).logsumexp(dim=0))
        mean = torch.stack([x * share for x, share in zip(logits, self.shares, strict=True)]).sum(0)
        if not self.widths:
            return TeacherOutput(mean)
        return TeacherOutput(
            mean, torch.cat([a.features for a in outputs if a.features is not None], 1)
        )

    @torch.no_grad()
    def each(self, images_BCHW: Tensor, views: Views | None = None) -> list[TeacherOutput]:
        """Return the output of every member, computed `chunk` images at a time, never autocast."""
        views = views or {}
        outputs = []
        with torch.autocast(images_BCHW.device.type, enabled=False):
            for member in self.members.values():
                size = self.chunk or max(len(images_BCHW), 1)
                if self.chunk is None and images_BCHW.is_cpu:
                    size = max(CPU_PIXELS // member.view[0] ** 2, 1)
                parts = []
                for start in range(0, len(images_BCHW), size):
                    chunk = slice(start, start + size)
                    cut = {key: x[chunk] for key, x in views.items()}
                    parts.append(member(images_BCHW[chunk], cut))
                outputs.append(concatenated(parts))
        return outputs

    def classifier(self) -> tuple[Tensor, Tensor]:
        """Return weight (K, F) and bias (K,): logits = features @ weight.T + bias, if `widths`."""
        parts = [member.classifier() for member in self.members.values()]
        weights = [share * weight for share, (weight, _) in zip(self.shares, parts, strict=True)]
        biases = [share * bias for share, (_, bias) in zip(self.shares, parts, strict=True)]
        return torch.cat(weights, dim=1), torch.stack(biases).sum(dim=0)


def build_teacher(
    cfg: schema.TeacherConfig,
    classes: Sequence[str],
    data: schema.DataConfig,
    device: torch.device | str,
) -> Teacher | None:
    """Return the teacher of `cfg` on `device`; None where no teacher is named.

    `classes` are the names of the data's classes in the order of its labels; `data` says what the
    student's images are: their size, channels and normalisation.

    Raises:
        UserError: weights that are missing or do not fit, other classes or channels than the
            data's (pretrained.py).
    """
    if not cfg.members and cfg.name is None and cfg.weights is None:
        return None
    cuda = torch.device(device).type == "cuda"
    bf16 = computes_in_bf16(cfg.dtype, cuda)
    members = {}
    for name, network in cfg.networks.items():
        key = f"teacher.members.{name}" if cfg.members else "teacher"
        loaded = load_pretrained(network, key, classes, data.in_chans)
        members[name] = Member(
            loaded,
            student_mean=data.mean,
            student_std=data.std,
            dtype=torch.bfloat16 if bf16 else torch.float32,
        )
        if cfg.compile:
            members[name].compile()
    weights = [getattr(network, "weight", 1.0) for network in cfg.networks.values()]
    teacher = Teacher(members, weights, cfg.average, min(data.train_sizes), cfg.chunk)
    return teacher.to(device)


def measure_teacher(
    teacher: Teacher, batches: Iterable[tuple[Tensor, Tensor, Views]]
) -> list[Score]:
    """Return the score of the teacher and, of an ensemble, of every member, the teacher's first.

    `batches` yields images (B, C, H, W) as the student gets them, unaugmented, labels (B) and
    views. UserError where a logit is not finite.
    """
    several = len(teacher.members) > 1
    given: list[list[Tensor]] = [[] for _ in range(1 + several * len(teacher.members))]
    labels = [torch.zeros(0, dtype=torch.long)]
    for images_BCHW, labels_B, views in batches:
        outputs = teacher.each(images_BCHW, views)
        labels.append(labels_B.cpu())
        for kept, output in zip(given, [teacher.joined(outputs), *outputs], strict=False):
            if not output.logits.isfinite().all():
                raise UserError(
                    "the teacher's outputs are not finite: its weights are broken, give other"
                    " teacher.weights=PATH"
                )
            kept.append(output.logits.argmax(dim=1).cpu())
    return [score(torch.cat([labels[0], *kept]), torch.cat(labels)) for kept in given]

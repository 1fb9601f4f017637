"""Distillation losses: pure functions, their registry, and settings that change in a run.

Owns the formulas; not their weights, which are the training loop's, and not the cross-entropy with
the labels, which is torch's (`F.cross_entropy` takes hard and soft labels, and smooths them).

Every loss takes logits (B, K), K of 2 or more, or features (B, F) of student and teacher, and
returns a scalar: the mean over the batch. It is computed in float32 (float64 stays float64)
whatever the inputs and autocast say, and has no gradient towards the teacher. A new one is one
function here and its file in conf/distill/ (`name: logit_mse`):

    @loss
    def logit_mse(student_BK: Tensor, teacher_BK: Tensor, *, scale: float = 1.0) -> Tensor:
        return scale * F.mse_loss(*_wide(student_BK, teacher_BK))

Its positional parameters say what it compares (`LossInputs`): logits, labels, pooled features
(student_BF, teacher_BF), the temperature. Its keyword-only ones are its settings (distill.scale=2),
numbers of 0 or more.

Shapes: B batch, K classes, F features of the teacher, N vectors of M numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ghosttrain.config.schema import Points

LOSSES: dict[str, Callable[..., Tensor]] = {}
"""Distillation losses by the name in `distill.name`."""


class LossInputs(NamedTuple):
    """What a loss may compare, by the names of its parameters."""

    student_BK: Tensor
    """Logits of the student."""
    teacher_BK: Tensor
    """Logits of the teacher."""
    labels_B: Tensor
    """Classes, int64."""
    temperature: float
    """Softmax temperature T."""
    student_BF: Tensor | None = None
    """Pooled features of the student, projected onto the teacher's."""
    teacher_BF: Tensor | None = None
    """Pooled features of the teacher."""


def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Register a distillation loss under the function's name."""
    LOSSES[function.__name__] = function
    return function


def evaluate_loss(name: str, inputs: LossInputs, settings: Mapping[str, float]) -> Tensor:
    """Return the loss called `name` of what it compares.

    Raises:
        ValueError: it compares features, and there are none.
    """
    function = LOSSES[name]
    parameters = inspect.signature(function).parameters.values()
    wanted = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    values = [getattr(inputs, name) for name in wanted]
    missing = [name for name, value in zip(wanted, values, strict=True) if value is None]
    if missing:
        raise ValueError(f"{name} compares {missing[0]}, and there is none")
    return function(*values, **settings)


def at(value: float | Points, progress: float) -> float:
    """Return a setting's value at a share of the run in [0, 1].

    Linear between points, constant before the first and after the last.
    """
    if not isinstance(value, tuple):
        return value
    shares, values = zip(*value, strict=True)
    return float(np.interp(progress, shares, values))


# --- Losses ---------------------------------------------------------------------------------------


@loss
def soft_ce(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> Tensor:
    """Cross-entropy -sum_k p_k log q_k, with p and q the softmax of teacher / T and student / T.

    Not multiplied by T^2. Source: the official GhostNetV3 training code uses it at T = 1.
    """
    student_BK, teacher_BK = _wide(student_BK, teacher_BK)
    target_BK = F.softmax(teacher_BK / temperature, dim=1)
    return -(target_BK * F.log_softmax(student_BK / temperature, dim=1)).sum(dim=1).mean()


@loss
def kl(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> Tensor:
    """KL divergence of the student from the teacher, KL(p || q) T^2 with p and q as in `soft_ce`.

    T^2 keeps the size of the gradients when T changes. Source: Hinton et al., "Distilling the
    Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531, section 2.
    """
    student_BK, teacher_BK = _wide(student_BK, teacher_BK)
    return _kl(student_BK / temperature, teacher_BK / temperature) * temperature**2


@loss
def dkd(
    student_BK: Tensor,
    teacher_BK: Tensor,
    labels_B: Tensor,
    temperature: float,
    *,
    alpha: float = 1.0,
    beta: float = 2.0,
) -> Tensor:
    """Decoupled KD: (alpha TCKD + beta NCKD) T^2, with the label's class told from all others.

    TCKD is the KL divergence between (p_label, 1 - p_label) of teacher and student, NCKD the one
    between their distributions over the other classes; KL = TCKD + (1 - p_label) NCKD with the
    teacher's p. Source: Zhao et al., "Decoupled Knowledge Distillation",
    https://arxiv.org/abs/2203.08679; T^2 as in the official code.

    Raises:
        ValueError: labels are not (B,).
    """
    student_BK, teacher_BK = _wide(student_BK, teacher_BK)
    if labels_B.shape != student_BK.shape[:1]:
        raise ValueError(f"labels must be (B,) = ({len(student_BK)},), got {tuple(labels_B.shape)}")
    student_B2, student_rest = _decoupled(student_BK / temperature, labels_B)
    teacher_B2, teacher_rest = _decoupled(teacher_BK / temperature, labels_B)
    target, others = _kl(student_B2, teacher_B2), _kl(student_rest, teacher_rest)
    return (alpha * target + beta * others) * temperature**2


@loss
def dist(
    student_BK: Tensor,
    teacher_BK: Tensor,
    temperature: float,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Tensor:
    """DIST: (alpha inter + beta intra) T^2, with 1 - Pearson's correlation of probabilities.

    inter: student and teacher are correlated over the classes of an image, and averaged over the
    images; intra: over the images of a class, and averaged over the classes. The batch is the one
    given, a micro-batch in training. A single image has no intra relation: that part is then the
    constant beta T^2, without gradient. With two classes the inter relation can only be 1 or -1.

    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher",
    https://arxiv.org/abs/2205.10536; T^2 and the 1e-8 of the denominator as in the official code,
    whose beta and gamma are alpha and beta here.
    """
    student_BK, teacher_BK = _wide(student_BK, teacher_BK)
    q_BK = F.softmax(student_BK / temperature, dim=1)
    p_BK = F.softmax(teacher_BK / temperature, dim=1)
    inter, intra = 1 - _pearson(q_BK, p_BK).mean(), 1 - _pearson(q_BK.T, p_BK.T).mean()
    return (alpha * inter + beta * intra) * temperature**2


@loss
def hard(student_BK: Tensor, teacher_BK: Tensor) -> Tensor:
    """Cross-entropy to the teacher's best class (the first of equals), without temperature.

    Source: Touvron et al., "Training data-efficient image transformers & distillation through
    attention", https://arxiv.org/abs/2012.12877, hard-label distillation.
    """
    student_BK, teacher_BK = _wide(student_BK, teacher_BK)
    return F.cross_entropy(student_BK, teacher_BK.argmax(dim=1))


@loss
def logit_std(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> Tensor:
    """`kl` of logits standardised image by image to mean 0 and standard deviation 1.

    T is the paper's base temperature. Only the relations between logits count, not their scale;
    the gradient grows as the student's spread shrinks. Source: Sun et al., "Logit Standardization
    in Knowledge Distillation", https://arxiv.org/abs/2403.01427; deviation over K - 1 and 1e-7
    added to it as in the official code (algorithm 1 of the paper: over K, nothing added).
    """
    student_BK, teacher_BK = _wide(student_BK, teacher_BK)
    return kl(_standardised(student_BK), _standardised(teacher_BK), temperature)


# --- Features, and a measure ----------------------------------------------------------------------


@loss
def feature_cosine(student_BF: Tensor, teacher_BF: Tensor) -> Tensor:
    """Mean over the images of 1 - cosine between projected student and teacher features (B, F).

    A vector shorter than 1e-4 counts as one of that length, so that the gradient stays bounded as
    its direction vanishes.
    """
    student_BF, teacher_BF = _wide(student_BF, teacher_BF, "features", "F", least=1)
    return 1 - F.cosine_similarity(student_BF, teacher_BF, dim=1, eps=1e-4).mean()


def agreement(student_BK: Tensor, teacher_BK: Tensor) -> Tensor:
    """Share of images, in [0, 1], on which both have the same best class; NaN where the teacher's
    logits are not finite. Has no gradient.
    """
    student_BK, teacher_BK = _wide(student_BK, teacher_BK)
    same = (student_BK.argmax(dim=1) == teacher_BK.argmax(dim=1)).float().mean()
    return torch.where(teacher_BK.isfinite().all(), same, torch.nan)


# --- Parts ----------------------------------------------------------------------------------------


def _wide(
    student: Tensor, teacher: Tensor, what: str = "logits", width: str = "K", least: int = 2
) -> tuple[Tensor, Tensor]:
    """Widen to at least float32, cut the teacher's gradient; ValueError unless both (B, width)."""
    if student.shape != teacher.shape or student.dim() != 2 or student.shape[1] < least:
        raise ValueError(
            f"student and teacher {what} must both be (B, {width}), {width} of {least} or more, "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def _kl(student_BK: Tensor, teacher_BK: Tensor) -> Tensor:
    """Return the mean KL divergence of softmax(student) from softmax(teacher)."""
    log_q_BK, log_p_BK = F.log_softmax(student_BK, dim=1), F.log_softmax(teacher_BK, dim=1)
    return F.kl_div(log_q_BK, log_p_BK, reduction="batchmean", log_target=True)


def _decoupled(logits_BK: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits (B, 2) of the label's class and of the rest, and the rest's own (B, K - 1)."""
    labels_B1 = labels_B.unsqueeze(1)
    index = torch.arange(logits_BK.shape[1] - 1, device=labels_B.device)
    # Gathered, not masked: a large negative number in the label's place would fail at large logits.
    rest = logits_BK.gather(1, index + (index >= labels_B1))
    label_B1 = logits_BK.gather(1, labels_B1)
    return torch.cat([label_B1, rest.logsumexp(dim=1, keepdim=True)], dim=1), rest


def _pearson(x_NM: Tensor, y_NM: Tensor) -> Tensor:
    """Return the correlation (N,) of each vector of x with its own of y; 0 for a constant one."""
    x_NM = x_NM - x_NM.mean(dim=1, keepdim=True)
    y_NM = y_NM - y_NM.mean(dim=1, keepdim=True)
    return (x_NM * y_NM).sum(dim=1) / (x_NM.norm(dim=1) * y_NM.norm(dim=1) + 1e-8)


def _standardised(logits_BK: Tensor) -> Tensor:
    deviation_B1, mean_B1 = torch.std_mean(logits_BK, dim=1, keepdim=True)
    return (logits_BK - mean_B1) / (deviation_B1 + 1e-7)

"""Distillation losses: pure functions of logits, and their registry.

Owns the formulas; not their weights, which are the training loop's, and not the cross-entropy with
the labels, which is torch's (`F.cross_entropy` takes hard and soft labels, and smooths them).

Every loss takes logits (B, K) of student and teacher and a temperature, and returns a scalar: the
mean over the batch. It is computed in float32 (float64 stays float64) whatever the inputs and
autocast say, and has no gradient towards the teacher. A new one is a function and its line in the
registry:

    def logit_mse(student_BK, teacher_BK, temperature):
        return F.mse_loss(*_wide(student_BK, teacher_BK))
    LOSSES["logit_mse"] = logit_mse

Shapes: B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor, float], Tensor]


def soft_ce(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> Tensor:
    """Cross-entropy -sum_k p_k log q_k, with p and q the softmax of teacher / T and student / T.

    Not multiplied by T^2. Source: the official GhostNetV3 training code uses it at T = 1.
    """
    student_BK, teacher_BK = _wide(student_BK, teacher_BK)
    target_BK = F.softmax(teacher_BK / temperature, dim=1)
    return -(target_BK * F.log_softmax(student_BK / temperature, dim=1)).sum(dim=1).mean()


def kl(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> Tensor:
    """KL divergence of the student from the teacher, KL(p || q) T^2 with p and q as in `soft_ce`.

    T^2 keeps the size of the gradients when T changes. Source: Hinton et al., "Distilling the
    Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531, section 2.
    """
    student_BK, teacher_BK = _wide(student_BK, teacher_BK)
    log_q_BK = F.log_softmax(student_BK / temperature, dim=1)
    log_p_BK = F.log_softmax(teacher_BK / temperature, dim=1)
    return F.kl_div(log_q_BK, log_p_BK, reduction="batchmean", log_target=True) * temperature**2


LOSSES: dict[str, Loss] = {"soft_ce": soft_ce, "kl": kl}
"""Distillation losses by the name in `distill.name`."""


def _wide(student_BK: Tensor, teacher_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Widen to at least float32, cut the teacher's gradient; ValueError unless both are (B, K)."""
    if student_BK.shape != teacher_BK.shape or student_BK.dim() != 2:
        shapes = f"{tuple(student_BK.shape)} and {tuple(teacher_BK.shape)}"
        raise ValueError(f"student and teacher logits must both be (B, K), got {shapes}")
    dtype = torch.promote_types(student_BK.dtype, torch.float32)
    return student_BK.to(dtype), teacher_BK.detach().to(dtype)

"""The loss to the labels: cross-entropy or one of each class, smoothed, weighted, focal.

Legend: B batch, K classes.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ghosttrain.config.schema import TrainConfig
from ghosttrain.errors import UserError


def label_loss(
    train: TrainConfig, logits: Tensor, targets: Tensor, class_weights_K: Tensor | None
) -> Tensor:
    """Return the mean over images of - sum_k w_k t_k (1 - p_k)^gamma log p_k.

    t are the targets, smoothed by `train.label_smoothing`, w the class weights (without any, 1) and
    gamma `train.focal_gamma` (Lin et al., https://arxiv.org/abs/1708.02002, equation 5; 0: the
    cross-entropy). With `train.label_loss=bce` it is the mean over images and classes of
    -w_k (t_k log s_k + (1 - t_k) log(1 - s_k)), s the sigmoid of the logits.

    Args:
        train: the settings.
        logits: (B, K).
        targets: (B, K) class probabilities.
        class_weights_K: (K,), or None.
    """
    weight = None if class_weights_K is None else class_weights_K.to(logits)
    if train.label_loss == "bce":
        smooth = targets * (1 - train.label_smoothing) + train.label_smoothing / logits.shape[1]
        return F.binary_cross_entropy_with_logits(logits, smooth.to(logits), weight=weight)
    if train.focal_gamma == 0:
        return F.cross_entropy(
            logits, targets, weight=weight, label_smoothing=train.label_smoothing
        )
    smoothing = train.label_smoothing
    targets = targets * (1 - smoothing) + smoothing / logits.shape[1]
    log_p = logits.log_softmax(dim=1)
    terms = targets * (-torch.expm1(log_p)).clamp(min=0) ** train.focal_gamma * log_p
    if weight is not None:
        terms = terms * weight
    return -terms.sum(dim=1).mean()


def class_weights(train: TrainConfig, labels: np.ndarray, num_classes: int) -> Tensor | None:
    """Return the weight of each class in the loss (K,) float32; None: all are 1.

    `balanced`: N / (K n_k) for a class of n_k of the N training images, so that every class weighs
    the same in sum and the mean over images is 1 (scikit-learn's rule).

    Raises:
        UserError: a list of another length than there are classes.
    """
    given = train.class_weights
    if given == "none":
        return None
    if given == "balanced":
        counts = np.bincount(labels, minlength=num_classes)
        return torch.from_numpy(len(labels) / (num_classes * counts)).float()
    if len(given) != num_classes:
        raise UserError(
            f"train.class_weights has {len(given)} values, the data has {num_classes} classes: "
            "type one for each, in the order of their names, or train.class_weights=balanced"
        )
    return torch.tensor(given)

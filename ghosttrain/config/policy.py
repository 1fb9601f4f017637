"""The augmentation policy's one refusal: no Mixup and no CutMix unless the policy allows them.

Imports no torch, so that the composer can refuse before anything heavy is loaded; `ghosttrain.data`
asks again for whoever builds an `Augment` in Python.
"""

from __future__ import annotations

from ghosttrain.config.errors import UserError
from ghosttrain.config.schema import AugmentConfig


def check_policy(augment: AugmentConfig) -> None:
    """Refuse Mixup and CutMix under every policy but `with_mixup`.

    Source: the abstract of GhostNetV3 (https://arxiv.org/abs/2404.11202) reports that both lower
    the accuracy of compact networks.

    Raises:
        UserError: `mixup_alpha` or `cutmix_alpha` is not 0 under `compact` or `none`.
    """
    if augment.policy == "with_mixup":
        return
    for name, key in (("Mixup", "mixup_alpha"), ("CutMix", "cutmix_alpha")):
        alpha = getattr(augment, key)
        if alpha:
            raise UserError(
                f"augment.{key}={alpha} asks for {name}, which augment={augment.policy} leaves "
                "out: GhostNetV3 (arXiv 2404.11202) reports that Mixup and CutMix hurt compact "
                "students; to try them all the same, type augment=with_mixup"
            )

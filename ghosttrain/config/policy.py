"""The augmentation policy's one refusal: no Mixup and no CutMix unless the policy allows them.

Imports no torch: the composer refuses before anything heavy is loaded. Nothing asks again: who
builds an `AugmentConfig` in Python has chosen.
"""

from __future__ import annotations

from ghosttrain.config.schema import AugmentConfig
from ghosttrain.errors import UserError


def validate_policy(augment: AugmentConfig) -> None:
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

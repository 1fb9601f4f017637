"""What a cache is stored for: a setting of a later version leaves the caches of an earlier one."""

from __future__ import annotations

from types import SimpleNamespace

from ghosttrain.config import schema
from ghosttrain.engine.cache_key import cache_key

# What the first caches name. A new setting does not belong in here: at its default it draws what
# was drawn before it came, and is not named.
FIRST = {
    "augment": (
        "cutmix_alpha erasing_prob jitter mixup_alpha operations policy randaugment_magnitude "
        "randaugment_ops randaugment_std ratio_max ratio_min scale_max scale_min seed"
    ),
    "data": "bit_depth flip in_chans interpolation mean std train_size",
    "versions": "augmentation jpeg pillow timm torch",
}


def key(**augment: object) -> dict:
    config = schema.Config(augment=schema.AugmentConfig(**augment))
    return cache_key(config, SimpleNamespace(classes=["ant"], content_digest=lambda: "0"))


def test_a_setting_of_a_later_version_is_named_only_where_it_is_not_at_its_default():
    default = key()
    assert {part: " ".join(sorted(default[part])) for part in FIRST} == FIRST
    assert set(default) == {"teacher", "teacher.average", "teacher.dtype", "classes", "images"} | {
        *FIRST
    }
    assert key(scale_jitter=0.1)["augment"]["scale_jitter"] == 0.1
    assert key(policy="none")["augment"] == {"policy": "none"}

"""Which augmentation policies may be composed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ghosttrain.config.compose import compose
from ghosttrain.config.policy import validate_policy
from ghosttrain.config.schema import AugmentConfig
from ghosttrain.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "augment"


@pytest.mark.parametrize("policy", ["compact", "none"])
@pytest.mark.parametrize(("key", "name"), [("mixup_alpha", "Mixup"), ("cutmix_alpha", "CutMix")])
def test_mixing_is_refused_with_the_reason(policy, key, name):
    augment = AugmentConfig(policy=policy, **{key: 0.2})
    with pytest.raises(UserError) as raised:
        validate_policy(augment)
    for part in (
        f"augment.{key}=0.2",
        name,
        f"augment={policy}",
        "2404.11202",
        "augment=with_mixup",
    ):
        assert part in str(raised.value)


def test_mixing_is_allowed_where_it_is_named():
    validate_policy(AugmentConfig(policy="with_mixup", mixup_alpha=0.8, cutmix_alpha=1.0))
    validate_policy(AugmentConfig())


def test_the_policy_is_checked_without_torch():
    code = "import sys, ghosttrain.config.policy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CONF.parents[1]).returncode == 0


@pytest.mark.parametrize("name", ["compact", "with_mixup", "none"])
def test_every_configuration_is_valid(name):
    augment = compose([f"augment={name}", "budget=full"]).config.augment
    validate_policy(augment)
    assert augment.policy == name
    mixing = {"policy", "mixup_alpha", "cutmix_alpha"}
    assert name == "none" or augment.model_dump(exclude=mixing) == AugmentConfig().model_dump(
        exclude=mixing
    )

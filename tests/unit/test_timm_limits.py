"""timm students: what they cannot take is one line before training."""

import pytest
import timm
import torch
from torch import nn

from ghosttrain.config.schema import DataConfig
from ghosttrain.errors import UserError
from ghosttrain.models.timm_limits import validate_timm_sides


def sides(train: int, evaluation: int, chans: int = 3) -> DataConfig:
    return DataConfig(train_size=train, eval_size=evaluation, in_chans=chans)


def test_a_vit_takes_its_own_side_only():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    with torch.random.fork_rng():
        before = torch.get_rng_state()
        validate_timm_sides(model, "vit_tiny_patch16_224", 5, sides(224, 224), batch=1)
        assert torch.equal(before, torch.get_rng_state()) and model.training
    for train, evaluation, key in ((64, 64, "train_size=64"), (224, 96, "eval_size=96")):
        with pytest.raises(
            UserError, match=f"vit_tiny_patch16_224 cannot take images of data.{key}"
        ) as no:
            validate_timm_sides(model, "vit_tiny_patch16_224", 5, sides(train, evaluation), batch=2)
        assert "type data.train_size=224 data.eval_size=224" in str(no.value)
        assert "\n" not in str(no.value)
    with pytest.raises(UserError, match="choose another model.name"):
        validate_timm_sides(model, "vit_tiny_patch16_224", 5, sides(224, 224, chans=1), batch=2)


def test_batches_of_one_where_a_batch_norm_would_see_a_single_value():
    model = timm.create_model("test_resnet", num_classes=5)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    validate_timm_sides(model, "test_resnet", 5, sides(64, 64), batch=1)
    validate_timm_sides(model, "test_resnet", 5, sides(32, 32), batch=2)
    with pytest.raises(UserError, match="batches of 1 at data.train_size=32.*micro_batch=2"):
        validate_timm_sides(model, "test_resnet", 5, sides(32, 32), batch=1)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="more than 1 value"):
        model(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("layers", [[nn.Conv2d(3, 5, 1)], [nn.Conv2d(3, 5, 1), nn.Flatten()]])
def test_what_returns_no_logits_is_no_classifier(layers):
    with pytest.raises(UserError, match="is no classifier: .* not with 5 logits"):
        validate_timm_sides(nn.Sequential(*layers), "x", 5, sides(8, 8), batch=2)

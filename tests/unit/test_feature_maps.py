"""The maps of the last layer of each stride, against hooks on every module."""

from __future__ import annotations

import math

import pytest
import timm
import torch

from ghosttrain.errors import UserError
from ghosttrain.models.create import create_model
from ghosttrain.models.reparam import fuse

SIZE = (96, 65)
NAMES = ("ghostnetv3_050", "mobilenetv2_050", "shufflenetv2_050")


def last_maps(model, images):
    """Return for each size of map the output of the last module, at the level of the stages, that
    makes one: what `feature_info` should list, found without it.
    """
    found, handles = {}, []
    for name, module in model.named_modules():
        if name in ("stem", "stem_pool", "last") or name.rpartition(".")[0] == "stages":
            handles.append(
                module.register_forward_hook(
                    lambda _, __, out, name=name: found.__setitem__(
                        tuple(out.shape[2:]), (name, out.detach().clone())
                    )
                )
            )
    with torch.no_grad():
        model.forward_features(images)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("input_stride", ["standard", "small"])
@pytest.mark.parametrize("name", NAMES)
def test_maps_are_those_of_the_last_layer_of_each_stride(name, input_stride):
    """In training, evaluation and the fused form."""
    torch.manual_seed(0)
    model = create_model(name, 5, input_stride=input_stride)
    least = 4 if input_stride == "standard" else 2
    wanted = [least * 2**k for k in range(4)]
    images = torch.randn(2, 3, *SIZE)
    fused = fuse(model.eval())
    for form in (model.train(), model.eval(), fused):
        hooked = last_maps(form, images)
        with torch.no_grad():
            maps = form.forward_maps(images)
        rows = form.feature_info
        assert [row["reduction"] for row in rows][-4:] == wanted
        for row, found in zip(rows, maps, strict=True):
            size = tuple(math.ceil(side / row["reduction"]) for side in SIZE)
            assert found.shape == (2, row["num_chs"], *size)
            module, output = hooked[size]
            assert row["module"] == module
            if module in ("last", "stem"):  # the activation follows it
                output = output.clamp(0, 6 if "mobilenet" in name else math.inf)
            torch.testing.assert_close(found, output, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            assert torch.equal(maps[-1], form.forward_features(images)) or form.training


def test_feature_info_has_the_keys_of_timms_networks():
    theirs = timm.create_model("mobilenetv2_050", features_only=True).feature_info.get_dicts()
    ours = create_model("mobilenetv2_050", 5).feature_info
    assert {*ours[0]} <= {*theirs[0]}
    assert [row["reduction"] for row in ours] == [row["reduction"] for row in theirs]


def test_images_that_cannot_be_taken_are_one_line():
    with pytest.raises(UserError, match="takes images of at least"):
        create_model(NAMES[0], 5).forward_maps(torch.zeros(2, 3, 8, 8))

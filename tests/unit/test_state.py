"""Checkpoints and weights files: what is saved loads again, what does not fit is refused, and a
full disk costs nothing that was saved before."""

import errno
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from safetensors import safe_open
from torch import nn

from ghosttrain.config.schema import PLAIN, Config, DataConfig, ModelConfig
from ghosttrain.engine.checkpoint import read_checkpoint, write_checkpoint
from ghosttrain.engine.state import fit_saved
from ghosttrain.engine.student import has_fused_form, without_start
from ghosttrain.engine.weights_file import describe_weights, read_weights, write_weights
from ghosttrain.errors import UserError, mistake
from ghosttrain.models.weights import files, packing


@contextmanager
def limited(which: int, value: int) -> Iterator[None]:
    """Lower a limit of this process: files beyond RLIMIT_FSIZE bytes fail as on a full disk."""
    before = resource.getrlimit(which)
    resource.setrlimit(which, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, before)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def checkpoint(**parts: object) -> dict:
    """A checkpoint with these parts."""
    whole = {
        "student": {}, "projection": {}, "ema": {}, "optimizer": {}, "buffers": [], "step": 0,
        "seconds": 0.0, "best": {"top1": -1.0, "epoch": 0}, "classes": ["a"], "data": {},
        "teacher": {}, "conditions": {}, "settings": {}, "total_steps": 9,
    }  # fmt: skip
    assert parts.keys() <= whole.keys()
    return whole | parts


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    model = small().to(torch.float64)
    optimizer = torch.optim.AdamW(model.parameters())
    state = checkpoint(
        student=model.state_dict(),
        optimizer=optimizer.state_dict(),
        best={"top1": 12.5, "epoch": 3},
        classes=["a", "b"],
        data={"train": {"images": 5, "digest": "x"}, "accepted": []},
    )
    write_checkpoint(tmp_path / "last.pt", state)
    back = read_checkpoint(tmp_path / "last.pt")
    assert back.keys() == state.keys()
    assert all(torch.equal(back["student"][k], v) for k, v in state["student"].items())
    assert back["student"]["0.weight"].dtype == torch.float64
    assert {k: back[k] for k in ("best", "classes", "data")} == {
        k: state[k] for k in ("best", "classes", "data")
    }
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is damaged"),
        (b"PK\x03\x04 cut short", "is damaged"),
        (b"hello", "is damaged"),
        ({"weights": 1}, "is no checkpoint"),
        ([1], "is no checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, content, expected):
    path = tmp_path / "last.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match=expected) as refusal:
        read_checkpoint(path)
    assert "move it away to start this run anew" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_checkpoint_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "last.pt"
    write_checkpoint(path, checkpoint(student={"x": torch.arange(1000.0)}))
    whole = path.read_bytes()
    for share in (0.1, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(UserError, match="is damaged"):
            read_checkpoint(path)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error; the disk"),
        (MemoryError(), "Cannot allocate memory; another job"),
        (None, "Cannot allocate memory; another job"),  # torch's own
    ],
)
def test_what_cannot_be_read_now_is_not_called_damaged(tmp_path, monkeypatch, error, expected):
    def fail(*args, **options):
        if error is None:
            torch.empty(2**58)
        raise error

    write_checkpoint(tmp_path / "last.pt", checkpoint(student={}))
    write_weights(tmp_path / "x.safetensors", small(), {})
    monkeypatch.setattr(torch, "load", fail)
    monkeypatch.setattr(packing, "safe_open", fail)
    for name, read in (
        ("last.pt", read_checkpoint),
        ("last.pt", files.read_state),
        ("x.safetensors", files.read_state),
        ("x.safetensors", lambda path: files.read_about(path, "x")),
    ):
        with pytest.raises(OSError) as failure:
            read(tmp_path / name)
        line = str(mistake(failure.value))
        assert line.startswith(f"{tmp_path / name}: {expected}") and "damaged" not in line


def test_a_file_that_cannot_be_opened_is_not_called_missing(tmp_path):
    write_weights(tmp_path / "x.safetensors", small(), {})
    failures = []
    with limited(resource.RLIMIT_NOFILE, 3):
        for read in (read_weights, files.read_state):
            try:
                read(tmp_path / "x.safetensors")
            except (OSError, UserError) as error:
                failures.append(error)
    assert [str(mistake(error)) for error in failures] == [
        f"{tmp_path / 'x.safetensors'}: Too many open files; allow more: ulimit -n 65536"
    ] * 2


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    torch.save({"student": Evil()}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="is damaged"):
        read_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "made").exists()


def test_weights_must_be_of_this_model(tmp_path):
    model, state = small(), small().state_dict()
    state["0.bias"] = state["0.bias"] + 1
    fit_saved(model, state, tmp_path)
    assert torch.equal(model[0].bias, state["0.bias"])
    for wrong in (
        {k: v for k, v in state.items() if k != "3.bias"},
        state | {"extra": torch.zeros(1)},
        state | {"3.bias": torch.zeros(3)},
    ):
        with pytest.raises(
            UserError,
            match="does not fit the network of these settings: 1 .* Choose another run.name",
        ):
            fit_saved(model, wrong, tmp_path)
    assert torch.equal(model[0].bias, state["0.bias"])


def test_a_weights_file_says_what_it_is(tmp_path):
    config = Config(
        model=ModelConfig(name="ghostnetv3_050", weights="start.pth"),
        reparam=PLAIN,
        data=DataConfig(eval_size=96, mean=(0.1, 0.2, 0.3)),
    )
    path = tmp_path / "x.safetensors"
    model = small()
    write_weights(path, model, describe_weights(config, ["a", "b"], "ema"))
    tensors, about = read_weights(path)
    assert all(torch.equal(tensors[k], v) for k, v in model.state_dict().items())
    assert about["classes"] == ["a", "b"] and about["kind"] == "ema"
    assert about["model"]["name"] == "ghostnetv3_050" and "weights" not in about["model"]
    assert about["reparam"] == PLAIN.model_dump(mode="json")
    assert about["input"]["eval_size"] == 96 and about["input"]["mean"] == [0.1, 0.2, 0.3]
    assert json.loads(describe_weights(config, [], "fused")["ghosttrain"])["reparam"] is None
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "pt"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="cannot be read as weights of ghosttrain"):
        read_weights(path)
    with pytest.raises(UserError, match="cannot be read as weights of ghosttrain"):
        read_weights(tmp_path / "absent")


def test_a_full_disk_is_one_line_and_what_was_saved_stays(tmp_path):
    """torch meets the failed write, then fails to end its archive: "unexpected pos"."""
    last, best = tmp_path / "last.pt", tmp_path / "best.safetensors"
    write_checkpoint(last, checkpoint(student={"x": torch.zeros(10)}))
    write_weights(best, small(), {})
    before = [path.read_bytes() for path in (last, best)]
    large, full = nn.Linear(500, 500), r"\(File too large\); .* ulimit -f unlimited"
    with limited(resource.RLIMIT_FSIZE, 100_000):
        for size in (40_000, 400_000):  # fails in the middle, and when the rest is flushed
            state = checkpoint(student={"x": torch.zeros(size), "y": torch.zeros(20)})
            with pytest.raises(UserError, match=f"{last} {full}"):
                write_checkpoint(last, state)
        with pytest.raises(UserError, match=f"{best} {full}"):
            write_weights(best, large, {})
    assert [path.read_bytes() for path in (last, best)] == before
    assert sorted(tmp_path.iterdir()) == [best, last]
    with pytest.raises(TypeError, match="not JSON"):  # another error keeps its trace
        write_checkpoint(last, checkpoint(teacher={"x": object()}))
    assert sorted(tmp_path.iterdir()) == [best, last]


def test_a_run_goes_on_without_the_file_it_started_from():
    config = Config(model=ModelConfig(weights="gone.pth", dropout=0.1))
    assert without_start(config).model == ModelConfig(dropout=0.1)
    assert has_fused_form(config) and not has_fused_form(
        Config(model=ModelConfig(name="x", source="timm"))
    )

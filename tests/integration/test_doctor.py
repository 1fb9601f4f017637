"""`doctor`: what it says where a run starts, and of each thing that keeps one from it; a run says
the same, and doctor leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from helpers import only_run, paint, stop_after_saves

from ghosttrain.locks import locked
from ghosttrain.study import doctor, packages

DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.fixture
def examined(ghosttrain):
    """Run `doctor ... --json`; return the exit code and check -> (state, text)."""

    def run(*args):
        outcome = ghosttrain("doctor", *args, "--json")
        assert outcome.err == ""
        found = json.loads(outcome.out)
        assert found["can_start"] == (outcome.code == 0)
        return outcome.code, {c["check"]: (c["state"], c["text"]) for c in found["checks"]}

    return run


def files_below(*roots: Path) -> dict[Path, int]:
    return {p: p.lstat().st_mtime_ns for root in roots for p in root.rglob("*")}


def failed(found: dict[str, tuple[str, str]]) -> dict[str, str]:
    return {check: text for check, (state, text) in found.items() if state == "FAIL"}


def test_a_machine_on_which_the_main_job_starts(ghosttrain, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = ghosttrain("doctor")
    assert outcome.code == 0, outcome.out
    *lines, last = outcome.out.splitlines()
    assert last == (
        "the run can start: python -m ghosttrain +recipe=compact_kd model=ghostnetv3_130"
    )
    checks = {line[6:19].strip(): (line[:4].strip(), line[21:]) for line in lines}
    assert [*checks] == ["versions", "extras", *doctor.LOOKS]
    assert {state for state, _ in checks.values()} <= {"OK", "note"}
    assert f"torch {torch.__version__.partition('+')[0]}" in checks["versions"][1]
    assert "top-1 100.0 % on 512 unaugmented" in checks["teacher"][1]
    assert "the run takes 618" in checks["disk"][1]  # as `cost` says, and one checkpoint more
    assert [*tmp_path.iterdir()] == []


def test_a_run_is_followed_from_its_begin_to_its_end(
    examined, ghosttrain, tiny, tmp_path, image_folder
):
    def look():
        before = files_below(tmp_path, image_folder)
        code, found = examined(*tiny)
        assert files_below(tmp_path, image_folder) == before
        return code, *found["run"], failed(found)

    tiny = [*tiny, "run.name=mine"]
    for folder in (image_folder, *image_folder.rglob("*")):  # old enough for a kept listing
        os.utime(folder, (1e9, 1e9))
    assert look()[:2] == (0, "OK") and not (tmp_path / "runs").exists()
    with pytest.MonkeyPatch.context() as patch:
        stop_after_saves(patch, 1)
        assert ghosttrain(*tiny, "train.save_every=1epoch").code == 130
    folder = only_run(tmp_path)
    assert look() == (0, "OK", f"goes on after epoch 1, step 3, of 6 steps, in {folder}", {})

    with locked(folder, "busy"):
        code, state, text, _ = look()
    assert (code, state) == (1, "FAIL") and "another process is training in" in text

    newest = folder / "checkpoints" / "last.pt"
    whole = newest.read_bytes()
    newest.write_bytes(whole[: len(whole) // 2])
    code, state, text, _ = look()
    assert (code, state) == (1, "FAIL") and "last.pt is damaged" in text and "move it away" in text
    newest.write_bytes(whole)

    assert ghosttrain(*tiny).code == 0
    code, state, text, _ = look()
    assert (code, state) == (0, "OK") and text.startswith("finished, top-1 ")
    with pytest.MonkeyPatch.context() as patch:  # it needs no room any more
        patch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**9, 10**9, 0))
        code, found = examined(*tiny)
        assert code == 0 and [*failed(found)] == ["disk"]
        assert ghosttrain(*tiny).code == 0

    code, found = examined(*tiny, "seed=4")
    assert code == 1 and "seed: 0 -> 4" in failed(found)["run"]
    said = ghosttrain(*tiny, "seed=4")
    assert said.code == 2 and failed(found)["run"] in said.err


def test_what_a_run_refuses_is_said_in_its_words(examined, ghosttrain, tiny, tmp_path):
    """Data, batch, teacher and weights, each refused by the run with the same line."""
    weights = tmp_path / "nothing.safetensors"
    teacher = ["teacher=file", "distill=kl", "teacher.name=resnet18", f"teacher.weights={weights}"]
    unfinished = tmp_path / "run"
    (unfinished / "checkpoints").mkdir(parents=True)
    for words, check in (
        (["train.global_batch=64"], "length"),
        (teacher, "teacher"),
        ([*teacher[:-1], f"teacher.weights={unfinished}"], "teacher"),
        (["data.train_split=trian"], "data"),
        (["data.root=/nowhere"], "data"),
        (["train.class_weights=[1,2]"], "length"),
    ):
        code, found = examined(*tiny, *words)
        assert code == 1 and [*failed(found)] == [check], (words, found)
        said = ghosttrain(*tiny, *words)
        assert said.code == 2 and failed(found)[check] in said.err, said.err
    code, found = examined(*tiny, "data.root=/nowhere")
    assert found["teacher"] == ("note", "not looked at: it needs data, see above")


def test_what_lies_in_the_place_of_a_run_folder(examined, ghosttrain, tiny, tmp_path):
    """Each is refused by the run with the same line, and left as it is."""
    root, folder = tmp_path / "runs", tmp_path / "runs" / "mine"
    file, fifo = tmp_path / "file", tmp_path / "fifo"
    file.write_text("of mine")
    os.mkfifo(fifo)
    (tmp_path / "one").symlink_to("other")
    (tmp_path / "other").symlink_to("one")

    def planted(name: str, make) -> None:
        (folder / name).parent.mkdir(parents=True)
        make(folder / name)

    no_run, link = "is no run's", "is a link (to"
    not_a_file = "is a FIFO, a device or a socket, not a file"
    for make, words, part in (
        (lambda: root.mkdir() or folder.symlink_to(tmp_path), [], link),
        (lambda: planted("log.txt", lambda path: path.symlink_to(file)), [], link),
        (lambda: planted("config.yaml", lambda path: path.write_text("a: 1")), [], no_run),
        (
            lambda: planted("config.yaml", lambda path: path.write_text("a: 1")),
            ["run.fresh=true"],
            "run.fresh: ",
        ),
        (lambda: planted("config.yaml", os.mkfifo), [], not_a_file),
        (lambda: planted("metrics.jsonl", os.mkfifo), [], not_a_file),
        (lambda: planted("checkpoints/last.pt", os.mkfifo), [], not_a_file),
        (lambda: planted("checkpoints/last.pt", os.mkfifo), ["run.fresh=true"], not_a_file),
        (lambda: root.mkdir() or folder.write_text("of mine"), [], "is a file, not a folder"),
        (lambda: None, [f"run.root={file}"], "is a file, not a folder"),
        (lambda: None, [f"run.root={file / 'below'}"], "is a file, not a folder"),
        (lambda: None, [f"run.root={fifo}"], "is a FIFO, a device or a socket, not a folder"),
        (lambda: None, [f"run.root={tmp_path / 'one'}"], "is a link that leads nowhere"),
    ):
        make()
        before = {*files_below(tmp_path)}
        code, found = examined(*tiny, "run.name=mine", *words)
        assert code == 1 and "run" in failed(found), (words, found)
        assert part in failed(found)["run"], failed(found)
        said = ghosttrain(*tiny, "run.name=mine", *words)
        assert said.code == 2 and failed(found)["run"] in said.err, (said.err, found)
        assert {each for each in files_below(tmp_path) if ".listed" not in each.parts} == before
        shutil.rmtree(root, ignore_errors=True)


def test_weights_that_are_no_file(examined, ghosttrain, tiny, tmp_path):
    os.mkfifo(fifo := tmp_path / "fifo.pth")
    for path in (fifo, "/dev/zero"):
        words = [*tiny, f"model.weights={path}"]
        code, found = examined(*words)
        assert code == 1 and [*failed(found)][0] == "student"
        assert "a FIFO, a device or a socket, not a file" in failed(found)["student"]
        said = ghosttrain(*words)
        assert said.code == 2 and failed(found)["student"] in said.err


def test_a_teacher_that_knows_nothing(examined, tiny, tmp_path):
    """The classes of another order, as a random network answers."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=3)
    save_file(network.state_dict(), tmp_path / "random.safetensors")
    words = ["teacher=file", "distill=kl", "teacher.name=test_resnet"]
    code, found = examined(*tiny, *words, f"teacher.weights={tmp_path / 'random.safetensors'}")
    assert code == 1 and "the teacher is right on" in failed(found)["teacher"]


def test_weights_of_the_hub_are_asked_for_and_not_fetched(examined, tmp_path, monkeypatch):
    from photos import PHOTOS

    from ghosttrain.models.weights import hub

    def not_cached(repo, filename, **options):
        assert options.get("local_files_only"), "it fetches"
        raise hub.LocalEntryNotFoundError("not in the cache")

    def no_route(url, **options):
        raise OSError("no route")

    for split in ("train", "val"):
        for name in PHOTOS:
            paint(tmp_path / "images" / split / name / "0.png")
    words = ["data=folder", f"data.root={tmp_path / 'images'}", "train.global_batch=4"]
    words += ["distill=kl", "teacher=timm", "teacher.name=resnet18", "teacher.weights=hub"]
    words += ["model=mobilenetv2_050", "data.workers=0", f"run.root={tmp_path / 'runs'}"]
    monkeypatch.setattr(hub, "hf_hub_download", not_cached)
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda url, **options: None)
    code, found = examined(*words)
    assert (
        code == 0 and found["teacher"][0] == "note" and "which the hub has" in found["teacher"][1]
    )
    monkeypatch.setattr(hub, "get_hf_file_metadata", no_route)
    code, found = examined(*words)
    assert code == 1 and "cannot be had from the hub (no route)" in failed(found)["teacher"]
    code, found = examined(*words, "data.classes=[]", "data=digits", "data.root=null")
    assert code == 1 and "knows 1000 classes, the data has 10" in failed(found)["teacher"]


@pytest.mark.parametrize("half", ["train", "val"])
def test_one_class_whose_images_cannot_be_read(examined, tiny, tmp_path, image_folder, half):
    root = shutil.copytree(image_folder, tmp_path / "images")
    for path in (root / half / "class1").iterdir():
        path.write_bytes(b"nothing")
    words = [*tiny, f"data.root={root}"]
    code, found = examined(*words)
    assert code == 1 and [*failed(found)] == ["images"]
    text = failed(found)["images"]
    assert f"{half}/class1/" in text and "4 of 24 cannot be read" in text
    code, found = examined(*words, "data.on_error=skip")
    assert code == 0 and found["images"][0] == "note"


def test_a_full_disk(examined, ghosttrain, tiny, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**9, 10**9 - 10**6, 10**6))
    code, found = examined(*tiny)
    assert code == 1 and [*failed(found)] == ["disk"]
    assert "1.0 MB are free, two checkpoints of this run need about" in failed(found)["disk"]
    said = ghosttrain(*tiny)
    assert said.code == 2 and "1.0 MB are free, two checkpoints" in said.err
    needed = float(re.search(r"need about ([\d.]+) MB", failed(found)["disk"])[1])
    free = round(1.05e6 * needed)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(10**9, 0, free))
    code, found = examined(*tiny)
    assert code == 0 and found["disk"][0] == "note" and "type run.root=" in found["disk"][1]


def test_few_files_and_little_shared_memory(examined, tiny, monkeypatch):
    found = run_with_few_files(*tiny, "data.workers=2")  # 39 are enough for a run
    assert found["open files"][0] == "FAIL" and "ulimit -n 65536" in found["open files"][1]
    real = os.statvfs

    def small(path):
        return os.statvfs_result((4096, 4096, 99, 9, 9, 9, 9, 9, 0, 255)) if path == "/dev/shm" \
            else real(path)  # fmt: skip

    monkeypatch.setattr(os, "statvfs", small)
    code, found = examined(*tiny, "data.workers=2")
    text = failed(found)["shared memory"]
    assert code == 1 and "36.9 kB of 405.5 kB free" in text and "data.workers=0" in text
    assert "2 batches of 196.6 kB each" in text  # 16 images of 64 x 64 x 3


def run_with_few_files(*args: str) -> dict[str, tuple[str, str]]:
    script = (
        "import resource, sys\n"
        "from ghosttrain.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (38, 38))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "doctor", "--json", *args]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    return {c["check"]: (c["state"], c["text"]) for c in json.loads(done.stdout)["checks"]}


def test_weights_and_biases_is_asked_only_where_the_settings_use_it(
    examined, tiny, tmp_path, monkeypatch
):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for words in ([], ["tracker.wandb=offline"]):
        assert examined(*tiny, *words)[0] == 0
    code, found = examined(*tiny, "tracker.wandb=online")
    assert (
        code == 1
        and "http://127.0.0.1:9 does not answer (Connection refused)" in (failed(found)["tracking"])
    )


def test_a_check_that_breaks_is_a_line(examined, tiny, monkeypatch):
    def breaks(found):
        raise ZeroDivisionError("no\nreason")

    monkeypatch.setitem(doctor.LOOKS, "threads", breaks)
    code, found = examined(*tiny)
    assert code == 1 and failed(found) == {"threads": "ZeroDivisionError: no reason"}


def test_cuda_that_is_asked_for_and_not_there(examined, tiny):
    if torch.cuda.is_available():
        pytest.skip("it is here")
    code, found = examined(*tiny, "launch.device=cuda")
    assert code == 1 and [*failed(found)] == ["device"]
    assert "launch.device=cuda, but PyTorch sees no CUDA device" in failed(found)["device"]


def test_packages_of_other_releases(monkeypatch):
    real = packages._version
    assert packages.are_of_one_release("2.14.1+cpu", "0.29.0")
    assert not packages.are_of_one_release("2.13.0", "0.29.0")
    monkeypatch.setattr(
        packages, "_version", lambda name: "0.1.0" if name == "torchvision" else real(name)
    )
    state, text = packages.look_at_versions()
    assert state == "note" and "pip install -U torch torchvision" in text
    monkeypatch.setattr(packages, "_version", lambda name: None if name == "timm" else real(name))
    state, text = packages.look_at_versions()
    assert state == "FAIL" and "pip install 'timm>=" in text


@pytest.mark.parametrize(
    "words, part",
    [
        (["doctor", "foo"], "'foo' is neither a verb nor key=value"),
        (["doctor", "seed=1,2"], "give one; train -m runs one after the other"),
        (["doctor", "+recipe=nothing"], "nothing"),
        (["doctor", "-m", "seed=1,2"], "-m does not belong to doctor"),
        (["doctor", "+recipe=compact_kd", "teacher=run", "teacher.run=/gone"], "no run folder"),
    ],
)
def test_mistakes_in_the_command_are_one_line(ghosttrain, words, part):
    outcome = ghosttrain(*words)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and part in outcome.err

"""Output that cannot be written ends no training: closed pipes, full disks, terminals that are
gone, letters that a locale lacks.
"""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import only_run, some_result
from tqdm import tqdm

from ghosttrain.cli import main
from ghosttrain.commands import cache as cache_command
from ghosttrain.config.compose import compose
from ghosttrain.config.schema import Config
from ghosttrain.engine import cache_writer
from ghosttrain.errors import UserError
from ghosttrain.files import write_json
from ghosttrain.terminal import Output, go_on_without, lasting_output, screen
from ghosttrain.text import printable

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "ghosttrain"]


class Broken(io.StringIO):
    """A stream that takes `limit` characters and then fails as a closed pipe does."""

    def __init__(self, limit: int = 0) -> None:
        super().__init__()
        self.limit = limit

    def write(self, text: str) -> int:
        if self.tell() + len(text) > self.limit:
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


def test_a_stream_that_fails_is_switched_off_and_said_once_on_the_other(monkeypatch):
    out, err = Broken(limit=6), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with lasting_output():
        go_on_without()
        for word in ("first", "second", "third"):
            print(word)
    assert out.getvalue() == "first\n"
    assert err.getvalue() == (
        "ghosttrain: the standard output cannot be written (Broken pipe); the work goes on "
        "without it\n"
    )
    assert sys.stdout is out and sys.stderr is err


def test_both_streams_may_fail(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken())
    monkeypatch.setattr(sys, "stderr", Broken())
    with lasting_output():
        go_on_without()
        print("lost")
        print("lost", file=sys.stderr)
    monkeypatch.setattr(sys, "stdout", None)  # `>&-`
    with lasting_output():
        print("lost")


def test_a_hangup_is_ignored_only_while_there_is_work():
    default = signal.getsignal(signal.SIGHUP)
    with lasting_output():
        assert signal.getsignal(signal.SIGHUP) is default
        go_on_without()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) is default


def test_letters_that_the_locale_lacks_are_shown_as_numbers():
    raw = io.BytesIO()
    stream = Output(io.TextIOWrapper(raw, encoding="ascii"), "the standard output")
    print("Straße 猫 caf\udce9", file=stream, flush=True)
    assert raw.getvalue() == b"Stra\\xdfe \\u732b caf\\udce9\n"
    assert printable("猫 caf\udce9") == "猫 caf\\udce9"


NAME = "\x1b]0;owned\x07\x1b[2K\rsafe\x9b31m\u202egpj.exe\n=== 1 of 1 finished"
"""Sets the terminal's title, clears the line, writes another one, turns colour and direction."""
SHOWN = r"\x1b]0;owned\x07\x1b[2K\x0dsafe\x9b31m\u202egpj.exe\x0a=== 1 of 1 finished"


def test_no_name_tells_the_terminal_anything(capsys):
    assert printable(NAME) == printable(SHOWN) == SHOWN
    assert str(UserError(f"no {NAME}")) == f"no {SHOWN}".replace(r"\x0a", " ").replace(r"\x0d", " ")
    with lasting_output():
        for stream in (sys.stdout, sys.stderr):
            print("a\tb", NAME, file=stream)
            assert not stream.isatty()
    for text in capsys.readouterr():
        assert text == f"a\tb {SHOWN}\n".replace(r"\x0a", "\n")


def test_a_progress_bar_may_move_the_cursor_of_a_terminal(monkeypatch):
    raw = io.StringIO()
    monkeypatch.setattr(sys, "stderr", raw)
    with lasting_output():
        assert screen() is None
        raw.isatty = lambda: True
        with tqdm(total=2, file=screen()) as bar:
            bar.update()
            print(NAME, file=sys.stderr)
    assert SHOWN.split(r"\x0a")[0] in raw.getvalue() and raw.getvalue().startswith("\r")
    assert "\x1b" not in raw.getvalue()


@pytest.mark.parametrize("args", [["--help"], ["--cfg", "job"]])
def test_a_reader_that_has_seen_enough_is_no_mistake(args):
    """`--help | head`: exit code 0, nothing on stderr, not even from Python's own end."""
    read, write = os.pipe()
    os.close(read)
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [*COMMAND, *args], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, env=buffered
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_only_prints_ends_quietly_when_its_reader_has_seen_enough(tmp_path, monkeypatch):
    """A finished run, and a look at cached outputs: nothing goes on, so nothing is said of it."""
    (tmp_path / "mine").mkdir()
    composed = compose([f"run.root={tmp_path}", "run.name=mine"]).config
    write_json(tmp_path / "mine" / "result.json", some_result(composed))
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "stdout", shown := Broken(limit=20))
    assert main([f"run.root={tmp_path}", "run.name=mine"]) == 0
    assert shown.getvalue() == "" and err.getvalue() == ""

    def look(config: object, **_: object) -> None:
        print("longer than twenty letters")

    monkeypatch.setattr(cache_writer, "fill_cache", look)
    monkeypatch.setattr(cache_command, "_settings", lambda *_: Config())
    for flag, message in (("--inspect", ""), ("--dry-run", ""), ("--repair", "Broken pipe")):
        assert main(["cache", "D", flag]) == 0
        assert message in err.getvalue() and bool(err.getvalue()) is bool(message)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_an_output_that_cannot_be_printed_is_a_failure(monkeypatch, capsys):
    for args in (["--version"], ["--help"], ["--cfg", "job"]):
        with open("/dev/full", "w") as full, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            assert main(args) == 2
        message = capsys.readouterr().err
        assert message == "ghosttrain: error: the standard output: No space left on device\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_training_goes_on_without_output_and_without_a_log(tiny, tmp_path, monkeypatch, capsys):
    run = tmp_path / "runs" / "mine"
    (run / "log.txt").mkdir(parents=True)
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert main([*tiny, "train.max_steps=1", "run.name=mine"]) == 0
    assert capsys.readouterr().err == (
        "ghosttrain: the standard output cannot be written (No space left on device); the work "
        "goes on without it\n"
    )
    assert (run / "result.json").is_file() and (run / "curves.png").is_file()


def test_training_goes_on_when_its_terminal_is_gone(tiny, tmp_path):
    """The end of a terminal sends SIGHUP, and every later line meets an input/output error."""
    script = (
        "import os, pty, sys\n"
        "process, terminal = pty.fork()\n"
        "if process == 0: os.execv(sys.executable, sys.argv[1:])\n"
        "seen = b''\n"
        "while b'length:' not in seen: seen += os.read(terminal, 4096)\n"
        "os.close(terminal)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))\n"
    )
    command = [sys.executable, "-c", script, *COMMAND, *tiny, "train.max_steps=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = only_run(tmp_path / "runs")
    assert (run / "result.json").is_file()
    assert (
        "the standard output cannot be written (Input/output error); the run goes on without it"
        in (run / "log.txt").read_text()
    )


def test_names_that_are_no_utf8_or_not_in_the_locale(tmp_path):
    """Class folders, image files, the data's and the run's folder: from the first line to `fuse`
    and a next run that starts from its weights."""
    import numpy as np
    from PIL import Image

    data = os.fsencode(tmp_path) + b"/d\xe9ta"
    for split in (b"train", b"val"):
        for label, name in enumerate(("Straße".encode(), "猫".encode(), b"caf\xe9")):
            folder = os.path.join(data, split, name)
            os.makedirs(folder)
            for number in range(2):
                pixels = np.full((32, 32, 3), 40 * label + number, np.uint8)
                with open(os.path.join(folder, b"%d\xe9.jpg" % number), "wb") as file:
                    Image.fromarray(pixels).save(file, "JPEG")
    runs = os.fsencode(tmp_path) + b"/r\xe9"
    command = [*map(os.fsencode, COMMAND)]
    settings = b"""model=shufflenetv2_050 teacher=none distill=none data=folder data.train_size=64
        data.eval_size=64 data.workers=0 train.global_batch=6 train.max_steps=1""".split()
    settings += [b"data.root=" + data, b"run.root=" + runs, "run.name=猫".encode()]
    run = runs + "/猫".encode()
    ascii_only = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    script = b"import sys; from ghosttrain.cli import main\nfor args in eval(sys.argv[1]):\n"
    script += b" code = main([*args])\n if code: sys.exit(code)\n"
    weights = b"model.weights=" + run + b"/model.safetensors"
    calls = [
        [*map(os.fsdecode, call)]
        for call in (
            settings,
            settings,
            [b"eval", run],
            [b"report", runs],
            [b"fuse", run],
            [*settings[:-1], b"run.name=next", weights],
        )
    ]
    done = subprocess.run(
        [command[0], b"-c", script, ascii(calls).encode()],
        cwd=ROOT,
        env=os.environ | ascii_only,
        capture_output=True,
    )
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr.decode()
    assert b"/r\\udce9/\\u732b" in done.stdout
    for name in (b"model.safetensors", b"model.fused.safetensors", b"card.md", b"curves.png"):
        assert os.path.isfile(run + b"/" + name)
    assert "/r\\udce9/猫" in Path(os.fsdecode(run), "log.txt").read_text(encoding="utf-8")

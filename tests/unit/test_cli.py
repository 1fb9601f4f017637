"""The command line: where a verb may stand, which options belong to it, what an error of the system
says, and the help."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ghosttrain import cli
from ghosttrain.cli import parse
from ghosttrain.config.errors import UserError
from ghosttrain.help import help_text

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("line", "verb", "overrides", "folders"),
    [
        ("", "train", [], []),
        ("train seed=1", "train", ["seed=1"], []),
        ("seed=1 train", "train", ["seed=1"], []),
        ("+recipe=x cache cache.dir=D", "cache", ["+recipe=x", "cache.dir=D"], []),
        ("-m seed=1,2 train", "train", ["seed=1,2"], []),
        ("runs/a runs/b report", "report", [], ["runs/a", "runs/b"]),
        ("fuse --out eval runs/a", "fuse", [], ["runs/a"]),
        ("--config-dir=cache seed=1", "train", ["seed=1"], []),
        ("bench step rounds=1", "bench", ["rounds=1"], ["step"]),
        ("--repair cache D", "cache", [], ["D"]),
        ("seed=1 --help", "help", [], []),
        ("report help", "help", [], []),
        ("cache --version", "version", [], []),
    ],
)
def test_a_verb_is_found_wherever_it_stands(line, verb, overrides, folders):
    found, options = parse(line.split())
    assert (found, options.overrides, options.folders) == (verb, overrides, folders)


def test_values_of_options():
    assert parse(["fuse", "a", "--out", "f", "--to=timm"])[1].out == "f"
    assert parse(["fuse", "a", "--out", "f", "--to=timm"])[1].to == "timm"
    assert parse(["-cd", "d", "--help"])[1].config_dir == "d"
    assert parse(["-c", "job", "-m"])[1].multirun


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train cache", "two verbs, 'train' and 'cache': type one"),
        ("report eval runs/a", "two verbs, 'report' and 'eval': type one"),
        ("report report", "two verbs, 'report' and 'report': type one"),
        ("seed=1 --out", "--out needs a value: --out FILE"),
        ("--cfg=", "--cfg needs a value: --cfg job"),
        ("--out f", "--out does not belong to train; see python -m ghosttrain --help"),
        ("eval a -m", "--multirun does not belong to eval; see python -m ghosttrain --help"),
        ("--dryrun cache", "unknown option '--dryrun'. Did you mean '--dry-run'?"),
        ("--cfg yes", "--cfg yes: choose job, hydra or all"),
    ],
)
def test_a_mistake_is_one_line(line, said):
    with pytest.raises(UserError) as caught:
        parse(line.split())
    assert str(caught.value) == said


def test_a_folder_may_be_called_like_a_verb(tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse(["report", "cache"])[1].folders == ["cache"]
    with pytest.raises(UserError, match="two verbs, 'train' and 'cache': type one"):
        parse(["train", "cache", "+recipe=x"])  # train takes none


def test_a_folder_may_hold_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a=b", "lr=1,2", "optim"):
        (tmp_path / name).mkdir()
    for verb in ("eval", "fuse", "report"):
        options = parse([verb, "lr=1,2", "seed=1", "runs/a=b"])[1]
        assert options.folders == ["lr=1,2", "runs/a=b"] and options.overrides == ["seed=1"]
    options = parse(["cache", "a=b", "mine/group=x", "optim=lamb"])[1]
    assert options.folders == ["a=b"] and options.overrides == ["mine/group=x", "optim=lamb"]
    assert parse(["a=b"])[1].overrides == ["a=b"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EMFILE, "Too many open files", "a.jpg"), "a.jpg: Too many open files; "),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a"), "a: File name too long\n"),
        (OSError(errno.EIO, "Input/output error", b"d\xe9"), "d\\udce9: Input/output error; "),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device; "),
        (FileNotFoundError(errno.ENOENT, "No such file", "last.pt"), "last.pt: No such file\n"),
    ],
)
def test_an_error_of_the_system_is_one_line(monkeypatch, capsys, error, said):
    def fail(_):
        raise error

    monkeypatch.setitem(cli.VERBS, "eval", fail)
    assert cli.main(["eval", "a"]) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("ghosttrain: error: ") and err.count("\n") == 1


def test_an_error_that_nobody_can_mend_keeps_its_trace(monkeypatch):
    def fail(_):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setitem(cli.VERBS, "eval", fail)
    with pytest.raises(OSError, match="Bad file descriptor"):
        cli.main(["eval", "a"])


def test_the_help_imports_next_to_nothing(tmp_path):
    """It has to be instant; what is imported does not depend on how busy the machine is."""
    script = (
        "import sys; from ghosttrain.cli import main; main(['--help', '--config-dir', '.'])\n"
        "print('\\n'.join(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    modules = {name.partition(".")[0] for name in done.stderr.split()}
    assert "ghosttrain" in modules
    heavy = {"torch", "numpy", "timm", "hydra", "omegaconf", "pydantic", "yaml", "matplotlib"}
    assert not modules & heavy
    assert len(done.stderr.split()) < 250  # a bare Python has about 60


def test_the_help_lists_what_can_be_typed():
    text = help_text()
    recipes = [
        path.relative_to(ROOT / "recipes").with_suffix("").as_posix()
        for path in (ROOT / "recipes").rglob("*.yaml")
    ]
    for word in ("eval RUN", "fuse RUN", "report RUN", "ghostnetv3_130", "lamb*", *recipes):
        assert word in text
    for name in cli.VERBS:
        assert name in text
    for option in (*cli.SWITCHES, *cli.WITH_VALUE):
        assert option in text or not option.startswith("--")


def test_the_help_lists_the_users_own_groups_and_recipes(ghosttrain, tmp_path):
    for name in ("recipe/mine", "recipe/sub/other", "optim/lion", "paints/blue"):
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("seed: 1\n")
    shown = ghosttrain("--config-dir", str(tmp_path), "--help")
    assert shown.code == 0
    listed = shown.out.split("groups (GROUP=CHOICE")[1].split("recipes (+recipe")[0].splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in listed[1:] if line.strip()}
    assert "lion" in rows["optim"] and "lamb*" in rows["optim"] and rows["paints"] == ["blue"]
    listed = shown.out.split("recipes (+recipe")[1].split("settings (section")[0].split()
    assert {"mine", "sub/other", "compact_kd"} <= set(listed)
    assert "recipe" not in rows
    absent = ghosttrain("--config-dir", str(tmp_path / "absent"), "--help")
    assert absent.code == 2 and "no such folder" in absent.err

"""The command line: where a verb may stand, which options belong to it, what an error of the system
says, and the help."""

import errno
import importlib
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from ghosttrain import cli
from ghosttrain.cli import find_verb, parse
from ghosttrain.commands import eval as eval_command
from ghosttrain.commands.arguments import folders_and_overrides
from ghosttrain.commands.help import help_text
from ghosttrain.config.schema import Config, Section
from ghosttrain.engine import distributed
from ghosttrain.errors import UserError
from ghosttrain.files import PACKAGE

ROOT = Path(__file__).resolve().parents[2]


def parsed(line: str | list[str]):
    """Return the verb of a command line and what its module gets."""
    words = line.split() if isinstance(line, str) else line
    verb, rest = find_verb(words)
    return verb, parse(importlib.import_module(f"ghosttrain.commands.{verb}").ARGUMENTS, rest)


@pytest.mark.parametrize(
    ("line", "verb", "words"),
    [
        ("", "train", []),
        ("train seed=1", "train", ["seed=1"]),
        ("seed=1 train", "train", ["seed=1"]),
        ("seed=1 -m train.epochs=1,2", "train", ["seed=1", "train.epochs=1,2"]),
        ("+recipe=x cache cache.dir=D", "cache", ["+recipe=x", "cache.dir=D"]),
        ("-m seed=1,2 train", "train", ["seed=1,2"]),
        ("runs/a runs/b report", "report", ["runs/a", "runs/b"]),
        ("fuse --out eval runs/a", "fuse", ["runs/a"]),
        ("--config-dir=cache seed=1", "train", ["seed=1"]),
        ("bench step rounds=1", "bench", ["step", "rounds=1"]),
        ("--repair cache D", "cache", ["D"]),
        ("seed=1 --help", "help", []),
        ("report help", "help", ["report"]),
        ("report --help", "help", ["report"]),
        ("help optim", "help", ["optim"]),
        ("cache --version", "version", []),
    ],
)
def test_a_verb_is_found_wherever_it_stands(line, verb, words):
    found, options = parsed(line)
    assert (found, options.words) == (verb, words)


def test_values_of_options():
    assert parsed("fuse a --out f --to=timm")[1].out == "f"
    assert parsed("fuse a --out f --to=timm")[1].to == "timm"
    assert parsed("-cd d --help")[1].config_dir == "d"
    assert parsed("-c job -m")[1].multirun


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train cache", "two verbs, 'train' and 'cache': type one"),
        ("report eval runs/a", "two verbs, 'report' and 'eval': type one"),
        ("report report", "two verbs, 'report' and 'report': type one"),
        ("fuse a --out", "--out needs a value: --out FILE"),
        ("fuse a --to --out", "--to needs a value: --to timm"),
        ("--cfg", "--cfg needs a value: --cfg job"),
        (
            "--out f",
            "--out does not belong to train, but to detect and fuse and pareto and wrong and",
        ),
        ("eval a -m", "-m does not belong to eval, but to train and cost; see python -m"),
        ("--dryrun cache", "unknown option '--dryrun'. Did you mean '--dry-run'?"),
        ("--cfg yes", "--cfg yes: choose job, hydra or all"),
        ("trian seed=1", "'trian' is neither a verb nor key=value. Did you mean 'train'?"),
        ("seed=1 ~optim", "'~optim': settings cannot be deleted; set a value"),
        ("cache a b", "cache takes one folder, not also 'b'"),
        ("cache a --repair --inspect", "choose one of --dry-run, --repair and --inspect"),
        ("eval", "eval needs one run folder: python -m ghosttrain eval runs/compact_kd/NAME"),
        ("fuse a seed=1", "fuse takes a run folder, --out FILE and --to LIBRARY, not 'seed=1'"),
        ("report", "report needs run folders: python -m ghosttrain report runs/compact_kd/*"),
        ("help nothing", "there is no help on 'nothing'. Choose from: augment, bench, cache"),
        ("help optim.rate", "optim has no setting 'rate'. Choose from: beta1, beta2"),
        ("help optim train", "help takes one word: 'optim' or 'train'"),
        ("seed=1 --resolve", "--resolve is for --cfg, which prints settings: add -c job"),
        ("seed=1 -p train", "--package train is for --cfg, which prints settings: add -c job"),
        ("--info x", "--info x: choose defaults, defaults-tree, config, searchpath, plugins or"),
        ("-m seed=1,2 --info defaults", "--info defaults is about one run: leave -m and the"),
        ("-m seed=1,2 -c all", "--cfg all is about one run: leave -m and the lists of values out"),
        ("version foo", "version takes no words, got 'foo': leave it out"),
        ("bench optim optim.lr=3", "'optim.lr=3' does nothing in bench optim: it reads model=, "),
    ],
)
def test_a_mistake_is_one_line(ghosttrain, line, message):
    outcome = ghosttrain(*line.split())
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and outcome.out == ""
    assert outcome.err.startswith(f"ghosttrain: error: {message}")


def test_a_folder_may_be_called_like_a_verb(tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parsed("report cache")[1].words == ["cache"]
    with pytest.raises(UserError, match="two verbs, 'train' and 'cache': type one"):
        parsed("train cache +recipe=x")  # train takes none


def test_a_folder_may_hold_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a=b", "lr=1,2", "optim"):
        (tmp_path / name).mkdir()
    words = ["lr=1,2", "seed=1", "runs/a=b"]
    assert folders_and_overrides(words) == (["lr=1,2", "runs/a=b"], ["seed=1"])
    words = ["a=b", "mine/group=x", "optim=lamb"]
    assert folders_and_overrides(words, groups=True) == (["a=b"], ["mine/group=x", "optim=lamb"])


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EMFILE, "Too many open files", "a.jpg"), "a.jpg: Too many open files; "),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a"), "a: File name too long\n"),
        (OSError(errno.EIO, "Input/output error", b"d\xe9"), "d\\udce9: Input/output error; "),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device; "),
        (FileNotFoundError(errno.ENOENT, "No such file", "last.pt"), "last.pt: No such file\n"),
        (OSError(errno.EFBIG, "File too large", "x"), "x: File too large; files may not be that"),
        (ImportError("libx.so: failed to map segment from shared object"), "ulimit -v unlimited\n"),
    ],
)
def test_an_error_of_the_system_is_one_line(monkeypatch, capsys, error, expected):
    def fail(_):
        raise error

    monkeypatch.setattr(eval_command, "run", fail)
    assert cli.main(["eval", "a"]) == 2
    err = capsys.readouterr().err
    assert expected in err and err.startswith("ghosttrain: error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "error", [OSError(errno.EBADF, "Bad file descriptor"), ImportError("cannot import name 'x'")]
)
def test_an_error_that_nobody_can_mend_keeps_its_trace(monkeypatch, error):
    def fail(_):
        raise error

    monkeypatch.setattr(eval_command, "run", fail)
    with pytest.raises(type(error), match=re.escape(str(error))):
        cli.main(["eval", "a"])


def test_ranks_leave_their_group_after_an_error(monkeypatch, tmp_path, capsys):
    """Else threads of gloo abort the process now and then: exit code 134 in place of 2."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    monkeypatch.setattr(importlib.import_module("ghosttrain.commands.train"), "run", fails)
    assert cli.main([]) == 2
    assert not dist.is_initialized()

    given_up = threading.Event()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", given_up.wait)  # for others that do not come
    distributed.stop_soon(seconds=0.1)
    given_up.set()


def fails(options):
    raise UserError("no")


def test_a_folder_that_is_gone_is_named(tmp_path):
    """Python's error names no path: it asked where it is."""
    script = "import os, sys; os.rmdir(os.getcwd()); from ghosttrain.cli import main; "
    script += "sys.exit(main(['doctor']))"
    (tmp_path / "gone").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path / "gone",
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "the folder in which this command was started is gone: cd to" in done.stderr


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


def test_every_verb_has_its_own_help(ghosttrain):
    for verb in cli.VERBS:
        if verb == "help":
            continue
        outcome = ghosttrain(verb, "--help")
        assert outcome.code == 0 and outcome.out == ghosttrain("help", verb).out
        assert outcome.out.startswith(f"usage: python -m ghosttrain {verb}")
        actions = importlib.import_module(f"ghosttrain.commands.{verb}").ARGUMENTS._actions
        for name in (name for action in actions for name in action.option_strings):
            assert name in outcome.out
        assert max(map(len, outcome.out.splitlines())) <= 98


def test_a_section_is_explained_setting_by_setting(ghosttrain):
    for section, field in Config.model_fields.items():
        if not isinstance(getattr(Config(), section), Section):
            continue
        outcome = ghosttrain("help", section)
        assert outcome.code == 0, outcome.err
        for name in field.annotation.model_fields:
            assert f"\n  {section}.{name}=" in outcome.out
            first = ghosttrain("help", f"{section}.{name}")
            assert first.code == 0 and first.out.startswith(f"  {section}.{name}=")
    text = ghosttrain("help", "optim").out
    assert "optim.lr=0.005   number, above 0\n      Peak learning rate" in text
    assert "optim.name=lamb   one of lamb, sgd, adamw" in text
    assert "optim.clip_grad=null   number or null, above 0" in text
    assert "lamb*" in text.split("files of the group")[1]
    assert (
        "train.max_steps=null   whole number or null, 1 or more"
        in ghosttrain("help", "train.max_steps").out
    )

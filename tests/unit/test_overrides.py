"""What a user may type as `key=value`: sweeps that have a list, and text that no grammar takes."""

import pytest

from ghosttrain.config.compose import cells, compose
from ghosttrain.errors import UserError


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("seed=1,2", ["1", "2"]),
        ("seed=choice(1,2)", ["1", "2"]),
        ("seed=range(1,4)", ["1", "2", "3"]),
        ("seed=sort(3,1)", ["1", "3"]),
        ("model=glob(ghostnetv3*,exclude=*_1*)", ["ghostnetv3_050"]),
        ("model=glob([mobile*,ghostnetv2*],exclude=*0)", None),
        ("+recipe=glob(ablation/no_*)", ["ablation/no_ema", "ablation/no_reparam",
                                         "ablation/no_teacher"]),
        ("budget=glob(full)", ["full"]),
    ],
)  # fmt: skip
def test_sweeps_with_a_list(override, values):
    if values is None:
        with pytest.raises(UserError, match="no model matches"):
            cells([override])
        return
    assert [cell[-1].partition("=")[2] for cell in cells([override])] == values


def test_a_glob_matches_the_users_own_files(tmp_path):
    (tmp_path / "recipe").mkdir()
    for name in ("mine_a", "mine_b", "other"):
        (tmp_path / "recipe" / f"{name}.yaml").write_text("seed: 1\n")
    assert cells(["+recipe=glob(mine*)"], str(tmp_path)) == [["+recipe=mine_a"], ["+recipe=mine_b"]]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "seed=interval(0,1)",
            "a range without steps, for a search (hydra/sweeper=optuna); ",
        ),
        ("seed=glob(*)", "glob() matches the files of a group; seed has none"),
        ("model=glob(absent*)", "no model matches. Choose from: "),
        ("seed=range(3,1)", "names no value"),
        ("seed=range(0,3,0)", "a step of 0 never ends"),
        ("=1", "there is no name before the '='"),
        ("+=1", "there is no name before the '='"),
        ("seed=tag(a)", "cannot read"),
    ],
)
def test_sweeps_without_one(override, expected):
    with pytest.raises(UserError) as caught:
        cells([override])
    assert expected in str(caught.value) and override.strip("+") in str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("defaults: 3", "write a recipe's defaults as a list"),
        ("defaults: {override /optim: lamb}", "write a recipe's defaults as a list"),
        ("defaults: [[a]]", "a recipe's defaults hold lines"),
        ("defaults: [{}]", "a recipe's defaults hold lines"),
        ("defaults: [{1: a}]", "a recipe's defaults hold lines"),
        ("defaults: [{override /optim: lamb, override /ema: x}]", "a recipe's defaults hold lines"),
        ("[1, 2]", "holds 'name: value', not a list"),
        ("3", "not readable YAML"),
        ("a: b: c", "not readable YAML"),
        ("# caf\udce9", "not readable YAML"),
        ("budget: 7", "no budget is called '7'. Choose from: "),
        ("optim: [1]", "'optim' is a section"),
        ("seed: ${x}", "seed: Interpolation key 'x' not found"),
    ],
)
def test_a_recipe_that_is_none_is_named(tmp_path, content, expected):
    (tmp_path / "recipe" / "folder.yaml").mkdir(parents=True)
    path = tmp_path / "recipe" / "mine.yaml"
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError) as caught:
        compose(["+recipe=mine"], str(tmp_path))
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no recipe is called 'folder'"):
        compose(["+recipe=folder"], str(tmp_path))


def test_a_home_that_nobody_has(tmp_path):
    for setting in ("data=folder data.root={}", "model.weights={}", "data=idx data.root={}"):
        with pytest.raises(UserError, match="no such (folder|file)"):
            compose(setting.format("~nobody-here/x").split())
    with pytest.raises(UserError, match="no such folder"):
        compose([], "~nobody-here")
    with pytest.raises(UserError, match="is no path"):
        compose(["data=folder", "data.root=\x00"])


KEYS = ("seed", "run.name", "model", "+recipe", "data.mean", "distill.weight", "a", "",
        "teacher.members", "teacher.members.a.name", "hydra.run.dir")  # fmt: skip
VALUES = ("{", "[1,", '"1', "'", "\\", "${", "${x}", "${oc.env:NO_SUCH}", "???", "int(",
          "choice()", "interval(0,1)", "[[[", "{a:", "a\nb", "\x00", "9" * 400, "inf")  # fmt: skip
BROKEN = [f"{KEYS[(i + j) % 11]}={v}" for i, v in enumerate(VALUES) for j in (0, 4)]
BROKEN += ["distill.weight=" + "9" * 400, "teacher.members.a.name=${", 'run.name="1']
BROKEN += ["~model", "~seed=1", "model@x=timm", "+x=1", "++seed.x=1", "hydra/launcher=basic"]


def test_no_text_breaks_the_grammar():
    """Every one is taken, or refused with a `UserError`."""
    taken = []
    for text in BROKEN:
        try:
            compose([text])
            taken.append(text)
        except UserError as error:
            assert str(error)
    assert 'run.name="1' in taken and len(taken) < 10, taken

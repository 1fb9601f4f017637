"""The composer: order of layers, budgets, names of runs, and one clear line for every mistake."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ghosttrain.commands.help import help_text
from ghosttrain.config.compose import batch_split, cells, compose, override_saved
from ghosttrain.config.identity import flatten, result_settings, run_name, settings_hash, unflatten
from ghosttrain.config.schema import Config, MemberConfig, OptimConfig, Section
from ghosttrain.errors import UserError, did_you_mean

ROOT = Path(__file__).resolve().parents[2]
KD = "+recipe=compact_kd"
FULL = [KD, "budget=full"]
ENSEMBLE = ["teacher=ensemble", "distill=kl"]
LITE = ["teacher.members.a.name=tf_efficientnet_lite0"]
TAUGHT = ["teacher=digits", "distill=kl"]


def refusal(*overrides: str, config_dir: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        compose(overrides, config_dir)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_recipe_values_are_those_of_the_file():
    config = compose(FULL).config
    assert (config.optim.name, config.optim.lr, config.optim.lr_batch) == ("lamb", 5e-3, 2048)
    assert (config.train.epochs, config.train.global_batch) == (600, 2048)
    assert (config.distill.name, config.ema.decay) == ("soft_ce", 0.9999)
    assert config.teacher.name.startswith("beitv2_base")
    assert config.recipe == "compact_kd"


def test_plus_is_optional_and_recipe_none_is_allowed():
    assert compose(["recipe=compact_kd"]).config == compose([KD]).config
    assert compose(["recipe=null"]).config.recipe == "none"


def test_budget_stands_between_recipe_and_command_line():
    budget = compose([KD]).config
    full = compose(FULL).config
    assert budget.budget == "digits" and full.budget == "full"
    assert budget.train.epochs < full.train.epochs
    assert budget.teacher.weights == "digits"
    assert compose([KD, "train.epochs=7"]).config.train.epochs == 7


def test_every_replaced_recipe_value_is_listed_once():
    notes = compose([KD]).replaced
    assert "teacher: beitv2_base -> digits" in notes
    assert any(n.startswith("train.epochs: 600 -> ") for n in notes)
    assert any(n.startswith("train.global_batch: 2048 -> ") for n in notes)
    assert len(notes) == len({n.split(":")[0] for n in notes})
    assert compose(FULL).replaced == ()


def test_the_budget_leaves_out_what_the_user_or_an_ablation_named():
    notes = compose([KD, "train.epochs=600", "teacher=none", "distill=none"]).replaced
    assert not any(n.startswith(("train.epochs", "teacher")) for n in notes)
    ablation = compose(["+recipe=[compact_kd,ablation/no_teacher]"])
    assert ablation.config.teacher.name is None
    assert not any(n.startswith("teacher") for n in ablation.replaced)


def test_a_recipe_may_name_its_budget_and_one_without_a_teacher_gets_none():
    made = compose(["+recipe=teacher_digits"])
    assert (made.config.budget, made.replaced) == ("full", ())
    assert compose(["+recipe=teacher_digits", "budget=digits"]).config.budget == "digits"
    plain = compose(["+recipe=baseline"])
    assert plain.config.teacher.name is None and plain.config.budget == "digits"
    assert not any(n.startswith("teacher") for n in plain.replaced)


def test_another_group_choice_drops_the_recipes_values_for_that_group():
    sgd = compose([*FULL, "optim=sgd"]).config.optim
    assert sgd.name == "sgd"
    assert sgd == compose(["optim=sgd", "budget=full"]).config.optim != compose(FULL).config.optim
    assert compose([*FULL, "optim=lamb"]).config.optim.lr == 5e-3
    stacked = compose(["+recipe=[compact_kd,ablation/sgd]", "budget=full"]).config
    assert stacked.optim == sgd and stacked.recipe == "compact_kd+ablation/sgd"


def test_values_of_a_group_that_the_layer_did_not_choose_stay(tmp_path):
    flat = lambda *o: result_settings(compose([*o]).config)  # noqa: E731
    kd, mixup = flat(KD), flat("+recipe=[compact_kd,ablation/mixup]")
    changed = {k for k in kd if kd[k] != mixup[k]}
    assert changed == {"augment.policy", "augment.mixup_alpha", "augment.cutmix_alpha"}
    assert compose([KD, "schedule=constant"]).config.schedule.warmup_epochs == 1
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("model:\n  dropout: 0.5\n")
    assert (
        compose(["+recipe=mine", "model=ghostnetv3_050"], str(tmp_path)).config.model.dropout == 0.5
    )


def test_the_budgets_learning_rate_is_only_for_the_optimizer_it_names():
    assert compose([KD]).config.optim.lr == 0.01
    assert compose([KD, "optim=adamw"]).config.optim == compose([*FULL, "optim=adamw"]).config.optim


def test_text_is_taken_as_it_stands(tmp_path):
    for value in ("/tmp/été", "/my dir/x", "a=b", 'quo"te', "2024", "it's"):
        assert compose([KD, f"run.root={value}"]).config.run.root == value
    assert compose([KD, "run.name=null"]).config.run.name is None
    own = tmp_path / "it's été"
    (own / "recipe").mkdir(parents=True)
    (own / "recipe" / "été.yaml").write_text("seed: 5\n")
    assert compose(["+recipe=été"], str(own)).config.seed == 5


def test_an_own_file_may_not_hide_a_shipped_one(tmp_path):
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "sgd.yaml").write_text("name: sgd\n")
    assert "has the name of a shipped file" in refusal(config_dir=str(tmp_path))


def test_a_learning_rate_typed_by_hand_is_not_scaled():
    assert compose(FULL).config.optim.lr_batch == 2048
    assert compose([KD, "optim.lr=0.001"]).config.optim.lr_batch is None
    assert compose([KD, "optim.lr=0.001", "optim.lr_batch=256"]).config.optim.lr_batch == 256


def test_an_own_folder_adds_groups_recipes_and_budgets(tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "optim").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /optim: fast\ntrain:\n  epochs: 3\n"
    )
    (tmp_path / "optim" / "fast.yaml").write_text("name: adamw\nlr: 0.01\nlr_batch: 64\n")
    config = compose(["+recipe=mine", "budget=full"], str(tmp_path)).config
    assert (config.optim.name, config.optim.lr, config.train.epochs) == ("adamw", 0.01, 3)
    assert "no such folder" in refusal(config_dir=str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lrr=1", "Did you mean 'optim.lr'?"),
        ("+foo=1", "there is no setting 'foo'"),
        ("++train.epochz=1", "Did you mean 'train.epochs'?"),
        ("lr=1", "Did you mean 'optim.lr'?"),
        ("epochs", "is not key=value"),
        ("modle=ghostnetv3_100", "Did you mean 'model'?"),
        (
            "model=ghostnetv3_13",
            "no model is called 'ghostnetv3_13'. Did you mean 'ghostnetv3_130'?",
        ),
        ("model.name=ghostnetv3_131", "Did you mean 'ghostnetv3_130'?"),
        ("+recipe=compact_kdd", "Did you mean 'compact_kd'?"),
        ("+recipe=[compact_kd,ablation/no_emma]", "Did you mean 'ablation/no_ema'?"),
        ("budget=small", "no budget is called 'small'"),
        ("optim.lr=nan", "optim.lr=nan is not a finite number"),
        ("optim.lr=-1", "greater than 0"),
        ("optim.lr=fast", "optim.lr=fast is not a valid number"),
        ("train.epochs=2.5", "train.epochs=2.5 is not a valid integer"),
        ("train.epochs=true", "train.epochs=True is not a valid integer"),
        ("optim.name=lam", "Did you mean 'lamb'?"),
        ("optim={lr:1}", "no optim is called"),
        ("train=1", "'train' is a section"),
        ("train.epochs", "is not key=value"),
        ("seed=1,2", "add -m"),
        ("~teacher", "is not key=value"),
        ("~teacher=none", "cannot be deleted"),
        ("data=folder", "type data.root=/path"),
        ("data.mean=[", "cannot read"),
        ("model=timm", "model.name"),
        ("model.weights=absent.pth", "model.weights=absent.pth: no such file"),
        ("distill=kl", "needs a teacher"),
        ("augment.mixup_alpha=0.2", "augment=with_mixup"),
        ("augment.cutmix_alpha=1.0", "augment=with_mixup"),
        ("augment.scale_min=1.0", "augment.scale_min=1.0 is above"),
        ("data.root=/somewhere", "type data=imagenet, data=folder or data=idx"),
        ("teacher=efficientnet_lite2", "would never be asked"),
        ("run.fresh=maybe", "run.fresh=maybe is not a valid boolean"),
        ("data.in_chans=1", "type data.mean=[0.3096] data.std=[0.3491]"),
        ("data.mean=[0.5]", "data.mean has 1 values for data.in_chans=3"),
        ("train.micro_batch=48", "train.micro_batch may be"),
        ("launch.nproc=3", "does not divide over 3 processes"),
    ],
)
def test_a_mistake_is_one_line_that_helps(override, expected):
    assert expected in refusal(
        override,
        "teacher=none" if override == "distill=kl" else "seed=0",
        "augment.scale_max=0.5" if "scale_min" in override else "seed=0",
        "train.global_batch=100" if "train.global" not in override else "seed=0",
    )


def test_missing_data_root_and_imagenet_dir(tmp_path, monkeypatch):
    monkeypatch.delenv("IMAGENET_DIR", raising=False)
    assert "IMAGENET_DIR" in refusal("data=imagenet")
    monkeypatch.setenv("IMAGENET_DIR", str(tmp_path))
    assert compose(["data=imagenet"]).config.data.root == str(tmp_path)
    gone = tmp_path / "gone"
    assert refusal("data=folder", f"data.root={gone}") == f"data.root={gone}: no such folder"


def test_a_broken_recipe_names_its_file(tmp_path):
    (tmp_path / "recipe").mkdir()
    for body, expected in [
        ("train:\n  epoch: 3\n", "Did you mean 'train.epochs'?"),
        ("defaults:\n  - optim: sgd\n", "override /GROUP: CHOICE"),
        ("defaults:\n  - override /optim: sdg\n", "Did you mean 'sgd'?"),
        ("train: [", "not readable YAML"),
    ]:
        (tmp_path / "recipe" / "bad.yaml").write_text("# @package _global_\n" + body)
        message = refusal("+recipe=bad", config_dir=str(tmp_path))
        assert "bad.yaml" in message and expected in message


def test_batch_split():
    config = compose([KD, "train.global_batch=96", "train.micro_batch=16"]).config
    assert batch_split(config, 1) == (16, 6)
    assert batch_split(config, 3) == (16, 2)
    assert batch_split(compose([KD, "train.global_batch=96"]).config, 4) == (24, 1)
    with pytest.raises(UserError, match="type train.global_batch=95 or 100"):
        batch_split(config, 5)


def test_run_name_depends_on_what_changes_the_result_and_on_nothing_else():
    base = compose([KD]).config
    for same in (
        "data.workers=3",
        "launch.device=cpu",
        "tracker.wandb=offline",
        "run.root=x",
        "seed=5",
    ):
        assert settings_hash(compose([KD, same]).config) == settings_hash(base)
    for other in ("optim.lr=0.1", "reparam=none", "augment.seed=1", "train.micro_batch=32"):
        assert settings_hash(compose([KD, other]).config) != settings_hash(base)
    assert run_name(base) == f"compact_kd/digits-ghostnetv3_100-{settings_hash(base)}-s0"
    mixed = compose(["+recipe=[compact_kd,ablation/mixup]"]).config
    assert run_name(mixed).startswith("compact_kd+mixup/digits-ghostnetv3_100-mixup-")
    assert "seed" not in result_settings(base) and "optim.lr" in result_settings(base)


def test_a_setting_at_its_default_does_not_enter_the_hash():
    class MoreOptim(OptimConfig):
        nesterov: bool = True

    class Later(Config):
        optim: MoreOptim = MoreOptim()
        extra: Section = Section()

    before = compose([*FULL, "optim=sgd"]).config
    saved = before.model_dump(mode="json")
    assert settings_hash(Later.model_validate(saved)) == settings_hash(before)
    saved["optim"]["nesterov"] = False
    assert settings_hash(Later.model_validate(saved)) != settings_hash(before)
    named = compose([*FULL, "optim=sgd", "distill.features_weight=0", "teacher.dtype=auto"]).config
    assert settings_hash(named) == settings_hash(before)


def test_a_sweep_is_every_combination_in_order():
    grid = cells(["+recipe=compact_kd,baseline", "seed=1,2", "train.epochs=3"])
    assert grid == [
        ["+recipe=compact_kd", "seed=1", "train.epochs=3"],
        ["+recipe=compact_kd", "seed=2", "train.epochs=3"],
        ["+recipe=baseline", "seed=1", "train.epochs=3"],
        ["+recipe=baseline", "seed=2", "train.epochs=3"],
    ]
    assert len(cells(["+recipe=[compact_kd,ablation/no_ema],[compact_kd,ablation/sgd]"])) == 2
    assert len(cells(["seed=range(0,3)"])) == 3
    assert cells(["++train.epochs=1,2"]) == [["++train.epochs=1"], ["++train.epochs=2"]]
    for cell in grid:
        compose(cell)


def test_saved_settings_may_be_changed_only_where_allowed():
    config = compose([KD]).config
    assert override_saved(config, ["data.workers=0"], "eval").data.workers == 0
    with pytest.raises(UserError, match="cannot be changed for a run that exists"):
        override_saved(config, ["optim.lr=1"], "eval")
    with pytest.raises(UserError, match="data.workers=-1 is not greater"):
        override_saved(config, ["data.workers=-1"], "eval")


def test_settings_are_frozen_and_survive_json():
    config = compose([KD]).config
    with pytest.raises(ValueError, match="frozen"):
        config.optim.lr = 1.0  # type: ignore[misc]
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_did_you_mean():
    assert did_you_mean("lam", ["lamb", "sgd"]) == " Did you mean 'lamb'?"
    assert did_you_mean("zzz", ["b", "a"]) == " Choose from: a, b."
    assert did_you_mean("x", []) == ""


def test_every_file_in_conf_composes():
    for group in (p for p in (ROOT / "conf").iterdir() if p.is_dir()):
        for file in group.glob("*.yaml"):
            extra = {
                "model": ["model.name=resnet10t"] if file.stem == "timm" else [],
                "teacher": ["distill=kl"] * (file.stem != "none")
                + ["teacher.name=resnet18"] * (file.stem == "timm")
                + ["teacher.weights=runs/x"] * (file.stem == "file")
                + LITE * (file.stem == "ensemble"),
                "data": [f"data.root={ROOT}"] * (file.stem != "digits"),
                "distill": ["teacher=digits"] * (file.stem != "none"),
            }.get(group.name, [])
            choice = f"{group.name}={file.stem}"
            assert compose([choice, *extra]).groups.get(group.name, file.stem) == file.stem


def test_config_imports_no_torch():
    code = "import ghosttrain.config.compose, ghosttrain.cli, ghosttrain.engine.launch, sys"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_setting_of_branches_tells_runs_of_a_timm_model_apart():
    timm = ["model=timm", "model.name=resnet10t"]
    runs = [run_name(compose([*timm, extra]).config) for extra in ("reparam=full", "reparam=none")]
    assert runs[0] == runs[1]


# --- Distillation ---------------------------------------------------------------------------------


PAIR = {
    "a": MemberConfig(name="tf_efficientnet_lite0", weights="efficientnet-lite", weight=2.0),
    "2b": MemberConfig(name="resnet18", mean=(0.5, 0.5, 0.5)),
}


@pytest.mark.parametrize(
    "typed",
    [
        [
            "teacher.members.a.name=tf_efficientnet_lite0",
            "++teacher.members.a.weights=efficientnet-lite",
            "+teacher.members.a.weight=2",
            "teacher.members.2b={name: resnet18, mean: [0.5, 0.5, 0.5]}",
        ],
        [
            "teacher.members={a: {name: tf_efficientnet_lite0, weights: efficientnet-lite, "
            "weight: 2}, 2b: {name: resnet18, mean: [.5, .5, .5]}}"
        ],
        [
            "teacher.members={a:{name:tf_efficientnet_lite0,weights:efficientnet-lite,weight:2},"
            "2b:{name:resnet18,mean:[0.5,0.5,0.5],weights:null}}"
        ],
    ],
)
def test_members_of_an_ensemble_are_named_by_the_user(typed):
    assert compose([*ENSEMBLE, *typed]).config.teacher.members == PAIR
    assert compose([KD, "teacher=ensemble", *typed]).config.teacher.members == PAIR
    assert not compose([*TAUGHT]).config.teacher.members


def test_members_come_from_files_too_and_the_command_line_is_stronger(tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "teacher").mkdir()
    (tmp_path / "budget").mkdir()
    members = "members:\n  a: {name: X, weight: 2}\n  b-2: {name: Y, weights: /tmp/été x.pth}\n"
    (tmp_path / "teacher" / "pair.yaml").write_text(members + "average: logit\n")
    indented = "".join(f"  {line}\n" for line in members.splitlines())
    (tmp_path / "recipe" / "two.yaml").write_text(
        "defaults:\n  - override /teacher: ensemble\n  - override /distill: kl\n"
        f"distill:\n  weight: [[0, 0], [0.1, 1]]\nteacher:\n{indented}"
    )
    (tmp_path / "budget" / "tiny.yaml").write_text("overrides:\n  - teacher.members.a.weight=7\n")
    own = str(tmp_path)
    for chosen in (["teacher=pair", "distill=kl"], ["+recipe=two", "budget=full"]):
        teacher = compose(chosen, own).config.teacher
        assert {n: (m.name, m.weight) for n, m in teacher.members.items()} == {
            "a": ("X", 2),
            "b-2": ("Y", 1),
        }
        assert teacher.members["b-2"].weights == "/tmp/été x.pth"
        more = compose([*chosen, "teacher.members.a.weight=5", "teacher.members.c.name=Z"], own)
        assert [m.weight for m in more.config.teacher.members.values()] == [5, 1, 1]
    assert compose(["+recipe=two", "budget=full"], own).config.distill.weight == ((0, 0), (0.1, 1))
    smaller = compose(["+recipe=two", "budget=tiny"], own)
    assert smaller.replaced == ("teacher.members.a.weight: 2 -> 7",)
    (tmp_path / "budget" / "more.yaml").write_text(
        "overrides:\n  - teacher=ensemble\n  - teacher.members.b.name=Y\n"
    )
    replaced = compose([KD, "budget=more"], own).replaced
    assert {"teacher: beitv2_base -> ensemble", "teacher.members.b.name: None -> Y"} == {*replaced}
    assert not compose([KD, "budget=more", "teacher=digits"], own).replaced
    other = compose(["+recipe=two", "teacher=digits"], own).config.teacher
    assert (other.name, other.members) == ("digits", {})  # the recipe's members go with its file


def test_text_of_members_is_taken_as_it_stands():
    for value in ("/tmp/été", "/my dir/x", "a=b", 'quo"te', "2024", "it's"):
        named = [f"teacher.members.a.name={value}", f"teacher.members.a.weights={value}"]
        member = compose([*ENSEMBLE, *named]).config.teacher.members["a"]
        assert (member.name, member.weights) == (value, value)
    for written, value in (("'/tmp/été, 2'", "/tmp/été, 2"), ("/tmp/été x.pth", "/tmp/été x.pth")):
        inside = f"teacher.members={{a: {{name: 2024, weights: {written}}}}}"
        member = compose([*ENSEMBLE, inside]).config.teacher.members["a"]
        assert (member.name, member.weights) == ("2024", value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("teacher.members.a.nmae=X", "Did you mean 'teacher.members.a.name'?"),
        ("teacher.member.lite.name=X", "Did you mean 'teacher.members.lite.name'?"),
        ("members.lite.name=X", "Did you mean 'teacher.members.lite.name'?"),
        ("teacher.members={a: {nmae: X}}", "Did you mean 'teacher.members.a.name'?"),
        ("teacher.members.a.b.name=X", "there is no setting 'teacher.members.a.b.name'"),
        ("teacher.members.été.name=X", "'été' cannot name a network; use letters, digits, _ and -"),
        ("teacher.members=3", "'teacher.members=3': name each network"),
        ("teacher.members={}", "type teacher.members.a.name=MODEL"),
        ("teacher.members=null", "type teacher.members.a.name=MODEL"),
        ("teacher.members.a=X", "'teacher.members.a=X': name each network"),
        ("teacher.members={a: {}}", "'teacher.members.a={}': name each network"),
        ("teacher.members={a: [", "cannot read"),
        ("teacher.members.a", "is not key=value"),
        ("~teacher.members.a.name=X", "cannot be deleted"),
        ("teacher.members.a.weight=1,2", "add -m"),
        ("teacher.members={a:{name:X}},{a:{name:Y}}", "add -m"),
        ("teacher.members.a.weight=0", "teacher.members.a.weight=0 is not greater than 0. (Its"),
        ("teacher.members.a.weight=x", "teacher.members.a.weight=x is not a valid number. (Its"),
        ("teacher.members.a.mean=[x]", "a.mean.0=x is not a valid number. (Channel means"),
        ("teacher.members.b.weights=hub", "type teacher.members.b.name=MODEL"),
        ("teacher.average=mean", "teacher.average=mean is not 'probability' or 'logit'"),
        ("teacher.name=X", "teacher.name set up a single teacher, teacher.members (a) an ensemble"),
        ("teacher.input_size=99", "teacher.input_size set up a single teacher"),
        ("teacher=digits", "teacher.name and teacher.weights set up a single teacher"),
        ("distill=none", "teacher=ensemble would never be asked, because distill=none"),
    ],
)
def test_a_mistake_in_an_ensemble_is_one_line_that_helps(override, expected):
    assert expected in refusal(*ENSEMBLE, *LITE, override)


def test_an_ensemble_without_members_says_what_to_type():
    message = refusal(*ENSEMBLE)
    assert "type teacher.members.a.name=tf_efficientnet_lite0 " in message
    typed = message.split("type ")[1].split(",")[0].split()
    assert [*compose([*ENSEMBLE, *typed]).config.teacher.members] == ["a"]
    assert "teacher.members.a.name would never be asked" in refusal(*LITE)
    assert "would do nothing" in refusal(*TAUGHT, "teacher.average=logit")


def test_a_broken_file_of_members_is_one_line(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "recipe").mkdir()
    for body, expected in [
        ("a: {nmae: X}", "Did you mean 'teacher.members.a.name'?"),
        ("a: X", "teacher.members.a=X: name each network"),
        ("a: null", "teacher.members.a=None: name each network"),
        ("1: {name: X}", "1 cannot name a network"),
        ("a b: {name: X}", "'a b' cannot name a network"),
        ("a: {weights: hub}", "teacher.members.a is no network yet"),
    ]:
        (tmp_path / "teacher" / "own.yaml").write_text(f"members:\n  {body}\n")
        assert expected in refusal("teacher=own", "distill=kl", config_dir=str(tmp_path))
        (tmp_path / "recipe" / "own.yaml").write_text(f"teacher:\n  members:\n    {body}\n")
        message = refusal("+recipe=own", *ENSEMBLE, config_dir=str(tmp_path))
        assert expected in message
    (tmp_path / "teacher" / "own.yaml").write_text("nmae: X\n")
    expected = "there is no setting 'teacher.nmae'. Did you mean 'teacher.name'?"
    assert refusal("teacher=own", "distill=kl", config_dir=str(tmp_path)) == expected


def test_a_sweep_over_members():
    grid = cells([*ENSEMBLE, "teacher.members.2b.name=/été x,y", "teacher.members.2b.weight=1,2"])
    found = [compose(cell).config.teacher.members["2b"] for cell in grid]
    assert found == [MemberConfig(name="/été x,y", weight=weight) for weight in (1, 2)]
    both = cells([*ENSEMBLE, "teacher.members={a:{name:X}},{b:{name:Y}}"])
    assert [[*compose(cell).config.teacher.members] for cell in both] == [["a"], ["b"]]


def test_members_are_part_of_what_a_run_is():
    ensemble = [*ENSEMBLE, *LITE, "teacher.members.b.name=X"]
    config = compose(ensemble).config
    assert result_settings(config)["teacher.members.b.name"] == "X"
    assert Config.model_validate(unflatten(flatten(config.model_dump(mode="json")))) == config
    assert Config.model_validate(unflatten(flatten(Config().model_dump(mode="json")))) == Config()
    assert settings_hash(compose([*ensemble, "teacher.chunk=3"]).config) == settings_hash(config)
    assert settings_hash(
        compose([*ensemble, "teacher.members.b.weight=1"]).config
    ) == settings_hash(config)
    for other in ("b.weight=2", "b.name=Y", "c.name=X"):
        changed = compose([*ensemble, f"teacher.members.{other}"]).config
        assert settings_hash(changed) != settings_hash(config)


def test_members_of_a_saved_run_may_be_changed_only_where_allowed():
    config = compose([*ENSEMBLE, *LITE]).config
    moved = override_saved(config, ["teacher.members.a.weights=/tmp/été x.pth"], "cache")
    assert moved.teacher.members["a"] == MemberConfig(
        name="tf_efficientnet_lite0", weights="/tmp/été x.pth"
    )
    for refused in ("teacher.members.b.weights=hub", "teacher.members.a.weight=2"):
        with pytest.raises(UserError, match="cannot be changed for a cache that exists"):
            override_saved(config, [refused], "cache")


def test_the_command_line_shows_an_ensemble(ghosttrain):
    job = ghosttrain(*ENSEMBLE, *LITE, "teacher.members.b={name: X, weight: 3}", "--cfg", "job")
    assert job.code == 0, job.err
    members = yaml.safe_load(job.out)["teacher"]["members"]
    assert {name: member["weight"] for name, member in members.items()} == {"a": 1, "b": 3}
    info = ghosttrain(*ENSEMBLE, *LITE, "--info", "config")
    assert info.code == 0 and "tf_efficientnet_lite0" in info.out
    wrong = ghosttrain(*ENSEMBLE, "teacher.members.a.nmae=X")
    assert (wrong.code, wrong.err) == (
        2,
        "ghosttrain: error: there is no setting 'teacher.members.a.nmae'. Did you mean "
        "'teacher.members.a.name'?\n",
    )


def test_a_weight_or_temperature_is_a_number_or_a_schedule():
    for typed, expected in [
        ("[[0,0],[0.1,1]]", ((0, 0), (0.1, 1))),
        ("[[0, 2.5]]", ((0, 2.5),)),
        ("3", 3.0),
    ]:
        assert compose([*TAUGHT, f"distill.weight={typed}"]).config.distill.weight == expected
    config = compose([*TAUGHT, "distill.temperature=[[0,1],[1,4]]"]).config
    assert Config.model_validate(
        yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
    ) == (config)
    assert settings_hash(config) != settings_hash(compose(TAUGHT).config)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("distill.weight=abc", "distill.weight=abc is not a number of 0 or more, nor a list"),
        ("distill.weight=[[0,0],[0,1]]", "=[[0, 0], [0, 1]] is not a number of 0 or more, nor"),
        ("distill.temperature=0", "distill.temperature=0 is not a number above 0, nor a list"),
        ("distill=dkdd", "no distill is called 'dkdd'"),
        ("distill.alpha=1", "distill.alpha=1.0 would do nothing with distill=kl"),
        ("distill.beta=0", "distill.beta=0.0 would do nothing with distill=kl"),
        ("distill.name=hard", "distill.temperature=4 would do nothing with distill=hard"),
        ("teacher=none distill=none distill.features_weight=1", "would do nothing with distill=no"),
        ("teacher=none distill=none distill.weight=[[0,0],[1,.5]]", "weight=[[0,0],[1,0.5]] would"),
        ("teacher=none distill=none distill.alpha=1", "would do nothing with distill=none"),
        ("teacher=none distill=none cache.dir=D", "would never be read, because distill=none"),
        ("cache.codec=topk:20", "cache.dir=FOLDER too (python -m ghosttrain cache writes one)"),
        ("cache.shard_size=10", "cache.shard_size=10 would do nothing"),
        ("cache.dir=D cache.codec=topk:0", "cache.codec=topk:0 is no codec: type topk:K"),
        ("cache.dir=D cache.codec=topk", "cache.codec=topk is no codec"),
        ("cache.dir=D cache.codec=topk:2x", "cache.codec=topk:2x is no codec"),
        ("cache.dir=D cache.codec=features:9", "cache.codec=features:9 is no codec"),
        ("cache.dir=D cache.codec=logits:1", "cache.codec=logits:1 is no codec"),
        ("cache.dir=D cache.codec=logits:32", "cache.codec=logits:32 is no codec"),
        ("cache.dir=D augment=with_mixup", "with augment.mixup_alpha=0.8 an image also depends"),
        (
            "cache.dir=D augment=with_mixup augment.mixup_alpha=0",
            "with augment.cutmix_alpha=1.0 an image also depends",
        ),
        ("cache.draws=0", "cache.draws=0 is not greater than or equal to 1"),
    ],
)
def test_a_mistake_in_distillation_is_one_line_that_helps(overrides, expected):
    assert expected in refusal(*TAUGHT, *overrides.split())


@pytest.mark.parametrize("loss", ["kl", "dkd", "dist", "hard", "logit_std"])
def test_the_ablation_of_a_loss_changes_nothing_else(loss):
    kd = result_settings(compose([KD]).config)
    ablation = compose([f"+recipe=[compact_kd,ablation/{loss}]"]).config
    assert ablation.distill == compose(["teacher=digits", f"distill={loss}"]).config.distill
    other = {key for key, value in result_settings(ablation).items() if kd[key] != value}
    assert "distill.name" in other and all(key.startswith("distill.") for key in other)


def test_what_two_part_losses_and_stores_of_outputs_take(tmp_path, monkeypatch):
    distill = compose([*TAUGHT, "distill.name=dist", "distill.alpha=1", "distill.beta=2"]).config
    assert (distill.distill.alpha, distill.distill.beta) == (1, 2)
    monkeypatch.chdir(tmp_path)
    for codec in ("auto", "topk:1", "topk:120", "features:2", "features:16", "logits:8"):
        stored = [*TAUGHT, "cache.dir=été x", f"cache.codec={codec}", "cache.draws=3"]
        cache = compose(stored).config.cache
        assert (cache.dir, cache.codec) == (str(tmp_path / "été x"), codec)
        assert cache.draws == 3 and not Path(cache.dir).exists()
    elsewhere = compose(
        [
            *TAUGHT,
            "augment=with_mixup",
            "augment.mixup_alpha=0",
            "cache.dir=~/D",
            "augment.cutmix_alpha=0",
        ]
    ).config
    assert elsewhere.cache.dir == str(Path.home() / "D")


def test_the_help_lists_every_setting_under_its_section_with_its_default():
    lines = help_text().split("settings (section.name")[1].split("\n\n")[0].splitlines()[1:]
    listed, section = [], ""
    for line in lines:
        section = line[2:12].strip() or section
        listed += [(section, *entry.split("=", 1)) for entry in line[12:].split()]
    tree = Config().model_dump(mode="json")
    expected = [(s, name) for s, inner in tree.items() if isinstance(inner, dict) for name in inner]
    assert [(s, name) for s, name, _ in listed] == [*expected, ("(top)", "seed")]
    defaults = {f"{s}.{name}": value for s, name, value in listed}
    assert defaults["teacher.name"] == "null" and defaults["teacher.members"] == "{}"
    assert defaults["distill.temperature"] == "1.0" and defaults["cache.shard_size"] == "8192"
    assert max(len(line) for line in help_text().splitlines()) <= 98

"""The composer: order of layers, budgets, names of runs, and one clear line for every mistake."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import refused_settings

from ghosttrain.commands.help import help_text
from ghosttrain.config.compose import batch_split, cells, compose, override_saved
from ghosttrain.config.identity import result_settings, run_name, settings_hash
from ghosttrain.config.schema import BOX_DATA, EMBEDDED_DATA, Config, OptimConfig, Section
from ghosttrain.engine.run_files import write_config
from ghosttrain.errors import UserError, did_you_mean
from ghosttrain.files import expanded

KD = "+recipe=compact_kd"
LITE = ["teacher.members.a.name=tf_efficientnet_lite0"]

ROOT = Path(__file__).resolve().parents[2]
FULL = [KD, "budget=full"]


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
    folder = tmp_path / "it's été"
    (folder / "recipe").mkdir(parents=True)
    (folder / "recipe" / "été.yaml").write_text("seed: 5\n")
    assert compose(["+recipe=été"], str(folder)).config.seed == 5


def test_an_own_file_may_not_hide_a_shipped_one(tmp_path):
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "sgd.yaml").write_text("name: sgd\n")
    assert "has the name of a shipped file" in refused_settings(config_dir=str(tmp_path))


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
    assert "no such folder" in refused_settings(config_dir=str(tmp_path / "absent"))


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
        ("budget=little", "no budget is called 'little'"),
        ("optim.lr=nan", "optim.lr=nan is not a finite number"),
        ("optim.lr=-1", "greater than 0"),
        ("optim.lr=fast", "optim.lr=fast is not a valid number"),
        ("train.epochs=2.5", "train.epochs=2.5 is not a valid integer"),
        ("train.epochs=true", "train.epochs=True is not a valid integer"),
        ("optim.name=lam", "Did you mean 'lamb'?"),
        ("optim={lr:1}", "no optim is called"),
        ("train=1", "'train' is a section"),
        ("train.epochs", "is not key=value"),
        ("seed=1,2", "give one; train -m"),
        ("~teacher", "settings cannot be deleted"),
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
        ("train.save_every=foo", "=foo is not of the form 10min, 500steps or 1epoch. (When a"),
        ("run.fresh=maybe", "run.fresh=maybe is not a valid boolean"),
        ("data.in_chans=1", "type data.mean=[0.3096] data.std=[0.3491]"),
        ("data.mean=[0.5]", "data.mean has 1 values for data.in_chans=3"),
        ("train.micro_batch=48", "train.micro_batch may be"),
        ("launch.nproc=3", "does not divide over 3 processes"),
    ],
)
def test_a_mistake_is_one_line_that_helps(override, expected):
    assert expected in refused_settings(
        override,
        "teacher=none" if override == "distill=kl" else "seed=0",
        "augment.scale_max=0.5" if "scale_min" in override else "seed=0",
        "train.global_batch=100" if "train.global" not in override else "seed=0",
    )


def test_the_examples_of_a_form_have_it():
    sections = [field.annotation for field in Config.model_fields.values()]
    kinds = [kind for kind in sections if isinstance(kind, type) and issubclass(kind, Section)]
    examples = {
        (kind, name): field.examples
        for kind in kinds
        for name, field in kind.model_fields.items()
        if any(getattr(rule, "pattern", None) for rule in field.metadata)
    }
    assert examples
    for (kind, name), values in examples.items():
        for value in values:
            assert getattr(kind(**{name: value}), name) == value


def test_missing_data_root_and_imagenet_dir(tmp_path, monkeypatch):
    monkeypatch.delenv("IMAGENET_DIR", raising=False)
    assert "IMAGENET_DIR" in refused_settings("data=imagenet")
    monkeypatch.setenv("IMAGENET_DIR", str(tmp_path))
    assert compose(["data=imagenet"]).config.data.root == str(tmp_path)
    gone = tmp_path / "gone"
    assert (
        refused_settings("data=folder", f"data.root={gone}") == f"data.root={gone}: no such folder"
    )


def test_a_broken_recipe_names_its_file(tmp_path):
    (tmp_path / "recipe").mkdir()
    for body, expected in [
        ("train:\n  epoch: 3\n", "Did you mean 'train.epochs'?"),
        ("defaults:\n  - optim: sgd\n", "override /GROUP: CHOICE"),
        ("defaults:\n  - override /optim: sdg\n", "Did you mean 'sgd'?"),
        ("defaults:\n  - /recipe/compact_k\n", "Did you mean 'compact_kd'?"),
        ("train: [", "not readable YAML"),
    ]:
        (tmp_path / "recipe" / "bad.yaml").write_text("# @package _global_\n" + body)
        message = refused_settings("+recipe=bad", config_dir=str(tmp_path))
        assert "bad.yaml" in message and expected in message


def test_a_recipe_builds_on_another_as_in_hydra(tmp_path):
    """The listed files in their order, the own values where `_self_` stands."""
    (tmp_path / "recipe" / "deep").mkdir(parents=True)
    texts = {
        "a": "defaults:\n- /recipe/compact_kd\n- override /optim: sgd\n- _self_\n"
        "train:\n  epochs: 90\n",
        "deep/b": "defaults:\n- _self_\n- /recipe/a\ntrain:\n  epochs: 5\n  label_smoothing: 0.2\n",
        "c": "# a comment\n# @package optim\nlr: 0.3\n",
        "d": "defaults:\n- /recipe/a\n- /recipe/c\n",
        "round": "defaults:\n- /recipe/trip\n",
        "trip": "defaults:\n- /recipe/round\n",
    }
    for name, text in texts.items():
        header = "" if name == "c" else "# @package _global_\n"
        (tmp_path / "recipe" / f"{name}.yaml").write_text(header + text)

    def composed(recipe: str):
        return compose([f"+recipe={recipe}", "budget=full"], str(tmp_path)).config

    kd, sgd = compose(FULL).config, compose([*FULL, "optim=sgd"]).config
    a, b, c, d = (composed(name) for name in ("a", "deep/b", "c", "d"))
    assert (a.recipe, a.optim, a.teacher) == ("a", sgd.optim, kd.teacher)
    assert (a.train.epochs, a.train.global_batch) == (90, 2048)
    assert (b.train.epochs, b.train.label_smoothing, b.optim) == (90, 0.2, sgd.optim)
    assert (c.optim.name, c.optim.lr) == ("lamb", 0.3)
    assert (d.optim.name, d.optim.lr, d.train.epochs) == ("sgd", 0.3, 90)
    circle = refused_settings("+recipe=round", config_dir=str(tmp_path))
    assert circle == "recipes build on each other in a circle: round -> trip -> round"


def test_a_recipe_of_what_differs_is_the_recipe(tmp_path):
    """The values of a group stand in its file: repeating them in a recipe changes nothing."""
    (tmp_path / "recipe").mkdir()
    lines = (ROOT / "recipes" / "compact_kd.yaml").read_text()
    repeated = lines + "optim: {lr: 0.005, lr_batch: 2048}\nema: {decay: 0.9999, warmup: true}\n"
    (tmp_path / "recipe" / "again.yaml").write_text(repeated)
    for budget in ("digits", "full"):
        words = f"budget={budget}"
        again = compose(["+recipe=again", words], str(tmp_path))
        once = compose([KD, words])
        assert result_settings(again.config) | {"recipe": 0} == (
            result_settings(once.config) | {"recipe": 0}
        )
        assert again.replaced == once.replaced


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
    with pytest.raises(UserError, match="data.workers=-1 is not a whole number"):
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


DETECTS = ["augment=boxes", "train.best_by=ap"]


def test_every_file_of_a_group_holds_settings_of_its_section():
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    files = [
        f
        for f in (ROOT / "conf").glob("*/*.yaml")
        if hasattr(sections.get(f.parent.name), "model_fields")
    ]
    assert len(files) > 60
    for file in files:
        values = yaml.safe_load(file.read_text()) or {}
        given = {k: v for k, v in values.items() if k != "defaults" and v is not None}
        assert sections[file.parent.name](**given), file


@pytest.mark.slow
def test_every_file_in_conf_composes(tmp_path, photo_folder):
    run, table = tmp_path, tmp_path / "table.csv"
    write_config(run, Config())
    table.write_text("path,label\na.png,a\n")
    for group in (p for p in (ROOT / "conf").iterdir() if p.is_dir() and p.name != "study"):
        for file in group.glob("*.yaml"):
            extra = {
                "model": {
                    "timm": ["model.name=resnet10t"],
                    "torchvision": [
                        "model.name=resnet18",
                        "data=scenes",
                        "detector=retinanet",
                        *DETECTS,
                    ],
                }.get(file.stem, []),
                "teacher": ["distill=kl"] * (file.stem != "none")
                + ["teacher.name=resnet18"] * (file.stem == "timm")
                + ["teacher.weights=runs/x"] * (file.stem == "file")
                + [f"teacher.run={run}"] * (file.stem == "run")
                + LITE * (file.stem == "ensemble"),
                "data": [f"data.root={ROOT}"] * (file.stem not in EMBEDDED_DATA)
                + [f"data.table={table}", "data.split=0.5"] * (file.stem == "table")
                + ["detector=ssdlite", *DETECTS] * (file.stem in BOX_DATA),
                "detector": ["data=scenes", *DETECTS] * (file.stem != "none"),
                "budget": ["data=folder", f"data.root={photo_folder}"] * (file.stem == "small")
                + ["detector=ssdlite", "data=scenes", *DETECTS] * (file.stem == "scenes"),
                "augment": ["detector=ssdlite", "data=scenes", "train.best_by=ap"]
                * (file.stem == "boxes"),
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


def test_a_variable_in_a_path_is_each_machines_own(tmp_path, monkeypatch):
    """Settings travel from rank 0 to the others as typed."""
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    (tmp_path / "images").mkdir()
    for given in ("$SCRATCH/images", "$SCRATCH"):
        assert compose(["data=folder", f"data.root={given}"]).config.data.root == given
    assert expanded("$SCRATCH/images") == tmp_path / "images"
    assert expanded("$NOT_SET/images") == Path("$NOT_SET/images")

"""Settings of teachers, ensembles, losses and caches, as they are composed."""

from pathlib import Path

import pytest
import yaml
from helpers import refused_settings

from ghosttrain.config.compose import cells, compose, override_saved
from ghosttrain.config.identity import flatten, result_settings, settings_hash, unflatten
from ghosttrain.config.schema import Config, MemberConfig
from ghosttrain.errors import UserError

KD = "+recipe=compact_kd"
LITE = ["teacher.members.a.name=tf_efficientnet_lite0"]

ENSEMBLE = ["teacher=ensemble", "distill=kl"]
TAUGHT = ["teacher=digits", "distill=kl"]
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
    folder = str(tmp_path)
    for chosen in (["teacher=pair", "distill=kl"], ["+recipe=two", "budget=full"]):
        teacher = compose(chosen, folder).config.teacher
        assert {n: (m.name, m.weight) for n, m in teacher.members.items()} == {
            "a": ("X", 2),
            "b-2": ("Y", 1),
        }
        assert teacher.members["b-2"].weights == "/tmp/été x.pth"
        with_c = compose(
            [*chosen, "teacher.members.a.weight=5", "teacher.members.c.name=Z"], folder
        )
        assert [m.weight for m in with_c.config.teacher.members.values()] == [5, 1, 1]
    assert compose(["+recipe=two", "budget=full"], folder).config.distill.weight == (
        (0, 0),
        (0.1, 1),
    )
    smaller = compose(["+recipe=two", "budget=tiny"], folder)
    assert smaller.replaced == ("teacher.members.a.weight: 2 -> 7",)
    (tmp_path / "budget" / "more.yaml").write_text(
        "overrides:\n  - teacher=ensemble\n  - teacher.members.b.name=Y\n"
    )
    replaced = compose([KD, "budget=more"], folder).replaced
    assert {"teacher: beitv2_base -> ensemble", "teacher.members.b.name: None -> Y"} == {*replaced}
    assert not compose([KD, "budget=more", "teacher=digits"], folder).replaced
    other = compose(["+recipe=two", "teacher=digits"], folder).config.teacher
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
        ("teacher.members.a.weight=1,2", "train -m"),
        ("teacher.members={a:{name:X}},{a:{name:Y}}", "train -m"),
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
    assert expected in refused_settings(*ENSEMBLE, *LITE, override)


def test_an_ensemble_without_members_says_what_to_type():
    message = refused_settings(*ENSEMBLE)
    assert "type teacher.members.a.name=tf_efficientnet_lite0 " in message
    typed = message.split("type ")[1].split(",")[0].split()
    assert [*compose([*ENSEMBLE, *typed]).config.teacher.members] == ["a"]
    assert "teacher.members.a.name would never be asked" in refused_settings(*LITE)
    assert "would do nothing" in refused_settings(*TAUGHT, "teacher.average=logit")


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
        assert expected in refused_settings("teacher=own", "distill=kl", config_dir=str(tmp_path))
        (tmp_path / "recipe" / "own.yaml").write_text(f"teacher:\n  members:\n    {body}\n")
        message = refused_settings("+recipe=own", *ENSEMBLE, config_dir=str(tmp_path))
        assert expected in message
    (tmp_path / "teacher" / "own.yaml").write_text("nmae: X\n")
    expected = "there is no setting 'teacher.nmae'. Did you mean 'teacher.name'?"
    assert refused_settings("teacher=own", "distill=kl", config_dir=str(tmp_path)) == expected


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
    assert expected in refused_settings(*TAUGHT, *overrides.split())


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

"""The recipes of others: their list, and two real steps of each."""

import pytest
from helpers import only_run

from ghosttrain.commands.recipes import head_of
from ghosttrain.config.compose import compose
from ghosttrain.config.names import Names
from ghosttrain.engine.rows import read_metrics
from ghosttrain.engine.run_files import read_config


def test_every_recipe_is_listed_with_its_command(ghosttrain):
    names = Names(None)
    listed = ghosttrain("recipes")
    assert listed.code == 0
    for name in names.choices("recipe"):
        assert f"\n{name}\n" in f"\n{listed.out}"
        head = "\n".join(head_of(names.recipe_file(name).read_text(encoding="utf-8")))
        assert "python -m ghosttrain" in head and "reaches" in head, name
    assert "reaches (theirs): 77.3 %" in listed.out and "override" not in listed.out
    assert ghosttrain("recipes", "x").code == 2


@pytest.mark.parametrize(
    "words",
    [
        ["+recipe=usi_kd", "teacher=digits"],
        ["+recipe=[deit_hard,ablation/no_teacher]", "model.drop_path=0.1"],
        ["+recipe=deit_hard_light", "teacher=digits", "optim.weight_decay_end=0.01"],
        ["+recipe=long_nokd", "train.label_loss=bce", "schedule=step"],
        ["+recipe=label_free", "teacher=digits"],
    ],
    ids=lambda words: words[0].removeprefix("+recipe="),
)
def test_it_trains(ghosttrain, tmp_path, words):
    done = ghosttrain(
        *words, "model=mobilenetv2_050", "train.max_steps=2", "train.global_batch=16",
        "data.train_size=32", "data.eval_size=32", "tracker.log_every=1", "launch.device=cpu",
        f"run.root={tmp_path}",
    )  # fmt: skip
    assert done.code == 0, done.err
    config = read_config(only_run(tmp_path))
    rows = [row for row in read_metrics(only_run(tmp_path)) if row["kind"] == "train"]
    assert len(rows) == 2
    assert (config.distill.name in rows[0]) == (config.distill.name != "none")
    if config.recipe == "label_free":  # labels weigh nothing
        assert rows[0]["loss"] == pytest.approx(rows[0]["kl"])


def test_the_values_of_tiny_hold_where_images_are_few(image_folder):
    words = ["+recipe=tiny", "data=folder", f"data.root={image_folder}"]
    own, small = compose(words).config, compose([*words, "budget=small"]).config
    assert (own.train.epochs, own.train.global_batch, own.augment.scale_min) == (100, 16, 0.2)
    assert (small.train.epochs, small.augment.scale_min) == (200, 0.35)


def test_what_they_ask_for_and_what_is_refused(ghosttrain, tmp_path):
    deit = compose(["+recipe=deit_hard", "data=imagenet", f"data.root={tmp_path}"]).config
    assert (deit.optim.clip_mode, deit.optim.clip_grad, deit.optim.lr) == ("agc", 0.02, 1e-3)
    long = compose(["+recipe=long_nokd", "data=imagenet", f"data.root={tmp_path}"]).config
    assert (long.train.epochs, long.optim.beta1, long.augment.mixup_alpha) == (9600, 0.6, 0)
    light = compose(["+recipe=deit_hard_light", "data=imagenet", f"data.root={tmp_path}"]).config
    assert (light.augment.mixup_alpha, light.augment.cutmix_alpha) == (0.2, 1)
    for words, message in (
        (["train.label_loss=bce", "train.focal_gamma=2"], "type train.label_loss=cross_entropy"),
        (["optim.weight_decay=0", "optim.weight_decay_end=0.1"], "a decay can change, not begin"),
        (["schedule=step", "schedule.milestones=[1.5]"], "schedule.milestones"),
        (["model=shufflenetv2_050", "model.drop_path=0.1"], "type model.drop_path=0"),
    ):
        refused = ghosttrain("+recipe=baseline", *words, f"run.root={tmp_path / 'runs'}")
        assert refused.code == 2 and refused.err.count("\n") == 1 and message in refused.err
    assert not (tmp_path / "runs").exists()

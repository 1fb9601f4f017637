"""The plan of a run: steps, epochs, warm-up, micro-batches, learning rate; by hand."""

import pytest

from ghosttrain.config.schema import Config, OptimConfig, ScheduleConfig, TrainConfig
from ghosttrain.engine.plan import make_plan
from ghosttrain.errors import UserError


def config(warmup_epochs: float = 5, optim: OptimConfig | None = None, **train) -> Config:
    return Config(
        train=TrainConfig(**train),
        schedule=ScheduleConfig(warmup_epochs=warmup_epochs),
        optim=optim or OptimConfig(lr=0.5, lr_batch=None),
    )


def test_steps_epochs_and_warmup_of_imagenet():
    plan = make_plan(config(epochs=600, global_batch=2048, micro_batch=128), 1_281_167, ranks=4)
    assert (plan.steps_per_epoch, plan.total_steps, plan.epochs) == (625, 375_000, 600)
    assert plan.warmup_steps == 3125
    assert (plan.micro_batch, plan.accumulation) == (128, 4)
    assert plan.long_warmup() is None


@pytest.mark.parametrize(
    ("max_steps", "total", "epochs", "warmup"),
    [(None, 30, 3, 10), (30, 30, 3, 10), (31, 30, 3, 10), (25, 25, 3, 10), (11, 11, 2, 5)],
)
def test_max_steps_shortens_the_run_and_its_warmup(max_steps, total, epochs, warmup):
    plan = make_plan(config(1, epochs=3, global_batch=10, max_steps=max_steps), 109, ranks=1)
    assert plan.steps_per_epoch == 10  # nine images are left over
    assert (plan.total_steps, plan.epochs, plan.warmup_steps) == (total, epochs, warmup)


def test_warmup_may_be_a_part_of_an_epoch():
    assert make_plan(config(0.26, epochs=3, global_batch=10), 100, ranks=1).warmup_steps == 3
    assert make_plan(config(0, epochs=3, global_batch=10), 100, ranks=1).warmup_steps == 0


def test_the_micro_batch_is_the_ranks_share_by_default():
    plan = make_plan(config(epochs=1, global_batch=96), 960, ranks=3)
    assert (plan.micro_batch, plan.accumulation) == (32, 1)
    with pytest.raises(UserError, match="does not divide over 5 processes"):
        make_plan(config(epochs=1, global_batch=96), 960, ranks=5)
    with pytest.raises(UserError, match=r"train.global_batch=192$"):
        make_plan(config(epochs=1, global_batch=3072, micro_batch=64), 1970, ranks=3)


def test_the_learning_rate_is_scaled_to_the_batch():
    lamb = OptimConfig(lr=0.5, lr_batch=400)
    sgd = OptimConfig(name="sgd", lr=0.5, lr_batch=400)
    for optim, lr in ((lamb, 0.25), (sgd, 0.125), (OptimConfig(lr=0.5, lr_batch=None), 0.5)):
        assert make_plan(config(optim=optim, global_batch=100), 1000, 1).peak_lr == lr


@pytest.mark.parametrize(("every", "evaluated"), [(1, [4, 8, 12, 14]), (2, [8, 14]), (9, [14])])
def test_epochs_are_evaluated_at_their_end_and_at_the_end_of_the_run(every, evaluated):
    plan = make_plan(config(epochs=5, global_batch=10, max_steps=14, eval_every=every), 40, ranks=1)
    assert [step for step in range(15) if plan.is_evaluated(step)] == evaluated
    assert [plan.epochs_after(step) for step in (0, 1, 4, 5, 14)] == [0, 1, 1, 2, 4]


@pytest.mark.parametrize(
    ("warmup", "epochs", "expected"),
    [
        (2, 10, None),
        (2.1, 10, "takes 21 % of the run; type schedule.warmup_epochs=2 for"),
        (5, 7, "takes 50 % of the run; type schedule.warmup_epochs=1.4 for"),
        (1, 1, "takes 50 % of the run; type schedule.warmup_epochs=0.2 for"),
    ],
)
def test_a_long_warmup_is_said_with_a_length_that_is_not(warmup, epochs, expected):
    plan = make_plan(config(warmup, epochs=epochs, global_batch=10), 100, ranks=1)
    line = plan.long_warmup()
    if expected is None:
        assert line is None
    else:
        assert expected in line
        typed = float(line.split("warmup_epochs=")[1].split()[0])
        shorter = make_plan(config(typed, epochs=epochs, global_batch=10), 100, ranks=1)
        assert shorter.long_warmup() is None and shorter.warmup_steps > 0

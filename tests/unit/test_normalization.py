"""Means and standard deviations that cannot be those of pixels in [0, 1]."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers import refusal

from ghosttrain.config.compose import compose

ENSEMBLE = [
    "teacher=ensemble",
    "distill=soft_ce",
    "teacher.members.a.name=resnet18",
    "teacher.members.a.weights=hub",
]


def refused(overrides, *parts):
    refusal(lambda: compose(overrides), *parts)


@pytest.mark.parametrize(
    ("key", "others"),
    [
        ("data", []),
        ("teacher", ["teacher=digits", "distill=soft_ce"]),
        ("teacher.members.a", ENSEMBLE),
    ],
)
def test_statistics_of_0_to_255_are_refused_with_the_divided_ones(key, others):
    mean, std = "[123.675,116.28,103.53]", "[58.395,57.12,57.375]"
    refused(
        [*others, f"{key}.mean={mean}"],
        f"{key}.mean={mean} is above 1",
        f"type {key}.mean=[0.485,0.456,0.406]",
    )
    refused([*others, f"{key}.std={std}"], f"type {key}.std=[0.229,0.224,0.225]")
    refused([*others, f"{key}.std=[0.2,0,0.2]"], f"{key}.std=[0.2,0,0.2] must be above 0")
    refused([*others, f"{key}.std=[0.2,0.2,-0.2]"], "must be above 0")
    refused([*others, f"{key}.mean=[-0.1,0.2,0.2]"], "must be 0 or more")
    refused([*others, f"{key}.mean=[]"], "is empty")
    config = compose([*others, f"{key}.mean=[0,0.5,1]", f"{key}.std=[1,0.00392,0.5]"]).config
    assert config.data.train_size == 64


def test_they_are_refused_before_torch_is_imported():
    script = (
        "import sys; from ghosttrain.cli import main; main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", script, "data.mean=[123,116,103]"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1 and "type data.mean=[0.4824,0.4549,0.4039]" in done.stderr

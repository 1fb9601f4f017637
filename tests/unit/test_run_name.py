"""Names of run folders: what cannot be one is refused before torch is imported."""

import pytest

from ghosttrain.config.compose import compose
from ghosttrain.config.identity import run_name
from ghosttrain.errors import UserError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", "is empty"),
        (".", "names no folder of its own"),
        ("..", "names no folder of its own"),
        ("a/../b", "names no folder of its own"),
        ("a/", "names no folder of its own"),
        ("a//b", "names no folder of its own"),
        ("/abs", "is absolute"),
        ("~/a", "is absolute"),
        (".a", "begins with a dot"),
        ("a/.b", "begins with a dot"),
        ("a\nb", "cannot be printed"),
        ("a\0b", "cannot be printed"),
        ("a\udcff", "is not UTF-8"),
        ("a\x1b[2K", "cannot be printed"),
        ("a.moved-20260101-120000/b", "that were moved aside"),
        ("a" * 221, "is longer than 220 bytes"),
    ],
)
def test_a_name_that_cannot_be_a_folder_below_the_root_is_refused(name, expected):
    with pytest.raises(UserError, match="^run.name=") as refusal:
        compose([f"run.name={name}"])
    assert expected in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["a", "a/b", "été 3", "v1..2", "a" * 220, "2024"])
def test_any_other_name_is_taken_as_it_is(name):
    assert run_name(compose([f"run.name={name}"]).config) == name


def test_a_derived_name_is_checked_too():
    assert "/digits-......x-" in run_name(compose(["model=timm", "model.name=../../x"]).config)
    with pytest.raises(UserError, match=r"of recipe, data and model.name\), is longer than 220"):
        compose(["model=timm", f"model.name={'x' * 220}"])

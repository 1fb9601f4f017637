"""The budget of few images: when it is chosen, and what it computes."""

from __future__ import annotations

import pytest
from helpers import refused_settings
from PIL import Image

from ghosttrain.config import small
from ghosttrain.config.compose import compose
from ghosttrain.config.small import computed, training_images


@pytest.fixture
def root(tmp_path):
    for half, count in (("train", 40), ("val", 10)):
        for name in "ab":
            (tmp_path / half / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (8, 8)).save(tmp_path / half / name / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("images", "seen", "batch", "epochs"),
    [(2_099, 40_000, 64, 19), (200, 300_000, 8, 200), (600, 300_000, 32, 200),
     (49_999, 300_000, 64, 6), (49_999, 40_000, 64, 5), (10, 100, 5, 10), (1, 10, 1, 10)],
)  # fmt: skip
def test_batch_and_epochs_follow_the_number_of_images(images, seen, batch, epochs) -> None:
    found = computed(images, seen)
    assert (int(found["batch"]), int(found["epochs"])) == (batch, epochs)
    assert float(found["warmup"]) == pytest.approx(0.05 * epochs)


def test_it_is_chosen_by_itself_below_the_limit_and_lists_what_it_replaces(
    root, tmp_path, monkeypatch
) -> None:
    words = ["+recipe=compact_kd", "data=folder", f"data.root={root}"]
    found = compose(words)
    assert found.config.budget == "small" and found.config.train.global_batch == 8
    assert found.config.train.epochs == 200 and found.config.distill.name == "none"
    assert "train.epochs: 600 -> 200" in found.replaced and "teacher: beitv2_base -> none" in (
        found.replaced
    )
    typed = compose([*words, "train.epochs=3", "augment.erasing_prob=0.25"]).config
    assert typed.train.epochs == 3 and typed.augment.erasing_prob == 0.25
    full = compose([*words, "budget=full"]).config
    assert (full.budget, full.train.epochs, full.train.global_batch) == ("full", 600, 2048)
    assert compose(["+recipe=compact_kd"]).config.budget == "digits"
    start = compose([*words, "model=mobilenetv2_050", f"model.weights={root}"]).config
    assert start.train.epochs == 200  # 40,000 images seen of 80
    monkeypatch.setattr(small, "LIMIT", 80)
    monkeypatch.setattr("ghosttrain.config.names.LIMIT", 80)
    assert compose(words).config.budget == "full"


def test_images_are_counted_before_they_are_listed(root, tmp_path) -> None:
    def count(**values: object) -> int | None:
        data = compose(["data=folder", f"data.root={root}"]).config.data
        return training_images({**data.model_dump(), **values})

    assert count() == 80
    assert count(root=str(root / "train"), split=0.25) == 60
    assert count(root=str(root / "train"), fold=1, folds=4) == 60
    assert count(root=str(root / "nothing")) is None and count(name="digits") is None
    table = tmp_path / "table.csv"
    table.write_text("path,label\n" + "a,b\n" * 20)
    assert count(name="table", table=str(table), split=0.5) == 10


def test_it_is_for_files_only() -> None:
    assert "counts the images of data=folder" in refused_settings("budget=small")

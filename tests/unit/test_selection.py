"""Fewer classes and fewer training images: which ones, and that a run knows what it took."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import only_run
from PIL import Image

from ghosttrain.config.compose import compose
from ghosttrain.config.schema import DataConfig
from ghosttrain.data.datasets import build_datasets
from ghosttrain.engine.identify import settled
from ghosttrain.engine.run_files import read_result


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Three classes of 40, 20 and 5 training images, 4 held-out ones of each."""
    root = tmp_path_factory.mktemp("tree")
    rng = np.random.default_rng(0)
    for half, counts in (("train", (40, 20, 5)), ("val", (4, 4, 4))):
        for name, count in zip(("apple", "bee", "cat"), counts, strict=True):
            (root / half / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / half / name / f"{number}.png")
    return root


def halves(tree, **settings):
    return build_datasets(DataConfig(name="folder", root=str(tree), **settings))


def paths(half) -> set[str]:
    return {half.path(i) for i in range(len(half))}


def test_a_share_of_every_class_and_the_held_out_images_stay(tree) -> None:
    whole, held = halves(tree)
    tenth, same = halves(tree, fraction=0.1)
    fifth, _ = halves(tree, fraction=0.2)
    assert np.bincount(tenth.labels).tolist() == [4, 2, 1]  # at least one
    assert np.bincount(fifth.labels).tolist() == [8, 4, 1]
    assert paths(tenth) < paths(fifth) < paths(whole) and paths(same) == paths(held)
    assert paths(halves(tree, fraction=0.1)[0]) == paths(tenth)
    assert paths(halves(tree, fraction=0.1, split_seed=1)[0]) != paths(tenth)
    most, _ = halves(tree, fraction=0.5, max_per_class=7)
    assert np.bincount(most.labels).tolist() == [7, 7, 2]
    assert most.left_out[-1] == "data.fraction=0.5 data.max_per_class=7: 16 of 65 training images"
    for half in (tenth, fifth, most):
        for i in range(len(half)):  # the label still is the folder's
            assert half.path(i).split("/")[-2] == half.classes[half.labels[i]]


def test_classes_in_the_order_of_the_data_and_unknown_ones_refused(tree, ghosttrain) -> None:
    train, held = halves(tree, classes=("cat", "apple"))
    assert train.classes == held.classes == ["apple", "cat"]
    assert np.bincount(train.labels).tolist() == [40, 5] and len(held) == 8
    assert {path.split("/")[-2] for path in paths(train)} == {"apple", "cat"}
    words = ["+recipe=baseline", "data=folder", f"data.root={tree}"]
    refused = ghosttrain(*words, "data.classes=[apple,bees]")
    assert refused.code == 2 and "has no class 'bees'. Did you mean 'bee'?" in refused.err
    one = ghosttrain(*words, "data.classes=[apple]")
    assert one.code == 2 and "has one class, 'apple'" in one.err
    digit = ghosttrain("+recipe=baseline", "data.classes=[3]")
    assert digit.code == 2 and "has one class, '3'" in digit.err


def test_arrays_too_and_a_run_says_what_it_took(ghosttrain, tmp_path) -> None:
    train, held = build_datasets(DataConfig(max_per_class=11, classes=("3", "8")))
    whole, _ = build_datasets(DataConfig())
    assert train.classes == ["3", "8"] and np.bincount(train.labels).tolist() == [11, 11]
    ours = {image.tobytes() for image in train.images[train.labels == 1]}
    assert ours <= {image.tobytes() for image in whole.images[whole.labels == 8]}
    words = ["+recipe=baseline", "model=mobilenetv2_050", "data.max_per_class=11",
             "data.classes=[3,8]", "train.epochs=1", "train.global_batch=8", "data.train_size=32",
             "data.eval_size=32", "launch.device=cpu", f"run.root={tmp_path}"]  # fmt: skip
    done = ghosttrain(*words)
    assert done.code == 0, done.err
    assert "data.max_per_class=11: 22 of 286 training images" in done.out
    result = read_result(only_run(tmp_path))
    assert result["data"]["train"]["images"] == 22
    assert sum(result["classes"]["images"]) == len(held)


def test_the_digest_of_the_data_is_of_all_images_and_the_budget_of_those_used(tree) -> None:
    def config(*words):
        line = ["+recipe=baseline", "data=folder", f"data.root={tree}", *words]
        return settled(compose(line))

    every, some = config(), config("data.fraction=0.5")
    assert every.data.digest == some.data.digest is not None
    assert config("data.classes=[bee,cat]").data.digest == every.data.digest
    assert config("data.max_per_class=5", "data.classes=[bee,cat]").train.global_batch == 5

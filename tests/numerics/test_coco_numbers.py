"""The 12 numbers, against pycocotools on the same detections."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest

from ghosttrain.data.datasets.boxes import checked_boxes
from ghosttrain.detect.coco_numbers import (
    NAMES,
    Found,
    as_coco,
    as_results,
    ignoring_the_picture,
    measure,
)
from ghosttrain.detect.matching import ON_CROWD, RIGHT, WRONG, best_threshold, match
from ghosttrain.study.detect_page import _svg

CLASSES = ["a", "b", "c"]


def random_boxes(rng, images=30, most=12):
    sizes = rng.integers(100, 400, (images, 2))
    owners, corners = [], []
    for image in range(images - 2):  # the last two have none
        for _ in range(rng.integers(1, most)):
            size = rng.integers(6, 98, 2)
            left_top = rng.uniform(0, sizes[image] - size)
            owners.append(image)
            corners.append([*left_top, *(left_top + size)])
    m = len(owners)
    labels, crowd = rng.integers(0, 2, m), rng.random(m) < 0.1  # class c has no box
    boxes, _ = checked_boxes(
        owners, np.array(corners), labels, crowd, None, sizes, "test", lambda i: f"{i}"
    )
    return boxes


def detections(rng, boxes):
    """Boxes moved a little, some of a wrong class, some false, equal scores among them."""
    found = {}
    for image in range(len(boxes.sizes)):
        own = boxes.of(image)
        corners = boxes.corners[own] + rng.normal(0, 4, (own.stop - own.start, 4))
        false = rng.uniform(0, 90, (3, 2))
        corners = np.concatenate([corners, np.concatenate([false, false + 25], axis=1)])
        labels = np.concatenate([boxes.labels[own], rng.integers(0, 3, 3)])
        labels = np.where(rng.random(len(labels)) < 0.15, 2 - labels, labels)
        scores = rng.random(len(labels)).round(1)
        if image != 4:
            found[image] = Found(corners, scores, labels)
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_the_numbers_are_pycocotools_own(seed):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rng = np.random.default_rng(seed)
    boxes = random_boxes(rng)
    found = detections(rng, boxes)
    ours = measure(boxes, CLASSES, found)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = as_coco(boxes, CLASSES)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(as_results(found)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    expected = [100 * value if value >= 0 else -1 for value in evaluation.stats]
    assert [ours.row[name] for name in NAMES] == pytest.approx(expected, abs=1e-6)
    assert 10 < ours.row["ap"] < 90 and ours.row["n"] == 30
    assert ours.class_ap[2] is None and None not in ours.class_ap[:2]
    assert ours.row["ap"] == pytest.approx(np.mean(ours.class_ap[:2]))


def test_all_right_is_100_and_nothing_is_0():
    boxes = random_boxes(np.random.default_rng(2))
    right = {
        i: Found(boxes.corners[s], np.ones(s.stop - s.start), boxes.labels[s])
        for i, s in ((i, boxes.of(i)) for i in range(len(boxes.sizes)))
    }
    assert measure(boxes, CLASSES, right).row["ap"] == pytest.approx(100)
    assert measure(boxes, CLASSES, {}).row["ap50"] == 0


def test_ignoring_the_picture_finds_what_is_always_there_and_little_else():
    fixed = np.array([[10.0, 10, 50, 60]] * 20)
    sizes = np.array([[100, 100]] * 20)
    boxes, _ = checked_boxes(
        range(20), fixed, [0] * 20, [False] * 20, None, sizes, "x", lambda i: f"{i}"
    )
    same = ignoring_the_picture(boxes, 2, np.array([[200, 100]] * 3))
    assert len(same) == 3 and same[0].corners.tolist() == [[20, 10, 100, 60]]
    assert same[0].scores.tolist() == [1.0]
    assert measure(boxes, ["a", "b"], ignoring_the_picture(boxes, 2, sizes)).row["ap"] == 100
    rng = np.random.default_rng(3)
    train, held = random_boxes(rng), random_boxes(rng)
    prior = ignoring_the_picture(train, 3, held.sizes)
    assert all(len(each.scores) <= 300 for each in prior.values())
    # 180 boxes that are always there, more than COCO counts of one class: all of three classes.
    grid = np.array([[x, y, x + 5, y + 5] for x in range(0, 120, 10) for y in range(0, 150, 10)])
    always, _ = checked_boxes(
        [0] * 180 + [1] * 180, np.tile(grid, (2, 1)), [*range(3)] * 120, [False] * 360, None,
        np.array([[200, 200]] * 2), "x", lambda i: f"{i}"
    )  # fmt: skip
    blind = ignoring_the_picture(always, 3, always.sizes)
    assert measure(always, CLASSES, blind).row["ap"] == pytest.approx(100)
    assert measure(held, CLASSES, prior).row["ap50"] < 20


def test_what_is_right_is_what_pycocotools_matches():
    """At IoU .5, image by image; with distinct scores, as equal ones may be taken in any order."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rng = np.random.default_rng(7)
    boxes = random_boxes(rng)
    found = {}
    for image, each in detections(rng, boxes).items():
        each.corners[:, 2:] = np.maximum(each.corners[:, 2:], each.corners[:, :2] + 1)
        found[image] = each._replace(scores=rng.permutation(len(each.scores)) / 100 + 0.01)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = as_coco(boxes, CLASSES)
        truth.createIndex()
        reference = COCOeval(truth, truth.loadRes(as_results(found)), "bbox")
        reference.params.iouThrs = np.array([0.5])
        reference.params.areaRng, reference.params.areaRngLbl = [[0, 1e10]], ["all"]
        reference.evaluate()
    expected: dict[int, dict[float, int]] = {image: {} for image in found}
    for part in filter(None, reference.evalImgs):
        kinds = np.where(part["dtIgnore"][0], ON_CROWD, part["dtMatches"][0] > 0)
        of_image = expected.setdefault(part["image_id"] - 1, {})
        of_image |= dict(zip(part["dtScores"], kinds.tolist(), strict=True))
    matched = []
    for image, each in found.items():
        own = boxes.of(image)
        done = match(each, boxes.corners[own], boxes.labels[own], boxes.crowd[own])
        assert dict(zip(done.found.scores, done.kind.tolist(), strict=True)) == expected[image]
        matched.append(done)
    assert {kind for each in matched for kind in each.kind.tolist()} == {RIGHT, WRONG, ON_CROWD}

    def f1(least):
        right, wrong, missed = np.sum([each.counts(least) for each in matched], axis=0)
        return 2 * right / (2 * right + wrong + missed)

    best = best_threshold(matched)
    assert f1(best) == max(f1(k / 100 + 0.01) for k in range(40))


def test_the_curve_of_precision_has_the_area_that_is_ap50():
    rng = np.random.default_rng(3)
    boxes = random_boxes(rng)
    numbers = measure(boxes, CLASSES, detections(rng, boxes))
    assert np.isnan(numbers.precision_RK[:, 2]).all()  # it has no box
    area = np.nanmean(numbers.precision_RK[:, :2])
    assert 100 * area == pytest.approx(numbers.row["ap50"], rel=1e-12)
    assert (np.diff(numbers.precision_RK[:, :2], axis=0) <= 0).all()


def test_names_are_escaped_in_the_page():
    box = [(np.array([1.0, 2, 30, 40]), "right", "<b>&")]
    svg = _svg((64, 64), "", box, 2.0, "boxes")
    assert "&lt;b&gt;&amp;" in svg and "<b>" not in svg and 'width="58.0"' in svg

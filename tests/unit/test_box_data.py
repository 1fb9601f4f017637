"""Detection data: readers, checks, the embedded synthetic scenes, augmentation, the loader."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from boxes import CATEGORIES, make_coco, make_voc, read_annotations, write_coco
from PIL import Image

from ghosttrain.config.schema import AugmentConfig, DataConfig
from ghosttrain.data.box_augment import box_transform
from ghosttrain.data.datasets import build_datasets
from ghosttrain.data.datasets.scenes import REGIONS, _photos
from ghosttrain.data.loader import eval_loader, train_loader
from ghosttrain.errors import UserError

ALL_ON = AugmentConfig(
    policy="boxes", photometric=True, zoom_out=2.0, iou_crop=True, scale_jitter=0.3, seed=3
)


def coco(root: Path, **values: object) -> DataConfig:
    return DataConfig(
        name="coco", root=str(root), train_split="train2017", val_split="val2017", train_size=64,
        eval_size=64, interpolation="bilinear", workers=0, **values,
    )  # fmt: skip


@pytest.fixture
def root(tmp_path):
    make_coco(tmp_path)
    return tmp_path


def test_coco_is_read_as_it_is_written(root):
    train, held_out = build_datasets(coco(root))
    assert train.classes == held_out.classes == ["disc", "bar"] and len(train) == 16
    for split, half in (("train2017", train), ("val2017", held_out)):
        found = read_annotations(root, split)
        for number, image in enumerate(found["images"]):
            rows = [r for r in found["annotations"] if r["image_id"] == image["id"]]
            corners, labels = half.boxes.objects(number)
            expected = [[b[0], b[1], b[0] + b[2], b[1] + b[3]] for b in (r["bbox"] for r in rows)]
            assert corners.tolist() == expected
            names = {row["id"]: row["name"] for row in CATEGORIES}
            assert [half.classes[k] for k in labels] == [names[r["category_id"]] for r in rows]
    assert "1 of 16 images have no boxes and are kept" in " ".join(train.left_out)
    assert "2 classes" in train.describe() and "boxes of" in train.describe()
    again = build_datasets(coco(root))[0]
    assert again.identity() == train.identity()
    content = read_annotations(root, "train2017")
    for change in ({"bbox": [1, 2, 30, 31]}, {"area": 7.0}):
        content["annotations"][0] |= change
        write_coco(root, "train2017", content)
        other = build_datasets(coco(root))[0].identity()
        assert other not in (again.identity(), train.identity())
        train = build_datasets(coco(root))[0]


def test_faults_of_boxes_are_counted_and_mended_as_stated(root):
    content = read_annotations(root, "train2017")
    rows = content["annotations"]
    total = len(rows)
    rows[0]["bbox"] = [-5, 2, 20, 20]  # leaves its image
    rows[1]["bbox"] = [100, 2, 20, 20]  # outside
    rows[2]["bbox"] = [3, 3, 0, 10]  # empty
    rows[3]["category_id"] = 99
    rows[4]["iscrowd"] = 1
    rows.append({**rows[5], "image_id": 77})
    write_coco(root, "train2017", content)
    train, _ = build_datasets(coco(root))
    said = "\n".join(train.left_out)
    assert f"1 of {total:,} boxes leave their image and are cut" in said
    assert f"2 of {total:,} boxes have less than a pixel" in said
    assert f"1 of {total:,} boxes are of a category" in said
    assert "1 boxes are crowds" in said and "1 boxes are of images that it does not list" in said
    assert len(train.boxes.labels) == total - 3 and train.boxes.corners.min() >= 0
    assert train.boxes.objects(0)[0][0].tolist() == [0, 2, 15, 22]
    crowd = np.flatnonzero(train.boxes.crowd)
    image = int(np.searchsorted(train.boxes.starts, crowd[0], side="right")) - 1
    assert (
        len(train.boxes.objects(image)[0])
        == train.boxes.of(image).stop - train.boxes.of(image).start - 1
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda c: c["annotations"][0].update(bbox=[math.nan, 0, 5, 5]),
            "numbers that are not fin",
        ),
        (lambda c: c["annotations"][0].pop("bbox"), "a row has no 'bbox'"),
        (lambda c: c["annotations"][0].update(bbox=7), "a row is not as COCO's are"),
        (lambda c: c.pop("categories"), "it has no list 'categories'"),
        (lambda c: c["images"][1].update(id=1000), "two images have the same id"),
        (lambda c: c["categories"].append({**c["categories"][0], "name": "x"}), "have the id"),
        (lambda c: c["images"][0].update(file_name="../x.jpg"), "names no folder of its own"),
        (lambda c: c["images"].clear(), "the annotations list no images"),
        (lambda c: c["images"][0].update(width=0), "an image of 0 x 64 pixels"),
        (lambda c: c["images"][0].update(width=10**30), "a row is not as COCO's are"),
        (lambda c: c["annotations"][0].update(bbox=[1e308, 1, 1e308, 5]), "are not finite"),
        (lambda c: c["annotations"][0].update(bbox=[10**400, 1, 5, 5]), "a row is not as COCO's"),
        (lambda c: c["categories"][0].update(name="\ud800"), "a row is not as COCO's are"),
    ],
)
def test_files_that_cannot_be_used_are_one_line(root, spoil, message):
    content = read_annotations(root, "train2017")
    spoil(content)
    write_coco(root, "train2017", content)
    with pytest.raises(UserError, match=message) as caught:
        build_datasets(coco(root))
    assert "\n" not in str(caught.value)


def test_categories_of_one_name_are_one_class(root):
    """As some exports have them: a parent category beside its only child."""
    content = read_annotations(root, "train2017")
    before, _ = build_datasets(coco(root))
    parent = {"id": 0, "name": content["categories"][1]["name"]}
    content["categories"].append(parent)
    content["annotations"][0]["category_id"] = 0
    write_coco(root, "train2017", content)
    train, _ = build_datasets(coco(root))
    assert sorted(train.classes) == sorted(before.classes)
    assert train.classes[train.boxes.labels[0]] == parent["name"]
    assert "categories of one name are one class" in " ".join(train.left_out)


def test_missing_files(root):
    (root / "train2017" / "0003.jpg").unlink()
    with pytest.raises(UserError, match="1 of 16 images are missing .first: 0003.jpg"):
        build_datasets(coco(root))
    train, _ = build_datasets(coco(root, on_error="skip"))
    assert len(train) == 15 and "are left out with their boxes" in train.left_out[0]
    (root / "annotations" / "instances_val2017.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        build_datasets(coco(root, on_error="skip"))
    (root / "annotations" / "instances_val2017.json").unlink()
    with pytest.raises(UserError, match="there is no .*instances_val2017.json: data=coco reads"):
        build_datasets(coco(root, on_error="skip"))


def test_voc_is_read_as_it_is_written(tmp_path):
    make_voc(tmp_path)
    data = DataConfig(name="voc", root=str(tmp_path), workers=0)
    train, held_out = build_datasets(data)
    assert train.classes == ["cat", "dog"]
    assert train.boxes.corners[0].tolist() == [0, 0, 20, 20]
    assert train.boxes.crowd.tolist() == [False, True, False]
    assert len(held_out.boxes.labels) == 1 and "of a category" in " ".join(held_out.left_out)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a\n  \nb\n")
    assert len(build_datasets(data)[0]) == 2
    c = tmp_path / "Annotations" / "c.xml"
    whole = c.read_text()
    for width in ("0", "9" * 30):
        c.write_text(whole.replace("<width>64<", f"<width>{width}<"))
        with pytest.raises(UserError, match="c.xml is not of VOC's format .an image of"):
            build_datasets(data)
    (tmp_path / "Annotations" / "c.xml").write_text("<annotation>")
    with pytest.raises(UserError, match="c.xml is not of VOC's format"):
        build_datasets(data)


def test_held_out_scenes_share_no_digit_and_no_pixel_of_background_with_training():
    train, held_out = build_datasets(DataConfig(name="scenes"))
    digits = [{t.digit for plan in half.plans for t in plan.things} for half in (train, held_out)]
    assert not digits[0] & digits[1] and len(digits[1]) > 200
    widths = [photo.width for photo in _photos()]
    assert REGIONS["train"][1] < REGIONS["held out"][0]
    for photo, width in enumerate(widths):
        shown = [[p.crop for p in half.plans if p.photo == photo] for half in (train, held_out)]
        assert max(c[2] for c in shown[0]) <= min(c[0] for c in shown[1]) <= width
    assert "synthetic" in train.describe() and "synthetic" in held_out.name_of(0)
    again = build_datasets(DataConfig(name="scenes"))[0]
    assert again.identity() == train.identity()


def test_boxes_of_scenes_are_the_extent_of_what_is_painted():
    """Found from pixels: those in which a scene differs from its background."""
    train, _ = build_datasets(DataConfig(name="scenes"))
    for index in (0, 5, 17):
        plan = train.plans[index]
        bare = type(train)("x", train.classes, train.labels, 3, (plan._replace(things=()),))
        for number, thing in enumerate(plan.things):
            alone = type(train)(
                "x", train.classes, train.labels, 3, (plan._replace(things=(thing,)),)
            )
            changed = (np.asarray(alone.open(0)) != np.asarray(bare.open(0))).any(axis=2)
            rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
            found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            box = train.boxes.corners[train.boxes.of(index)][number]
            assert np.abs(box - found).max() <= 1  # a painted pixel may have the background's value


def test_augmented_boxes_follow_their_objects(root):
    """Red and blue rectangles on grey: the pixels inside a box have its class's colour."""
    train, _ = build_datasets(coco(root))
    augment = ALL_ON.model_copy(update={"photometric": False})
    transform = box_transform(coco(root), augment, train.boxes)
    seen = 0
    for draw in range(6):
        for index in range(len(train) - 1):
            pixels, rows = transform(lambda index=index: train.open(index), draw, index)
            assert pixels.shape == (3, 64, 64) and pixels.dtype == torch.uint8
            assert rows.shape == (train.boxes.most(), 5)
            for left, top, right, bottom, label in rows[rows[:, 4] >= 0].tolist():
                assert 0 <= left < right <= 64 and 0 <= top < bottom <= 64
                inside = pixels[:, math.ceil(top) : int(bottom), math.ceil(left) : int(right)]
                if inside.numel() < 3 * 30:
                    continue
                mean = inside.float().flatten(1).mean(1)
                assert (mean[0] > mean[2] + 60) == (label == 0), (draw, index)
                seen += 1
    assert seen > 60


@pytest.mark.parametrize("size", [(400, 1), (1, 50), (4000, 20)])
def test_thin_images_are_neither_cropped_nor_scaled(root, size):
    """torchvision's transforms would leave a part without pixels."""
    content = read_annotations(root, "train2017")
    image = content["images"][0]
    image["width"], image["height"] = size
    Image.new("RGB", size).save(root / "train2017" / image["file_name"])
    own = [row for row in content["annotations"] if row["image_id"] == image["id"]]
    own[0]["bbox"] = [0, 0, *size]
    write_coco(root, "train2017", content)
    train, _ = build_datasets(coco(root))
    augment = ALL_ON.model_copy(update={"scale_jitter": 0.9})
    transform = box_transform(coco(root), augment, train.boxes)
    for draw in range(12):
        pixels, _ = transform(lambda: train.open(0), draw, 0)
        assert pixels.shape == (3, 64, 64)


def test_draws_are_a_function_of_seed_draw_and_sample_alone(root):
    train, _ = build_datasets(coco(root))

    def sample(augment, draw, index=2):
        transform = box_transform(coco(root), augment, train.boxes)
        return transform(lambda: train.open(index % len(train)), draw, index)

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sample(ALL_ON, 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, sample(ALL_ON, 0), strict=True))
    for other in (
        sample(ALL_ON, 1), sample(ALL_ON, 0, 2 + len(train)),
        sample(ALL_ON.model_copy(update={"seed": 4}), 0),
    ):  # fmt: skip
        assert not torch.equal(first[0], other[0])
    # One ingredient less leaves the draws of the others: here the flip alone is left.
    flips = [
        torch.equal(
            sample(AugmentConfig(policy="boxes", seed=3), draw)[0],
            sample(AugmentConfig(policy="none", seed=3), draw)[0],
        )
        for draw in range(12)
    ]
    assert 2 < sum(flips) < 10


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_brings_boxes_to_any_number_of_workers(root, workers):
    data = coco(root).model_copy(update={"workers": workers})
    train, held_out = build_datasets(data)
    plan = [[3, 15], [1, 3 + len(train)]]
    with train_loader(train, data, ALL_ON, torch.device("cpu"), channels_last=True) as loader:
        batches = list(loader.batches(plan, draw_number=5))
    transform = box_transform(data, ALL_ON, train.boxes)
    for batch, indices in zip(batches, plan, strict=True):
        assert batch.indices.tolist() == indices
        for boxes, index in zip(batch.boxes, indices, strict=True):
            own = transform(lambda index=index: train.open(index % len(train)), 5, index)
            assert torch.equal(boxes, own[1])
    assert (batches[0].boxes[1, :, 4] == -1).all()  # the image without boxes
    with eval_loader(held_out, data, torch.device("cpu")) as loader:
        batch = next(loader.batches([[0]]))
    corners, _ = held_out.boxes.objects(0)
    scaled = corners * np.array([0.8, 1, 0.8, 1])
    np.testing.assert_allclose(batch.boxes[0, : len(corners), :4].numpy(), scaled, rtol=1e-5)


def test_an_image_of_another_size_than_its_annotation_is_one_line(root):
    content = read_annotations(root, "val2017")
    content["images"][0]["width"] = 81
    write_coco(root, "val2017", content)
    _, held_out = build_datasets(coco(root))
    message = "is 80 x 64 pixels, its annotation says 81 x 64: mend the annotation;"
    with (
        eval_loader(held_out, coco(root), torch.device("cpu")) as loader,
        pytest.raises(UserError, match=message),
    ):
        next(loader.batches([[0, 1]]))
    data = coco(root, on_error="skip")
    with eval_loader(held_out, data, torch.device("cpu")) as loader:
        batch = next(loader.batches([[0, 1]]))
    assert [each.number for each in batch.broken] == [0]
    assert json.dumps([each.reason for each in batch.broken])


@pytest.mark.parametrize("setting", ["ignore", "apply"])
def test_a_turned_photograph_says_which_orientation_its_boxes_are_of(root, setting):
    """The remedy is the other value than the one that is set."""
    other = {"ignore": "apply", "apply": "ignore"}[setting]
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    # Annotated is 80 x 64: the upright photograph, or the file as it is stored.
    stored = (64, 80) if setting == "ignore" else (80, 64)
    Image.new("RGB", stored).save(root / "train2017" / "0000.jpg", exif=exif)
    with pytest.raises(UserError, match=f"EXIF turns it: type data.orientation={other}"):
        build_datasets(coco(root, orientation=setting))[0].open(0)
    build_datasets(coco(root, orientation=other))[0].open(0)


def test_data_check_names_all_images_of_another_size(root, ghosttrain):
    for split in ("train2017", "val2017"):
        content = read_annotations(root, split)
        for image in content["images"][:2]:
            image["height"] += 1
        write_coco(root, split, content)
    words = ["data", "check", "+recipe=detect_ssdlite", "data=coco", f"data.root={root}"]
    found = ghosttrain(*words)
    assert found.code == 1 and "unreadable: 4 (" in found.out, found.err
    assert found.out.count("is 80 x 64 pixels, its annotation says 80 x 65") == 4
    assert "1 of 16 images have no boxes and are kept" in found.out
    assert ghosttrain(*words, "data.on_error=skip").code == 0
    parsed = json.loads(ghosttrain(*words, "--json").out)
    assert len(parsed["unreadable"]) == 4
    assert {*parsed["unreadable"][0]} == {"half", "image", "reason"}  # no class of its own

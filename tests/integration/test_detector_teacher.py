"""A detector taught by the feature pyramid of another one (distill=pkd)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from boxes import make_coco
from helpers import only_run

from ghosttrain.cli import main
from ghosttrain.config.compose import compose
from ghosttrain.data.datasets import build_datasets
from ghosttrain.data.loader import train_loader
from ghosttrain.detect.pkd import LEVELS, pearson_loss
from ghosttrain.engine import pyramid_teacher
from ghosttrain.engine.detection import build_network, loss_terms
from ghosttrain.engine.load import load_detector
from ghosttrain.engine.rows import read_metrics

CPU = torch.device("cpu")
PKD = ["distill=pkd", "teacher=run"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    coco = tmp_path_factory.mktemp("coco")
    make_coco(coco)
    return [
        "+recipe=detect_retinanet", "model=mobilenetv2_050", "reparam=none", "data=coco",
        f"data.root={coco}", "data.train_size=64", "data.eval_size=64", "data.workers=0",
        "augment.iou_crop=false", "detector.channels=16", "train.global_batch=8",
        "train.max_steps=1", "schedule.warmup_epochs=0", "tracker.log_every=1",
        "launch.device=cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def teacher(words, tmp_path_factory):
    root = tmp_path_factory.mktemp("teacher")
    assert main(["detect", *words, f"run.root={root}", "data.mean=[0.4,0.4,0.4]"]) == 0
    return only_run(root)


def test_the_loss_is_one_minus_the_correlation_of_each_channel():
    rng = np.random.default_rng(0)
    shapes = [(3, 5, side, side + 1) for side in (9, 5, 4, 2, 1)]
    student, teacher = ([rng.normal(size=shape) for shape in shapes] for _ in range(2))
    expected = 0.0
    for s, t in list(zip(student, teacher, strict=True))[:LEVELS]:
        flat = [x.transpose(1, 0, 2, 3).reshape(5, -1) for x in (s, t)]
        n = flat[0].shape[1]
        r = [np.corrcoef(a, b)[0, 1] for a, b in zip(*flat, strict=True)]
        expected += (1 - np.mean(r)) * (n - 1) / n
    maps = [[torch.from_numpy(x) for x in side] for side in (student, teacher)]
    assert pearson_loss(*maps).item() == pytest.approx(expected, rel=1e-5)
    scaled = [7 * x + 3 for x in maps[0]]
    assert pearson_loss(maps[0], scaled).item() == pytest.approx(0, abs=1e-8)


def test_the_term_is_that_of_both_pyramids(words, teacher):
    """The teacher sees the images in its own normalisation."""
    config = compose(
        [*words, *PKD, f"teacher.run={teacher}", "teacher.trust=true", "distill.weight=3",
         "distill.label_weight=0.5", "data.std=[0.2,0.2,0.2]"]
    ).config  # fmt: skip
    train, _ = build_datasets(config.data)
    source = pyramid_teacher.build_pyramid_source(config, train, CPU)
    torch.manual_seed(0)
    network = build_network(config, train.classes, 0, 4, CPU).train()
    with train_loader(train, config.data, config.augment, CPU, channels_last=True) as images:
        (batch,) = images.batches([[0, 1, 2, 3]])
    terms = loss_terms(config, network, source, batch, progress=0.0)
    torch.testing.assert_close(terms["loss"], terms["class"] + terms["box"] + terms["pkd"])

    pixels = batch.images * 0.2 + torch.tensor(config.data.mean).view(3, 1, 1)
    seen = (pixels - 0.4) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        theirs = [*load_detector(teacher).backbone(seen).values()]
    ours = [*network.student.backbone(batch.images).values()]
    torch.testing.assert_close(terms["pkd"], 3 * pearson_loss(ours, theirs), rtol=1e-4, atol=1e-5)
    terms["loss"].backward()
    assert network.student.backbone.fpn.inner_blocks[0][0].weight.grad is not None
    assert all(p.grad is None for p in source.pyramid.parameters())

    alone = config.model_copy(
        update={"distill": config.distill.model_copy(update={"name": "none"})}
    )
    own = loss_terms(alone, network, None, batch)
    torch.testing.assert_close(terms["class"], 0.5 * own["class"], rtol=1e-3, atol=1e-4)


def test_it_trains_from_the_command_line(ghosttrain, words, teacher, tmp_path):
    taught = [*words, *PKD, f"teacher.run={teacher}", "teacher.trust=true", f"run.root={tmp_path}"]
    done = ghosttrain("detect", *taught)
    assert done.code == 0, done.err
    assert "teacher: retinanet on mobilenetv2_050" in done.out and "not checked" in done.out
    assert "its teacher reaches" in done.out
    first = next(row for row in read_metrics(only_run(tmp_path)) if row["kind"] == "train")
    assert first["pkd"] > 0
    assert first["loss"] == pytest.approx(first["class"] + first["box"] + first["pkd"], rel=1e-5)


def test_a_teacher_must_find_more_than_chance(words, teacher, ghosttrain, monkeypatch, tmp_path):
    """One that finds the boxes is taken; the same boxes of the images after them are not."""
    refused = ghosttrain("detect", *words, *PKD, f"teacher.run={teacher}", f"run.root={tmp_path}")
    assert refused.code == 2 and refused.err.count("\n") == 1
    assert "finds no more than chance" in refused.err and "16 training images" in refused.err

    config = compose([*words, *PKD, f"teacher.run={teacher}"]).config
    train, _ = build_datasets(config.data)
    order = pyramid_teacher.epoch_order(len(train), 0, 0).tolist()

    def finds(shift):
        queue = order[shift:] + order[:shift]

        def forward(self, images):
            found = []
            for _ in images:
                corners, labels = train.boxes.objects(queue.pop(0))
                found.append(
                    {
                        "boxes": torch.from_numpy(corners * [64 / 80, 1, 64 / 80, 1]),
                        "scores": torch.ones(len(labels)),
                        "labels": torch.from_numpy(labels + 1),
                    }
                )
            return found

        monkeypatch.setattr(pyramid_teacher.PyramidTeacher, "forward", forward)
        return pyramid_teacher.build_pyramid_source(config, train, CPU).about

    assert "AP50 100.0 % on 16 unaugmented training images" in finds(0)
    with pytest.raises(pyramid_teacher.UserError, match="no more than chance: AP50"):
        finds(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["teacher.run=/nowhere"], "is no run folder"),
        (["detector.channels=32"], "type detector.channels=16"),
        (["data.in_chans=1", "data.mean=[0.5]", "data.std=[0.2]"], "type data.in_chans=3"),
        (["teacher=timm", "teacher.name=resnet18", "teacher.run=null"], "teacher=run teacher.run="),
        (["teacher.input_size=64"], "teacher.input_size would do nothing"),
        (["cache.dir=stored"], "leave cache.dir out"),
        (["distill.temperature=2"], "compares pyramids; leave it out"),
        (["+recipe=detect_ssdlite", "detector=ssdlite"], "detector=ssdlite has none"),
        (["detector=none", "data=digits", "augment=none"], "feature pyramids of detectors"),
        (["teacher=none", "teacher.run=null"], "distill=pkd needs a teacher"),
    ],
)
def test_mistakes_are_one_line(ghosttrain, words, teacher, tmp_path, changes, message):
    asked = [*words, *PKD, f"teacher.run={teacher}", f"run.root={tmp_path}"]
    names = {change.partition("=")[0] for change in changes}
    kept = [word for word in asked if word.partition("=")[0] not in names]
    if "data=digits" in changes:
        kept = [word for word in kept if not word.startswith(("data.", "augment."))]
    refused = ghosttrain("detect", *kept, *changes)
    assert refused.code == 2 and refused.err.count("\n") == 1, refused.err
    assert message in refused.err


def test_weights_of_others_do_not_teach_a_detector(ghosttrain, words, tiny, tmp_path):
    classes = ghosttrain(*tiny, "train.max_steps=1", f"run.root={tmp_path}")
    assert classes.code == 0, classes.err
    asked = [*words, *PKD, f"teacher.run={only_run(tmp_path)}", f"run.root={tmp_path / 'r'}"]
    refused = ghosttrain("detect", *asked)
    assert refused.code == 2 and refused.err.count("\n") == 1, refused.err
    assert "weights of a classifier" in refused.err

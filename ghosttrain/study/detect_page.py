"""`detect show RUN`: what a detector finds on the held-out images, the worst first, as one page of
HTML.

*Worst* is the lowest F1 of an image: its detections from one score on, the score from which F1 of
all held-out images together is the highest, against its boxes at IoU .5 (`detect/matching.py`).

Legend: K classes.
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ghosttrain.config.schema import Config, DataConfig
from ghosttrain.data.datasets import Dataset
from ghosttrain.data.decode import decoded
from ghosttrain.detect.coco_numbers import RECALLS, TITLES, CocoNumbers, measure
from ghosttrain.detect.matching import ON_CROWD, RIGHT, Matched, best_threshold, match
from ghosttrain.engine.detection import boxes_of, find
from ghosttrain.engine.detection_words import IGNORES
from ghosttrain.engine.distributed import pick_device
from ghosttrain.engine.evaluate import HeldOutImages
from ghosttrain.engine.figures import new_figure, png_of
from ghosttrain.engine.load import load_detector
from ghosttrain.study.page import data_url, figure, page, table
from ghosttrain.text import counted, printable

SIDE = 320
"""Pixels of the longer side of a picture in the page."""
NAMED_CURVES = 8
"""Classes up to which each has a curve with its name; of more, the lowest of AP."""
KINDS = {"raw": "raw", "ema": "EMA", "fused": "fused", "ignoring": IGNORES}
"""Row of `result.json` -> its column."""
UNREAD = "cannot be read"
"""Of an image, in its line and in the place of its picture."""
Reported = Mapping[str, Mapping[str, float]]
"""Row of `KINDS` -> the numbers of COCO that `result.json` has of it."""
STYLE = """
body { max-width: 76rem }
th, td { padding: .25rem .5rem }
.sums { display: grid; gap: 0 2rem; align-items: start;
        grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)) }
.sums > * { min-width: 0 }
.images { display: grid; gap: 1.2rem;
          grid-template-columns: repeat(auto-fit, minmax(min(100%, 33rem), 1fr)) }
.images article { break-inside: avoid; border-top: 1px solid #ddd; padding-top: .4rem }
.pair { display: grid; gap: .5rem;
        grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)) }
.pair svg { width: 100%; height: auto; max-height: 28rem; display: block; background: #f4f4f4 }
.name { overflow-wrap: anywhere; margin: 0 0 .4rem }
rect { fill: none; stroke-width: 2.5 }
.right { stroke: #0a7d32 } .wrong { stroke: #c3221b; stroke-dasharray: 7 4 }
.crowd { stroke: #777; stroke-dasharray: 2 3 }
svg text { font: 13px system-ui, sans-serif; fill: #fff; stroke: #000; stroke-width: 3;
           paint-order: stroke }
@media print { .images { grid-template-columns: 1fr 1fr } .pair { grid-template-columns: 1fr 1fr }
               * { print-color-adjust: exact } }
"""
MEANING = (
    "The first picture has the boxes of the data: green, found; red and broken, missed; grey and "
    "dotted, a crowd, which counts neither for nor against. The second one has what the EMA "
    "weights detect: green, right; red and broken, wrong."
)


@dataclass(frozen=True)
class Seen:
    """What a detector makes of the held-out images."""

    images: list[Matched]
    """In the order of the held-out set."""
    numbers: CocoNumbers
    threshold: float
    """The score from which F1 of all images together is the highest."""
    unread: frozenset[int]
    """Numbers of the images that cannot be read, under `data.on_error=skip`: the detector was shown
    a black one in their place."""

    def worst_first(self) -> list[int]:
        """Return the numbers of the images, by rising F1; of equals the one with more mistakes
        first.
        """

        def rank(index: int) -> tuple[float, int, int]:
            each = self.images[index]
            _, wrong, missed = each.counts(self.threshold)
            return each.f1(self.threshold), -wrong - missed, index

        return sorted(range(len(self.images)), key=rank)

    def definition(self) -> str:
        """Return how worst is defined, in one sentence."""
        return (
            "Worst first: the lowest F1 of an image at IoU .5, of detections with a score of "
            f"{self.threshold:.3f} or more, from which F1 of all images together is the highest"
        )

    def line(self, index: int) -> str:
        """Return `F1 .67: 2 of 3 boxes found, 1 wrong detection`, and whether it was not read."""
        each = self.images[index]
        right, wrong, missed = each.counts(self.threshold)
        return (
            f"F1 {each.f1(self.threshold):.2f}: {right} of {right + missed} boxes found, "
            f"{counted(wrong, 'wrong detection')}{f'; {UNREAD}' * (index in self.unread)}"
        )

    def remarks(self, reported: Reported | None) -> list[str]:
        """Return what to know about the numbers, a sentence each."""
        lines = []
        if reported is None:
            lines.append(
                "These are other images, or of another size, than those of the run's result: all "
                "numbers here were measured now, of the EMA weights"
            )
        if self.unread:
            lines.append(
                f"{len(self.unread):,} of {counted(len(self.images), 'held-out image')} {UNREAD}: "
                "the detector was shown a black one instead"
            )
        return lines


def look(folder: Path, held_out: Dataset, config: Config, batch: int) -> Seen:
    """Return what the EMA weights of a run detect on its held-out images."""
    device = pick_device(config.launch.device)
    model, boxes = load_detector(folder).to(device), boxes_of(held_out)
    with HeldOutImages(held_out, config, device, batch) as batches:
        model.eval()
        found = find({"ema": model}, batches, device)[0]["ema"]
    matched = []
    for index, each in sorted(found.items()):
        own = boxes.of(index)
        matched.append(match(each, boxes.corners[own], boxes.labels[own], boxes.crowd[own]))
    numbers, unread = measure(boxes, held_out.classes, found), frozenset(batches.loader.broken)
    return Seen(matched, numbers, best_threshold(matched), unread)


def detection_page(
    title: str,
    seen: Seen,
    held_out: Dataset,
    config: Config,
    reported: Reported | None,
    shown: Sequence[int],
) -> str:
    """Return the page.

    Args:
        title: above all.
        seen: what was detected.
        held_out: the images.
        config: how they are decoded.
        reported: of all weights of the run; None: what `result.json` says is not of these images.
        shown: numbers of the images that are shown, in this order.
    """
    count = len(held_out)
    no_look = (
        f'<p class="note">{IGNORES}: a detector that ignores the picture: the same boxes on every '
        "image, those that find the most training boxes.</p>"
    )
    return page(
        title,
        [
            f"<p>{html.escape(held_out.describe())}</p>",
            *(f"<p>{remark}.</p>" for remark in seen.remarks(reported)),
            '<div class="sums"><section><h2>Numbers of COCO, in per cent</h2>',
            *table(_numbers(reported or {"ema": seen.numbers.row})),
            *([no_look] if reported else []),
            "</section><section><h2>Classes</h2>",
            *table(_classes(seen.numbers, held_out)),
            "</section><section><h2>Precision and recall</h2>",
            figure(_curves(seen.numbers, held_out.classes), "At IoU .5, of the EMA weights"),
            "</section></div>",
            f"<h2>{len(shown)} of {count:,} held-out images</h2>",
            f"<p>{seen.definition()}. {MEANING}</p>",
            '<div class="images">',
            *(_image(index, seen, held_out, config) for index in shown),
            "</div>",
        ],
        STYLE,
    )


def _numbers(rows: Reported) -> list[list[str]]:
    kinds = [kind for kind in KINDS if kind in rows]
    lines = [["", *(KINDS[kind] for kind in kinds)]]
    for key, name in TITLES.items():
        values = [rows[kind].get(key, -1) for kind in kinds]
        lines.append([name, *(f"{value:.2f}" if value >= 0 else "-" for value in values)])
    return lines


def _classes(numbers: CocoNumbers, held_out: Dataset) -> list[list[str]]:
    """Return a row for each class, the lowest AP first; without boxes it has none and is last."""
    names = held_out.classes
    counts = np.bincount(boxes_of(held_out).labels, minlength=len(names)).tolist()
    rows = zip(names, counts, numbers.class_ap, _ap50(numbers).tolist(), strict=True)
    ordered = sorted(rows, key=lambda row: (row[2] is None, row[2] or 0.0))
    return [
        ["class", "boxes", "AP %", "AP50 %"],
        *(
            [
                printable(name),
                f"{boxes:,}",
                *(("-", "-") if ap is None else (f"{ap:.2f}", f"{half:.2f}")),
            ]
            for name, boxes, ap, half in ordered
        ),
    ]


def _ap50(numbers: CocoNumbers) -> np.ndarray:
    """Return AP at IoU .5 of each class in per cent; NaN: no object of it."""
    return 100 * numbers.precision_RK.mean(axis=0)


def _curves(numbers: CocoNumbers, classes: Sequence[str]) -> bytes:
    """Return the picture of precision against recall: all classes together, and each."""
    ap = {k: each for k, each in enumerate(numbers.class_ap) if each is not None}
    named = sorted(ap, key=lambda k: ap[k])[:NAMED_CURVES]
    picture = new_figure(4.8, 3.8)
    axis = picture.subplots()
    for k in ap:
        (line,) = axis.plot(RECALLS, numbers.precision_RK[:, k], linewidth=1)
        if k in named:
            line.set_label(printable(classes[k]))
        else:
            line.set_color("0.85")
    mean = numbers.precision_RK[:, list(ap)].mean(axis=1)
    axis.plot(RECALLS, mean, color="black", linewidth=2, label="mean of the classes")
    axis.set_xlabel("recall")
    axis.set_ylabel("precision")
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1.02)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
    for text in axis.legend(frameon=False, fontsize=7).get_texts():
        text.set_parse_math(False)
    return png_of(picture, 160)


def _image(index: int, seen: Seen, held_out: Dataset, config: Config) -> str:
    """Return an image with its boxes, and beside it with what was detected; of one that cannot be
    read the boxes alone.
    """
    each, classes = seen.images[index], held_out.classes
    width, height = boxes_of(held_out).sizes[index].tolist()
    scale = SIDE / max(width, height)
    sides = round(width * scale), round(height * scale)
    if index in seen.unread:
        first = again = f'<text x="3" y="{sides[1] // 2}">{UNREAD}</text>'
    else:
        first = f'<image id="i{index}" width="{sides[0]}" height="{sides[1]}" href="'
        first += f'{_picture(held_out.open(index), config.data)}"/>'
        again = f'<use href="#i{index}"/>'
    chosen = each.found.scores >= seen.threshold
    taken = {*each.box[chosen & (each.kind == RIGHT)].tolist()}
    truth = [
        (box, "crowd" if crowd else "right" if m in taken else "wrong", classes[label])
        for m, (box, label, crowd) in enumerate(
            zip(each.corners, each.labels.tolist(), each.crowd.tolist(), strict=True)
        )
    ]
    look_of = {RIGHT: "right", ON_CROWD: "crowd"}
    said = [
        (box, look_of.get(int(kind), "wrong"), f"{classes[label]} {score:.2f}")
        for box, label, score, kind in zip(
            each.found.corners[chosen], each.found.labels[chosen].tolist(),
            each.found.scores[chosen].tolist(), each.kind[chosen], strict=True,
        )
    ]  # fmt: skip
    name = html.escape(printable(held_out.name_of(index)))
    return (
        f'<article><p class="name">{name}<br><span class="note">{seen.line(index)}</span></p>'
        f'<div class="pair">{_svg(sides, first, truth, scale, "boxes of the data")}'
        f"{_svg(sides, again, said[::-1], scale, 'detections')}</div></article>"
    )


def _picture(image: Image.Image, data: DataConfig) -> str:
    """Return an image, not decoded yet, as a small URL that holds it."""
    picture = Image.fromarray(decoded(image, data.model_copy(update={"in_chans": 3})))
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return data_url(file.getvalue(), "jpeg")


def _svg(
    sides: tuple[int, int],
    image: str,
    boxes: Sequence[tuple[np.ndarray, str, str]],
    scale: float,
    about: str,
) -> str:
    """Return an image of `sides` under boxes: corners in pixels of the file, which `scale` makes
    those of the picture; a class of the style; words.
    """
    width, height = sides
    parts = []
    for corners, style, words in boxes:
        left, top, right, bottom = (corners * scale).tolist()
        parts.append(
            f'<rect class="{style}" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" '
            f'height="{bottom - top:.1f}"/><text x="{left + 3:.1f}" '
            f'y="{min(max(top + 13, 13), height - 4):.1f}">{html.escape(printable(words))}</text>'
        )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{about}">{image}'
        f"{''.join(parts)}</svg>"
    )

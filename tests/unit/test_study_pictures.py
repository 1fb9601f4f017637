"""What stands in a picture of a study lies within it, also where arms have long names."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from ghosttrain.study import study_pictures
from ghosttrain.study.stats import paired_difference

ARMS = ["none", "+Mixup and CutMix", "ghostnetv3_100 + compact_kd without its identity"]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    monkeypatch.setattr(study_pictures, "save_figure", lambda figure, *_: figures.append(figure))
    return figures


def test_no_word_of_a_picture_is_cut(drawn: list[Figure]) -> None:
    path, title = Path("unused.png"), "EMA balanced accuracy %"
    difference = paired_difference({0: 1.0, 1: 2.0}, {0: 0.0, 1: 1.5})
    study_pictures.draw_effects(path, dict.fromkeys(ARMS, difference), ARMS[1], title)
    study_pictures.draw_effects(path, {ARMS[0]: difference}, ARMS[2], title)
    study_pictures.draw_learning(path, dict.fromkeys(ARMS, [{1: 10.0, 2: 20.0}]), "top-1")
    points = {arm: (1e6 * (place + 1), 80.0 + place) for place, arm in enumerate(ARMS)}
    study_pictures.draw_pareto(path, points, title, {"GhostNetV3 1.3x (published)": (3e6, 79.1)})
    many = {f"{arm} {number}": [{1: 10.0}] for arm in ARMS for number in range(2)}
    study_pictures.draw_learning(path, many, "top-1")
    assert len(drawn) == 5
    for figure in drawn:
        figure.canvas.draw()
        inked, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert inked.x0 >= 0 and inked.x1 <= width and inked.y0 >= 0 and inked.y1 <= height

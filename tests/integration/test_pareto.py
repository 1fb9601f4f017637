"""`pareto`: networks beside each other, and which no other one beats."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from ghosttrain.cli import main
from ghosttrain.deploy.latency_of import network_for, networks_of
from ghosttrain.deploy.pareto import Point, draw, front
from ghosttrain.models.cost import count_macs, count_params
from ghosttrain.models.create import create_model
from ghosttrain.study.published import IFORMER


def test_runs_and_models_beside_published_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train.max_steps=2", "train.global_batch=32", "launch.device=cpu"]
    run = str(tmp_path / "it")
    place = [f"run.root={tmp_path}", "run.name=it"]
    assert main(["+recipe=baseline", "model=shufflenetv2_050", *words, *place]) == 0
    capsys.readouterr()
    out = tmp_path / "out"
    asked = ["--models", "ghostnetv3_100,lcnet_050", "--backend", "torch", "--rounds", "2"]
    assert main(["pareto", run, *asked, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    rows = list(csv.DictReader((out / "pareto.csv").read_text().splitlines()))
    names = ["shufflenetv2_050", "lcnet_050", "ghostnetv3_100", "ghostnetv3_100"]
    assert [row["model"] for row in rows] == names
    assert rows[0]["px"] == "64" and rows[0]["where"] == f"digits: {run}"
    assert rows[1]["top1"] == "" and rows[1]["where"] == ""
    assert [row["top1"] for row in rows[2:]] == ["77.1", "77.134"], "two sources, two rows"
    assert IFORMER in rows[2]["where"] and "PaddleClas" in rows[3]["where"]
    fused = create_model("ghostnetv3_100", fused=True)
    assert int(rows[2]["macs"]) == count_macs(fused, 224)
    assert int(rows[2]["parameters"]) == count_params(fused)
    assert all(float(row["latency_ms"]) > 0 for row in rows)
    assert f"77.10  ImageNet, 600 epochs: {IFORMER}" in text
    assert (out / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    # Published values are those of 224 px.
    assert main(["pareto", *asked, "--size", "96"]) == 0
    assert IFORMER not in capsys.readouterr().out


def test_two_published_values_of_a_network_have_one_name_in_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    one, two = (Point("net", "ImageNet", top1, 224, 1, 1, 1.0) for top1 in (77.1, 77.134))
    draw(tmp_path / "unused.png", [one, two, replace(one, model="other", top1=70.0)], "torch")
    for axis in drawn[0].axes:
        assert [text.get_text() for text in axis.texts] == ["net", "other"]
        assert len([line for line in axis.lines if line.get_marker() == "o"]) == 3


def test_a_backend_times_the_form_it_names() -> None:
    networks = networks_of("shufflenetv2_050", (64, 64))
    for backend in ("torch", "onnx"):
        assert network_for(networks, backend) is networks.fused
    for backend in ("torch_unfused", "onnx_unfused"):
        assert count_params(network_for(networks, backend)) == count_params(networks.trained)
    assert count_params(networks.trained) > count_params(networks.fused)


def test_the_front_is_what_no_other_beats() -> None:
    def point(name: str, top1: float | None, ms: float) -> Point:
        return Point(name, "", top1, 224, 1, 1, ms)

    points = [
        point("slow", 80, 9), point("best", 80, 5), point("beaten", 70, 6), point("fast", 60, 1),
        point("unknown", None, 0.5), point("worse", 59, 1),
    ]  # fmt: skip
    assert [each.model for each in front(points, "latency_ms")] == ["fast", "best"]


@pytest.mark.parametrize(
    "words, part",
    [
        (["--models", "none"], "pareto --models none needs runs"),
        (["--backend", "x", "--models", "lcnet_050"], "--backend x is none"),
        (["--models", "ghostnetv9"], "ghostnetv9 is no run"),
        (["--rounds", "0"], "--rounds 0: give a whole number"),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], part: str
) -> None:
    assert main(["pareto", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert part in line

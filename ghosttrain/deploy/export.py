"""Export a run: convert, write what belongs beside the file, run it, let it pass or reject it."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghosttrain.config.detection import validate_anchors
from ghosttrain.config.schema import Config
from ghosttrain.data.datasets import Dataset
from ghosttrain.data.datasets.base import evenly
from ghosttrain.deploy.card import update_card
from ghosttrain.deploy.detector import DetectorComparison, compare_detector
from ghosttrain.deploy.formats import Format, folder_name, versions
from ghosttrain.deploy.latency import one_pass
from ghosttrain.deploy.network import Deployed, example_of, write_preprocess
from ghosttrain.deploy.parity import BOUND, Comparison, compare, first_difference
from ghosttrain.deploy.runtime import stretched
from ghosttrain.detect.coco_numbers import validate_installed
from ghosttrain.engine.evaluate import HeldOutImages
from ghosttrain.engine.load import held_out_of
from ghosttrain.engine.metrics import headline
from ghosttrain.errors import UserError
from ghosttrain.files import file_digest, sync_folder, write_json, write_text
from ghosttrain.locks import locked
from ghosttrain.models.cost import count_macs, count_params
from ghosttrain.text import byte_size, one_line

REJECTED = ".rejected"
"""How the name of a file ends that did not answer as its network."""


@dataclass(frozen=True)
class Wanted:
    """What an exported file shall be."""

    precision: str = "fp32"
    size: tuple[int, int] | None = None
    """Height and width; None: `data.eval_size`."""
    batch: int | None = None
    """Images at once; None: any number where the format knows it, else 1."""
    images: int | None = None
    """Held-out images that it is tried on; None: all."""
    nms: bool = False
    """Whether it chooses a detector's boxes."""

    def batch_of(self, made: Format) -> int | None:
        """Return how many images a file of this format takes at once; None: any number."""
        if self.nms:
            return 1
        return self.batch if self.batch or made.dynamic_batch else 1


def export_run(
    source: Deployed, config: Config, formats: Sequence[Format], wanted: Wanted
) -> list[dict[str, Any]]:
    """Export a network in several formats into RUN/export/<format>; return what the reports say.

    Args:
        source: the network.
        config: its settings, those of the data as they are here.
        formats: what to convert to.
        wanted: what the files shall be.

    Raises:
        UserError: a precision that a format does not have; held-out images that are not there or
            have other classes; a size that a detector's anchors are not for; boxes that are to be
            chosen where there are none.
    """
    validate_precision(formats, wanted.precision)
    validate_detector(source, wanted)
    size = wanted.size or (config.data.eval_size, config.data.eval_size)
    validate_anchors(source.config, size)
    held_out, batch = held_out_of(source.folder, config)
    validate_size(source, size)
    print(about(source, size), flush=True)
    box_settings = None if source.detector is None else source.box_settings(size)
    if wanted.nms and box_settings is not None:
        source = source.with_nms(box_settings)
    images = HeldOut(held_out, config, batch, size, wanted.images)
    return each_format(
        source,
        formats,
        lambda made: export_one(source, made, wanted, images, box_settings),
        lambda report: [line(report)],
    )


def each_format(
    source: Deployed,
    formats: Sequence[Format],
    write: Callable[[Format], dict[str, Any]],
    lines: Callable[[dict[str, Any]], list[str]],
) -> list[dict[str, Any]]:
    """Write a file in each format, say what became of it, and return the reports; a converter that
    fails does not stop the others.

    Raises:
        UserError: another process writes exported files of this run.
    """
    folder = source.folder / "export"
    folder.mkdir(exist_ok=True)
    reports: list[dict[str, Any]] = []
    with locked(folder, f"{{owner}} writes into {folder}: wait for it"):
        for made in formats:
            try:
                reports.append(write(made))
                print("\n".join(lines(reports[-1])), flush=True)
            except ConversionFailed as failed:
                reports.append({"format": made.name, "passed": False, "error": str(failed)})
                print(failed, flush=True)
        update_card(source.folder)
    return reports


def validate_precision(formats: Sequence[Format], precision: str) -> None:
    """Raise UserError where a format does not have a precision."""
    for made in formats:
        if precision not in made.precisions:
            raise UserError(
                f"--precision {precision} does not exist for {made.name}: choose "
                f"{' or '.join(made.precisions)}"
            )


def validate_detector(source: Deployed, wanted: Wanted) -> None:
    """Raise UserError where boxes cannot be chosen within the file, or cannot be measured."""
    if source.detector is not None:
        validate_installed()
    elif wanted.nms:
        raise UserError(f"--nms is for detectors, and {source.folder} classifies: leave it out")
    if wanted.nms and (wanted.precision != "fp32" or wanted.batch not in (None, 1)):
        raise UserError(
            "--nms is for one image at a time in fp32: leave --precision and --batch out"
        )


class ConversionFailed(Exception):
    """A converter could not write its file."""


def validate_size(source: Deployed, size: tuple[int, int]) -> None:
    """Raise UserError where a network cannot take images of this height and width."""
    try:
        with torch.inference_mode():
            source.network(example_of(source, size, 1))
    except (UserError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"--size {size[0]}x{size[1]}: {source.config.model.name} cannot take such images "
            f"({one_line(error).partition(': ')[0]})"
        ) from None


def about(source: Deployed, size: tuple[int, int]) -> str:
    """Return what is exported, in one line."""
    config = source.config
    params = count_params(source.network)
    macs = count_macs(source.alone, size[0], config.data.in_chans)
    at = f"{size[0]} px" if size[0] == size[1] else f"{size[0]} x {size[1]} px"
    note = "" if size[0] == size[1] else f" ({size[0]} x {size[0]} px)"
    return (
        f"{source.folder}: {config.model.name}, inference form, {params / 1e6:.3f} M parameters, "
        f"{macs / 1e6:.1f} M MACs{note}; {at}"
    )


@dataclass(frozen=True)
class HeldOut:
    """The held-out images of a run, as a file takes them."""

    dataset: Dataset
    config: Config
    batch: int
    size: tuple[int, int]
    most: int | None = None
    """Of so many, evenly spread; None: all."""

    def indices(self) -> Sequence[int]:
        """Return the numbers of the images."""
        return evenly(len(self.dataset), self.most or len(self.dataset))

    def batches(self, source: Deployed) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs of a network and labels (B,).

        Where another size is wanted than the run's, images are stretched to it.
        """
        held = HeldOutImages(self.dataset, self.config, torch.device("cpu"), self.batch)
        held.indices = self.indices()
        with held:
            for batch in held:
                images = batch.images
                if tuple(images.shape[2:]) != self.size:
                    images = stretched(images, self.size)
                yield source.inputs_of(images.contiguous()).contiguous(), batch.labels


def export_one(
    source: Deployed,
    made: Format,
    wanted: Wanted,
    held_out: HeldOut,
    box_settings: dict[str, Any] | None,
) -> dict[str, Any]:
    """Convert a network, try the file, and leave both in RUN/export/<format>; return its report.
    A detector has `box_settings`.
    """
    batch, bound = wanted.batch_of(made), BOUND[wanted.precision]
    example = example_of(source, held_out.size, batch or 2)  # of 1, a free one would be fixed
    with making(folder_of(source.folder, made, wanted.precision, source.nms)) as folder:
        path = folder / f"model{made.suffix}"
        with converting(source, made, wanted.precision):
            made.convert(source.network, example, path, wanted.precision, batch is None)
        report = report_of(source, made, wanted, path, [batch, *example.shape[1:]])
        write_preprocess(folder, source, held_out.size, box_settings)
        if reason := made.runs_here():
            report |= {"verified": False, "passed": None, "note": f"not verified: {reason}"}
        else:
            runner = made.load(path, 1)
            found: Comparison | DetectorComparison
            if box_settings is None:
                found = compare(source.network, runner, held_out.batches(source), batch, bound)
            else:
                from ghosttrain.engine.detection import boxes_of

                boxes = boxes_of(held_out.dataset).at(held_out.indices())
                seen = held_out.batches(source)
                found = compare_detector(source, runner, seen, boxes, box_settings, batch)
            report |= {"verified": True, "passed": found.passes(bound), "bound": bound}
            report["comparison"] = found.record()
            report["latency_ms"] = one_pass(path, runner, held_out.size)
            if not report["passed"]:
                report |= rejection(source, made, folder, held_out, bound)
            elif source.nms and not report["comparison"]["boxes"]:
                note = "not verified: the detector finds no box in these images"
                report |= {"verified": False, "passed": None, "note": note}
        write_json(folder / "report.json", report)
    return report


@contextmanager
def converting(source: Deployed, made: Format, precision: str) -> Iterator[None]:
    """Turn whatever a converter raises within the block into `ConversionFailed`, and keep its trace
    in a file: it is another project's code.
    """
    try:
        yield
    except Exception as error:
        log = source.folder / "export" / f"{made.name}.error.txt"
        write_text(log, traceback.format_exc())
        raise ConversionFailed(
            f"{made.name} {precision}: its converter failed ({type(error).__name__}: "
            f"{one_line(error)[:160]}); all of it: {log}"
        ) from error


def rejection(
    source: Deployed, made: Format, folder: Path, held_out: HeldOut, bound: float
) -> dict[str, Any]:
    """Give the files of a rejected model their other name; return where it differs first."""
    for path in folder.glob("model.*"):
        path.rename(path.with_name(f"{path.name}{REJECTED}"))
    inputs, _ = next(iter(held_out.batches(source)))
    found = first_difference(source.network, made, inputs[:1].contiguous(), bound)
    return {"file": f"model{made.suffix}{REJECTED}", "first_layer": found and list(found)}


def folder_of(run: Path, made: Format, precision: str, nms: bool = False) -> Path:
    """Return where a run's file of a format is."""
    return run / "export" / folder_name(made.name, precision, nms)


@contextmanager
def making(folder: Path) -> Iterator[Path]:
    """Give a folder that is either the old one or complete: within the block it has another
    name.
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    part.mkdir(parents=True)
    try:
        yield part
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def report_of(
    source: Deployed, made: Format, wanted: Wanted, path: Path, shape: list[int | None]
) -> dict[str, Any]:
    """Return what is known of a file before it is tried; its folder holds nothing else yet."""
    weights = source.folder / "model.safetensors"
    return {
        "run": str(source.folder),
        "weights": file_digest(weights) if weights.is_file() else None,
        "format": made.name,
        "precision": wanted.precision,
        "file": path.name,
        "bytes": bytes_in(path.parent),
        "input": shape,
        "include_preprocess": source.include_preprocess,
        "nms": source.nms,
        "versions": versions(made),
    }


def bytes_in(folder: Path) -> int:
    """Return how large the files in a folder are together."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def line(report: dict[str, Any]) -> str:
    """Return what became of a file, in one line."""
    batch = report["input"][0]
    folder = folder_name(report["format"], report["precision"], report["nms"])
    head = (
        f"{report['format']} {report['precision']}: "
        f"{Path(report['run']) / 'export' / folder / report['file']}, "
        f"{byte_size(report['bytes'])}, {'any batch' if batch is None else f'batch {batch}'}"
    )
    if not report["verified"]:
        return f"{head}; converted, {report['note']}"
    compared: Comparison | DetectorComparison
    if headline(report["comparison"]) == "ap":
        compared = DetectorComparison(**report["comparison"])
        words = compared.words()
    else:
        compared = Comparison(**report["comparison"])
        words = compared.words("a probability" if report["include_preprocess"] else "a logit")
    text = f"{head}; {words}; {report['latency_ms']:.2f} ms"
    if report["passed"]:
        return text
    layer = report.get("first_layer")
    where = (
        f"the first layer that differs is {layer[0]}, by {layer[1]:.1e} of its largest value"
        if layer
        else "each layer alone is within the bound"
    )
    return f"{text}\nREJECTED: {compared.allowed(report['bound'])}; {where}"

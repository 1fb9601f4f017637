"""Batches of sample numbers -> batches of images on the device, in the same order.

Owns worker processes, prefetching and the transfer. What is in a batch is decided by order.py, what
an image looks like by augment.py; both travel to the workers as plain numbers, so that 0, 1 and 3
workers give the same bits. A batch can also bring what the training loop needs beside the student's
images: views of them for teachers of other input sizes, and cached outputs of a teacher.

Legend: B batch, C channels, S side of the square, R bytes of a record.
"""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import pickle
import re
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from ghosttrain.config.schema import AugmentConfig, DataConfig
from ghosttrain.data.augment import Transform, View, eval_transform, normalise, train_transform
from ghosttrain.data.box_augment import box_transform
from ghosttrain.data.datasets import Dataset
from ghosttrain.data.decode import TOO_MANY_FILES, BrokenImage
from ghosttrain.data.order import mix
from ghosttrain.errors import UserError
from ghosttrain.memory import keep_freed_memory
from ghosttrain.text import one_line
from ghosttrain.threads import cores

SETTLED, SLOW = 20.0, 0.3
"""Seconds of training before it is judged whether the images come too slowly, and the share of the
time spent waiting from which they do."""
MOST_WORKERS = 16
PATIENCE = 300.0
"""Seconds to wait for the workers' next batch, twice: once may be over after Ctrl-Z and fg."""
CachedReader = Callable[[int, Sequence[int]], Tensor]
"""(draw number, sample numbers) -> what is stored of them: (B, R) uint8. It is called in the
workers and must pickle."""


class Batch(NamedTuple):
    """What one step sees. Pixels are uint8 in a worker, and channels last in memory."""

    images: Tensor
    """As the student sees them: (B, C, S, S), normalised float32."""
    labels: Tensor
    """(B,) int64."""
    indices: Tensor
    """Sample numbers: (B,) int64, on the CPU."""
    views: dict[View, Tensor]
    """The same draws at other sizes: (B, C, S, S) uint8, not normalised."""
    cached: Tensor | None
    """(B, R) uint8; None without a cache."""
    broken: tuple[Broken, ...] = ()
    """Under `data.on_error=skip`: what could not be read."""
    boxes: Tensor | None = None
    """(B, M, 5): left, top, right, bottom in pixels of the image and class, of images with boxes;
    rows of class -1 fill up."""


class Broken(NamedTuple):
    """An image that could not be read."""

    position: int
    """In the batch."""
    number: int
    """Of the image. A training image has another one's number in its place in `Batch.indices`."""
    reason: str


class Loader:
    """Images of one data set under one transform.

        with train_loader(dataset, data, augment, device) as loader:
            for epoch in range(epochs):
                plan = train_batches(len(dataset), seed, epoch, ...)
                for batch in loader.batches(plan, draw_number=epoch):
                    ...

    Worker processes start with the first batch, serve all later calls, and end with the block or
    with `close`.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Transform,
        data: DataConfig,
        device: torch.device,
        channels_last: bool = False,
        views: Sequence[View] = (),
        cached: CachedReader | None = None,
        replace_seed: int | None = None,
        patience: float | None = PATIENCE,
    ) -> None:
        """Use `train_loader` or `eval_loader`; `views` are those that `transform` makes."""
        self.broken: dict[int, str] = {}
        """Images that could not be read so far, with the reasons."""
        self._device = device
        if device.type == "cpu":
            keep_freed_memory()
        # On the device from the start: a small copy in every step would make the CPU wait for it.
        self._mean, self._std = torch.tensor((data.mean, data.std)).to(device)
        self._channels_last = channels_last
        self._plan = _Plan()
        self._told, self._waited, self._used = False, 0.0, 0.0
        workers = worker_count(data.workers, device.type)
        with _starting_workers():
            self._loader: DataLoader[Any] = DataLoader(
                _Samples(
                    dataset, transform, tuple(views), cached, data.on_error == "skip", replace_seed
                ),
                sampler=self._plan,
                batch_size=None,  # an item is already a whole batch
                num_workers=workers,
                timeout=patience if workers and patience else 0,
                persistent_workers=workers > 0,
                collate_fn=_unchanged,
                pin_memory=device.type == "cuda",
                worker_init_fn=_prepare_worker,
                generator=torch.Generator(),  # else every epoch would draw from the global one
            )

    def batches(
        self, plan: Iterable[list[int]], draw_number: int = 0, size: int | None = None
    ) -> Iterator[Batch]:
        """Yield one batch per list of sample numbers, in this order.

        All but the sample numbers is on the device. End one call's iterator before the next call:
        they share the workers.

        Args:
            plan: sample numbers of each batch (order.py).
            draw_number: which draw of each image the augmentation takes; the training loop counts
                epochs. Evaluation draws nothing.
            size: S of the student's images; None: that of the settings.

        Raises:
            UserError: an image is broken, or what `cached` raises; the workers cannot be started
                or have no memory or files left to send their batches with; one of them died.
        """
        how = {} if size is None else {"size": size}
        self._plan.batches = ((draw_number, indices, how) for indices in plan)
        workers, self._since = self._loader.num_workers, 0.0
        if workers and self._loader._iterator is None:
            validate_workers(workers)
        with _explained(workers), _starting_workers():
            batches = iter(self._loader)
        while True:
            with _explained(workers), self._waiting():
                try:
                    batch = next(batches, None)
                except RuntimeError as error:
                    if _TIMED_OUT not in str(error):
                        raise
                    batch = next(batches, None)
            if batch is None:
                return
            if isinstance(batch, _Failure):
                raise UserError(batch.message)
            self.broken |= {each.number: each.reason for each in batch.broken}
            yield self._delivered(batch)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Count how long the training waits for a batch, and how long it works on it after."""
        began = time.perf_counter()
        if self._since:
            self._used += began - self._since
        yield
        if self._since:  # the first batch of a call waits for all workers
            self._waited += time.perf_counter() - began
        self._since = time.perf_counter()

    def slow_note(self) -> list[str]:
        """Return a line, once, where the images come more slowly than the model takes them, after
        `SETTLED` seconds; else nothing.
        """
        both = self._waited + self._used
        if self._told or both < SETTLED or self._waited < SLOW * both:
            return []
        self._told = True
        workers, free = self._loader.num_workers, int(cores())
        share = f"{100 * self._waited / both:.0f} % of the time is spent waiting for images"
        if workers < free:
            # As many as would have kept up, if each brings what it brings now.
            needed = math.ceil(max(workers, 1) * both / max(self._used, both / 16))
            help_ = f"type data.workers={min(max(needed, workers + 1), free)}"
        else:
            help_ = (
                "all cores work on them: save the images no larger than needed, or draw "
                "fewer operations (augment.randaugment_ops)"
            )
        return [f"note: {share} (data.workers={workers}); {help_}"]

    def close(self) -> None:
        """End the worker processes. A later call of `batches` starts new ones."""
        iterator = self._loader._iterator
        if iterator is not None:
            # Private, but torch has no other way: deleting the iterator ends its workers only
            # when no traceback refers to it any more.
            iterator._shutdown_workers()  # type: ignore[attr-defined]
            self._loader._iterator = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        with _explained(self._loader.num_workers):
            self.close()
            # torch raises a worker's death wherever the main process happens to be.
            if isinstance(error, RuntimeError) and str(error).startswith(_DIED):
                raise error

    def _delivered(self, batch: Batch) -> Batch:
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(self._device, non_blocking=True)

        images = normalise(moved(batch.images), self._mean, self._std)
        memory_format = torch.channels_last if self._channels_last else torch.contiguous_format
        return Batch(
            images.contiguous(memory_format=memory_format),
            moved(batch.labels),
            batch.indices,
            {view: moved(pixels) for view, pixels in batch.views.items()},
            None if batch.cached is None else moved(batch.cached),
            batch.broken,
            None if batch.boxes is None else moved(batch.boxes),
        )


def worker_count(setting: int | str, device: str) -> int:
    """Return the number of workers under `data.workers` on a device of this type."""
    if isinstance(setting, int):
        return setting
    share = int(cores())
    if share <= 1:
        return 0
    return min(share - 1, MOST_WORKERS) if device == "cuda" else max(share // 4, 1)


def train_loader(
    dataset: Dataset,
    data: DataConfig,
    augment: AugmentConfig,
    device: torch.device,
    channels_last: bool = False,
    views: Sequence[View] = (),
    cached: CachedReader | None = None,
    patience: float | None = PATIENCE,
) -> Loader:
    """Return a loader of augmented images.

    Args:
        dataset: where images and labels come from.
        data: how the student sees them; how many workers.
        augment: the policy.
        device: where batches go.
        channels_last: memory format of the student's images.
        views: further sizes and resamplings of the same augmented images (teachers').
        cached: reads cached outputs for the same images and draws.
        patience: seconds to wait for the workers' next batch, twice; None: as long as it takes.
    """
    if dataset.boxes is None:
        transform = train_transform(data, augment, views)
    else:
        transform = box_transform(data, augment, dataset.boxes)
    return Loader(
        dataset, transform, data, device, channels_last, views, cached, augment.seed, patience
    )


def eval_loader(
    dataset: Dataset,
    data: DataConfig,
    device: torch.device,
    channels_last: bool = False,
    views: Sequence[View] = (),
    patience: float | None = PATIENCE,
) -> Loader:
    """Return a loader of centre crops, nothing random; arguments as for `train_loader`."""
    if dataset.boxes is None:
        transform = eval_transform(data, views)
    else:
        transform = box_transform(data, None, dataset.boxes)
    return Loader(dataset, transform, data, device, channels_last, views, patience=patience)


def in_workers(samples: TorchDataset[Any], requests: Sequence[Any], workers: int) -> Iterator[Any]:
    """Yield `samples[request]` for each request, in this order, computed by so many processes (0:
    by this one).

    Raises:
        UserError: the workers cannot be started, or one of them died.
    """
    if workers:
        validate_workers(workers)
    with _explained(workers), _starting_workers():
        results: Any = iter(
            DataLoader(
                samples,
                sampler=requests,
                batch_size=None,
                num_workers=workers,
                collate_fn=_unchanged,
                worker_init_fn=_prepare_worker,
                generator=torch.Generator(),
            )
        )
    try:
        for _ in requests:
            with _explained(workers):
                result = next(results)
            yield result
    finally:
        if workers:
            results._shutdown_workers()


# --- in the workers -------------------------------------------------------------------------------


_Request = tuple[int, list[int], dict[str, int]]
"""(draw number, sample numbers, further arguments of the transform) of one batch."""


class _Plan:
    """The sampler: the batches of the call in progress. An object, since workers outlive a call."""

    batches: Iterable[_Request] = ()

    def __iter__(self) -> Iterator[_Request]:
        return iter(self.batches)


@dataclass(frozen=True)
class _Failure:
    """A `UserError` on its way out of a worker; torch would wrap it in a traceback's text."""

    message: str


@dataclass(frozen=True)
class _Samples(TorchDataset[Any]):
    """A request -> one batch."""

    dataset: Dataset
    transform: Transform
    views: tuple[View, ...]
    cached: CachedReader | None
    skips: bool
    """Whether the place of an image that cannot be read is taken, or it is an error."""
    replace_seed: int | None
    """Of the numbers of the images that take it; None: a black one does."""

    def __getitem__(self, request: _Request) -> Batch | _Failure | _Parcel:
        draw_number, asked, how = request
        images = len(self.dataset)  # a larger number: the image once more (`balanced_order`)
        indices, samples, broken = [], [], []
        try:
            for position, index in enumerate(asked):
                taken, sample, reason = self._sample(draw_number, index, how)
                indices.append(taken)
                samples.append(sample)
                if reason:
                    broken.append(Broken(position, index % images, reason))
            cached = None if self.cached is None else self.cached(draw_number, indices)
        except UserError as error:
            return _Failure(str(error))
        has_boxes = self.dataset.boxes is not None
        boxes = torch.stack([sample.pop() for sample in samples]) if has_boxes else None
        pixels, *views = map(stacked, zip(*samples, strict=True))
        batch = Batch(
            pixels,
            torch.from_numpy(self.dataset.labels[np.array(indices) % images]),
            torch.tensor(indices),
            dict(zip(self.views, views, strict=True)),
            cached,
            tuple(broken),
            boxes,
        )
        return batch if get_worker_info() is None else _packed(batch)

    def _sample(
        self, draw_number: int, index: int, how: dict[str, int]
    ) -> tuple[int, list[Tensor], str]:
        """Return a sample's number, its pixels, and why it is not the one asked for."""
        try:
            return index, self._transformed(draw_number, index, how), ""
        except BrokenImage as error:
            reason = str(error)
        replaced = self.replace_seed is not None
        if not self.skips:
            instead = "another image takes its place" if replaced else "it counts as wrong"
            raise UserError(f"{reason}; with data.on_error=skip {instead}")
        if self.replace_seed is None:
            return index, self.transform(_black, draw_number, index, **how), reason
        for attempt in range(_ATTEMPTS):
            other = mix(self.replace_seed, _REPLACE, draw_number, index, attempt)
            other %= len(self.dataset)
            with suppress(BrokenImage):
                return other, self._transformed(draw_number, other, how), reason
        raise UserError(f"{reason}; {_ATTEMPTS} images drawn for its place cannot be read either")

    def _transformed(self, draw_number: int, index: int, how: dict[str, int]) -> list[Tensor]:
        opened = partial(self.dataset.open, index % len(self.dataset))
        return self.transform(opened, draw_number, index, **how)


_REPLACE = 9  # a stream beside those of augment.py
_ATTEMPTS = 8


def _black() -> Image.Image:
    return Image.new("RGB", (8, 8))


@dataclass(frozen=True)
class _Parcel:
    """A batch on its way out of a worker, whose pixels lie in shared memory already; on arrival it
    turns into the batch.
    """

    pickled: bytes

    def __reduce__(self) -> Any:
        return _unpacked, (self.pickled,)


def _packed(batch: Batch) -> _Parcel | _Failure:
    """Put a batch into shared memory.

    torch does this in a thread of the worker, where an error is printed and lost: the main process
    would wait for this batch for ever.
    """
    tensors = [batch.images, *batch.views.values()]
    tensors += [] if batch.boxes is None else [batch.boxes]
    try:
        # The thread that hands them over needs a few: without, the main process would wait.
        _validate_files(len(tensors) + 3 + 6)
        return _Parcel(bytes(ForkingPickler.dumps(batch)))
    except Exception as error:
        size = sum(t.nbytes for t in tensors)
        return _Failure(_what_failed(error, size) or _NOT_SENT.format(reason=one_line(error)))


def _unpacked(pickled: bytes) -> Batch | _Failure:
    try:
        return pickle.loads(pickled)
    except Exception as error:
        return _Failure(_what_failed(error) or _NOT_SENT.format(reason=one_line(error)))


def stacked(images: Sequence[Tensor]) -> Tensor:
    """Stack (C, S, S) that are channels last in memory; so is the result, (B, C, S, S)."""
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


# --- what to say of workers that fail -------------------------------------------------------------

_NOT_SENT = "a data worker could not send its batch ({reason}): type data.workers=0"
_DIED = "DataLoader worker (pid"
_TIMED_OUT = "DataLoader timed out"


def validate_workers(workers: int, beside: int = 0) -> None:
    """Raise the UserError that starting so many workers would, with so many other files `beside`
    theirs: torch prints a traceback with it.
    """
    with _explained(workers):
        multiprocessing.Lock()  # lies in shared memory
        _validate_files(files_of(workers) + beside)


def files_of(workers: int) -> int:
    """Return how many files so many workers keep open: pipes of each, and those of the results."""
    return 6 * workers + 10


def _validate_files(needed: int) -> None:
    """Raise an OSError unless `needed` more files can be opened.

    They are counted, not opened: the thread that hands over the batch before needs some meanwhile.
    """
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most == resource.RLIM_INFINITY:
        return
    try:
        numbers = os.listdir("/dev/fd")  # opens one itself
    except FileNotFoundError:  # a system without it
        return
    if most - sum(int(number) < most for number in numbers) + 1 < needed:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@contextmanager
def _explained(workers: int) -> Iterator[None]:
    """Turn what torch and the system raise about workers into one line; bugs stay as they are."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        if workers and (message := _what_failed(error)):
            raise UserError(message) from error
        raise


def _what_failed(error: BaseException, batch_bytes: int = 0) -> str | None:
    """Return one line about a failure of the machinery around the workers; None for other errors.

    torch says most of it in words only.
    """
    message, code = "", getattr(error, "errno", None)
    cause: BaseException | None = error
    while cause is not None:
        message += f"{cause}\n"
        cause = cause.__cause__
    if code is None and (found := re.search(r"shared memory.*\((\d+)\)", message)):
        code = int(found[1])
    if (
        code in (errno.EMFILE, errno.ENFILE)
        or "ancdata" in message
        or "Too many open files" in message
    ):
        return f"too many files are open for {_WORKERS} to send their batches: {TOO_MANY_FILES}"
    if isinstance(error, EOFError):  # it hung up: seen where it had no file left to send with
        return (
            "a data worker could not send its batch (EOFError), perhaps because too many files are "
            f"open: {TOO_MANY_FILES}, or data.workers=0 to see why"
        )
    if code == errno.ENOSPC or "Bus error" in message:
        return (
            f"the batches of {_WORKERS} do not fit into shared memory ({_free(batch_bytes)}): type "
            "data.workers=0 or fewer than now, a smaller train.micro_batch and train.eval_batch, "
            "or in Docker start the container with --shm-size=8g"
        )
    if _DIED in message and "signal: Killed" in message:
        return (
            "a data worker was killed, as the system does when memory runs out: type a smaller "
            "data.workers (or 0), or a smaller train.micro_batch"
        )
    if _TIMED_OUT in message:
        return (
            f"{_WORKERS} have brought no batch for a long time ({one_line(error)}): the "
            "disk hangs, or somebody stopped them; type data.workers=0 to see where"
        )
    if _DIED in message:
        return f"a data worker died ({one_line(error)}): type data.workers=0 to see why"
    if isinstance(error, OSError) and code is not None:
        return f"{_WORKERS} cannot work ({os.strerror(code)}): type data.workers=0"
    return None


_WORKERS = "the data workers (data.workers)"


def _free(batch_bytes: int) -> str:
    parts = []
    with suppress(OSError):
        shared_memory = os.statvfs("/dev/shm")
        total, free = (
            blocks * shared_memory.f_frsize
            for blocks in (shared_memory.f_blocks, shared_memory.f_bavail)
        )
        parts.append(f"/dev/shm has {free / 1e6:,.1f} of {total / 1e6:,.1f} MB free")
    if batch_bytes:
        parts.append(f"one batch takes {batch_bytes / 1e6:,.1f} MB")
    return ", ".join(parts) or "/dev/shm is not there"


# --------------------------------------------------------------------------------------------------


def _unchanged(batch: Any) -> Any:
    return batch


def _prepare_worker(worker: int) -> None:
    """Leave signals that reach every process of a terminal, or of a step of Slurm, to the main one:
    it ends the workers. Keep the memory of one image for the next.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    keep_freed_memory()


@contextmanager
def _starting_workers() -> Iterator[None]:
    """Delay Ctrl-C, as workers that do not ignore it yet would print tracebacks; silence advice.

    torch warns of more workers than cores, but how many is the user's setting.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

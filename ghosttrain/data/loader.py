"""Batches of sample numbers -> batches of images on the device, in the same order.

Owns worker processes, prefetching and the transfer. What is in a batch is decided by order.py, what
an image looks like by augment.py; both travel to the workers as plain numbers, so that 0, 1 and 3
workers give the same bits.

Legend: B batch, C channels, S side of the square.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ghosttrain.config.errors import UserError
from ghosttrain.config.schema import Augment, Data
from ghosttrain.data.augment import Transform, eval_transform, normalise, train_transform
from ghosttrain.data.datasets import Dataset

Batch = tuple[Tensor, Tensor, Tensor]
"""images (B, C, S, S), labels (B,), sample numbers (B,)."""


class Loader:
    """Images of one data set under one transform.

        with train_loader(dataset, data, augment, device) as loader:
            for epoch in range(epochs):
                plan = train_batches(len(dataset), seed, epoch, ...)
                for images, labels, indices in loader.batches(plan, draw_number=epoch):
                    ...

    Worker processes start with the first batch, serve all later calls, and end with the block or
    with `close`.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Transform,
        data: Data,
        device: torch.device,
        channels_last: bool,
    ) -> None:
        self._device = device
        # On the device from the start: a small copy in every step would make the CPU wait for it.
        self._mean, self._std = torch.tensor((data.mean, data.std)).to(device)
        self._channels_last = channels_last
        self._plan = _Plan()
        with _starting_workers():
            self._loader: DataLoader[Any] = DataLoader(
                _Samples(dataset, transform),
                sampler=self._plan,
                batch_size=None,  # an item is already a whole batch
                num_workers=data.workers,
                persistent_workers=data.workers > 0,
                collate_fn=_unchanged,
                pin_memory=device.type == "cuda",
                worker_init_fn=_ignore_interrupts,
                generator=torch.Generator(),  # else every epoch would draw from the global one
            )

    def batches(self, plan: Iterable[list[int]], draw_number: int = 0) -> Iterator[Batch]:
        """Yield one batch per list of sample numbers, in this order.

        The images are normalised float32 (B, C, S, S) and the labels int64, both on the device; the
        sample numbers are int64 on the CPU. End one call's iterator before the next call: they
        share the workers.

        Args:
            plan: sample numbers of each batch (order.py).
            draw_number: which draw of each image the augmentation takes; the training loop counts
                epochs. Evaluation draws nothing.

        Raises:
            UserError: an image is broken.
        """
        self._plan.batches = ((draw_number, indices) for indices in plan)
        with _starting_workers():
            batches = iter(self._loader)
        for batch in batches:
            if isinstance(batch, _Failure):
                raise UserError(batch.message)
            yield self._delivered(*batch)

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

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _delivered(self, images: Tensor, labels: Tensor, indices: Tensor) -> Batch:
        images = normalise(images.to(self._device, non_blocking=True), self._mean, self._std)
        memory_format = torch.channels_last if self._channels_last else torch.contiguous_format
        images = images.contiguous(memory_format=memory_format)
        return images, labels.to(self._device, non_blocking=True), indices


def train_loader(
    dataset: Dataset,
    data: Data,
    augment: Augment,
    device: torch.device,
    channels_last: bool = False,
) -> Loader:
    """Return a loader of augmented images.

    Raises:
        UserError: the policy refuses Mixup or CutMix.
    """
    return Loader(dataset, train_transform(data, augment), data, device, channels_last)


def eval_loader(
    dataset: Dataset, data: Data, device: torch.device, channels_last: bool = False
) -> Loader:
    """Return a loader of centre crops, nothing random."""
    return Loader(dataset, eval_transform(data), data, device, channels_last)


# --- in the workers -------------------------------------------------------------------------------


class _Plan:
    """The sampler: the batches of the call in progress. An object, since workers outlive a call."""

    batches: Iterable[tuple[int, list[int]]] = ()

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        return iter(self.batches)


@dataclass(frozen=True)
class _Failure:
    """A `UserError` on its way out of a worker; torch would wrap it in a traceback's text."""

    message: str


@dataclass(frozen=True)
class _Samples(TorchDataset[Any]):
    """(draw number, sample numbers) -> one batch of 8-bit images, channels last in memory."""

    dataset: Dataset
    transform: Transform

    def __getitem__(self, key: tuple[int, list[int]]) -> Batch | _Failure:
        draw_number, indices = key
        try:
            samples = [
                self.transform(self.dataset.open(index), draw_number, index) for index in indices
            ]
        except UserError as error:
            return _Failure(str(error))
        images = torch.stack([sample.permute(1, 2, 0) for sample in samples]).permute(0, 3, 1, 2)
        return images, torch.from_numpy(self.dataset.labels[indices]), torch.tensor(indices)


def _unchanged(batch: Any) -> Any:
    return batch


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal: the main one decides, and ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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

"""Batches straight from picture files: PIL and torch's DataLoader."""

from __future__ import annotations

import itertools
import signal
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .decode import RejectedImageError, decode, read_bytes
from .loader import Reading, StagedLoader
from .order import Order
from .prepare import Catalogue
from .scale import scale


class Pictures(Dataset[np.ndarray]):
    """Image number -> uint8 [size, size, 3], decoded on the spot."""

    def __init__(self, catalogue: Catalogue, size: int, crop: str) -> None:
        self.requests, self.size, self.crop = catalogue.requests, size, crop

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, number: int) -> np.ndarray:
        """A file that was damaged or removed since it was listed gives way to the next one, with a warning."""
        for other in range(len(self)):
            path, offset, length = self.requests[(number + other) % len(self)]
            try:
                return scale([decode(read_bytes(path, offset, length), self.crop).pixels], self.size)[0]
            except RejectedImageError as error:
                warnings.warn(
                    f"{path} was good and is not any more ({error}); the next one takes its place", stacklevel=2
                )
        raise RuntimeError("none of the files can be decoded any more")


def _ignore_signals(_: int) -> None:
    """In a loader's process: a run that is asked to end takes its step to the end, and its batch."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if number := getattr(signal, name, None):
            signal.signal(number, signal.SIG_IGN)


class _Batches:
    """Numbers of the images of each batch of a rank, from a position on, without end."""

    def __init__(self, count: int, reading: Reading, position: int) -> None:
        self.order, self.reading, self.position = Order(count, reading.seed), reading, position

    def __iter__(self) -> Iterator[list[int]]:
        reading = self.reading
        for start in itertools.count(self.position + reading.rank * reading.batch_size, reading.step):
            yield self.order.place(torch.arange(start, start + reading.batch_size))[0].tolist()


def stacked(pictures: list[np.ndarray]) -> Tensor:
    """A batch of pictures: uint8 [N, size, size, 3]."""
    return torch.from_numpy(np.stack(pictures))


class TorchLoader(StagedLoader):
    """PIL in the processes of torch's DataLoader; what works everywhere, and the yardstick."""

    def __init__(
        self, catalogue: Catalogue, reading: Reading, crop: str, *, workers: int | None = None, prefetch: int = 2
    ) -> None:
        super().__init__(len(catalogue.requests), reading)
        self.pictures = Pictures(catalogue, reading.stored, crop)
        self._workers, self._prefetch = 2 if workers is None else workers, prefetch
        self._batches: Iterator[Tensor] | None = None
        self._next = 0

    def pixels(self, ids: Tensor) -> Tensor:
        return stacked([self.pictures[number] for number in ids.tolist()])

    def _read(self, position: int, ids: Tensor, out: Tensor) -> Tensor:
        if self._batches is None or position != self._next:
            self.close()
            batches = DataLoader(
                self.pictures,
                batch_sampler=_Batches(self.count, self.reading, position),
                collate_fn=stacked,
                num_workers=self._workers,
                prefetch_factor=self._prefetch if self._workers else None,
                worker_init_fn=_ignore_signals,
            )
            self._batches = iter(batches)
        self._next = position + self.reading.step
        return next(self._batches)

    def close(self) -> None:
        self._batches = None  # its processes end with it

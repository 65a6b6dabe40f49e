"""Batches straight from picture files: our own decoding in torch's DataLoader."""

from __future__ import annotations

import itertools
import os
import signal
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from .decode import RejectedImageError, decode, read_bytes
from .loader import Batching, StagedLoader
from .order import Order
from .prepare import Catalogue
from .scale import scale

NONE_LEFT = "none of the picture files can be decoded any more"


class NoneLeftError(UserError):
    """Every file that was good is damaged or gone."""


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
        raise NoneLeftError(NONE_LEFT)


def _outlast_signals(_: int) -> None:
    """In a loader's process: a run that is asked to end finishes its step first, and needs its batch for that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # by its own loader or by the system: to torch any other end of it is an error that ends the run
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


class _Batches:
    """Numbers of the images of each batch of a rank, from a position on, without end."""

    def __init__(self, count: int, batching: Batching, position: int) -> None:
        self.order, self.batching, self.position = Order(count, batching.seed), batching, position

    def __iter__(self) -> Iterator[list[int]]:
        batching = self.batching
        for start in itertools.count(self.position + batching.rank * batching.batch_size, batching.step):
            yield self.order.place(torch.arange(start, start + batching.batch_size))[0].tolist()


def stacked(pictures: list[np.ndarray]) -> Tensor:
    """A batch of pictures: uint8 [N, size, size, 3]."""
    return torch.from_numpy(np.stack(pictures))


class TorchLoader(StagedLoader):
    """Decoding as for a pack, in the processes of torch's DataLoader: what works everywhere."""

    def __init__(
        self, catalogue: Catalogue, batching: Batching, crop: str, *, workers: int | None = None, prefetch: int = 2
    ) -> None:
        super().__init__(len(catalogue.requests), batching)
        self.pictures = Pictures(catalogue, batching.stored, crop)
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
                batch_sampler=_Batches(self.count, self.batching, position),
                collate_fn=stacked,
                num_workers=self._workers,
                prefetch_factor=self._prefetch if self._workers else None,
                worker_init_fn=_outlast_signals,
            )
            self._batches = iter(batches)
        self._next = position + self.batching.step
        try:
            return next(self._batches)
        except NoneLeftError:
            raise NoneLeftError(NONE_LEFT) from None  # without the other process's traceback
        except RuntimeError as error:  # a process was ended from outside
            warnings.warn(f"{str(error).splitlines()[0]}; this batch is read here, the next by new ones", stacklevel=2)
            self.close()
            return self.pixels(ids)

    def close(self) -> None:
        batches, self._batches = self._batches, None
        if (end := getattr(batches, "_shutdown_workers", None)) is not None:  # who else holds it may hold it for long
            end()

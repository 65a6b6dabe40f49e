"""Batches straight from picture files, decoded in the processes of torch's DataLoader."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import shutil
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..device import core_count
from ..errors import UserError
from .decode import Decoding, RejectedImageError, decode, read_bytes
from .loader import Batching, StagedLoader
from .order import Order
from .prepare import Catalogue
from .scale import scale

_PATIENCE = 120  # seconds without a batch, after which loader processes are given up
_SHARED_MEMORY = Path("/dev/shm")  # by which torch's processes pass batches on Linux
NONE_LEFT = "none of the picture files can be decoded any more"


class NoneLeftError(UserError):
    """Every file that was good is damaged or gone."""


class Pictures(Dataset[np.ndarray]):
    """Maps an image number to uint8 [size, size, 3], decoded on access."""

    def __init__(self, catalogue: Catalogue, size: int, decoding: Decoding) -> None:
        """`size` is the height and width of the result."""
        self.entries, self.size, self.decoding = catalogue.entries, size, decoding

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: int) -> np.ndarray:
        """Decode file `number`; one damaged or removed since it was listed gives way to the next, with a warning."""
        for shift in range(len(self)):
            entry = self.entries[(number + shift) % len(self)]
            try:
                data = read_bytes(entry.path, entry.offset, entry.length)
                return scale([decode(data, self.decoding).pixels], self.size)[0]
            except RejectedImageError as error:
                warnings.warn(
                    f"{entry.name} was good and is not any more ({error}); the next one takes its place", stacklevel=2
                )
        raise NoneLeftError(NONE_LEFT)


def _outlast_signals(_: int) -> None:
    """Ignore the run's stop signals in a loader process: the run finishes its step first and needs the batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # torch ends the run when a process exits with anything but 0
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


@contextlib.contextmanager
def _no_garbage_of_ours() -> Iterator[None]:
    """Keep processes that are forked inside from destroying what lies in this one's reference cycles.

    A destructor may wait for threads, as that of DALI's pipeline does. A fork has none of them, so it would never end.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _Batches:
    """Endless batches of image numbers of one rank, from a position on."""

    def __init__(self, count: int, batching: Batching, position: int) -> None:
        self.order, self.batching, self.position = Order(count, batching.seed), batching, position

    def __iter__(self) -> Iterator[list[int]]:
        batching = self.batching
        for start in itertools.count(self.position + batching.rank * batching.batch_size, batching.step):
            yield self.order.place(torch.arange(start, start + batching.batch_size))[0].tolist()


def stacked(pictures: list[np.ndarray]) -> Tensor:
    """Stack pictures into a batch: uint8 [N, size, size, 3]."""
    return torch.from_numpy(np.stack(pictures))


def _shared(pictures: list[np.ndarray]) -> Tensor:
    """`stacked`, in shared memory. Left to torch's queue, a lack of it would be no error, and the run wait forever."""
    return stacked(pictures).share_memory_()


def _lack_of_memory(message: str) -> str | None:
    """What to do about `message`, an error of a loader process, where it tells that shared memory is full."""
    signs = ("/torch_", "shared memory", "Bus error", "No space left on device")
    others = ("Too many open files", "Permission denied")
    if not any(sign in message for sign in signs) or any(sign in message for sign in others):
        return None
    if not _SHARED_MEMORY.is_dir():
        return None
    room = shutil.disk_usage(_SHARED_MEMORY)
    size = f"{room.total / 1e6:,.1f} MB, {room.free / 1e6:,.1f} free"
    return (
        f"{_SHARED_MEMORY} is too small for loader processes ({size}); "
        "from here on this process reads alone; better: docker run --shm-size=1g or --ipc=host, or --loader packed"
    )


class TorchLoader(StagedLoader):
    """Batches that torch's DataLoader decodes, with the same pixels as a pack; works on every platform."""

    def __init__(
        self,
        catalogue: Catalogue,
        batching: Batching,
        decoding: Decoding,
        *,
        workers: int | None = None,
        prefetch: int = 2,
    ) -> None:
        """Start no process yet.

        Args:
            catalogue: The good files of the source.
            batching: Size, order and device of the batches.
            decoding: As of the catalogue.
            workers: Processes that decode; None means 2, or 1 on one core; 0 decodes in this process.
            prefetch: Batches that each process decodes ahead.
        """
        super().__init__(len(catalogue.entries), batching)
        self.pictures = Pictures(catalogue, batching.stored, decoding)
        self._workers, self._prefetch = min(2, core_count()) if workers is None else workers, prefetch
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
                collate_fn=_shared if self._workers else stacked,
                num_workers=self._workers,
                prefetch_factor=self._prefetch if self._workers else None,
                worker_init_fn=_outlast_signals,
                timeout=_PATIENCE if self._workers else 0,
            )
            with _no_garbage_of_ours():
                self._batches = iter(batches)
        self._next = position + self.batching.step
        try:
            return next(self._batches)
        except NoneLeftError:
            raise NoneLeftError(NONE_LEFT) from None  # drop the traceback of the loader process
        except RuntimeError as error:  # something outside ended a loader process
            if lack := _lack_of_memory(str(error)):
                self._workers = 0
            first_line = str(error).partition("\n")[0]
            warnings.warn(lack or f"{first_line}; this batch is read here, the next by new ones", stacklevel=2)
            self.close()
            return self.pixels(ids)

    def close(self) -> None:
        batches, self._batches = self._batches, None
        # at once: another reference to the iterator, say in a traceback, would keep its processes alive
        if (shut_down := getattr(batches, "_shutdown_workers", None)) is not None:
            shut_down()
            for process in getattr(batches, "_workers", ()):
                process.kill()  # one that hangs takes no SIGTERM, and would keep this process from ending

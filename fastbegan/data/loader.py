"""Batches of images in an order that follows from (seed, position), whatever holds the images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbegan_kernels import normalize_images

from .order import Order, corners, mirrored

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Batching:
    """What is read and how: one for all loaders of a run.

    `batch_size` is what this rank reads of the `world * batch_size` images of a step; images are stored with
    2 * `jitter` pixels more than `size` in each direction, of which a random window is shown.
    """

    batch_size: int
    size: int
    seed: int
    flip: bool = True
    jitter: int = 0
    rank: int = 0
    world: int = 1
    device: torch.device = _CPU

    @property
    def stored(self) -> int:
        """Side of an image as it is stored."""
        return self.size + 2 * self.jitter

    @property
    def step(self) -> int:
        """Images that all ranks read at once."""
        return self.batch_size * self.world


class Loader(ABC):
    """Batches by position, the number of images that all ranks have read since the start of the run.

    Before a step the host calls `prepare(position)`; the step itself, which may be a CUDA graph, takes
    `current(position)` with the same position in a tensor on the device.
    """

    def __init__(self, count: int, batching: Batching) -> None:
        self.count, self.batching = count, batching
        self.order = Order(count, batching.seed)

    def ids(self, position: int) -> Tensor:
        """Numbers of the images of this rank's batch at `position`: int64 [batch_size], on the CPU."""
        return self._place(position)[0]

    @abstractmethod
    def prepare(self, position: int) -> None:
        """What the host has to do before `current` can give the batch at `position`."""

    @abstractmethod
    def current(self, position: Tensor) -> Tensor:
        """The batch at `position` [] int64: float32 [batch_size, 3, size, size] in [-1, 1], channels_last."""

    @abstractmethod
    def pixels(self, ids: Tensor) -> Tensor:
        """These images as they are stored: uint8 [N, stored, stored, 3]."""

    def batch(self, position: int) -> Tensor:
        """`prepare` and `current`."""
        self.prepare(position)
        return self.current(torch.tensor(position, device=self.batching.device))

    def close(self) -> None:  # noqa: B027  # most have nothing to end
        """End what works in the background."""

    def _place(self, position: int) -> tuple[Tensor, Tensor]:
        first = position + self.batching.rank * self.batching.batch_size
        return self.order.place(torch.arange(first, first + self.batching.batch_size))

    def _window(self, ids: Tensor, epochs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Which of these are mirrored and where their windows lie, where that is asked for."""
        batching = self.batching
        flip = mirrored(batching.seed, ids, epochs) if batching.flip else None
        corner = corners(batching.seed, ids, epochs, 2 * batching.jitter) if batching.jitter else None
        return flip, corner


class StagedLoader(Loader):
    """A loader whose images come from the host, batch by batch, to where the step reads them.

    On a GPU a batch is copied on a stream of its own, from pinned memory, while the step before is at work.
    """

    def __init__(self, count: int, batching: Batching) -> None:
        super().__init__(count, batching)
        self._staged: list[Tensor] = []  # where they are, they stay: a CUDA graph reads them there
        # pinned memory, where it arrived on the device (DALI's own memory, maybe), and when that was read
        self._flights: list[tuple[list[Tensor], list[Tensor], torch.cuda.Event]] = []
        self._stream = torch.cuda.Stream(batching.device) if batching.device.type == "cuda" else None

    @abstractmethod
    def _read(self, position: int, ids: Tensor, out: Tensor) -> Tensor:
        """The images of this batch as they are stored, uint8 [N, stored, stored, 3]: in `out`, or elsewhere."""

    def prepare(self, position: int) -> None:
        ids, epochs = self._place(position)
        window = [value for value in self._window(ids, epochs) if value is not None]
        if not self._staged:
            self._staged = self._buffers(window, device=self.batching.device)
        if self._stream is None:
            self._fill(self._staged, self._read(position, ids, self._staged[0]), window)
        else:
            self._send(position, ids, window, self._stream)

    def _buffers(self, window: list[Tensor], **options: Any) -> list[Tensor]:
        side = self.batching.stored
        images = torch.empty(self.batching.batch_size, side, side, 3, dtype=torch.uint8, **options)
        return [images, *(torch.empty(value.shape, dtype=value.dtype, **options) for value in window)]

    def _fill(self, buffers: list[Tensor], images: Tensor, window: list[Tensor]) -> None:
        for buffer, value in zip(buffers, [images, *window], strict=True):
            if buffer is not value:
                buffer.copy_(value)

    def _send(self, position: int, ids: Tensor, window: list[Tensor], stream: torch.cuda.Stream) -> None:
        if len(self._flights) == 2:
            pinned, arrived, landed = self._flights.pop(0)
            landed.synchronize()  # two batches ago: what it came from may be used again
        else:
            pinned, landed = self._buffers(window, pin_memory=True), torch.cuda.Event()
        images = self._read(position, ids, pinned[0])
        decoded_there = images.device.type == "cuda"
        self._fill(pinned, pinned[0] if decoded_there else images, window)
        with torch.cuda.stream(stream):
            first = images.clone() if decoded_there else pinned[0]
            arrived = [value.to(self.batching.device, non_blocking=True) for value in (first, *pinned[1:])]
        if decoded_there:
            stream.synchronize()  # for the copy alone: DALI takes its buffer back with the next batch
        now = torch.cuda.current_stream(self.batching.device)
        now.wait_stream(stream)
        for target, value in zip(self._staged, arrived, strict=True):  # after the step before, which reads it
            target.copy_(value)
        landed.record(now)
        self._flights.append((pinned, arrived, landed))

    def current(self, position: Tensor) -> Tensor:
        assert self._staged, "prepare was not called"
        images, *window = self._staged
        flip = window[0] if self.batching.flip else None
        corner = window[-1] if self.batching.jitter else None
        return normalize_images(images, None, flip, corner, margin=2 * self.batching.jitter)


class PackedLoader(StagedLoader):
    """From a packed set, memory-mapped or not: uint8 [count, stored, stored, 3]."""

    def __init__(self, images: np.ndarray, batching: Batching) -> None:
        super().__init__(len(images), batching)
        self.images = images

    def pixels(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(self.images[ids.numpy()])

    def _read(self, position: int, ids: Tensor, out: Tensor) -> Tensor:
        np.take(self.images, ids.numpy(), axis=0, out=out.numpy(), mode="clip")  # "raise" would copy it once more
        return out


class ResidentLoader(Loader):
    """From the device's own memory, which holds all images: the host only sends each epoch's order, once."""

    def __init__(self, images: np.ndarray, batching: Batching) -> None:
        """As `PackedLoader`; a step reads at most as many images as there are, else ValueError."""
        super().__init__(len(images), batching)
        if batching.step > len(images):
            raise ValueError(f"a step reads {batching.step} images; accepted: up to the {len(images)} there are")
        self._resident = torch.tensor(images, device=batching.device)
        self._two_orders = torch.zeros(2, len(images), dtype=torch.int64, device=batching.device)
        self._held: list[int | None] = [None, None]  # the epochs whose orders those are
        on_gpu = batching.device.type == "cuda"
        self._pinned = torch.empty_like(self._two_orders, device="cpu", pin_memory=on_gpu)
        self._landed = [torch.cuda.Event() for _ in range(2)] if on_gpu else []  # when those were copied

    def pixels(self, ids: Tensor) -> Tensor:
        return self._resident[ids.to(self._resident.device)].cpu()

    def prepare(self, position: int) -> None:
        """Send the orders of the epochs that the step at `position` lies in."""
        for epoch in {position // self.count, (position + self.batching.step - 1) // self.count}:
            if self._held[slot := epoch % 2] != epoch:
                if self._landed:
                    self._landed[slot].synchronize()  # of two epochs ago
                self._pinned[slot].copy_(self.order.epoch(epoch))
                self._two_orders[slot].copy_(self._pinned[slot], non_blocking=True)
                if self._landed:
                    self._landed[slot].record(torch.cuda.current_stream(self.batching.device))
                self._held[slot] = epoch

    def current(self, position: Tensor) -> Tensor:
        batching = self.batching
        first = position + batching.rank * batching.batch_size
        slots = first + torch.arange(batching.batch_size, device=position.device)
        epochs = slots // self.count
        ids = self._two_orders[epochs % 2, slots % self.count]
        flip, corner = self._window(ids, epochs)
        return normalize_images(self._resident, ids, flip, corner, margin=2 * batching.jitter)

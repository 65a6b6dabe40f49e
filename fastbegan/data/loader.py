"""Batches of images in an order that follows from (seed, position), wherever the images are stored."""

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
    """The batches of a loader: size, order, augmentation, and the device that they go to."""

    batch_size: int
    """Images that this rank reads per step; all ranks together read `world * batch_size`."""
    size: int
    """Height and width of a batch, in pixels."""
    seed: int
    flip: bool = True
    """Whether about half of the images are mirrored, others in each epoch."""
    jitter: int = 0
    """Images are stored with 2 * `jitter` extra rows and columns; a batch shows a random window of each."""
    rank: int = 0
    world: int = 1
    device: torch.device = _CPU

    @property
    def stored(self) -> int:
        """Height and width of an image as it is stored."""
        return self.size + 2 * self.jitter

    @property
    def step(self) -> int:
        """Images that all ranks read per step."""
        return self.batch_size * self.world


class Loader(ABC):
    """Batches by position: the number of images that all ranks have read since the start of the run.

    Before a step the host calls `prepare(position)`. The step, which may be a CUDA graph, then calls
    `current(position)` with the same position as a tensor on the device.
    """

    def __init__(self, count: int, batching: Batching) -> None:
        """`count` is the number of images."""
        self.count, self.batching = count, batching
        self.order = Order(count, batching.seed)

    def ids(self, position: int) -> Tensor:
        """Image numbers of this rank's batch at `position`: int64 [batch_size], on the CPU."""
        return self._place(position)[0]

    @abstractmethod
    def prepare(self, position: int) -> None:
        """Do the host's part, after which `current` can return the batch at `position`."""

    @abstractmethod
    def current(self, position: Tensor) -> Tensor:
        """The batch at `position` [] int64: float32 [batch_size, 3, size, size] in [-1, 1], channels_last."""

    @abstractmethod
    def pixels(self, ids: Tensor) -> Tensor:
        """Images with the numbers `ids` as they are stored: uint8 [N, stored, stored, 3]."""

    def batch(self, position: int) -> Tensor:
        """Call `prepare`, then return `current`."""
        self.prepare(position)
        return self.current(torch.tensor(position, device=self.batching.device))

    def close(self) -> None:  # noqa: B027  # most loaders have no background work
        """End background threads and processes."""

    def _place(self, position: int) -> tuple[Tensor, Tensor]:
        first = position + self.batching.rank * self.batching.batch_size
        return self.order.place(torch.arange(first, first + self.batching.batch_size))

    def _window(self, ids: Tensor, epochs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Whether each image is mirrored, and the corners of the windows; None where the run does not use it."""
        batching = self.batching
        flip = mirrored(batching.seed, ids, epochs) if batching.flip else None
        corner = corners(batching.seed, ids, epochs, 2 * batching.jitter) if batching.jitter else None
        return flip, corner


class StagedLoader(Loader):
    """A loader that copies each batch from the host into staging buffers, which the step reads.

    On a GPU the copy runs from pinned memory on a separate stream, while the previous step computes.
    """

    def __init__(self, count: int, batching: Batching) -> None:
        super().__init__(count, batching)
        self._staged: list[Tensor] = []  # at fixed addresses, which a CUDA graph has captured
        # two batches in flight: pinned buffers, their copies on the device, and an event after those were read
        self._flights: list[tuple[list[Tensor], list[Tensor], torch.cuda.Event]] = []
        self._stream = torch.cuda.Stream(batching.device) if batching.device.type == "cuda" else None

    @abstractmethod
    def _read(self, position: int, ids: Tensor, out: Tensor) -> Tensor:
        """Images `ids` as they are stored, uint8 [N, stored, stored, 3]; returns `out`, or another tensor."""

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
            landed.synchronize()  # the copy of two batches ago has ended, so its pinned buffers are free
        else:
            pinned, landed = self._buffers(window, pin_memory=True), torch.cuda.Event()
        images = self._read(position, ids, pinned[0])
        on_gpu = images.device.type == "cuda"  # DALI with nvJPEG decodes there
        self._fill(pinned, pinned[0] if on_gpu else images, window)
        with torch.cuda.stream(stream):
            first = images.clone() if on_gpu else pinned[0]
            arrived = [value.to(self.batching.device, non_blocking=True) for value in (first, *pinned[1:])]
        if on_gpu:
            stream.synchronize()  # DALI reuses its buffer with the next batch, so the clone has to end first
        step_stream = torch.cuda.current_stream(self.batching.device)
        step_stream.wait_stream(stream)
        for target, value in zip(self._staged, arrived, strict=True):  # queued after the previous step, which reads it
            target.copy_(value)
        landed.record(step_stream)
        self._flights.append((pinned, arrived, landed))

    def current(self, position: Tensor) -> Tensor:
        assert self._staged, "prepare was not called"
        images, *window = self._staged
        flip = window[0] if self.batching.flip else None
        corner = window[-1] if self.batching.jitter else None
        return normalize_images(images, None, flip, corner, margin=2 * self.batching.jitter)


class PackedLoader(StagedLoader):
    """Batches from a packed set, memory-mapped or not: uint8 [count, stored, stored, 3]."""

    def __init__(self, images: np.ndarray, batching: Batching) -> None:
        super().__init__(len(images), batching)
        self.images = images

    def pixels(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(self.images[ids.numpy()])

    def _read(self, position: int, ids: Tensor, out: Tensor) -> Tensor:
        np.take(self.images, ids.numpy(), axis=0, out=out.numpy(), mode="clip")  # "raise" would buffer a second copy
        return out


class ResidentLoader(Loader):
    """Batches from the device's memory, which holds all images; the host only sends each epoch's order, once."""

    def __init__(self, images: np.ndarray, batching: Batching) -> None:
        """`images` are those of `PackedLoader`. Raises ValueError where a step reads more images than there are."""
        super().__init__(len(images), batching)
        if batching.step > len(images):
            raise ValueError(f"a step reads {batching.step} images; accepted: up to the {len(images)} there are")
        self._resident = torch.tensor(images, device=batching.device)
        self._two_orders = torch.zeros(2, len(images), dtype=torch.int64, device=batching.device)
        self._epochs: list[int | None] = [None, None]  # whose orders are in `_two_orders`
        on_gpu = batching.device.type == "cuda"
        self._pinned = torch.empty_like(self._two_orders, device="cpu", pin_memory=on_gpu)
        self._landed = [torch.cuda.Event() for _ in range(2)] if on_gpu else []  # after the copy of each order

    def pixels(self, ids: Tensor) -> Tensor:
        return self._resident[ids.to(self._resident.device)].cpu()

    def prepare(self, position: int) -> None:
        """Send the order of each epoch that the step at `position` reads: one, or two at an epoch's end."""
        for epoch in {position // self.count, (position + self.batching.step - 1) // self.count}:
            if self._epochs[slot := epoch % 2] != epoch:
                if self._landed:
                    self._landed[slot].synchronize()  # the copy of two epochs ago has left the pinned slot
                self._pinned[slot].copy_(self.order.epoch(epoch))
                self._two_orders[slot].copy_(self._pinned[slot], non_blocking=True)
                if self._landed:
                    self._landed[slot].record(torch.cuda.current_stream(self.batching.device))
                self._epochs[slot] = epoch

    def current(self, position: Tensor) -> Tensor:
        batching = self.batching
        first = position + batching.rank * batching.batch_size
        slots = first + torch.arange(batching.batch_size, device=position.device)
        epochs = slots // self.count
        ids = self._two_orders[epochs % 2, slots % self.count]
        flip, corner = self._window(ids, epochs)
        return normalize_images(self._resident, ids, flip, corner, margin=2 * batching.jitter)

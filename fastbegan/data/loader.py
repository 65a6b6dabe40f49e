"""Batches of a packed set in an order that follows from (seed, position): nothing to save but the position."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbegan_kernels import normalize_images

from .. import counter


class PackedLoader:
    """Shuffled batches, every image once an epoch, batches running on across epochs.

    `position` counts the images read since the start of the run. Image number `position` of a run is the same
    whatever the batch size.
    """

    def __init__(
        self,
        images: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        flip: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        """`images` is uint8 [count, size, size, 3], memory-mapped or not."""
        self.images, self.batch_size, self.seed, self.flip, self.device = (
            images,
            batch_size,
            seed,
            flip,
            device,
        )
        self._orders: dict[int, Tensor] = {}
        self._ready: Tensor | None = None

    def ids(self, position: int) -> Tensor:
        """Numbers of the images of the batch that starts at `position`: int64 [batch_size]."""
        return self._place(position)[0]

    def batch(self, position: int) -> Tensor:
        """The batch that starts at `position`: float32 [batch_size, 3, size, size] in [-1, 1], channels_last."""
        ids, epochs = self._place(position)
        images = torch.from_numpy(self.images[ids.numpy()]).to(self.device)
        flip = None
        if self.flip:
            flip = (counter.bits(self.seed, counter.FLIP, (epochs << 40) + ids) & 1).bool().to(self.device)
        return normalize_images(images, flip=flip)

    def prepare(self, position: int) -> None:
        """What the host has to do before `current` can give the batch that starts at `position`."""
        batch = self.batch(position)
        if self._ready is None:
            self._ready = torch.empty_like(batch)  # where it is, it stays: a CUDA graph reads it there
        self._ready.copy_(batch)

    def current(self, position: Tensor) -> Tensor:
        """The batch that was prepared; `position` [] int64 is where it starts, on the device."""
        assert self._ready is not None, "prepare was not called"
        return self._ready

    def _place(self, position: int) -> tuple[Tensor, Tensor]:
        count = len(self.images)
        slots = torch.arange(position, position + self.batch_size)
        epochs = slots // count
        ids = torch.empty_like(slots)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            ids[here] = self._order(epoch)[slots[here] % count]
        return ids, epochs

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = counter.permutation(self.seed, counter.ORDER, epoch, len(self.images))
        return self._orders[epoch]


class ResidentLoader(PackedLoader):
    """The same batches with all images in the device's memory: the host only sends each epoch's order, once."""

    def __init__(self, images: np.ndarray, *, batch_size: int, **options: Any) -> None:
        """As `PackedLoader`; batch_size is at most the number of images, else ValueError."""
        super().__init__(images, batch_size=batch_size, **options)
        if batch_size > len(images):
            raise ValueError(f"batch_size is {batch_size}; accepted: up to the {len(images)} images there are")
        self._resident = torch.tensor(images, device=self.device)
        self._two_orders = torch.zeros(2, len(images), dtype=torch.int64, device=self.device)
        self._held: list[int | None] = [None, None]  # the epochs whose orders those are

    def prepare(self, position: int) -> None:
        """Send the orders of the epochs that the batch at `position` lies in."""
        count = len(self.images)
        for epoch in {position // count, (position + self.batch_size - 1) // count}:
            if self._held[epoch % 2] != epoch:
                self._two_orders[epoch % 2].copy_(self._order(epoch))
                self._held[epoch % 2] = epoch

    def current(self, position: Tensor) -> Tensor:
        """The batch that starts at `position` [] int64, gathered, mirrored and normalised on the device."""
        slots = position + torch.arange(self.batch_size, device=self.device)
        epochs = slots // len(self.images)
        ids = self._two_orders[epochs % 2, slots % len(self.images)]
        flip = None
        if self.flip:
            flip = (counter.bits(self.seed, counter.FLIP, (epochs << 40) + ids) & 1).bool()
        return normalize_images(self._resident, ids, flip)


def make_loader(
    images: np.ndarray, *, batch_size: int, seed: int, flip: bool, device: torch.device
) -> tuple[PackedLoader, str]:
    """The loader for a device and one line about it: resident where the images fill at most half of free memory."""
    options = {"batch_size": batch_size, "seed": seed, "flip": flip, "device": device}
    if device.type != "cuda":
        return PackedLoader(images, **options), "from the packed file"
    free = torch.cuda.mem_get_info(device)[0]
    size = f"{images.nbytes / 2**30:.2f} of {free / 2**30:.1f} GiB free"
    if images.nbytes <= free / 2:
        return ResidentLoader(images, **options), f"resident on the GPU, {size}"
    return PackedLoader(images, **options), f"copied batch by batch: resident they would take {size}"

"""Batches of a packed set in an order that follows from (seed, position): nothing to save but the position."""

from __future__ import annotations

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

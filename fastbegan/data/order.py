"""Order, mirroring and cropping of images as functions of (seed, position): a run saves no state of them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import counter

# image numbers take the low bits of a counter, the epoch the high ones
_EPOCH_BITS = 40


class Order:
    """The order in which a run reads `count` images: each once per epoch, every epoch in another order.

    Slot n of a run is the same image for any batch size and any number of ranks. Batches may cross epochs.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epochs: dict[int, Tensor] = {}

    def place(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Image numbers and epochs of `slots` [N]: int64 [N] each, on the CPU."""
        epochs = slots // self.count
        ids = torch.empty_like(slots)
        for epoch in epochs.unique().tolist():
            here = epochs == epoch
            ids[here] = self.epoch(epoch)[slots[here] % self.count]
        return ids, epochs

    def epoch(self, number: int) -> Tensor:
        """The order of one epoch: int64 [count], on the CPU."""
        if number not in self._epochs:
            self._epochs = {e: order for e, order in self._epochs.items() if e >= number - 1}
            self._epochs[number] = counter.permutation(self.seed, counter.ORDER, number, self.count)
        return self._epochs[number]


def mirrored(seed: int, ids: Tensor, epochs: Tensor) -> Tensor:
    """Choose the images that are mirrored: about half, others in each epoch.

    `ids` and `epochs` are int64 [N], the images and the epochs of their slots. Returns bool [N].
    """
    return (counter.bits(seed, counter.FLIP, (epochs << _EPOCH_BITS) + ids) & 1).bool()


def corners(seed: int, ids: Tensor, epochs: Tensor, margin: int) -> Tensor:
    """Choose the window of each image, another one in each epoch.

    `ids` and `epochs` are int64 [N], the images and the epochs of their slots. Returns top and left, int64 [N, 2],
    uniform in 0 to `margin`.
    """
    place = ((epochs << _EPOCH_BITS) + ids)[:, None] * 2 + torch.arange(2, device=ids.device)
    return (counter.uniform(seed, counter.JITTER, place) * (margin + 1)).long()

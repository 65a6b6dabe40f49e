"""A net's gradients as one flat tensor: the mean over the parts of a batch and over ranks."""

from __future__ import annotations

import torch
from torch import nn

from .ranks import Flight, Ranks


class Bucket:
    """Collects a net's gradients from each part of a batch, and returns their mean over all parts and ranks.

    A step calls `reset`, then for each batch `begin`, `collect` once per part, and `finish`. The sum over ranks starts
    in the last `collect` and runs while the device computes what does not need it. One flat tensor is one message, and
    one node of a CUDA graph. DistributedDataParallel would not work here: its hooks on parameters never fire, because
    the leaves of these passes are packed weights.
    """

    def __init__(self, net: nn.Module, ranks: Ranks, parts: int) -> None:
        """`parts` is the number of calls of `collect` before `finish`. All parameters are dense and of one type."""
        self._parameters = list(net.parameters())
        self._ranks, self._parts, self._collected = ranks, parts, 0
        first = self._parameters[0]
        self._flat = torch.zeros(sum(p.numel() for p in self._parameters), dtype=first.dtype, device=first.device)
        pieces = self._flat.split([p.numel() for p in self._parameters])
        # fused Adam requires gradients in the layout of the parameters
        self._views = [piece.as_strided(p.shape, p.stride()) for piece, p in zip(pieces, self._parameters, strict=True)]
        self._flight: Flight | None = None

    def reset(self) -> None:
        """Forget all gradients: a step begins."""
        self._flight, self._collected = None, 0

    def begin(self) -> None:
        """Begin a batch, or repeat it. A sum over ranks that has started is kept."""
        if self._flight is None:
            self._collected = 0

    def collect(self) -> None:
        """Move the gradients of one part from the parameters to the sum; after the last part, sum over ranks."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        for parameter in self._parameters:
            parameter.grad = None
        if self._flight is not None:  # a repeated batch: the other ranks have these gradients already
            return
        # the first part overwrites what the last step left, which spares setting it to zero
        (torch._foreach_add_ if self._collected else torch._foreach_copy_)(self._views, gradients)
        self._collected += 1
        if self._collected == self._parts:
            self._flat.mul_(1 / (self._parts * self._ranks.world))
            self._flight = None if self._ranks.alone else self._ranks.begin_sum(self._flat)

    def finish(self) -> None:
        """Wait for the sum, and set each parameter's `grad` to its part of the mean."""
        if self._flight is not None:
            self._flight.land()
        self.reset()
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view

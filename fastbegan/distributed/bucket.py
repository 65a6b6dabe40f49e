"""A net's gradients as one flat tensor: the mean over the parts of a batch and over ranks."""

from __future__ import annotations

import torch
from torch import nn

from .ranks import Flight, Ranks


class Bucket:
    """Takes the gradients off a net's parameters once a part of a batch, and gives back the mean over all parts.

    Sums over ranks travel while the device goes on with what does not need them. One flat tensor is one message and one
    node of a CUDA graph. DistributedDataParallel waits for hooks on parameters, which are no leaves of these passes.
    """

    def __init__(self, net: nn.Module, ranks: Ranks, parts: int) -> None:
        """`parts` is how often `collect` is called before `finish`; the net's parameters are dense, of one type."""
        self._parameters = list(net.parameters())
        self._ranks, self._parts, self._collected = ranks, parts, 0
        first = self._parameters[0]
        self._flat = torch.zeros(sum(p.numel() for p in self._parameters), dtype=first.dtype, device=first.device)
        pieces = self._flat.split([p.numel() for p in self._parameters])
        # in the parameters' own layout, which fused Adam asks for
        self._views = [piece.as_strided(p.shape, p.stride()) for piece, p in zip(pieces, self._parameters, strict=True)]
        self._flight: Flight | None = None

    def reset(self) -> None:
        """A step begins: nothing of it is there yet."""
        self._flight, self._collected = None, 0

    def begin(self) -> None:
        """A batch begins, or begins again: what ranks have summed up already stays."""
        if self._flight is None:
            self._collected = 0

    def collect(self) -> None:
        """Take a part's gradients off the parameters; after the last part, begin the sum over ranks."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        for parameter in self._parameters:
            parameter.grad = None
        if self._flight is not None:
            return
        (torch._foreach_add_ if self._collected else torch._foreach_copy_)(self._views, gradients)
        self._collected += 1
        if self._collected == self._parts:
            self._flat.mul_(1 / (self._parts * self._ranks.world))
            self._flight = None if self._ranks.alone else self._ranks.begin_sum(self._flat)

    def finish(self) -> None:
        """Give the parameters the mean."""
        if self._flight is not None:
            self._flight.land()
        self.reset()
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view

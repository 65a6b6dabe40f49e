"""Memory as kernels read it, and sums of what their programs wrote."""

from __future__ import annotations

import torch
from torch import Tensor


def dense(x: Tensor | None) -> Tensor | None:
    """x, contiguous."""
    return None if x is None else x.contiguous()


def as_bytes(flags: Tensor | None) -> Tensor | None:
    """Booleans as bytes, without a copy."""
    return None if flags is None else flags.contiguous().view(torch.uint8)


def total(partial: Tensor, dim: int) -> Tensor:
    """The sum of the programs' float32 partials in a fixed order, in float64, as there may be thousands."""
    return partial.sum(dim, dtype=torch.float64).float()

"""Weight folding: nearest x2 followed by conv3x3 is one 4x4 transposed convolution of stride 2."""

from __future__ import annotations

import torch
from torch import Tensor


def fold_upsample(weight: Tensor) -> Tensor:
    """3x3 weights [K, C, 3, 3] of a conv after nearest x2 -> conv_transpose2d weights [C, K, 4, 4].

    Exact and linear, hence differentiable by its transpose. Sums in the weight's own dtype, under autocast too: fold
    float32 masters, then cast.
    """
    return _fold(_fold(weight, 2), 3).transpose(0, 1)


def _fold(weight: Tensor, dim: int) -> Tensor:
    # tap t = y - 2i + 1 of output y and input i sums the 3x3 taps that reach i through the two copies of it
    first, middle, last = weight.unbind(dim)
    return torch.stack((last, middle + last, first + middle, first), dim)

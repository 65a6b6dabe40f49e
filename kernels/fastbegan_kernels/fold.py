"""Weight folding: nearest x2 followed by conv3x3 is one 4x4 transposed convolution of stride 2, or four of 2x2."""

from __future__ import annotations

import torch
from torch import Tensor


def fold_upsample(weight: Tensor) -> Tensor:
    """3x3 weights [K, C, 3, 3] of a conv after nearest x2 -> conv_transpose2d weights [C, K, 4, 4].

    Exact and linear, hence differentiable by its transpose. Sums in the weight's own dtype, under autocast too: fold
    float32 masters, then cast.
    """
    return _fold(_fold(weight, 2), 3).transpose(0, 1)


def unfold_upsample(gradient: Tensor) -> Tensor:
    """The transpose of `fold_upsample`: gradients [C, K, 4, 4] -> [K, C, 3, 3]."""
    return _unfold(_unfold(gradient, 2), 3).transpose(0, 1)


def phases_of(folded: Tensor) -> Tensor:
    """Folded weights [C, K, 4, 4] by output phase: contiguous [4, K, 4, C] (phase, output, tap, input)."""
    channels, out = folded.shape[:2]
    # output 2i + p reads input i + p - 1 + a through tap 3 - p - 2a
    turned = folded.flip(2, 3).reshape(channels, out, 2, 2, 2, 2)  # [C, K, a, py, b, px]
    return turned.permute(3, 5, 1, 2, 4, 0).reshape(4, out, 4, channels)


def _fold(weight: Tensor, dim: int) -> Tensor:
    # tap t = y - 2i + 1 of output y and input i sums the 3x3 taps that reach i through the two copies of it
    first, middle, last = weight.unbind(dim)
    return torch.stack((last, middle + last, first + middle, first), dim)


def _unfold(gradient: Tensor, dim: int) -> Tensor:
    a, b, c, d = gradient.unbind(dim)
    return torch.stack((c + d, b + c, a + b), dim)

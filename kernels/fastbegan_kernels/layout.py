"""Memory formats at the border of an op, by the rule of nn.Conv2d.

Output and input gradient are channels_last if and only if the input or the weight is. The format of the incoming
gradient has no influence. The gradient of a weight has the weight's format. Kernels compute in channels_last, so only
borders convert.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(*tensors: Tensor) -> bool:
    """Whether torch's convolutions treat one of the tensors [A, B, H, W] as channels_last, judged by its strides.

    Slices of channels_last count. Where both formats fit the sizes (B = 1, 1x1 maps), the strides decide as well.
    """
    return any(map(_ascends, tensors))


def _ascends(x: Tensor) -> bool:
    """Whether strides grow in the order channel, column, row, sample."""
    if x.dim() != 4:
        return False
    sizes, strides, below = x.shape, x.stride(), 0
    for dim in (1, 3, 2, 0):
        of_one_value = dim == 0 and below == strides[1]  # [N, 1, 1, 1] is contiguous
        if sizes[dim] == 0 or strides[dim] < below or of_one_value:
            return False
        below = strides[dim] * sizes[dim]
    return strides[1] != 0


def lay_out(x: Tensor, channels_last: bool) -> Tensor:
    """x [A, B, H, W] as channels_last or contiguous, with the strides of that format for every size.

    Copies only where the memory has another order.
    """
    if channels_last:
        return x.contiguous(memory_format=torch.channels_last)
    x = x.contiguous()
    # a view would be recorded by autograd, and outputs of custom functions may not be changed in place as views
    return torch.ops.aten._unsafe_view(x.view(-1), x.shape) if is_channels_last(x) else x

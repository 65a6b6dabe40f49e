"""Memory formats at the border of an op, by the rule of nn.Conv2d.

Output and input gradient are channels_last if and only if the input or the weight is, whatever the incoming gradient's
format. The gradient of a weight has the weight's format. Kernels compute in channels_last, and only borders convert.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(*tensors: Tensor) -> bool:
    """Whether torch's convolutions take one of the tensors [A, B, H, W] for channels_last, which they tell by strides.

    Slices of channels_last count. Sizes that fit both formats (B = 1, 1x1 maps) do not: the strides decide there, too.
    """
    return any(map(_ascends, tensors))


def _ascends(x: Tensor) -> bool:
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
    """x [A, B, H, W] in channels_last or contiguous, copied only where it is not; strides say so for every size."""
    if channels_last:
        return x.contiguous(memory_format=torch.channels_last)
    x = x.contiguous()
    # no view to autograd: functions of ours give it out, and others may write into it
    return torch.ops.aten._unsafe_view(x.view(-1), x.shape) if is_channels_last(x) else x

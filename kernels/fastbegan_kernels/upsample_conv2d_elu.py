"""upsample_conv2d_elu: nearest x2, conv3x3, bias and activation without ever storing the upsampled tensor."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import reference
from .dispatch import choose
from .fold import fold_upsample


def upsample_conv2d_elu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "elu",
    alpha: float = 1.0,
    carry: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """As `reference.upsample_conv2d_elu`, in 4 taps an output pixel instead of 9 in the algebraic tier."""
    if choose(impl) == "reference":
        return reference.upsample_conv2d_elu(x, weight, bias, activation=activation, alpha=alpha, carry=carry)
    if weight.shape[2:] != (3, 3):
        raise ValueError(f"weight is {list(weight.shape)}; accepted: [out, in, 3, 3]")
    y = F.conv_transpose2d(x, fold_upsample(weight), bias, stride=2, padding=1)
    y = reference.activate(y, activation, alpha)
    return y if carry is None else reference.blend(F.interpolate(x, scale_factor=2.0, mode="nearest"), y, carry)

"""upsample_conv2d_elu: nearest x2, conv3x3, bias and activation without ever storing the upsampled tensor."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import reference
from .conv_stage import conv_stage
from .dispatch import asked_for


def upsample_conv2d_elu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    skip: Tensor | None = None,
    activation: str = "elu",
    alpha: float = 1.0,
    carry: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """As `reference.upsample_conv2d_elu`: x [N, C, H, W] -> [N, K, 2H, 2W], in 4 taps an output pixel instead of 9.

    weight is [K, C, 3, 3], or folded once for many calls (`fold`), [C, K, 4, 4]. The algebraic tier is one transposed
    convolution, the fused one computes its four output phases as matrix products over the low-resolution input, with
    bias, skip table and activation in the epilogue.
    """
    if asked_for(impl) == "reference":
        return reference.upsample_conv2d_elu(
            x, weight, bias, skip=skip, activation=activation, alpha=alpha, carry=carry
        )
    if carry is not None:
        reference.check_layer(x, weight, bias, kind="up", skip=skip, carry=carry)
    biases = None if bias is None else [bias]
    y = conv_stage(x, [weight], biases, kinds=["up"], skip=skip, activation=activation, alpha=alpha, impl=impl)
    return y if carry is None else reference.blend(F.interpolate(x, scale_factor=2.0, mode="nearest"), y, carry)

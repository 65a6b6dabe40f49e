"""upsample_conv2d_elu: nearest x2, conv3x3, bias and activation without ever storing the upsampled tensor."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import arguments, reference
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
    """Upsample by 2, convolve 3x3, add bias and skip, and apply an activation.

    y = act(conv3x3(nearest_x2(x), weight) + bias + skip). With `carry` the result is
    carry * nearest_x2(x) + (1 - carry) * y, BEGAN's vanishing residual (paper §3.5.1).

    Each output pixel depends on 2x2 pixels of x. So four products per output pixel and channel pair replace nine, with
    folded weights (`fold`), exactly, borders included. The algebraic tier is one transposed convolution. The fused tier
    computes four output phases as matrix products, with bias, skip and activation in the epilogue. The upsampled x is
    stored for `carry` only. `reference.upsample_conv2d_elu` is the plain twin.

    Gradients reach x, weight, bias, skip and carry. With create_graph=True they come from plain operations, so they can
    be differentiated again. With `skip` this raises RuntimeError, because the table is not kept: use impl="reference".

    Args:
        x: Input [N, C, H, W] in float32, bfloat16, float16 or float64, any memory format. Autocast casts it.
        weight: [K, C, 3, 3], or folded once for many calls (`fold`, kind "up") [C, K, 4, 4]; in x's dtype (any under
            autocast) and any memory format.
        bias: [K] in x's dtype or float32, or None.
        skip: Phase table [N, 3, 3, S, S, K] of `skip_phase_table` in x's dtype, or None. It stands for a map
            [N, K, 2H, 2W] that is added before the activation: one value per cell of the map and place in the cell
            (first, inner or last row and column). S divides 2H and 2W into cells of at least 2x2 pixels.
        activation: "elu", "relu", "leaky_relu", "silu" or "none".
        alpha: Scale of ELU or negative slope of leaky_relu, from 0; others ignore it.
        carry: A tensor with one number, in [0, 1] for a blend, or None. It needs K = C.
        impl: "reference", "algebraic" or "fused" forces a tier. None takes FASTBEGAN_IMPL from the environment, else
            the fastest form verified on this machine.

    Returns:
        [N, K, 2H, 2W] in x's dtype (autocast's where it is on). It is channels_last if x or weight is, else contiguous;
        with `carry` it has x's format.

    Raises:
        ValueError: Shapes or dtypes do not match, or an argument is not among those above.
        RuntimeError: The fused tier is forced where it cannot run: no GPU, no Triton or float64. Or a gradient with
            create_graph=True is taken with `skip`. Or a tensor kept for the backward was changed in place.
    """
    if asked_for(impl) == "reference":
        return reference.upsample_conv2d_elu(
            x, weight, bias, skip=skip, activation=activation, alpha=alpha, carry=carry
        )
    if carry is not None:
        arguments.check_layer(x, weight, bias, kind="up", skip=skip, carry=carry)
    biases = None if bias is None else [bias]
    y = conv_stage(x, [weight], biases, kinds=["up"], skip=skip, activation=activation, alpha=alpha, impl=impl)
    return y if carry is None else reference.blend(F.interpolate(x, scale_factor=2.0, mode="nearest"), y, carry)

"""conv2d_elu: convolution, bias, activation and optional residual carry."""

from __future__ import annotations

from torch import Tensor

from . import arguments, reference
from .conv_stage import conv_stage
from .dispatch import asked_for


def conv2d_elu(  # noqa: PLR0913
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: str = "same",
    activation: str = "elu",
    alpha: float = 1.0,
    carry: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Convolve, add a bias and apply an activation: y = act(conv2d(x, weight) + bias).

    With `carry` the result is carry * x + (1 - carry) * y, BEGAN's vanishing residual (paper §3.5.1).

    This is a `conv_stage` of one layer. Bias and activation run in the convolution's epilogue (fused tier) or in one
    kernel after it (algebraic tier). The backward keeps x, the weight and y. For silu it keeps the pre-activation, as
    silu's derivative does not follow from y. `reference.conv2d_elu` is the plain twin.

    Gradients reach x, weight, bias and carry. With create_graph=True they come from plain operations, so they can be
    differentiated again.

    Args:
        x: Input [N, C, H, W] in float32, bfloat16, float16 or float64, any memory format. Autocast casts it.
        weight: [K, C, k, k] as nn.Conv2d holds it, with odd k, in x's dtype (any under autocast) and any memory format.
        bias: [K] in x's dtype or float32, or None.
        stride: 1 or 2.
        padding: "same" pads k // 2 zeros on all sides. "end" needs stride 2 and k = 3, and pads one row below and one
            column to the right, as TensorFlow and the encoders of latent diffusion do.
        activation: "elu", "relu", "leaky_relu", "silu" or "none".
        alpha: Scale of ELU or negative slope of leaky_relu, from 0; others ignore it.
        carry: A tensor with one number, or None. It needs stride 1 and K = C.
        impl: "reference", "algebraic" or "fused" forces a tier. None takes FASTBEGAN_IMPL from the environment, else
            the fastest form verified on this machine.

    Returns:
        [N, K, ceil(H / stride), ceil(W / stride)], with padding "end" [N, K, H // 2, W // 2], in x's dtype (autocast's
        where it is on). It is channels_last if x or weight is, else contiguous; with `carry` it has x's format.

    Raises:
        ValueError: Shapes or dtypes do not match, or an argument is not among those above. The fused tier accepts k = 1
            and k = 3 only.
        RuntimeError: The fused tier is forced where it cannot run: no GPU, no Triton, float64, or padding "end".
    """
    kind = arguments.conv_kind(stride, padding)
    if asked_for(impl) == "reference":
        return reference.conv2d_elu(
            x, weight, bias, stride=stride, padding=padding, activation=activation, alpha=alpha, carry=carry
        )
    if carry is not None:
        arguments.check_layer(x, weight, bias, kind=kind, carry=carry)
    biases = None if bias is None else [bias]
    y = conv_stage(x, [weight], biases, kinds=[kind], activation=activation, alpha=alpha, impl=impl)
    return reference.blend(x, y, carry)

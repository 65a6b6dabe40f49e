"""conv2d_elu: convolution, bias, activation and optional residual carry."""

from __future__ import annotations

from torch import Tensor

from . import reference
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
    """As `reference.conv2d_elu`: x [N, C, H, W], weight [K, C, k, k] -> [N, K, H / stride, W / stride], channels_last.

    A stage of one layer (`conv_stage`): bias and activation are in the convolution's epilogue (fused tier) or one
    kernel behind it (algebraic), and only the output is kept; with silu, which cannot be told from its output, the
    pre-activation, and with a carry act(conv) itself.
    """
    kind = reference.conv_kind(stride, padding)
    if asked_for(impl) == "reference":
        return reference.conv2d_elu(
            x, weight, bias, stride=stride, padding=padding, activation=activation, alpha=alpha, carry=carry
        )
    if carry is not None:
        reference.check_layer(x, weight, bias, kind=kind, carry=carry)
    biases = None if bias is None else [bias]
    y = conv_stage(x, [weight], biases, kinds=[kind], activation=activation, alpha=alpha, impl=impl)
    return reference.blend(x, y, carry)

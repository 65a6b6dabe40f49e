"""conv2d_elu: convolution, bias, activation and optional residual carry."""

from __future__ import annotations

from torch import Tensor

from . import reference
from .dispatch import choose


def conv2d_elu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    activation: str = "elu",
    alpha: float = 1.0,
    carry: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """As `reference.conv2d_elu`. The algebraic tier is the same evaluation: the library's own convolution."""
    choose(impl)
    return reference.conv2d_elu(x, weight, bias, stride=stride, activation=activation, alpha=alpha, carry=carry)

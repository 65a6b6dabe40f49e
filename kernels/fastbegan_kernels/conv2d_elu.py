"""conv2d_elu: convolution, bias, activation and optional residual carry."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from ._gradients import fake_results, results
from .dispatch import autocast, choose, require_fused


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
    """As `reference.conv2d_elu`; kernels of 1x1 and 3x3, stride 1 and 2, channels_last.

    The algebraic tier is the library's own convolution. The fused tier computes bias and activation in the
    convolution's epilogue and keeps the output only; with silu, which cannot be told from its output, it keeps the
    pre-activation, and with a carry act(conv) itself.
    """
    if choose(impl) != "fused":
        return reference.conv2d_elu(x, weight, bias, stride=stride, activation=activation, alpha=alpha, carry=carry)
    reference.check_activation(activation, alpha)
    if weight.shape[2:] not in ((1, 1), (3, 3)) or stride not in (1, 2):
        raise ValueError(f"weight is {list(weight.shape)}, stride {stride}; accepted: 1x1 and 3x3, stride 1 and 2")
    require_fused(x, weight, bias)
    (x,) = autocast(x)
    y = _conv2d_elu(x, weight, bias, stride, "none" if activation == "silu" else activation, alpha)
    return reference.blend(x, F.silu(y) if activation == "silu" else y, carry)


@torch.library.custom_op("fastbegan::conv2d_elu", mutates_args=())
def _conv2d_elu(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, activation: str, alpha: float) -> Tensor:
    from .fused import launch

    return launch.conv2d_elu(x, weight, bias, stride=stride, activation=activation, alpha=alpha)


@_conv2d_elu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, activation: str, alpha: float) -> Tensor:
    padding = weight.shape[2] // 2
    height, width = ((size + 2 * padding - weight.shape[2]) // stride + 1 for size in x.shape[2:])
    shape = (x.shape[0], weight.shape[0], height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.custom_op("fastbegan::conv2d_elu_backward", mutates_args=())
def _conv2d_elu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, y: Tensor, stride: int, activation: str, alpha: float, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; those that `needs` does not name are empty."""
    from .fused import launch

    dz, db = launch.activation_backward(grad, y, activation=activation, alpha=alpha)
    fuse = needs[0] and stride == 1
    dx = launch.conv2d_elu_input_gradient(dz, weight)[0] if fuse else None
    padding = [weight.shape[2] // 2] * 2
    mask = [needs[0] and not fuse, needs[1], False]
    dw = None
    if any(mask) and x.numel():
        cast = weight.to(x.dtype)
        library_dx, dw, _ = torch.ops.aten.convolution_backward(
            dz, x, cast, None, [stride] * 2, padding, [1, 1], False, [0, 0], 1, mask
        )
        dx = library_dx if mask[0] else dx
    return results(dx, dw, db, x, weight, needs)


@_conv2d_elu_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, y: Tensor, stride: int, activation: str, alpha: float, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_results(x, weight, needs)


def _setup(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, *settings = inputs
    ctx.save_for_backward(x, weight, output)
    ctx.settings = settings
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, y = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.bias_dtype is not None and ctx.needs_input_grad[2]]
    dx, dw, db = _conv2d_elu_backward(grad, x, weight, y, *ctx.settings, needs)
    gradients = [dx if needs[0] else None, dw if needs[1] else None, db.to(ctx.bias_dtype) if needs[2] else None]
    return *gradients, None, None, None


_conv2d_elu.register_autograd(_backward, setup_context=_setup)

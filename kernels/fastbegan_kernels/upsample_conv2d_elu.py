"""upsample_conv2d_elu: nearest x2, conv3x3, bias and activation without ever storing the upsampled tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from ._gradients import fake_results, results
from .dispatch import autocast, choose, require_fused
from .fold import fold_upsample, phases_of, unfold_upsample


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
    """As `reference.upsample_conv2d_elu`, in 4 taps an output pixel instead of 9 in the other two tiers.

    Algebraic: one transposed convolution with folded weights. Fused: the four output phases as matrix products over the
    low-resolution input, with bias, skip table and activation in the epilogue.
    """
    tier = choose(impl)
    if tier == "reference":
        return reference.upsample_conv2d_elu(
            x, weight, bias, skip=skip, activation=activation, alpha=alpha, carry=carry
        )
    reference.check_activation(activation, alpha)
    if weight.shape[2:] != (3, 3):
        raise ValueError(f"weight is {list(weight.shape)}; accepted: [out, in, 3, 3]")
    if tier == "fused":
        require_fused(x, weight, bias, skip)
        (x,) = autocast(x)
        y = _upsample_conv2d_elu(x, weight, bias, skip, "none" if activation == "silu" else activation, alpha)
        y = F.silu(y) if activation == "silu" else y
    else:
        y = F.conv_transpose2d(x, fold_upsample(weight), bias, stride=2, padding=1)
        if skip is not None:
            y = y + reference.expand_phase_table(skip, y.shape[2], y.shape[3])
        y = reference.activate(y, activation, alpha)
    return y if carry is None else reference.blend(F.interpolate(x, scale_factor=2.0, mode="nearest"), y, carry)


@torch.library.custom_op("fastbegan::upsample_conv2d_elu", mutates_args=())
def _upsample_conv2d_elu(
    x: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor | None, activation: str, alpha: float
) -> Tensor:
    from .fused import launch

    phases = phases_of(fold_upsample(weight)).to(x.dtype)
    skip = None if skip is None else skip.to(x.dtype).contiguous()
    return launch.upsample_conv2d_elu(x, phases, bias, skip, activation=activation, alpha=alpha)


@_upsample_conv2d_elu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor | None, activation: str, alpha: float) -> Tensor:
    shape = (x.shape[0], weight.shape[0], 2 * x.shape[2], 2 * x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.custom_op("fastbegan::upsample_conv2d_elu_backward", mutates_args=())
def _upsample_conv2d_elu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, y: Tensor, activation: str, alpha: float, skip_size: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias and skip [N, 3, 3, S, S, K]; those that `needs` does not name are empty."""
    from .fused import launch

    dz, db = launch.activation_backward(grad, y, activation=activation, alpha=alpha)
    folded = fold_upsample(weight)
    dx = launch.upsample_conv2d_elu_input_gradient(dz, folded)[0] if needs[0] else None
    dw = None
    if needs[1] and x.numel():
        _, d_folded, _ = torch.ops.aten.convolution_backward(
            dz, x, folded.to(x.dtype), None, [2, 2], [1, 1], [1, 1], True, [0, 0], 1, [False, True, False]
        )
        dw = unfold_upsample(d_folded.to(weight.dtype))
    d_skip = _skip_gradient(dz, skip_size) if needs[3] else x.new_empty(0)
    return *results(dx, dw, db, x, weight, needs), d_skip


def _skip_gradient(dz: Tensor, size: int) -> Tensor:
    """Sums of dz [N, K, H, W] over what each entry of the phase table [N, 3, 3, S, S, K] was added to."""
    batch, channels, height, width = dz.shape
    cells = dz.float().reshape(batch, channels, size, height // size, size, width // size)
    rows = torch.stack((cells[:, :, :, 0], cells[:, :, :, 1:-1].sum(3), cells[:, :, :, -1]))  # [3, N, K, S, S, cell]
    parts = torch.stack((rows[..., 0], rows[..., 1:-1].sum(-1), rows[..., -1]))  # [3 (w), 3 (h), N, K, S, S]
    return parts.permute(2, 1, 0, 4, 5, 3).to(dz.dtype).contiguous()


@_upsample_conv2d_elu_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, y: Tensor, activation: str, alpha: float, skip_size: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    table = (x.shape[0], 3, 3, skip_size, skip_size, weight.shape[0])
    return *fake_results(x, weight, needs), x.new_empty(table if needs[3] else 0)


def _setup(ctx, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, skip, *ctx.settings = inputs
    ctx.save_for_backward(x, weight, output)
    ctx.dtypes = [None if given is None else given.dtype for given in (bias, skip)]
    ctx.skip_size = 0 if skip is None else skip.shape[3]


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, y = ctx.saved_tensors
    bias_dtype, skip_dtype = ctx.dtypes
    needs = list(ctx.needs_input_grad[:4])
    dx, dw, db, d_skip = _upsample_conv2d_elu_backward(grad, x, weight, y, *ctx.settings, ctx.skip_size, needs)
    gradients = (
        dx if needs[0] else None,
        dw if needs[1] else None,
        db.to(bias_dtype) if needs[2] else None,
        d_skip.to(skip_dtype) if needs[3] else None,
    )
    return *gradients, None, None


_upsample_conv2d_elu.register_autograd(_backward, setup_context=_setup)

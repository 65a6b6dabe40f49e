"""group_norm_silu: group normalisation and the activation behind it, without a map stored between them."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from . import arguments, problems, reference, tuning
from .dispatch import op_impl
from .layout import is_channels_last, lay_out
from .recorded import recorded_gradients


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "silu",
    impl: str | None = None,
) -> Tensor:
    """Normalise groups of channels, scale and shift each channel, and apply SiLU.

    y = act((x - mean) / sqrt(variance + eps) * weight + bias), with z * sigmoid(z) for act. Mean and biased variance
    are those of a sample's group: C / groups channels over all pixels (Wu and He 2018). They are computed in float32
    from values around the mean, in a fixed order, so results repeat bit for bit.

    The fused tier reads x twice and writes y once, in channels_last. It keeps x and the statistics for the backward,
    not the map between norm and activation. A contiguous x is computed by torch's own operations unless the fused tier
    is forced. `reference.group_norm_silu` is the plain twin.

    Gradients reach x, weight and bias. With create_graph=True they come from plain operations, so they can be
    differentiated again.

    Args:
        x: [N, C, H, W] in float32, bfloat16, float16 or float64, any memory format; N may be 0. Under CUDA's
            autocast it is computed in float32, as torch does it.
        groups: Number of groups, a divisor of C.
        weight: [C], in x's dtype or float32, or None for 1.
        bias: [C], in x's dtype or float32, or None for 0.
        eps: Added to the variance, above 0.
        activation: "silu" or "none".
        impl: "reference", "algebraic" or "fused" forces a tier. None takes FASTBEGAN_IMPL from the environment, else
            the kernel if it is verified on this machine.

    Returns:
        [N, C, H, W] in x's dtype (float32 under CUDA's autocast). It is channels_last if x is, else contiguous.

    Raises:
        ValueError: Shapes do not match, `groups` does not divide C, another activation, or eps of 0 and below.
        RuntimeError: The fused tier is forced where it cannot run: no GPU, no Triton or float64.
    """
    arguments.check_group_norm(x, groups, weight, bias, eps, activation)
    if x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()  # as CUDA's autocast does it for torch.group_norm
    mode = op_impl(impl, (x,))
    if mode is None or (mode != "fused" and not is_channels_last(x)):
        return reference.group_norm_silu(x, groups, weight, bias, eps=eps, activation=activation)
    return _group_norm_silu(x, groups, weight, bias, eps, activation, mode)[0]


def _is_fused(x: Tensor, impl: str) -> bool:
    return tuning.is_fused("group_norm_silu", x.dtype, x.device, impl)


@torch.library.custom_op("fastbegan::group_norm_silu", mutates_args=())
def _group_norm_silu(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and each group's mean and 1 / standard deviation, float32 [N, groups], for the backward."""
    if _is_fused(x, impl):
        from .fused import group_norm_silu as fused

        y, mean, rstd = fused.forward(x, groups, weight, bias, eps, silu=activation == "silu")
        return lay_out(y, is_channels_last(x)), mean, rstd
    values = x.float().reshape(x.shape[0], groups, -1)
    mean, rstd = values.mean(2), (values.var(2, unbiased=False) + eps).rsqrt()
    y = reference.group_norm_silu(x, groups, weight, bias, eps=eps, activation=activation)
    return lay_out(y, is_channels_last(x)), mean, rstd


@_group_norm_silu.register_fake
def _(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    mean = x.new_empty(x.shape[0], groups, dtype=torch.float32)
    return torch.empty_like(x, memory_format=layout), mean, torch.empty_like(mean)


@torch.library.custom_op("fastbegan::group_norm_silu_backward", mutates_args=())
def _group_norm_silu_backward(  # noqa: PLR0913
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; those of weight and bias in float32."""
    groups = mean.shape[1]
    if _is_fused(x, impl):
        from .fused import group_norm_silu as fused

        dx, d_weight, d_bias = fused.backward(grad, x, mean, rstd, weight, bias, silu=activation == "silu")
        return lay_out(dx, is_channels_last(x)), d_weight, d_bias
    samples = len(x)
    xhat = ((x.float().reshape(samples, groups, -1) - mean[..., None]) * rstd[..., None]).reshape(x.shape)
    scale = 1.0 if weight is None else weight.float()[:, None, None]
    dz = grad.float()
    if activation == "silu":
        dz = torch.ops.aten.silu_backward(dz, xhat * scale + (0.0 if bias is None else bias.float()[:, None, None]))
    d_weight, d_bias = (dz * xhat).sum((0, 2, 3)), dz.sum((0, 2, 3))
    # what moves mean and variance is taken out
    along, flat = (dz * scale).reshape(samples, groups, -1), xhat.reshape(samples, groups, -1)
    dx = rstd[..., None] * (along - along.mean(2, True) - flat * (along * flat).mean(2, True))
    return lay_out(dx.reshape(x.shape).to(x.dtype), is_channels_last(x)), d_weight, d_bias


@_group_norm_silu_backward.register_fake
def _(  # noqa: PLR0913
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    d_weight = x.new_empty(x.shape[1], dtype=torch.float32)
    return torch.empty_like(x, memory_format=layout), d_weight, torch.empty_like(d_weight)


def _setup(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, ctx.groups, weight, bias, ctx.eps, ctx.activation, ctx.impl = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, mean, rstd, weight, bias)


def _backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, mean, rstd, weight, bias = ctx.saved_tensors
    needs = [ctx.needs_input_grad[place] for place in (0, 2, 3)]
    if torch.is_grad_enabled():
        present = [value for value in (x, weight, bias) if value is not None]
        wanted = [need for need, value in zip(needs, (x, weight, bias), strict=True) if value is not None]
        plain = functools.partial(_plain, ctx.groups, weight is not None, eps=ctx.eps, activation=ctx.activation)
        recorded = iter(recorded_gradients(plain, present, wanted, grad))
        dx, dw, db = (None if value is None else next(recorded) for value in (x, weight, bias))
        return dx, None, dw, db, None, None, None
    gradients = _group_norm_silu_backward(grad, x, mean, rstd, weight, bias, ctx.eps, ctx.activation, ctx.impl)
    dx, dw, db = (
        gradient.to(value.dtype) if need and value is not None else None
        for gradient, need, value in zip(gradients, needs, (x, weight, bias), strict=True)
    )
    return dx, None, dw, db, None, None, None


def _plain(groups: int, has_weight: bool, x: Tensor, *affine: Tensor, eps: float, activation: str) -> Tensor:
    """The plain twin of the tensors that are there."""
    weight = affine[0] if has_weight else None
    bias = affine[-1] if len(affine) > has_weight else None
    return reference.group_norm_silu(x, groups, weight, bias, eps=eps, activation=activation)


_group_norm_silu.register_autograd(_backward, setup_context=_setup)


@problems.checks("group_norm_silu")
def _check(device: torch.device, dtype: torch.dtype, fused: bool) -> list[Tensor]:
    """Output and gradients: groups of one, of an odd number and of all channels; more pixels than a split has."""
    results: list[Tensor] = []
    cases = [((3, 37, 9, 7), 37), ((2, 36, 9, 7), 12), ((2, 64, 36, 32), 1)]
    for (shape, groups), activation in itertools.product(cases, ("silu", "none")):
        x, grad = (problems.draw(device, dtype, seed, *shape) for seed in (0, 1))
        weight, bias = (problems.draw(device, dtype, seed, shape[1]) for seed in (2, 3))
        leaves = [value.requires_grad_() for value in (x, weight, bias)]
        if fused:
            y = group_norm_silu(x, groups, weight, bias, activation=activation, impl="fused")
        else:
            y = reference.group_norm_silu(x, groups, weight, bias, activation=activation)
        results += [y.detach(), *torch.autograd.grad(y, leaves, grad)]
    return results

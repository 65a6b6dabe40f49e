"""The calls that a rewritten graph makes. Each falls back to torch's operations where the fast layers do not fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import checkpoint

from fastbegan_kernels import conv_stage, group_norm_silu
from fastbegan_kernels.layout import lay_out
from fastbegan_kernels.reference import plain_layer


def stage(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    kinds: Sequence[str],
    paddings: Sequence[int],
    activations: Sequence[str],
    alpha: float,
    least: int,
) -> Tensor:
    """A chain of convolutions as one stage. With fewer than `least` pixels N * H * W it is slower so."""
    if not _fits(x, weights, biases, paddings) or x.shape[0] * x.shape[2] * x.shape[3] < least:
        layers = zip(weights, biases, kinds, paddings, activations, strict=True)
        for weight, bias, kind, padding, activation in layers:
            x = plain_layer(x, weight, bias, kind=kind, padding=padding, activation=activation, alpha=alpha)
        return x
    present = [bias for bias in biases if bias is not None]
    return conv_stage(x, weights, present or None, kinds=kinds, activation=activations, alpha=alpha)


def _fits(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], paddings: Sequence[int]) -> bool:
    """Whether the fast layers take these shapes, types and devices."""
    sizes = [(2 * padding + 1, 2 * padding + 1) for padding in paddings]
    sizes_fit = all(tuple(weight.shape[2:]) == size for weight, size in zip(weights, sizes, strict=True))
    floating = x.is_floating_point() and all(weight.is_floating_point() for weight in weights)
    device_fits = x.device.type in ("cpu", "cuda")
    autocast = device_fits and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    one_dtype = autocast or all(weight.dtype == x.dtype for weight in weights)
    biased = sum(bias is not None for bias in biases)
    return x.dim() == 4 and sizes_fit and floating and one_dtype and device_fits and biased in (0, len(weights))


def norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str) -> Tensor:
    """GroupNorm, and SiLU behind it."""
    present = [value for value in (weight, bias) if value is not None]
    if x.dim() == 4 and x.is_floating_point() and all(value.dtype == x.dtype for value in present):
        return group_norm_silu(x, groups, weight, bias, eps=eps, activation=activation)
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if activation == "silu" else y


class Border(torch.autograd.Function):
    """x [N, C, H, W] in another memory format; its gradient in a format of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inside_last: bool, gradient_last: bool) -> Tensor:
        ctx.gradient_last = gradient_last
        y = lay_out(x, inside_last)
        return y.clone() if y is x else y  # a view of x may not be changed in place by who gets it

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return Border.apply(grads[0], ctx.gradient_last, not ctx.gradient_last), None, None  # pyright: ignore


def enter(x: Tensor) -> Tensor:
    """A contiguous x in channels_last; its gradient is contiguous."""
    return Border.apply(x, True, False)  # pyright: ignore[reportReturnType]


def leave(x: Tensor) -> Tensor:
    """A channels_last x as a contiguous one; its gradient is channels_last."""
    return Border.apply(x, False, True)  # pyright: ignore[reportReturnType]


def recompute(graph: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """Gradient checkpointing of a part of a forward, as the user asked for it.

    Dynamo's own operator keeps no random state: it is meant for a compiler that does.
    """
    named = {name: options[name] for name in ("preserve_rng_state", "context_fn", "early_stop") if name in options}
    return checkpoint.checkpoint(graph, *inputs, use_reentrant=False, **named)

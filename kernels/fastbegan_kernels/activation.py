"""Activations after a convolution of the library, and their derivative: kernels where they are verified."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from . import arguments, library, problems, reference, tuning
from .library_op import library_op


def _backward_like(grad: Tensor, y: Tensor, activation: str, alpha: float, impl: str) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(y.dtype, torch.float32)
    return torch.empty_like(y, memory_format=torch.channels_last), y.new_empty(y.shape[1], dtype=wide)


@library_op(_backward_like)
def activation_backward(grad: Tensor, y: Tensor, activation: str, alpha: float, impl: str) -> tuple[Tensor, Tensor]:
    """grad * act'(y), both [N, K, H, W], channels_last, and its sum over pixels [K] in float32 or wider."""
    if y.numel() and tuning.is_fused("activation_backward", y.dtype, y.device, impl):
        from .fused import activation as fused

        return fused.activation_backward(grad, y, activation=activation, alpha=alpha)
    return library.activation_backward(grad, y, activation, alpha)


@problems.checks("activation_backward")
def _check(device: torch.device, dtype: torch.dtype, fused: bool) -> list[Tensor]:
    results: list[Tensor] = []
    for shape, activation in itertools.product(problems.SHAPES, arguments.FROM_OUTPUT):
        grad, y = (problems.draw(device, dtype, seed, *shape) for seed in (0, 1))
        y = reference.activate(y, activation, 0.25).to(torch.bfloat16).to(torch.float16).to(dtype)
        if fused:
            from .fused import activation as kernels

            results += kernels.activation_backward(grad, y, activation=activation, alpha=0.25)
        else:
            results += library.activation_backward(grad, y, activation, 0.25)
    return results

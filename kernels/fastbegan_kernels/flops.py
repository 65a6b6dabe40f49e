"""FLOP formulas of the ops for torch.utils.flop_counter.FlopCounterMode.

Importing this module registers them. They count the products of the algebraic tier, a multiply-add as two. An output
pixel of an up-convolution has four taps; pointwise work counts nothing. The fused kernels do the same products.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import conv_stage  # noqa: F401  (defines the ops)
from .reference import output_size

Shape = Sequence[int]
_OPS = torch.ops.fastbegan


def _layer_flops(x: Shape, weights: Sequence[Shape], kinds: str) -> list[int]:
    """FLOPs of each layer's forward. Its input gradient needs as many, and so does its weight gradient."""
    flops = []
    size = tuple(x[2:])
    for weight, kind in zip(weights, kinds.split(), strict=False):
        output = output_size(size, kind)
        pixels = prod(size) if kind == "up" else prod(output)  # a transposed convolution spreads each input pixel
        flops.append(2 * x[0] * pixels * prod(weight))
        size = output
    return flops


@register_flop_formula(_OPS.conv_stage)
def conv_stage_flops(x: Shape, weights: Sequence[Shape], biases: Any, skip: Any, kinds: str, *_: Any, **__: Any) -> int:
    """FLOPs of a forward, which uses one copy of the weights."""
    return sum(_layer_flops(x, weights, kinds))


@register_flop_formula(_OPS.conv_stage_backward)
def conv_stage_backward_flops(  # noqa: PLR0913
    grad: Shape,
    x: Shape,
    weights: Sequence[Shape],
    outputs: Any,
    skip_size: int,
    has_bias: bool,
    kinds: str,
    activations: str,
    alpha: float,
    impl: str,
    copies: int,
    needs: Sequence[bool],
    **_: Any,
) -> int:
    """FLOPs of a backward: needed weight gradients, and input gradients of layers above any needed gradient."""
    flops = _layer_flops(x, weights, kinds)
    layers = len(flops)
    lists = [needs[start : start + layers] for start in range(2, len(needs), layers)]  # a copy's weights, or its biases
    total = 0
    for number, count in enumerate(flops):
        below = needs[0] or any(any(needed[:number]) for needed in lists)
        weights_of = sum(needed[number] for needed in lists[:copies])
        total += count * weights_of // copies + count * int(below)
    return total

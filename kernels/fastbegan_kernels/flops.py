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

from . import conv_layer  # noqa: F401  (defines the ops)
from .arguments import output_size

Shape = Sequence[int]
_OPS = torch.ops.fastbegan


def _layer_flops(x: Shape, weight: Shape, kind: str) -> int:
    """FLOPs of a layer's forward. Its input gradient needs as many, and so does its weight gradient."""
    size = tuple(x[2:])
    # a transposed convolution spreads each input pixel
    pixels = prod(size) if kind == "up" else prod(output_size(size, kind))
    return 2 * x[0] * pixels * prod(weight)


@register_flop_formula(_OPS.layer)
def layer_flops(x: Shape, weight: Shape, bias: Any, skip: Any, kind: str, *_: Any, **__: Any) -> int:
    """FLOPs of a layer."""
    return _layer_flops(x, weight, kind)


@register_flop_formula([_OPS.layer_input_gradient, _OPS.layer_weight_gradient])
def gradient_flops(dz: Shape, x: Shape, weight: Shape, kind: str, *_: Any, **__: Any) -> int:
    """FLOPs of one of a layer's gradients."""
    return _layer_flops(x, weight, kind)

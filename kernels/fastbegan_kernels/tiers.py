"""One convolution layer and its gradients, three ways; `how` says which.

"plain" is the library's own operations; "algebraic" its convolutions with one Triton kernel for all that is pointwise
around them; anything else names the tile of a fused kernel. Weights are packed (`fold`): [K, C, k, k], and for kind
"up" [C, K, 4, 4]. No function here is differentiable; all tensors are channels_last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference

KINDS = ("same", "down", "up")


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor | None, *, kind: str, activation: str, alpha: float,
    how: str,
) -> Tensor:  # fmt: skip
    """act(conv(x) + bias + skip): x [N, C, H, W] -> [N, K, H', W']; skip [N, 3, 3, S, S, K] with kind "up" only."""
    if how not in ("plain", "algebraic"):
        launch, tiles = _fused()
        return launch.layer(
            x, weight, bias, skip, kind=kind, activation=activation, alpha=alpha, tile=tiles.tile_named(how)
        )
    inside = bias.to(x.dtype) if bias is not None and how == "plain" else None
    if kind == "up":
        y = F.conv_transpose2d(x, weight, inside, stride=2, padding=1)
    else:
        y = F.conv2d(x, weight, inside, 1 if kind == "same" else 2, weight.shape[2] // 2)
    if how == "algebraic":
        return _fused()[0].activation(y, bias, skip, activation=activation, alpha=alpha)
    if skip is not None:
        y = y + reference.expand_phase_table(skip, y.shape[2], y.shape[3])
    return reference.activate(y, activation, alpha).contiguous(memory_format=torch.channels_last)


def activation_backward(
    grad: Tensor, y: Tensor, *, activation: str, alpha: float, how: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """grad * act'(y), both [N, K, H, W], and its sum [K] in float32 (float64 for float64)."""
    if how != "plain":
        return _fused()[0].activation_backward(grad, y, activation=activation, alpha=alpha)
    dz = (grad * reference.derivative(y, activation, alpha)).contiguous(memory_format=torch.channels_last)
    return dz, dz.sum((0, 2, 3), dtype=torch.promote_types(dz.dtype, torch.float32))


def input_gradient(
    dz: Tensor, x: Tensor, weight: Tensor, *, kind: str, activation: str | None, alpha: float, how: str
) -> tuple[Tensor, Tensor | None]:
    """The gradient at a layer's input x from dz; with the activation that x is the output of, times act', and its sum.

    Kind "down" with a 1x1 kernel is the library's in every form.
    """
    if how not in ("plain", "algebraic"):
        launch, tiles = _fused()
        y_prev = None if activation is None else x
        size, tile = (x.shape[2], x.shape[3]), tiles.tile_named(how)
        return launch.input_gradient(
            dz, weight, y_prev, kind=kind, size=size, activation=activation or "none", alpha=alpha, tile=tile
        )
    dx = _library(dz, x, weight, kind, [True, False, False])[0]
    if activation is None:
        return dx.contiguous(memory_format=torch.channels_last), None
    return activation_backward(dx, x, activation=activation, alpha=alpha, how=how)


def weight_gradient(dz: Tensor, x: Tensor, weight: Tensor, *, kind: str) -> Tensor:
    """The gradient of a layer's packed weight, like it; always the library's."""
    dw = _library(dz, x, weight, kind, [False, True, False])[1]
    return dw.contiguous(memory_format=torch.channels_last)


def skip_gradient(dz: Tensor, size: int, *, how: str) -> Tensor:
    """Sums of dz [N, K, H, W] over what each entry of the phase table [N, 3, 3, size, size, K] was added to."""
    if how != "plain":
        return _fused()[0].skip_gradient(dz, size)
    batch, channels, height, width = dz.shape
    cells = dz.reshape(batch, channels, size, height // size, size, width // size)
    rows = torch.stack((cells[:, :, :, 0], cells[:, :, :, 1:-1].sum(3), cells[:, :, :, -1]))  # [3, N, K, S, S, cell]
    parts = torch.stack((rows[..., 0], rows[..., 1:-1].sum(-1), rows[..., -1]))  # [3 (w), 3 (h), N, K, S, S]
    return parts.permute(2, 1, 0, 4, 5, 3)


def _library(dz: Tensor, x: Tensor, weight: Tensor, kind: str, mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    if not dz.numel():  # oneDNN and cuDNN refuse empty gradients
        return torch.zeros_like(x), torch.zeros_like(weight), dz.new_empty(0)
    stride, padding = (1, 1) if kind == "same" else (2, 2), [1, 1] if weight.shape[2] > 1 else [0, 0]
    return torch.ops.aten.convolution_backward(
        dz, x, weight, None, stride, padding, [1, 1], kind == "up", [0, 0], 1, mask
    )


def _fused():
    from .fused import launch, tiles

    return launch, tiles

"""One convolution layer and its gradients in the library's own operations.

Weights are packed (`fold`): [K, C, k, k], and [C, K, 4, 4] for kind "up". All tensors are channels_last. Autograd
records nothing here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor | None, kind: str, activation: str, alpha: float
) -> Tensor:
    """act(conv(x) + bias + skip): x [N, C, H, W] -> [N, K, H', W']; skip [N, 3, 3, S, S, K] with kind "up" only."""
    y = convolve(x, weight, None if bias is None else bias.to(x.dtype), kind)
    y = y.contiguous(memory_format=torch.channels_last)
    if skip is not None and torch.compiler.is_compiling():  # inductor fuses this gather with the activation's loop
        y = y + reference.expand_phase_table(skip, y.shape[2], y.shape[3])
    elif skip is not None:
        _add_phase_table(y, skip)
    return _IN_PLACE[activation](y, alpha)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """conv(x) + bias, in the memory format that the library chooses."""
    if _to_few(x, weight, kind):
        return _convolve_to_few(x, weight, bias)
    if kind == "up":
        return F.conv_transpose2d(x, weight, bias, stride=2, padding=1)
    if kind == "down_end":
        return F.conv2d(F.pad(x, reference.END), weight, bias, 2)
    return F.conv2d(x, weight, bias, 1 if kind == "same" else 2, weight.shape[2] // 2)


def _elu(y: Tensor, alpha: float) -> Tensor:
    if torch.compiler.is_compiling():  # inductor's C++ exp costs half of its expm1, and is exact to 1 + y
        return torch.where(y > 0, y, alpha * (torch.exp(y) - 1))
    return F.elu_(y, alpha)


# a convolution's output is new, and its own backward does not read it: the activation may overwrite it
_IN_PLACE: dict[str, Callable[[Tensor, float], Tensor]] = {
    "elu": _elu,
    "relu": lambda y, alpha: F.relu_(y),
    "leaky_relu": F.leaky_relu_,
    "none": lambda y, alpha: y,
}


def _add_phase_table(y: Tensor, table: Tensor) -> None:
    """y [N, K, H, W] += the map whose cells `table` [N, 3, 3, S, S, K] describes, in one pass over y."""
    size, (height, width) = table.shape[3], y.shape[2:]
    first, inner, last = table.unsqueeze(5).unbind(2)  # [N, 3, S, S, 1, K]
    inner = inner.expand(*inner.shape[:4], width // size - 2, -1)
    rows = torch.cat((first, inner, last), 4).flatten(3, 4)  # [N, 3, S, W, K]
    cells = y.permute(0, 2, 3, 1).unflatten(1, (size, height // size))  # [N, S, cell, W, K]
    cells[:, :, 0] += rows[:, 0]
    cells[:, :, 1:-1] += rows[:, 1, :, None]
    cells[:, :, -1] += rows[:, 2]


def activation_backward(
    grad: Tensor, y: Tensor, activation: str, alpha: float, *, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """grad * act'(y), both [N, K, H, W], and its sum over pixels [K] in float32 (float64 for float64).

    `overwrite`: the result may take grad's memory.
    """
    dz = grad
    if activation != "none":
        derivative, arguments = _DERIVATIVE[activation]
        numbers = arguments(grad, y, alpha)
        in_place = overwrite and not torch.compiler.is_compiling()
        dz = derivative.grad_input(*numbers, grad_input=grad) if in_place else derivative(*numbers)
    dz = dz.contiguous(memory_format=torch.channels_last)
    return dz, bias_gradient(dz)


_DERIVATIVE: dict[str, tuple[Any, Callable[[Tensor, Tensor, float], tuple]]] = {
    "elu": (torch.ops.aten.elu_backward, lambda grad, y, alpha: (grad, alpha, 1.0, 1.0, True, y)),
    "relu": (torch.ops.aten.threshold_backward, lambda grad, y, alpha: (grad, y, 0)),
    "leaky_relu": (torch.ops.aten.leaky_relu_backward, lambda grad, y, alpha: (grad, y, alpha, True)),
}


def input_gradient(
    dz: Tensor, x: Tensor, weight: Tensor, kind: str, activation: str | None, alpha: float
) -> tuple[Tensor, Tensor | None]:
    """The gradient dx at a layer's input x, from dz at its convolution's output.

    With `activation`, the one whose output x is: dx * act'(x), and its sum over pixels.
    """
    dx = convolution_gradient(dz, x, weight, kind)
    if activation is None:
        return dx.contiguous(memory_format=torch.channels_last), None
    return activation_backward(dx, x, activation, alpha, overwrite=True)


def convolution_gradient(dz: Tensor, x: Tensor, weight: Tensor, kind: str) -> Tensor:
    """The gradient at a convolution's input x, in the memory format that the library chooses."""
    if _to_few(dz, across := weight.transpose(0, 1), kind):
        return _convolve_to_few(dz, across.flip(2, 3), None)
    return _library(dz, x, weight, kind, [True, False, False])[0]


def bias_gradient(dz: Tensor) -> Tensor:
    """The sum of dz [N, K, H, W] over all but its channels, in float32 (float64 for float64)."""
    return dz.sum((0, 2, 3), dtype=torch.promote_types(dz.dtype, torch.float32))


def weight_gradient(dz: Tensor, x: Tensor, weight: Tensor, kind: str) -> Tensor:
    """The gradient of a layer's packed weight, in its shape and dtype."""
    if kind == "same" and x.device.type == "cpu" and 1 < weight.shape[0] < 8 <= weight.shape[1]:
        # oneDNN runs two to four times as fast with the few channels at the input
        return exchanged_weight_gradient(dz, x, weight)
    dw = _library(dz, x, weight, kind, [False, True, False])[1]
    return dw.contiguous(memory_format=torch.channels_last)


def exchanged_weight_gradient(dz: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The same for kind "same": exchanging x and dz gives the transposed gradient with its taps reversed."""
    exchanged = _library(x, dz, weight.transpose(0, 1), "same", [False, True, False])[1]
    return exchanged.transpose(0, 1).flip(2, 3).contiguous(memory_format=torch.channels_last)


def phases_weight_gradient(dz: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The same for kind "up": one 3x3 weight gradient between x and the four phases of dz as channels.

    Output phase (py, px) at (2i + py, 2j + px) reads x[i + dh, j + dw] with the 4x4 tap (1 + py - 2 dh, 1 + px - 2 dw).
    So each tap of the folded weight is one tap of the 3x3 gradient of one phase, and 20 of the 36 are not used.
    """
    channels, outputs = weight.shape[:2]
    phases = F.pixel_unshuffle(dz, 2)  # [N, 4 K, H, W], channel 4 k + 2 py + px
    wide = x.new_empty(1).expand(4 * outputs, channels, 3, 3)
    taps = _library(phases, x, wide, "same", [False, True, False])[1].unflatten(0, (outputs, 2, 2))
    rows = [taps[:, parity, :, :, place] for parity, place in _TAPS]  # [K, px, C, column] each
    dw = torch.stack([torch.stack([row[:, parity, :, place] for parity, place in _TAPS], -1) for row in rows], -2)
    return dw.transpose(0, 1).contiguous(memory_format=torch.channels_last)


# tap t of a 4x4 direction: the output's parity p and dh + 1, where t = 1 + p - 2 dh
_TAPS = ((1, 2), (0, 1), (1, 1), (0, 0))


def skip_gradient(dz: Tensor, size: int) -> Tensor:
    """The gradient of a phase table [N, 3, 3, size, size, K]: each entry sums dz [N, K, H, W] over its pixels."""
    cells = dz.permute(0, 2, 3, 1).unflatten(1, (size, -1))  # [N, S, cell, W, K]
    rows = torch.stack((cells[:, :, 0], cells[:, :, 1:-1].sum(2), cells[:, :, -1]), 1)
    rows = rows.unflatten(3, (size, -1))  # [N, 3, S, S, cell, K]
    return torch.stack((rows[..., 0, :], rows[..., 1:-1, :].sum(4), rows[..., -1, :]), 2)


def _to_few(x: Tensor, weight: Tensor, kind: str) -> bool:
    """Whether a 3x3 convolution has so few outputs, as for an image, that oneDNN computes mostly padding."""
    few = kind == "same" and weight.shape[2:] == (3, 3) and 3 * weight.shape[0] <= 16 < weight.shape[1]
    return few and x.device.type == "cpu" and x.dtype == torch.float32


def _convolve_to_few(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """conv2d of x [N, C, H, W] with weight [K, C, 3, 3], as one convolution with weights [3 K, C, 1, 3].

    oneDNN pads output channels to 16 with zeros. So each row of taps gets channels of its own, and its output is added
    one line above or below.
    """
    rows = weight.permute(2, 0, 1, 3).flatten(0, 1).unsqueeze(2).contiguous(memory_format=torch.channels_last)
    # F.conv2d would cast where a backward runs under autocast
    outputs = torch.ops.aten.convolution(x, rows, None, [1, 1], [0, 1], [1, 1], False, [0, 0], 1)
    above, middle, below = outputs.split(weight.shape[0], 1)
    y = middle.clone(memory_format=torch.channels_last) if bias is None else middle + bias[:, None, None]
    y[:, :, 1:] += above[:, :, :-1]
    y[:, :, :-1] += below[:, :, 1:]
    return y


def _library(dz: Tensor, x: Tensor, weight: Tensor, kind: str, mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """The library's gradients of x, weight and bias; `mask` names those to compute."""
    if kind == "down_end":  # padded again, to keep no padded copy of x between forward and backward
        padded = F.pad(x, reference.END).contiguous(memory_format=torch.channels_last)
        dx, dw, db = _library_convolution(dz, padded, weight, 2, [0, 0], mask, transposed=False)
        return dx[:, :, :-1, :-1] if mask[0] else dx, dw, db
    padding = [1, 1] if kind == "up" else [weight.shape[2] // 2] * 2
    return _library_convolution(dz, x, weight, 1 if kind == "same" else 2, padding, mask, transposed=kind == "up")


def _library_convolution(
    dz: Tensor, x: Tensor, weight: Tensor, stride: int, padding: list[int], mask: list[bool], *, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not dz.numel():  # oneDNN and cuDNN refuse empty gradients
        return torch.zeros_like(x), torch.zeros_like(weight), dz.new_empty(0)
    return torch.ops.aten.convolution_backward(
        dz, x, weight, None, [stride] * 2, padding, [1, 1], transposed, [0, 0], 1, mask
    )

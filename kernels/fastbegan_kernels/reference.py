"""The specification: every public function in plain, differentiable PyTorch, on any device and in any dtype.

Each twin takes the arguments of the op with its name, but for `impl`; the op's docstring describes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import (
    check_activation,
    check_activations,
    check_controller,
    check_group_norm,
    check_layer,
    check_loss,
    check_stage,
    conv_kind,
)

END = (0, 1, 0, 1)
"""F.pad's argument for one column to the right and one row below."""


def activate(x: Tensor, activation: str = "elu", alpha: float = 1.0) -> Tensor:
    """Apply one of ACTIVATIONS; `alpha`, from 0, is the scale of ELU or the negative slope of leaky_relu."""
    check_activation(activation, alpha)
    if activation == "elu":
        return F.elu(x, alpha)
    if activation == "relu":
        return F.relu(x)
    if activation == "leaky_relu":
        return F.leaky_relu(x, alpha)
    return F.silu(x) if activation == "silu" else x


def derivative(y: Tensor, activation: str = "elu", alpha: float = 1.0) -> Tensor:
    """act'(z) from y = act(z), exact for alpha >= 0. Not for silu, whose output does not fix its derivative."""
    ones = torch.ones_like(y)
    below = {"elu": y + alpha, "relu": 0 * ones, "leaky_relu": alpha * ones, "none": ones}[activation]
    return torch.where(y > 0, ones, below)


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "silu",
) -> Tensor:
    """Plain twin of `group_norm_silu`."""
    check_group_norm(x, groups, weight, bias, eps, activation)
    if weight is None and bias is not None:  # torch 2.7 cannot differentiate that
        weight = torch.ones_like(bias)
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if activation == "silu" else y


def blend(x: Tensor, y: Tensor, carry: Tensor | None) -> Tensor:
    """Vanishing residual (paper §3.5.1): carry * x + (1 - carry) * y; y itself where carry is None."""
    return y if carry is None else carry * x + (1 - carry) * y


def conv2d_elu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: str = "same",
    activation: str = "elu",
    alpha: float = 1.0,
    carry: Tensor | None = None,
) -> Tensor:
    """act(conv2d(x, weight) + bias), blended with x by `carry`: the twin of `fastbegan_kernels.conv2d_elu`."""
    kind = conv_kind(stride, padding)
    check_layer(x, weight, bias, kind=kind, carry=carry)
    x = F.pad(x, END) if kind == "down_end" else x
    zeros = 0 if kind == "down_end" else int(weight.shape[2]) // 2  # a tensor while it is traced
    y = F.conv2d(x, weight, _like(bias, weight), stride, zeros)
    return blend(x, activate(y, activation, alpha), carry)


def plain_layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, kind: str, padding: int, activation: str, alpha: float
) -> Tensor:
    """A layer in torch's operations, without checks, for tracers: a trace must not branch on shapes.

    `padding` counts the zeros on each side of a kind other than "down_end".
    """
    if kind == "up":
        x = F.interpolate(x, scale_factor=2.0)
    elif kind == "down_end":
        x, padding = F.pad(x, END), 0
    y = F.conv2d(x, weight, _like(bias, weight), 1 if kind in ("same", "up") else 2, padding)
    return activate(y, activation, alpha)


def _like(bias: Tensor | None, weight: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(weight.dtype)


def upsample_conv2d_elu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    skip: Tensor | None = None,
    activation: str = "elu",
    alpha: float = 1.0,
    carry: Tensor | None = None,
) -> Tensor:
    """act(conv3x3(nearest_x2(x), weight) + bias + skip): the twin of `fastbegan_kernels.upsample_conv2d_elu`."""
    check_layer(x, weight, bias, kind="up", skip=skip, carry=carry)
    doubled = F.interpolate(x, scale_factor=2.0, mode="nearest")
    if weight.shape[2] == 4:
        y = F.conv_transpose2d(x, weight, _like(bias, weight), stride=2, padding=1)
    else:
        y = F.conv2d(doubled, weight, _like(bias, weight), padding=1)
    if skip is not None:
        y = y + expand_phase_table(skip, y.shape[2], y.shape[3])
    return blend(doubled, activate(y, activation, alpha), carry)


def conv_stage(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    kinds: Sequence[str] | None = None,
    skip: Tensor | None = None,
    activation: str | Sequence[str] = "elu",
    alpha: float = 1.0,
    copies: int = 1,
) -> Tensor:
    """conv2d_elu and upsample_conv2d_elu one after another: the twin of `fastbegan_kernels.conv_stage`.

    With `copies`, chunk i of the batch runs with copy i of weights and biases.
    """
    kinds = check_stage(x, weights, biases, kinds, skip, copies)
    activations = check_activations(activation, alpha, len(kinds))
    if copies > 1:
        count = len(kinds)
        tables = [None] * copies if skip is None else skip.chunk(copies)
        parts = []
        for number, (part, table) in enumerate(zip(x.chunk(copies), tables, strict=True)):
            copy = slice(number * count, (number + 1) * count)
            bias = None if biases is None else biases[copy]
            parts.append(
                conv_stage(part, weights[copy], bias, kinds=kinds, skip=table, activation=activations, alpha=alpha)
            )
        return torch.cat(parts)
    for number, (weight, kind, activation) in enumerate(zip(weights, kinds, activations, strict=True)):
        bias = None if biases is None else biases[number]
        if kind == "up":
            table = skip if number == len(kinds) - 1 else None
            x = upsample_conv2d_elu(x, weight, bias, skip=table, activation=activation, alpha=alpha)
        else:
            stride, padding = 1 if kind == "same" else 2, "end" if kind == "down_end" else "same"
            x = conv2d_elu(x, weight, bias, stride=stride, padding=padding, activation=activation, alpha=alpha)
    return x


def skip_phase_table(h: Tensor, weight: Tensor) -> Tensor:
    """All values of conv3x3 over an upsampled h: the twin of `fastbegan_kernels.skip_phase_table`.

    An output in the first row of its cell reads the cell above with tap 0, and its own cell with taps 1 and 2. An inner
    row reads its own cell only. The last row reads its own cell with taps 0 and 1, and the cell below with tap 2.
    """
    first, middle, last = torch.eye(3, dtype=weight.dtype, device=weight.device)
    none = torch.zeros_like(first)
    # [phase, neighbour above / own / below, tap]
    rows = torch.stack(
        [
            torch.stack((first, middle + last, none)),
            torch.stack((none, first + middle + last, none)),
            torch.stack((none, first + middle, last)),
        ]
    )
    kernels = torch.einsum("pda,qeb,kcab->pqkcde", rows, rows, weight)
    out, channels = weight.shape[:2]
    table = F.conv2d(h, kernels.reshape(9 * out, channels, 3, 3), padding=1)
    return table.unflatten(1, (3, 3, out)).permute(0, 1, 2, 4, 5, 3)


def expand_phase_table(table: Tensor, height: int, width: int) -> Tensor:
    """Expand a phase table [N, 3, 3, S, S, K] to the map [N, K, height, width]; S divides height and width."""
    phases_h, phases_w = (_phases(size // table.shape[3], table.device) for size in (height, width))
    cells = table[:, phases_h][:, :, phases_w]  # [N, cell, cell, S, S, K]
    return cells.permute(0, 5, 3, 1, 4, 2).flatten(4, 5).flatten(2, 3)


def _phases(cell: int, device: torch.device) -> Tensor:
    phases = torch.ones(cell, dtype=torch.int64, device=device)
    phases[0], phases[-1] = 0, 2
    return phases


def l1_reconstruction_loss(prediction: Tensor, target: Tensor, *, eta: int = 1, detach_target: bool = False) -> Tensor:
    """Mean of |target - prediction|^eta of each sample: the twin of `fastbegan_kernels.l1_reconstruction_loss`."""
    check_loss(prediction, target, eta)
    wide = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    difference = prediction.to(wide) - (target.detach() if detach_target else target).to(wide)
    error = difference.abs() if eta == 1 else difference.square()
    # flatten and mean would make gradients contiguous, whatever the format of the inputs
    return error if error.dim() == 1 else error.sum(tuple(range(1, error.dim()))) / prod(error.shape[1:])


def equilibrium_update(
    loss_real: Tensor,
    loss_fake: Tensor,
    k: Tensor,
    sums: Tensor,
    window: Tensor,
    skip: Tensor | None = None,
    *,
    gamma: float,
    lambda_k: float,
) -> None:
    """One step of BEGAN's controller, in place: the twin of `fastbegan_kernels.equilibrium_update`."""
    check_controller(gamma, lambda_k)
    real, fake = loss_real.mean().to(k.dtype), loss_fake.mean().to(k.dtype)
    balance = gamma * real - fake
    measure = real + balance.abs()
    row = torch.stack((real, fake, k, measure, (real - fake).abs(), torch.ones_like(real)))
    new_k = (k + lambda_k * balance).clamp(0, 1)
    if skip is not None:
        row, new_k = torch.where(skip, 0.0, row), torch.where(skip, k, new_k)
    sums += row
    window += row[3::2]  # a list of indices would be copied from the host
    k.copy_(new_k)


def normalize_images(
    images: Tensor,
    index: Tensor | None = None,
    flip: Tensor | None = None,
    corner: Tensor | None = None,
    *,
    margin: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A batch from stored uint8 images: the twin of `fastbegan_kernels.normalize_images`."""
    batch = images if index is None else images[index]
    if margin:
        count, height, width = batch.shape[:3]
        corner = corner if corner is not None else torch.full((count, 2), margin // 2, device=batch.device)
        rows = corner[:, :1] + torch.arange(height - margin, device=batch.device)
        columns = corner[:, 1:] + torch.arange(width - margin, device=batch.device)
        samples = torch.arange(count, device=batch.device)
        batch = batch[samples[:, None, None], rows[:, :, None], columns[:, None, :]]
    if flip is not None:
        batch = torch.where(flip[:, None, None, None], batch.flip(2), batch)
    return batch.to(dtype).div_(127.5).sub_(1).permute(0, 3, 1, 2)  # [N, C, H, W]

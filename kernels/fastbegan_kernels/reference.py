"""The specification: every public function in plain, differentiable PyTorch, on any device and in any dtype.

Each twin takes the arguments of the op with its name, but for `impl`; the op's docstring describes them. The checks of
arguments are here too, so that all tiers refuse the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("elu", "relu", "leaky_relu", "silu", "none")
FROM_OUTPUT = ("elu", "relu", "leaky_relu", "none")
"""Activations whose derivative follows from their output, so that a backward keeps nothing else."""
WITH_ALPHA = ("elu", "leaky_relu")
KINDS = ("same", "down", "down_end", "up")
END = (0, 1, 0, 1)
"""F.pad's argument for one column to the right and one row below."""


def require_number(name: str, value: object, accepted: str, within: Callable[[float], bool]) -> None:
    """Raises ValueError unless `value` is a number, or a tensor of one, for which `within` holds.

    `accepted` names the range in the message.
    """
    value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(value, bool) or not isinstance(value, Real) or not within(float(value)):
        raise ValueError(f"{name} is {value!r}; accepted: {accepted}")


def check_activation(activation: str, alpha: float) -> None:
    """Raises ValueError for an unknown name, and for alpha below 0, where the output does not fix the derivative."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; accepted: {', '.join(ACTIVATIONS)}")
    require_number("alpha", alpha, "numbers >= 0", lambda number: number >= 0)


def check_activations(activation: str | Sequence[str], alpha: float, layers: int) -> list[str]:
    """One name per layer, from one for all or a list. Raises ValueError for other names and lengths, and alpha < 0."""
    names = [activation] * layers if isinstance(activation, str) else list(activation)
    if len(names) != layers:
        raise ValueError(f"activation has {len(names)} entries for {layers} layers; accepted: one for all, or one each")
    for name in names:
        check_activation(name, alpha)
    return names


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


def check_group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, activation: str
) -> None:
    """Raises ValueError for what `group_norm_silu` does not accept."""
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; accepted: floating-point [N, C, H, W]")
    channels = x.shape[1]
    if groups < 1 or channels % groups or not channels:
        raise ValueError(f"groups is {groups} for {channels} channels; accepted: divisors of the channels")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.shape != (channels,):
            raise ValueError(f"{name} is {list(value.shape)}; accepted: [{channels}] or None")
    require_number("eps", eps, "numbers above 0", lambda number: number > 0)
    if activation not in ("silu", "none"):
        raise ValueError(f"activation is {activation!r}; accepted: silu, none")


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


def check_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    kind: str,
    skip: Tensor | None = None,
    carry: Tensor | None = None,
) -> None:
    """Raises ValueError for arguments that no tier can compute, with name, value and accepted values."""
    check_dtypes(x, weight, bias)
    check_shapes(x.shape, weight, bias, kind=kind, skip=skip, carry=carry)


def check_dtypes(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises ValueError unless all have one dtype. A bias may be float32. Under autocast, which casts, all pass."""
    device = x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        return
    if weight.dtype != x.dtype:
        raise ValueError(f"weight is {weight.dtype} but x is {x.dtype}; they must match (autocast may cast both)")
    if bias is not None and bias.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"bias is {bias.dtype}; accepted: {x.dtype} or torch.float32")


def check_shapes(
    x: Sequence[int],
    weight: Tensor,
    bias: Tensor | None,
    *,
    kind: str,
    skip: Tensor | None = None,
    carry: Tensor | None = None,
) -> list[int]:
    """Returns the output's shape. Raises ValueError for shapes that do not fit.

    Weights are [K, C, k, k] with odd k (3 for kind "up"), or folded [C, K, 4, 4] for kind "up" (`fold`).
    """
    if len(x) != 4 or min(x[1:]) < 1:
        raise ValueError(f"x is {list(x)}; accepted: [N, C, H, W]")
    folded = kind == "up" and weight.dim() == 4 and tuple(weight.shape[2:]) == (4, 4)
    square = weight.dim() == 4 and weight.shape[2] == weight.shape[3] and (weight.shape[2] % 2 == 1 or folded)
    if not square or weight.shape[2] not in {"up": (3, 4), "down_end": (3,)}.get(kind, weight.shape[2:]):
        accepted = {"up": "[out, in, 3, 3], or folded [in, out, 4, 4]", "down_end": "[out, in, 3, 3]"}
        accepted = accepted.get(kind, "[out, in, k, k] with odd k")
        raise ValueError(f"weight is {list(weight.shape)}; accepted: {accepted}")
    channels, outputs = (weight.shape[0], weight.shape[1]) if folded else (weight.shape[1], weight.shape[0])
    if x[1] != channels:
        raise ValueError(f"x is {list(x)} but weight takes {channels} channels; they must match")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias is {list(bias.shape)}; accepted: [{outputs}]")
    if carry is not None and (kind.startswith("down") or channels != outputs or carry.numel() != 1):
        raise ValueError(
            f"carry is {list(carry.shape)}; accepted: one number, with stride 1 and as many outputs as inputs"
        )
    if skip is not None:
        size = skip.shape[3] if skip.dim() == 6 else 0
        cells = [2 * side // size if size and 2 * side % size == 0 else 0 for side in x[2:]]
        if kind != "up" or min(cells) < 2 or skip.shape != (x[0], 3, 3, size, size, outputs):
            accepted = f"[{x[0]}, 3, 3, S, S, {outputs}] after an upsampling, S a divisor of {x[2]} and {x[3]}"
            raise ValueError(f"skip is {list(skip.shape)}; accepted: {accepted}")
    return [x[0], outputs, *output_size(x[2:], kind)]


def output_size(size: Sequence[int], kind: str) -> tuple[int, ...]:
    """Height and width of a layer's output from those of its input."""
    return tuple({"same": side, "down": (side + 1) // 2, "down_end": side // 2, "up": 2 * side}[kind] for side in size)


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


def conv_kind(stride: int, padding: str = "same") -> str:
    """The kind of `conv_stage` for a stride and padding. Raises ValueError where there is none."""
    if stride not in (1, 2):
        raise ValueError(f"stride is {stride!r}; accepted: 1, 2")
    if padding not in ("same", "end") or (padding == "end" and stride != 2):
        raise ValueError(f"padding is {padding!r} with stride {stride}; accepted: same, and with stride 2 end")
    return "same" if stride == 1 else "down" if padding == "same" else "down_end"


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


def check_stage(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    kinds: Sequence[str] | None,
    skip: Tensor | None = None,
    copies: int = 1,
) -> list[str]:
    """One kind per layer. Raises ValueError for lists of different lengths, and for unknown kinds."""
    if copies < 1 or len(x) % copies:
        raise ValueError(f"copies is {copies} for x {list(x.shape)}; accepted: numbers that divide the batch")
    layers = ["same"] * (len(weights) // copies) if kinds is None else list(kinds)
    if not weights or len(layers) * copies != len(weights) or (biases is not None and len(biases) != len(weights)):
        lengths = f"{len(weights)} weights, {'no' if biases is None else len(biases)} biases, {len(layers)} kinds"
        raise ValueError(f"a stage was given {lengths}; accepted: one or more weights, and as many biases and kinds")
    for number, kind in enumerate(layers):
        if kind not in KINDS:
            raise ValueError(f"kinds[{number}] is {kind!r}; accepted: {', '.join(KINDS)}")
    if skip is not None and layers[-1] != "up":
        raise ValueError(f"skip was given but the last kind is {layers[-1]!r}; accepted: up")
    return layers


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


def check_loss(prediction: Tensor, target: Tensor, eta: int) -> None:
    """Raises ValueError for another exponent than 1 and 2, integer dtypes (stored images), and shapes that differ."""
    if eta not in (1, 2):
        raise ValueError(f"eta is {eta!r}; accepted: 1, 2")
    for name, value in (("prediction", prediction), ("target", target)):
        if not value.is_floating_point():
            raise ValueError(f"{name} is {value.dtype}; accepted: floating-point types (images in [-1, 1])")
    if prediction.shape != target.shape:
        raise ValueError(f"prediction is {list(prediction.shape)} but target is {list(target.shape)}; they must match")


def l1_reconstruction_loss(prediction: Tensor, target: Tensor, *, eta: int = 1, detach_target: bool = False) -> Tensor:
    """Mean of |target - prediction|^eta of each sample: the twin of `fastbegan_kernels.l1_reconstruction_loss`."""
    check_loss(prediction, target, eta)
    wide = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    difference = prediction.to(wide) - (target.detach() if detach_target else target).to(wide)
    error = difference.abs() if eta == 1 else difference.square()
    # flatten and mean would make gradients contiguous, whatever the format of the inputs
    return error if error.dim() == 1 else error.sum(tuple(range(1, error.dim()))) / prod(error.shape[1:])


def check_controller(gamma: float, lambda_k: float) -> None:
    """Raises ValueError for a diversity ratio outside of 0 to 1, and for a negative gain."""
    require_number("gamma", gamma, "0 to 1", lambda number: 0 <= number <= 1)
    require_number("lambda_k", lambda_k, "numbers from 0", lambda number: number >= 0)


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

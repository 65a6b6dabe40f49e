"""Checks of the ops' arguments, with one clear error each. All tiers share them, so that they refuse the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real

import torch
from torch import Tensor

ACTIVATIONS = ("elu", "relu", "leaky_relu", "silu", "none")
FROM_OUTPUT = ("elu", "relu", "leaky_relu", "none")
"""Activations whose derivative follows from their output, so that a backward keeps nothing else."""
WITH_ALPHA = ("elu", "leaky_relu")
KINDS = ("same", "down", "down_end", "up")


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


def conv_kind(stride: int, padding: str = "same") -> str:
    """The kind of `conv_stage` for a stride and padding. Raises ValueError where there is none."""
    if stride not in (1, 2):
        raise ValueError(f"stride is {stride!r}; accepted: 1, 2")
    if padding not in ("same", "end") or (padding == "end" and stride != 2):
        raise ValueError(f"padding is {padding!r} with stride {stride}; accepted: same, and with stride 2 end")
    return "same" if stride == 1 else "down" if padding == "same" else "down_end"


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


def check_loss(prediction: Tensor, target: Tensor, eta: int) -> None:
    """Raises ValueError for another exponent than 1 and 2, integer dtypes (stored images), and shapes that differ."""
    if eta not in (1, 2):
        raise ValueError(f"eta is {eta!r}; accepted: 1, 2")
    for name, value in (("prediction", prediction), ("target", target)):
        if not value.is_floating_point():
            raise ValueError(f"{name} is {value.dtype}; accepted: floating-point types (images in [-1, 1])")
    if prediction.shape != target.shape:
        raise ValueError(f"prediction is {list(prediction.shape)} but target is {list(target.shape)}; they must match")


def check_controller(gamma: float, lambda_k: float) -> None:
    """Raises ValueError for a diversity ratio outside of 0 to 1, and for a negative gain."""
    require_number("gamma", gamma, "0 to 1", lambda number: 0 <= number <= 1)
    require_number("lambda_k", lambda_k, "numbers from 0", lambda number: number >= 0)

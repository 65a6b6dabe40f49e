"""Outputs and gradients of a module, and how far another way to get them is from the truth."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

_FACTOR, _FLOOR = 4.0, 1e-6  # of errors; four as for folded up-convolutions, see kernels/fastbegan_kernels/problems.py
_UNKNOWN = 1e-4  # the relative difference that is allowed where the truth is not known
_ANOTHER_DRAW = 1e-2  # a relative error that no rounding makes: float64 drew other random numbers
_MOVE, _DRAWS, _ENOUGH = 1e-3, 3, 2  # how far inputs are moved, how often, and how many of these must pass


@dataclass(frozen=True)
class Comparison:
    """Errors by name: relative ones before and after of what is near, and words on what is further off than it was."""

    near: dict[str, tuple[float, float]]
    too_far: dict[str, str]

    def __str__(self) -> str:
        before, after = (max((errors[side] for errors in self.near.values()), default=0.0) for side in (0, 1))
        return f"checked: largest relative error {after:.1e}, without fast layers {before:.1e}"

    def require_near(self) -> None:
        """Raises RuntimeError for the first that is too far."""
        for words in self.too_far.values():
            raise RuntimeError(f"the check failed: {words}; the model was restored")


def values(model: nn.Module, example: Any) -> dict[str, Tensor]:
    """By name, every floating-point output for `example` and its gradient to each parameter and input.

    The gradient is that of a fixed random sum of all outputs. Buffers and the random state are put back, and no `.grad`
    is touched.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    devices = sorted(
        {leaf.device.index or 0 for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.is_cuda}
    )
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            torch.manual_seed(0)
            return _values(model, tree_map(_leaf, inputs))
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


def _values(model: nn.Module, given: Any) -> dict[str, Tensor]:
    # clones: a first layer may work in place
    outputs = tree_leaves(model(*tree_map(lambda one: one.clone() if isinstance(one, Tensor) else one, given)))
    outputs = [leaf for leaf in outputs if isinstance(leaf, Tensor)]
    found = {f"output {number}": one.detach() for number, one in enumerate(outputs)}
    wanted = {name: one for name, one in model.named_parameters() if one.requires_grad}
    leaves = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor) and leaf.requires_grad]
    wanted |= {f"input {number}": one for number, one in enumerate(leaves)}
    total = [_weighted(one) for one in outputs if one.requires_grad]
    if total and wanted:
        gradients = torch.autograd.grad(torch.stack(total).sum(), list(wanted.values()), allow_unused=True)
        for name, gradient in zip(wanted, gradients, strict=True):
            if gradient is not None:
                found[f"gradient of {name}"] = gradient
    return found


def truth(model: nn.Module, example: Any) -> dict[str, Tensor]:
    """`values` of a copy in float64; nothing where there can be no copy."""
    try:
        wide = copy.deepcopy(model).double()
        return values(wide, tree_map(lambda one: one.double() if _is_real(one) else one, example))
    except Exception:  # hooks that make weights forbid a copy; forwards that cast to float32 do not mix with float64
        return {}


def compare(before: dict[str, Tensor], after: dict[str, Tensor], exact: dict[str, Tensor]) -> Comparison:
    """Errors against `exact`. Too far is what has more than four times the error it had.

    Errors of gradients are seen beside the largest gradient of their layer: that of a bias before a norm is 0 but for
    rounding. What `exact` does not have must be equal to a ten-thousandth. Raises RuntimeError for other names.
    """
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        raise RuntimeError(f"the check found {odd[0]} in one of both only; the model was restored")
    truth = {
        name: exact.get(name, old).to(torch.float64 if old.is_floating_point() else old.dtype)
        for name, old in before.items()
    }
    scales: dict[str, float] = {}
    for name, wide in truth.items():
        scales[_layer(name)] = max(scales.get(_layer(name), torch.finfo(torch.float32).tiny), _largest(wide))
    near, too_far = {}, {}
    for name, old in before.items():
        new, wide, scale = after[name], truth[name], scales[_layer(name)]
        was, now = (_error(one, wide) for one in (old, new))
        if was > _ANOTHER_DRAW * scale or name not in exact:
            was, now = _UNKNOWN * scale / _FACTOR, _error(new, old.to(wide.dtype))
        if now <= _FACTOR * was + _floor(old) * scale:
            near[name] = was / scale, now / scale
        else:
            too_far[name] = (
                f"the error of {name} is {now:.3g}, without fast layers {was:.3g}, of values up to {scale:.3g}"
            )
    return Comparison(near, too_far)


def moved(example: Any, draw: int) -> Any:
    """`example` with noise of a thousandth of each floating-point tensor's size, another one for each `draw`."""
    generator = torch.Generator().manual_seed(draw)

    def move(value: Any) -> Any:
        if not _is_real(value) or not value.numel():
            return value
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
        size = value.detach().double().square().mean().sqrt()
        return (value + _MOVE * torch.where(size > 0, size, 1.0) * noise).to(value.dtype)

    return tree_map(move, example)


def excuse(comparison: Comparison, compare_at: Callable[[int], Comparison]) -> Comparison:
    """`comparison`, with gradients that are near at two of three moved inputs near, too, by what they are there.

    A value that lies on a kink (0 before a ReLU) goes either way by rounding, and gradients with it; outputs do not
    jump there. `compare_at` takes the number of a draw; a draw that the model does not take counts for nothing.
    """
    doubtful = [name for name in comparison.too_far if name.startswith("gradient of ")]
    draws: list[Comparison] = []
    for draw in range(_DRAWS) if doubtful else ():
        with contextlib.suppress(Exception):  # say, images out of a range that the forward asks for
            draws.append(compare_at(draw))
    near = dict(comparison.near)
    for name in doubtful:
        passed = [draw.near[name] for draw in draws if name in draw.near]
        if len(passed) >= _ENOUGH:
            near[name] = max(passed, key=lambda errors: errors[1])
    return Comparison(near, {name: words for name, words in comparison.too_far.items() if name not in near})


def _layer(name: str) -> str:
    """What a value is measured by: the layer of a parameter's gradient, else the value itself."""
    if not name.startswith("gradient of ") or name.startswith("gradient of input "):
        return name
    return name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]


def _largest(value: Tensor) -> float:
    return float(value.abs().max()) if value.numel() else 0.0


def _floor(value: Tensor) -> float:
    if not value.is_floating_point():
        return 0.0
    return max(_FLOOR, 4 * torch.finfo(value.dtype).eps) if value.dtype != torch.float64 else 1e-12


def _error(one: Tensor, other: Tensor) -> float:
    return float((one.to(other.dtype) - other).abs().max()) if one.numel() else 0.0


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _leaf(value: Any) -> Any:
    return value.detach().clone().requires_grad_(_is_real(value)) if isinstance(value, Tensor) else value


def _weighted(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(output.numel())
    draw = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return (output * draw.to(device=output.device, dtype=output.dtype)).sum().double()

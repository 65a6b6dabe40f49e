"""Compares two ways to compute a module's outputs and gradients by their errors against float64."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

_FACTOR, _FLOOR = 4.0, 1e-6  # allowed growth and absolute part of an error; four, as for folded up-convolutions
_UNKNOWN = 1e-4  # allowed relative difference where there is no result in float64
_ANOTHER_DRAW = 1e-2  # a relative error too large for rounding: the model drew other random numbers in float64
_MOVE, _DRAWS, _ENOUGH = 1e-3, 3, 2  # relative size of the noise on inputs, number of draws, draws that must pass


@dataclass(frozen=True)
class Comparison:
    """The result of a check, by the names of outputs and gradients."""

    near: dict[str, tuple[float, float]]
    """Relative errors before and after of the values that pass."""
    too_far: dict[str, str]
    """Descriptions of the values that fail."""

    def __str__(self) -> str:
        before, after = (max((errors[side] for errors in self.near.values()), default=0.0) for side in (0, 1))
        return f"checked: largest relative error {after:.1e}, without fast layers {before:.1e}"

    def require_near(self) -> None:
        """Raises RuntimeError for the first value that fails."""
        for words in self.too_far.values():
            raise RuntimeError(f"the check failed: {words}; the model was restored")


def values(model: nn.Module, example: Any) -> dict[str, Tensor]:
    """All tensors in the output for `example`, and gradients at each parameter and input, by name.

    The gradients are those of one fixed random weighted sum of all outputs. Buffers and the random state are put back;
    no `.grad` is changed.
    """
    inputs = _arguments(example)
    with _unchanged(model, inputs), torch.enable_grad():
        torch.manual_seed(0)
        return _values(model, tree_map(_leaf, inputs))


def called(model: nn.Module, example: Any) -> None:
    """Call the model with `example`. Buffers and the random state are put back."""
    inputs = _arguments(example)
    with _unchanged(model, inputs):
        model(*inputs)


def _arguments(example: Any) -> tuple[Any, ...]:
    return example if isinstance(example, tuple) else (example,)


@contextlib.contextmanager
def _unchanged(model: nn.Module, inputs: Any) -> Iterator[None]:
    """Put buffers and the random state back afterwards."""
    devices = sorted(
        {leaf.device.index or 0 for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.is_cuda}
    )
    lazy = torch.nn.parameter.is_lazy
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if not lazy(buffer)}
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers and buffer.shape == buffers[name].shape:  # others a forward has made
                    buffer.copy_(buffers[name])


def _values(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    # clones: a first layer may work in place
    outputs = tree_leaves(model(*tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)))
    outputs = [leaf for leaf in outputs if isinstance(leaf, Tensor)]
    results = {f"output {number}": output.detach() for number, output in enumerate(outputs)}
    sources = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
    sources |= {f"input {number}": leaf for number, leaf in enumerate(leaves)}
    terms = [_weighted(output) for output in outputs if output.requires_grad]
    if terms and sources:
        gradients = torch.autograd.grad(torch.stack(terms).sum(), list(sources.values()), allow_unused=True)
        for name, gradient in zip(sources, gradients, strict=True):
            if gradient is not None:
                results[f"gradient of {name}"] = gradient
    return results


def truth(model: nn.Module, example: Any) -> dict[str, Tensor]:
    """`values` of a float64 copy; empty where the model cannot be copied or does not run in float64."""
    try:
        wide = copy.deepcopy(model).double()
        return values(wide, tree_map(lambda leaf: leaf.double() if _is_real(leaf) else leaf, example))
    except Exception:  # hooks that make weights forbid a copy; forwards that cast to float32 do not mix with float64
        return {}


def in_channels_last(model: nn.Module, example: Any) -> dict[str, Tensor]:
    """`values` of a copy in channels_last; empty where the model cannot be copied or does not run so."""

    def last(value: Any) -> Any:
        is_map = isinstance(value, Tensor) and value.dim() == 4
        return value.contiguous(memory_format=torch.channels_last) if is_map else value

    try:
        other: Any = copy.deepcopy(model)
        return values(other.to(memory_format=torch.channels_last), tree_map(last, example))
    except Exception:
        return {}


def either(comparison: Comparison, other: Comparison) -> Comparison:
    """A comparison in which a value passes that passes in one of two."""
    near = {**other.near, **comparison.near}
    return Comparison(near, {name: words for name, words in comparison.too_far.items() if name not in near})


def compare(before: dict[str, Tensor], after: dict[str, Tensor], exact: dict[str, Tensor]) -> Comparison:
    """Compare errors against `exact`. A value fails if its error is more than four times as large as before.

    The error of a gradient is relative to the largest gradient of its layer. That of a bias before a normalisation is
    zero up to rounding, so its own size says nothing. A value that is not in `exact` must be equal to 1e-4, relative.
    Raises RuntimeError if `before` and `after` have different names. An empty `before` compares nothing.
    """
    if before and before.keys() != after.keys():
        unmatched = sorted(before.keys() ^ after.keys())
        raise RuntimeError(f"the check found {unmatched[0]} in one of both only; the model was restored")
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
        was, now = _error(old, wide), _error(new, wide)
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
    """`example` with noise of a thousandth of each floating-point tensor's root mean square; `draw` is the seed."""
    generator = torch.Generator().manual_seed(draw)

    def move(value: Any) -> Any:
        if not _is_real(value) or not value.numel():
            return value
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
        size = value.detach().double().square().mean().sqrt()
        return (value + _MOVE * torch.where(size > 0, size, 1.0) * noise).to(value.dtype)

    return tree_map(move, example)


def excuse(comparison: Comparison, compare_at: Callable[[int], Comparison]) -> Comparison:
    """Let gradients in `comparison` pass that pass at two of three inputs nearby.

    Where a value lies on the kink of an activation (0 before a ReLU), rounding decides its side. There gradients jump,
    and outputs do not. `compare_at` compares at the inputs of a draw. A draw at which the model raises does not count.
    """
    doubtful = [name for name in comparison.too_far if name.startswith("gradient of ")]
    draws: list[Comparison] = []
    for draw in range(_DRAWS) if doubtful else ():
        with contextlib.suppress(Exception):  # a forward may require a range, which noise can leave
            draws.append(compare_at(draw))
    near = dict(comparison.near)
    for name in doubtful:
        passed = [draw.near[name] for draw in draws if name in draw.near]
        if len(passed) >= _ENOUGH:
            near[name] = max(passed, key=lambda errors: errors[1])
    return Comparison(near, {name: words for name, words in comparison.too_far.items() if name not in near})


def _layer(name: str) -> str:
    """The name of the scale of a value: the layer for a parameter's gradient, else the value itself."""
    if not name.startswith("gradient of ") or name.startswith("gradient of input "):
        return name
    return name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]


def _largest(value: Tensor) -> float:
    return float(value.abs().max()) if value.numel() else 0.0


def _floor(value: Tensor) -> float:
    if not value.is_floating_point():
        return 0.0
    return max(_FLOOR, 4 * torch.finfo(value.dtype).eps) if value.dtype != torch.float64 else 1e-12


def _error(value: Tensor, exact: Tensor) -> float:
    return float((value.to(exact.dtype) - exact).abs().max()) if value.numel() else 0.0


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _leaf(value: Any) -> Any:
    return value.detach().clone().requires_grad_(_is_real(value)) if isinstance(value, Tensor) else value


def _weighted(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(output.numel())
    draw = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return (output * draw.to(device=output.device, dtype=output.dtype)).sum().double()

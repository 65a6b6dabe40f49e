"""Sizes for elementwise kernels on which their launchers compile exactly what the gate compiles.

Each function computes with the public ops, fused or by their plain twins, as the registered checks of
`fastbegan_kernels.problems` do. Sizes are no multiples of 16 but where the gate promises that; the last block of
everything is partly empty.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastbegan_kernels as fk
from fastbegan_kernels import problems, reference
from fastbegan_kernels.activation import activation_backward
from fastbegan_kernels.fold import fold_flat
from fastbegan_kernels.skip_phase_table import skip_gradient

from . import project
from .project import Layer

Compute = Callable[[torch.dtype, bool], list[Tensor]]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Elementwise:
    """A problem as those of `fastbegan_kernels.problems`: results in a form, plain and exact ones."""

    name: str
    compute: Compute
    dtype: torch.dtype
    tf32: bool = False

    def results(self, form: Any, device: torch.device) -> list[Tensor]:
        """What a form computes."""
        return self.compute(self.dtype, form == project.FUSED)

    def expected(self, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """Plain results in this dtype, and in float64."""
        return self.compute(self.dtype, False), self.compute(torch.float64, False)


def elementwise(case: str) -> tuple[Elementwise | Layer, problems.Form]:
    """The problem for a case of the gate by its name, and the form that runs the kernel."""
    if case == "equilibrium update":
        return Elementwise(case, _equilibrium, torch.float32), project.FUSED
    head, _, word = case.rpartition(" ")
    if head in _LAYERS:
        dtype = str(_DTYPES[word]).removeprefix("torch.")
        return dataclasses.replace(_LAYERS[head], dtype=dtype), project.EPILOGUE
    for family in ("group norm", "fold"):
        head = family if head.startswith(family) else head
    return Elementwise(case, _COMPUTE[head], _DTYPES[word]), project.FUSED


def _draw(dtype: torch.dtype, seed: int, *shape: int) -> Tensor:
    return problems.draw(torch.device("cpu"), dtype, seed, *shape)


def _impl(fused: bool) -> str:
    return "fused" if fused else "reference"


def _activation_backward(dtype: torch.dtype, fused: bool) -> list[Tensor]:
    shape = (3, 144, 7, 5)
    grad, before = _draw(dtype, 0, *shape), _draw(torch.float32, 1, *shape)
    y = reference.activate(before, "elu", 0.7).bfloat16().half().to(dtype)
    return list(activation_backward(grad, y, "elu", 0.7, _impl(fused)))


def _skip_gradient(dtype: torch.dtype, fused: bool) -> list[Tensor]:
    dz = _draw(dtype, 0, 2, 48, 24, 120)  # cells of 3 x 15: one column of the block is empty
    return [skip_gradient(dz, 8, _impl(fused))]


def _l1(dtype: torch.dtype, fused: bool, *, eta: int, what: str) -> list[Tensor]:
    shape = (3, 1, 26, 40)
    prediction, target = _draw(dtype, 0, *shape), _draw(dtype, 1, *shape)
    target[:, :, :3] = prediction[:, :, :3]
    scale, impl = torch.tensor([1.0, -0.5, 0.25]), _impl(fused)
    if what == "both":
        results = fk.l1_reconstruction_loss_with_gradients(
            prediction, target, scale, eta=eta, to_target=True, impl=impl
        )
        return [value for value in results if value is not None]
    leaves = [value.requires_grad_(what == "gradient") for value in (prediction, target)]
    loss = fk.l1_reconstruction_loss(prediction, target, eta=eta, impl=impl)
    return [loss] if what == "loss" else list(torch.autograd.grad(loss, leaves, scale.to(loss.dtype)))


def _normalize(dtype: torch.dtype, fused: bool, *, windows: bool) -> list[Tensor]:
    images = torch.arange(3 * 27 * 29 * 3).remainder(256).to(torch.uint8).reshape(3, 27, 29, 3)
    index, flip = torch.tensor([2, 0, 2, 1]), torch.tensor([True, False, False, True])
    corner = torch.tensor([[0, 2], [1, 0], [2, 1], [2, 2]]) if windows else None
    margin = 2 if windows else 0
    return [fk.normalize_images(images, index, flip, corner, margin=margin, dtype=dtype, impl=_impl(fused))]


def _equilibrium(dtype: torch.dtype, fused: bool) -> list[Tensor]:
    real, fake = (_draw(dtype, seed, 300).abs() for seed in (0, 1))
    k, sums, window = torch.full((), 0.25, dtype=dtype), torch.ones(6, dtype=dtype), torch.ones(2, dtype=torch.float64)
    for skip in (False, True, False):
        fk.equilibrium_update(
            real, fake, k, sums, window, torch.tensor(skip), gamma=0.5, lambda_k=0.125, impl=_impl(fused)
        )
    return [k, sums, window]


def _fold(dtype: torch.dtype, fused: bool) -> list[Tensor]:
    return problems.POINTWISE["fold"](torch.device("cpu"), dtype, fused)


def _group_norm(dtype: torch.dtype, fused: bool) -> list[Tensor]:
    """Two splits of the pixels, the second short; groups of twelve."""
    x, grad = (_draw(dtype, seed, 2, 48, 33, 33) for seed in (0, 1))
    weight, bias = (_draw(dtype, seed, 48) for seed in (2, 3))
    leaves = [value.requires_grad_() for value in (x, weight, bias)]
    y = fk.group_norm_silu(x, 4, weight, bias, impl=_impl(fused))
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def _single(op: str, dtype: torch.dtype, fused: bool) -> list[Tensor]:
    """An op on maps of one pixel, channel and sample. Triton makes sizes of one compile-time numbers."""
    impl, image, one = _impl(fused), _draw(dtype, 0, 1, 1, 1, 1), torch.ones(1)
    if op == "activation_backward":
        return list(activation_backward(image, image, "elu", 0.7, impl))
    if op == "skip_gradient":
        return [skip_gradient(_draw(dtype, 0, 1, 1, 2, 2), 1, impl)]
    if op == "l1_reconstruction_loss":
        return list(fk.l1_reconstruction_loss_with_gradients(image, 2 * image, one, to_target=True, impl=impl)[:2])
    if op == "normalize_images":
        return [fk.normalize_images(torch.full((1, 1, 1, 1), 200, dtype=torch.uint8), dtype=dtype, impl=impl)]
    if op == "fold":
        master = torch.float64 if dtype == torch.float64 else torch.float32
        weights = [_draw(master, seed, 1, 1, 3, 3) for seed in (0, 1)]
        return [fold_flat(weights, ["conv", "up"], dtype, fused=fused)]
    grad = _draw(dtype, 1, 1, 1, 2, 2)
    x = _draw(dtype, 0, 1, 1, 2, 2).requires_grad_()
    y = fk.group_norm_silu(x, 1, impl=impl)
    return [y.detach(), *torch.autograd.grad(y, x, grad)]


def singles() -> Iterator[tuple[str, Elementwise]]:
    """Name and problem of each op on single values."""
    for op in problems.POINTWISE:
        if op != "equilibrium_update":  # its check has a batch of one
            yield op, Elementwise(op, functools.partial(_single, op), torch.float32)


_LAYERS = {  # library convolutions of few channels; with a phase table, of cells of 3 x 5
    "activation": Layer("same", False, "float32", (3, 2, 7, 5), (144, 2, 1, 1), alpha=0.7),
    "activation with skip": Layer("up", False, "float32", (1, 2, 12, 20), (2, 144, 4, 4), skip=8, alpha=0.7),
}
_COMPUTE: dict[str, Compute] = {
    "activation backward": _activation_backward,
    "skip gradient": _skip_gradient,
    "normalize images": functools.partial(_normalize, windows=False),
    "normalize images, windows": functools.partial(_normalize, windows=True),
    "fold": _fold,
    "group norm": _group_norm,
    **{
        f"l1 {what} eta {eta}": functools.partial(_l1, eta=eta, what=what)
        for eta in (1, 2)
        for what in ("loss", "gradient", "both")
    },
}

"""What a kernel is tried on before it is trusted: random inputs, what comes out, and how far off it may be.

A result is right when its largest error against float64 is at most twice that of PyTorch's own operation in the same
dtype, plus 1e-6 of the largest value (or of 1), and plus 2^-9 of it for TF32, whose operands Triton cuts off where
cuDNN may round them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference, tiers
from .fold import KINDS as FOLDS
from .fold import fold_flat, unfold_flat

_VALUES = 1 << 24  # of the largest tensor in a check; whole samples are left out above it


def dtype_named(name: str) -> torch.dtype:
    return getattr(torch, name)


@dataclass(frozen=True)
class Layer:
    """A layer, or its input gradient; `x` is its input's shape, `weight` that of its packed weights."""

    kind: str
    backward: bool
    dtype: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    bias: bool = True
    skip: int = 0
    activation: str | None = "elu"  # backward: that of the layer before, None where there is none
    alpha: float = 1.0
    tf32: bool = False

    @property
    def name(self) -> str:
        size = f"{self.x[1]} to {self.weight[1 if self.kind == 'up' else 0]} channels, {self.x[0]} of {self.x[2:]}"
        return f"{self.kind} {'input gradient' if self.backward else 'forward'} {self.dtype} {size}"

    def variant(self, how: str) -> str:
        """What is compiled anew: sizes are run-time numbers of a kernel, apart from what these say of them."""
        channels, outputs = self.weight[:2] if self.kind == "up" else self.weight[1::-1]
        if self.backward:
            channels, outputs = outputs, channels
        block = 64 if channels % 64 == 0 else 32 if channels % 32 == 0 else 16 if channels % 16 == 0 else 1
        facts = (
            self.kind, "backward" if self.backward else "forward", self.dtype, "tf32" if self.tf32 else "exact",
            self.weight[2], self.activation, self.bias, self.skip, block, outputs % 16 == 0,
            channels % 8 == 0 == outputs % 8, how,
        )  # fmt: skip
        return " ".join(map(str, facts))

    def tensors(self, device: torch.device, *, whole: bool = True) -> dict[str, Tensor | None]:
        """Random inputs with outputs of about 1; not `whole`: as few samples as a check needs."""
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device) * scale
            values = values.to(dtype_named(self.dtype) if dtype is None else dtype)
            return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

        batch, channels, height, width = self.x
        up = self.kind == "up"
        outputs = self.weight[1 if up else 0]
        out_h, out_w = reference.output_size((height, width), self.kind)
        if not whole:
            largest = max(channels * height * width, outputs * out_h * out_w)
            batch = max(1, min(batch, _VALUES // largest))
        fan = (4 if up else self.weight[2] ** 2) * (outputs if self.backward else channels)
        x = draw(batch, channels, height, width)
        if self.backward and self.activation is not None:
            x = reference.activate(x, self.activation, self.alpha)
        return {
            "x": x,
            "weight": draw(*self.weight, scale=fan**-0.5),
            "bias": draw(outputs, dtype=torch.float32) if self.bias and not self.backward else None,
            "skip": draw(batch, 3, 3, self.skip, self.skip, outputs) if self.skip and not self.backward else None,
            "dz": draw(batch, outputs, out_h, out_w) if self.backward else None,
        }

    def run(self, how: str, given: dict[str, Tensor | None]) -> list[Tensor]:
        """The output, or the gradient (and with an activation its sum over pixels)."""
        x, weight, dz = given["x"], given["weight"], given["dz"]
        assert x is not None and weight is not None
        if dz is None:
            assert self.activation is not None
            return [
                tiers.forward(
                    x, weight, given["bias"], given["skip"], kind=self.kind, activation=self.activation,
                    alpha=self.alpha, how=how,
                )
            ]  # fmt: skip
        found = tiers.input_gradient(
            dz, x, weight, kind=self.kind, activation=self.activation, alpha=self.alpha, how=how
        )
        return [value for value in found if value is not None]

    def results(self, how: str, device: torch.device) -> list[Tensor]:
        """What a form gives on the inputs of a check."""
        return self.run(how, self.tensors(device, whole=False))

    def expected(self, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """PyTorch's own results for a check in this dtype, and the exact ones in float64."""
        given = self.tensors(device, whole=False)
        exact = {name: None if value is None else value.double() for name, value in given.items()}
        return self.run("plain", given), self.run("plain", exact)


def excess(got: Tensor, own: Tensor, exact: Tensor, *, tf32: bool = False, factor: float = 2.0) -> float:
    """Largest error over the allowed one; above 1 is wrong. NaN, infinity and a wrong shape give 1e9."""
    if got.shape != exact.shape:
        return 1e9
    if not exact.numel():
        return 0.0
    largest = exact.abs().max().item()
    allowed = factor * (own.double() - exact).abs().max().item() + 1e-6 * max(1.0, largest)
    allowed += 2**-9 * largest if tf32 else 0.0
    error = (got.double() - exact).abs().max().item()
    return min(error / allowed, 1e9) if math.isfinite(error) else 1e9


@dataclass(frozen=True)
class Pointwise:
    """One of the kernels without a matrix product, by its name in POINTWISE, on sizes that no block divides."""

    op: str
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.op} {self.dtype}"

    def variant(self, how: str) -> str:
        return f"{self.name} {how}"

    def results(self, how: str, device: torch.device) -> list[Tensor]:
        return POINTWISE[self.op](device, dtype_named(self.dtype), how == "fused")

    def expected(self, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        plain = POINTWISE[self.op](device, dtype_named(self.dtype), False)
        return plain, POINTWISE[self.op](device, torch.float64, False)


def _draw(device: torch.device, dtype: torch.dtype, seed: int, *shape: int) -> Tensor:
    """Values that float16, bfloat16 and float32 hold alike, so that a check in float64 sees the same inputs."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    values = values.half().to(device=device, dtype=dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


_SHAPES = ((3, 37, 9, 7), (2, 32, 16, 16))  # what no block divides, and what all do: Triton compiles them apart


def _activation_backward(device: torch.device, dtype: torch.dtype, fused: bool) -> list[Tensor]:
    found: list[Tensor] = []
    for shape, activation in itertools.product(_SHAPES, ("elu", "relu", "leaky_relu", "none")):
        grad, y = (_draw(device, dtype, seed, *shape) for seed in (0, 1))
        y = reference.activate(y, activation, 0.25).to(torch.bfloat16).to(torch.float16).to(dtype)
        how = "algebraic" if fused else "plain"
        found += tiers.activation_backward(grad, y, activation=activation, alpha=0.25, how=how)
    return found


def _skip_gradient(device: torch.device, dtype: torch.dtype, fused: bool) -> list[Tensor]:
    how = "algebraic" if fused else "plain"
    small, large = _draw(device, dtype, 0, 2, 37, 12, 18), _draw(device, dtype, 1, 2, 32, 32, 32)
    return [tiers.skip_gradient(dz, size, how=how) for dz, size in ((small, 2), (small, 6), (large, 8))]


def _l1(device: torch.device, dtype: torch.dtype, fused: bool) -> list[Tensor]:
    """Loss and gradients in one pass, and each alone, as autograd asks for them."""
    from .l1_reconstruction_loss import loss_and_gradients

    found: list[Tensor | None] = []
    for shape, eta in itertools.product(_SHAPES, (1, 2)):
        prediction, target = (_draw(device, dtype, seed, *shape) for seed in (0, 1))
        scale = torch.tensor([1.0, -0.5, 0.25][: shape[0]], device=device)
        both = loss_and_gradients(prediction, target, scale, eta=eta, to_target=True, fused=fused)
        found += both
        if fused:
            from .fused import launch

            found.append(launch.l1_reconstruction_loss(prediction, target, eta=eta)[0])
            found += launch.l1_reconstruction_loss(prediction, target, scale, eta=eta, loss=False)[1:2]
        else:
            found += both[:2]
    return [value for value in found if value is not None]


def _normalize(device: torch.device, dtype: torch.dtype, fused: bool) -> list[Tensor]:
    from .normalize_images import normalize

    images = torch.arange(3 * 7 * 9 * 3, device=device).remainder(256).to(torch.uint8).reshape(3, 7, 9, 3)
    index, flip = torch.tensor([2, 0, 2], device=device), torch.tensor([True, False, False], device=device)
    corner = torch.tensor([[0, 2], [1, 0], [2, 1]], device=device)
    return [
        normalize(images, index, flip, None, 0, dtype, fused),
        normalize(images, index, flip, corner, 2, dtype, fused),
        normalize(images, None, None, None, 0, dtype, fused),
    ]


def _equilibrium(device: torch.device, dtype: torch.dtype, fused: bool) -> list[Tensor]:
    from .equilibrium_update import update

    found: list[Tensor] = []
    for samples in (1, 16, 300):
        real, fake = (_draw(device, dtype, seed, samples).abs() for seed in (0, 1))
        k, sums = torch.full((), 0.25, dtype=dtype, device=device), torch.ones(6, dtype=dtype, device=device)
        window = torch.ones(2, dtype=torch.float64, device=device)
        for skip in (None, torch.tensor(True, device=device), torch.tensor(False, device=device)):
            update(real, fake, k, sums, window, skip, 0.5, 0.125, fused)
        found += [k, sums, window]
    return found


def _fold(device: torch.device, dtype: torch.dtype, fused: bool) -> list[Tensor]:
    """Packed weights, and gradients of the packed ones taken back."""
    master = torch.float64 if dtype == torch.float64 else torch.float32
    weights = [_draw(device, master, seed, 5, 7, 3, 3) for seed in range(3)]
    flat = fold_flat(weights, FOLDS, dtype, fused=fused)
    grad = _draw(device, dtype, 9, flat.numel())
    return [flat, unfold_flat(grad, weights, FOLDS, fused=fused)]


POINTWISE: dict[str, Callable[[torch.device, torch.dtype, bool], list[Tensor]]] = {
    "activation_backward": _activation_backward,
    "skip_gradient": _skip_gradient,
    "l1_reconstruction_loss": _l1,
    "normalize_images": _normalize,
    "equilibrium_update": _equilibrium,
    "fold": _fold,
}

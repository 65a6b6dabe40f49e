"""The problems that a kernel is verified on before it is used: random inputs, plain and exact results, allowed errors.

A result is right if its largest error against float64 stays within the sum of

- twice the largest error of PyTorch's own operation in the same dtype;
- 1e-6 of the largest value, or of 1 if that is larger;
- for TF32, 2^-9 of the largest value: Triton cuts operands off where cuDNN may round them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference, tiers

_VALUES = 1 << 24  # of the largest tensor in a check; a larger batch is checked in part

Check = Callable[[torch.device, torch.dtype, bool], list[Tensor]]
POINTWISE: dict[str, Check] = {}
"""The check of each kernel without a matrix product: its results on a device, in a dtype, fused or plain."""


def checks(op: str) -> Callable[[Check], Check]:
    """Enter a function in POINTWISE. Ops enter their own checks, so that this module and `tuning` import no op."""

    def enter(check: Check) -> Check:
        POINTWISE[op] = check
        return check

    return enter


def dtype_named(name: str) -> torch.dtype:
    """torch.float32 for "float32"."""
    return getattr(torch, name)


@dataclass(frozen=True)
class Layer:
    """A layer's forward, or its input gradient. `x` and `weight` are the shapes of its input and packed weight."""

    kind: str
    backward: bool
    dtype: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    bias: bool = True
    skip: int = 0  # S of the phase table, 0 without one
    activation: str | None = "elu"  # backward: of the layer before, None for the first layer
    alpha: float = 1.0
    tf32: bool = False

    @property
    def name(self) -> str:
        """One line for warnings."""
        size = f"{self.x[1]} to {self.weight[1 if self.kind == 'up' else 0]} channels, {self.x[0]} of {self.x[2:]}"
        return f"{self.kind} {'input gradient' if self.backward else 'forward'} {self.dtype} {size}"

    def variant(self, form: str) -> str:
        """The compiled binary that a form needs here. Sizes are run-time numbers; only their divisibility counts."""
        channels, outputs = self.weight[:2] if self.kind == "up" else self.weight[1::-1]
        if self.backward:
            channels, outputs = outputs, channels
        block = 64 if channels % 64 == 0 else 32 if channels % 32 == 0 else 16 if channels % 16 == 0 else 1
        divisible = (block, outputs % 16 == 0, channels % 8 == 0 == outputs % 8)
        mode = ("backward" if self.backward else "forward", self.dtype, "tf32" if self.tf32 else "exact")
        facts = (self.kind, *mode, self.weight[2], self.activation, self.bias, self.skip, *divisible, form)
        return " ".join(map(str, facts))

    def tensors(self, device: torch.device, *, whole: bool = True) -> dict[str, Tensor | None]:
        """Random inputs with outputs of about 1. Without `whole`, only as many samples as a check needs."""
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

    def run(self, form: str, tensors: dict[str, Tensor | None]) -> list[Tensor]:
        """The output, or the input gradient and, with an activation, its sum over pixels."""
        x, weight, dz = tensors["x"], tensors["weight"], tensors["dz"]
        assert x is not None and weight is not None
        if dz is None:
            act, bias, skip = self.activation, tensors["bias"], tensors["skip"]
            assert act is not None
            y = tiers.forward(x, weight, bias, skip, kind=self.kind, activation=act, alpha=self.alpha, form=form)
            return [y]
        gradients = tiers.input_gradient(
            dz, x, weight, kind=self.kind, activation=self.activation, alpha=self.alpha, form=form
        )
        return [value for value in gradients if value is not None]

    def results(self, form: str, device: torch.device) -> list[Tensor]:
        """The results of a form on the inputs of a check."""
        return self.run(form, self.tensors(device, whole=False))

    def expected(self, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """PyTorch's own results for a check in this dtype, and the exact ones in float64."""
        tensors = self.tensors(device, whole=False)
        exact = {name: None if value is None else value.double() for name, value in tensors.items()}
        return self.run("plain", tensors), self.run("plain", exact)


class Race:
    """Ways to compute the same thing, made of other problems, each of which is tried by itself."""

    candidates: tuple[str, ...] = ()
    tf32: bool = False

    @property
    def name(self) -> str:
        """One line for warnings."""
        raise AssertionError

    def variant(self, form: str) -> str:
        """A name for a form of this problem."""
        return f"{self.name} {form}"

    def tensors(self, device: torch.device, *, whole: bool = True) -> dict[str, Tensor | None]:
        """Random inputs. Without `whole`, only as many samples as a check needs."""
        raise AssertionError

    def run(self, form: str, tensors: dict[str, Tensor | None]) -> list[Tensor]:
        """What a form computes."""
        raise AssertionError

    def results(self, form: str, device: torch.device) -> list[Tensor]:
        """The results of a form on the inputs of a check."""
        return self.run(form, self.tensors(device, whole=False))

    def expected(self, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """The first candidate's results for a check in this dtype, and the exact ones in float64."""
        tensors = self.tensors(device, whole=False)
        exact = {name: None if value is None else value.double() for name, value in tensors.items()}
        return self.run(self.candidates[0], tensors), self.run(self.candidates[0], exact)


def excess(got: Tensor, plain: Tensor, exact: Tensor, *, tf32: bool = False, factor: float = 2.0) -> float:
    """Largest error over the allowed one; above 1 is wrong. NaN, infinity and a wrong shape give 1e9."""
    if got.shape != exact.shape:
        return 1e9
    if not exact.numel():
        return 0.0
    largest = exact.abs().max().item()
    allowed = factor * (plain.double() - exact).abs().max().item() + 1e-6 * max(1.0, largest)
    allowed += 2**-9 * largest if tf32 else 0.0
    error = (got.double() - exact).abs().max().item()
    return min(error / allowed, 1e9) if math.isfinite(error) else 1e9


@dataclass(frozen=True)
class Pointwise:
    """A kernel without a matrix product, by its name in POINTWISE. Sizes in its check are no multiples of blocks."""

    op: str
    dtype: str

    @property
    def name(self) -> str:
        """One line for warnings."""
        return f"{self.op} {self.dtype}"

    def variant(self, form: str) -> str:
        """The compiled binary that a form needs."""
        return f"{self.name} {form}"

    def results(self, form: str, device: torch.device) -> list[Tensor]:
        """The results of a form on the inputs of a check."""
        return POINTWISE[self.op](device, dtype_named(self.dtype), form == "fused")

    def expected(self, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """PyTorch's own results for a check in this dtype, and the exact ones in float64."""
        plain = POINTWISE[self.op](device, dtype_named(self.dtype), False)
        return plain, POINTWISE[self.op](device, torch.float64, False)


SHAPES = ((3, 37, 9, 7), (2, 32, 16, 16))
"""Sizes that no block divides, and sizes that all blocks divide: Triton compiles them apart."""


def draw(device: torch.device, dtype: torch.dtype, seed: int, *shape: int) -> Tensor:
    """Random values that float16, bfloat16 and float32 represent exactly, so that a float64 check has equal inputs."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    values = values.half().to(device=device, dtype=dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values


@checks("activation_backward")
def _activation_backward(device: torch.device, dtype: torch.dtype, fused: bool) -> list[Tensor]:
    results: list[Tensor] = []
    for shape, activation in itertools.product(SHAPES, reference.FROM_OUTPUT):
        grad, y = (draw(device, dtype, seed, *shape) for seed in (0, 1))
        y = reference.activate(y, activation, 0.25).to(torch.bfloat16).to(torch.float16).to(dtype)
        form = "algebraic" if fused else "plain"
        results += tiers.activation_backward(grad, y, activation=activation, alpha=0.25, form=form)
    return results


@checks("skip_gradient")
def _skip_gradient(device: torch.device, dtype: torch.dtype, fused: bool) -> list[Tensor]:
    form = "algebraic" if fused else "plain"
    small, large = draw(device, dtype, 0, 2, 37, 12, 18), draw(device, dtype, 1, 2, 32, 32, 32)
    return [tiers.skip_gradient(dz, size, form=form) for dz, size in ((small, 2), (small, 6), (large, 8))]

"""The problems that a kernel is verified on before it is used: random inputs, plain and exact results, allowed errors.

Ops define their own problems, or enter a check; this module and `tuning` import no op.

A result is right if its largest error against float64 stays within the sum of

- twice the largest error of PyTorch's own operation in the same dtype;
- 1e-6 of the largest value, or of 1 if that is larger;
- for TF32, 2^-9 of the largest value: Triton cuts operands off where cuDNN may round them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

Tensors = dict[str, Tensor | None]
Check = Callable[[torch.device, torch.dtype, bool], list[Tensor]]
POINTWISE: dict[str, Check] = {}
"""The check of each kernel without a matrix product: its results on a device, in a dtype, fused or plain."""
PROBLEMS: dict[str, type[Problem]] = {}
"""The kinds of problems by their names, for the process that tries kernels."""


class Form(Protocol):
    """A way to compute a problem, a value that can be compared. Its name is for people and for kernels.json."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Named:
    """A form that is nothing but its name."""

    name: str


PLAIN = Named("plain")
"""PyTorch's own operations."""
FUSED = Named("fused")
"""The kernel, of those that have one form."""


class Problem:
    """Something that several forms compute. Fields of a frozen dataclass define it."""

    tf32: bool = False
    plain: ClassVar[Form] = PLAIN
    timed: ClassVar[bool] = True
    """Whether right forms are raced; else the first right one is taken."""
    tried_apart: ClassVar[bool] = True
    """Whether forms run in a child process first; not if they consist of other problems' forms."""

    def __init_subclass__(cls) -> None:
        PROBLEMS[cls.__name__] = cls

    @property
    def name(self) -> str:
        """One line for warnings."""
        raise NotImplementedError

    def variant(self, form: Form) -> str:
        """The compiled binary that a form needs here."""
        return f"{self.name} {form.name}"

    def forms(self, device: torch.device, impl: str) -> list[Form]:
        """The candidates besides `plain`, in a tier: "auto", "algebraic" or "fused"."""
        raise NotImplementedError

    def form_named(self, name: str) -> Form:
        """The form with a name."""
        return Named(name)

    def repeats(self, form: Form) -> bool:
        """Whether a form must give the same bits each time."""
        raise NotImplementedError

    def tensors(self, device: torch.device, *, whole: bool = True) -> Tensors:
        """Random inputs. Without `whole`, only as many samples as a check needs."""
        raise NotImplementedError

    def run(self, form: Form, tensors: Tensors) -> list[Tensor]:
        """What a form computes."""
        raise NotImplementedError

    def results(self, form: Form, device: torch.device) -> list[Tensor]:
        """The results of a form on the inputs of a check."""
        return self.run(form, self.tensors(device, whole=False))

    def expected(self, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """The plain form's results for a check in this dtype, and the exact ones in float64."""
        tensors = self.tensors(device, whole=False)
        exact = {name: None if value is None else value.double() for name, value in tensors.items()}
        return self.run(self.plain, tensors), self.run(self.plain, exact)


@dataclass(frozen=True)
class Pointwise(Problem):
    """A kernel without a matrix product, by its name in POINTWISE. Sizes in its check are no multiples of blocks."""

    op: str
    dtype: str
    timed: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """One line for warnings."""
        return f"{self.op} {self.dtype}"

    def forms(self, device: torch.device, impl: str) -> list[Form]:
        """The kernel."""
        return [FUSED]

    def repeats(self, form: Form) -> bool:
        """Kernels add in a fixed order."""
        return True

    def results(self, form: Form, device: torch.device) -> list[Tensor]:
        """The results of a form on the inputs of a check."""
        return POINTWISE[self.op](device, dtype_named(self.dtype), form == FUSED)

    def expected(self, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """PyTorch's own results for a check in this dtype, and the exact ones in float64."""
        plain = POINTWISE[self.op](device, dtype_named(self.dtype), False)
        return plain, POINTWISE[self.op](device, torch.float64, False)


def checks(op: str) -> Callable[[Check], Check]:
    """Enter a function in POINTWISE."""

    def enter(check: Check) -> Check:
        POINTWISE[op] = check
        return check

    return enter


NAMES = {getattr(torch, name): name for name in ("float32", "bfloat16", "float16", "float64", "uint8")}
"""The names of dtypes."""


def dtype_named(name: str) -> torch.dtype:
    """torch.float32 for "float32"."""
    return getattr(torch, name)


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


SHAPES = ((3, 37, 9, 7), (2, 32, 16, 16))
"""Sizes that no block divides, and sizes that all blocks divide: Triton compiles them apart."""


def draw(device: torch.device, dtype: torch.dtype, seed: int, *shape: int) -> Tensor:
    """Random values that float16, bfloat16 and float32 represent exactly, so that a float64 check has equal inputs."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    values = values.half().to(device=device, dtype=dtype)
    return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

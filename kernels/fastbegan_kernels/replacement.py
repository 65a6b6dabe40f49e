"""A chain of layers as somebody wrote it, raced against the one op that can take its place.

On a GPU the layers as they were are one more candidate of `tuning`: whoever replaces them asks `pays` first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tuning
from .conv_stage import conv_stage
from .group_norm_silu import group_norm_silu
from .problems import Form, Named, Problem, Tensors, dtype_named
from .reference import plain_layer

UNTOUCHED, REPLACED = Named("untouched"), Named("replaced")
_VALUES = 1 << 22  # of the largest tensor in a check; a larger batch is checked in part


@dataclass(frozen=True)
class Replacement(Problem):
    """One layer with its neighbours. `x` and `weight` are shapes, that of a GroupNorm's weight is empty."""

    kind: str  # a kind of conv_stage, or "norm"
    activation: str
    dtype: str
    x: tuple[int, ...]
    weight: tuple[int, ...] = ()
    bias: bool = True
    alpha: float = 1.0
    channels_last: bool = False
    backward: bool = False
    groups: int = 0
    eps: float = 1e-5
    tf32: bool = False
    plain = UNTOUCHED
    tried_apart = False  # its parts are problems of their own

    @property
    def name(self) -> str:
        """One line for warnings."""
        way = "forward and backward" if self.backward else "forward"
        return f"{self.kind} with {self.activation} in place of layers, {way}, {self.dtype}, {list(self.x)}"

    def forms(self, device: torch.device, impl: str) -> list[Form]:
        """Both: what is not replaced is timed too."""
        return [UNTOUCHED, REPLACED]

    def repeats(self, form: Form) -> bool:
        """The library's sums may not have a fixed order."""
        return False

    def tensors(self, device: torch.device, *, whole: bool = True) -> Tensors:
        """Random inputs with outputs of about 1. Without `whole`, only as many samples as a check needs."""
        generator = torch.Generator(device).manual_seed(0)
        dtype, last = dtype_named(self.dtype), self.channels_last

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            values = (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)
            return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 and last else values

        batch, channels, height, width = self.x
        if not whole:
            batch = max(1, min(batch, _VALUES // max(1, 4 * channels * height * width)))
        outputs = self.weight[0] if self.weight else channels
        fan = self.weight[1] * self.weight[2] * self.weight[3] if self.weight else 1
        return {
            "x": draw(batch, channels, height, width),
            "weight": draw(*self.weight, scale=fan**-0.5) if self.weight else draw(channels),
            "bias": draw(outputs) if self.bias else None,
        }

    def run(self, form: Form, tensors: Tensors) -> list[Tensor]:
        """The output and, with `backward`, the gradients of its sum of squares."""
        given = {name: None if value is None else value.detach() for name, value in tensors.items()}
        leaves = [value.requires_grad_(self.backward) for value in given.values() if value is not None]
        with torch.set_grad_enabled(self.backward):
            y = self._output(form, **given)
            if not self.backward:
                return [y]
            # in autograd's own thread, ops of the backward would wait for the lock that `tuning` holds in this one
            with torch.autograd.set_multithreading_enabled(False):
                return [y.detach(), *torch.autograd.grad(y.square().sum() / 2, leaves)]

    def _output(self, form: Form, x: Any, weight: Any, bias: Any) -> Tensor:
        if self.kind == "norm":
            if form == REPLACED:
                return group_norm_silu(x, self.groups, weight, bias, eps=self.eps, activation=self.activation)
            y = F.group_norm(x, self.groups, weight, bias, self.eps)
            return F.silu(y) if self.activation == "silu" else y
        if form == REPLACED:
            biases = None if bias is None else [bias]
            return conv_stage(x, [weight], biases, kinds=[self.kind], activation=self.activation, alpha=self.alpha)
        padding = weight.shape[2] // 2
        return plain_layer(
            x, weight, bias, kind=self.kind, padding=padding, activation=self.activation, alpha=self.alpha
        )


def pays(problem: Replacement, device: torch.device) -> bool:
    """Whether the op is right and faster on a GPU.

    Args:
        problem: The layers.
        device: A CUDA device.

    Returns:
        The verdict, measured once and kept as `tuning` keeps its choices. True under deterministic algorithms, where
        nothing is measured.
    """
    if torch.are_deterministic_algorithms_enabled():
        return True
    return tuning.form(problem, device, "auto") == REPLACED

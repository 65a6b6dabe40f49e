"""The specification's own derivatives: gradcheck of every differentiable reference function, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastbegan_kernels import reference

CALLS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "conv2d_elu": (reference.conv2d_elu, [(2, 3, 4, 4), (2, 3, 3, 3), (2,)]),
    "conv2d_elu stride 2": (lambda *a: reference.conv2d_elu(*a, stride=2), [(2, 3, 5, 4), (2, 3, 3, 3), (2,)]),
    "conv2d_elu with carry": (
        lambda x, w, b, carry: reference.conv2d_elu(x, w, b, carry=carry),
        [(2, 2, 4, 4), (2, 2, 3, 3), (2,), ()],
    ),
    "upsample_conv2d_elu": (
        lambda x, w, b, skip: reference.upsample_conv2d_elu(x, w, b, skip=skip),
        [(2, 3, 4, 2), (2, 3, 3, 3), (2,), (2, 3, 3, 2, 2, 2)],
    ),
    "conv_stage": (
        lambda x, a, b, c: reference.conv_stage(x, (a, b, c), kinds=("same", "down", "up")),
        [(1, 2, 4, 4), (3, 2, 1, 1), (2, 3, 3, 3), (2, 2, 3, 3)],
    ),
    "skip_phase_table": (reference.skip_phase_table, [(2, 3, 3, 3), (2, 3, 3, 3)]),
    "expand_phase_table": (lambda t: reference.expand_phase_table(t, 6, 8), [(2, 3, 3, 2, 2, 2)]),
    "l1_reconstruction_loss": (reference.l1_reconstruction_loss, [(2, 3, 4), (2, 3, 4)]),
    "l1_reconstruction_loss eta 2": (lambda *a: reference.l1_reconstruction_loss(*a, eta=2), [(2, 3, 4), (2, 3, 4)]),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("seed", [0, 1])
def test_gradcheck(name: str, seed: int) -> None:
    function, shapes = CALLS[name]
    torch.manual_seed(seed)
    assert torch.autograd.gradcheck(function, [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes])


@pytest.mark.parametrize("activation", ["elu", "relu", "leaky_relu", "none"])
def test_the_derivative_is_that_of_the_activation(activation: str) -> None:
    z = torch.linspace(-3, 3, 50, dtype=torch.float64, requires_grad=True)
    y = reference.activate(z, activation, 0.3)
    (expected,) = torch.autograd.grad(y.sum(), z)
    torch.testing.assert_close(reference.derivative(y.detach(), activation, 0.3), expected)

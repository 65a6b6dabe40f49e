"""conv2d_elu against arithmetic done by hand, and its derivatives."""

from __future__ import annotations

import pytest
import torch

from fastbegan_kernels import conv2d_elu


def test_values_by_hand() -> None:
    x = torch.arange(9.0).view(1, 1, 3, 3) - 4
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1, 1], weight[0, 0, 1, 2] = 1, 1  # each pixel plus its right neighbour
    y = conv2d_elu(x, weight, torch.tensor([0.5]))
    before = torch.tensor([[-6.5, -4.5, -1.5], [-0.5, 1.5, 1.5], [5.5, 7.5, 4.5]])
    torch.testing.assert_close(y[0, 0], torch.where(before > 0, before, before.exp() - 1))


@pytest.mark.parametrize(("stride", "size", "out"), [(1, 8, 8), (2, 8, 4), (2, 7, 4), (1, 1, 1)])
def test_shapes(stride: int, size: int, out: int) -> None:
    y = conv2d_elu(torch.zeros(2, 3, size, size), torch.zeros(5, 3, 3, 3), stride=stride)
    assert y.shape == (2, 5, out, out)


@pytest.mark.parametrize("activation", ["elu", "leaky_relu", "silu", "none"])
def test_gradcheck(activation: str) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4, 4), (3, 3, 3, 3), (3,))]
    carry = torch.tensor(0.3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *a: conv2d_elu(*a, activation=activation, alpha=0.7, carry=carry), inputs)

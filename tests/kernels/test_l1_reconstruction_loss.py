"""The loss against hand-worked numbers, its gradients and its accumulation."""

from __future__ import annotations

import pytest
import torch

from fastbegan_kernels import l1_reconstruction_loss
from tests.helpers.oracle import random_tensor

pytestmark = pytest.mark.core


def test_values_and_gradients_by_hand() -> None:
    prediction = torch.tensor([[[[0.0, 1.0]]], [[[2.0, -2.0]]]], requires_grad=True)  # [2, 1, 1, 2]
    target = torch.tensor([[[[0.5, -1.0]]], [[[2.5, 2.0]]]], requires_grad=True)
    loss = l1_reconstruction_loss(prediction, target)
    torch.testing.assert_close(loss, torch.tensor([1.25, 2.25]))
    loss.sum().backward()
    expected = torch.tensor([[[[-0.5, 0.5]]], [[[-0.5, -0.5]]]])
    assert prediction.grad is not None and target.grad is not None
    torch.testing.assert_close(prediction.grad, expected)
    torch.testing.assert_close(target.grad, -expected)
    torch.testing.assert_close(l1_reconstruction_loss(prediction, target, eta=2), torch.tensor([2.125, 8.125]))


def test_detached_target_gets_no_gradient() -> None:
    prediction, target = (torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    l1_reconstruction_loss(prediction, target, detach_target=True).sum().backward()
    assert target.grad is None and prediction.grad is not None


@pytest.mark.parametrize("eta", [1, 2])
def test_gradcheck(eta: int) -> None:
    torch.manual_seed(0)
    pair = [torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda p, t: l1_reconstruction_loss(p, t, eta=eta), pair)


def test_bf16_accumulates_in_float32() -> None:
    prediction = torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16)
    loss = l1_reconstruction_loss(prediction, torch.full_like(prediction, 1 / 256))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor([1 / 256]), rtol=1e-6, atol=0)  # a bf16 sum stops growing early


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="eta is 3; accepted: 1, 2"):
        l1_reconstruction_loss(torch.zeros(1, 1), torch.zeros(1, 1), eta=3)
    with pytest.raises(ValueError, match=r"prediction is \[1, 1\] but target is \[2, 1\]"):
        l1_reconstruction_loss(torch.zeros(1, 1), torch.zeros(2, 1))


@pytest.mark.parametrize("impl", [None, "algebraic", "fused"])
@pytest.mark.parametrize("eta", [1, 2])
def test_second_derivatives(eta: int, impl: str | None) -> None:
    if impl:
        pytest.importorskip("triton")
    x = random_tensor(2, 3, 4, 5, seed=1).requires_grad_()
    seconds = []
    for tier in (impl, "reference"):
        (slope,) = torch.autograd.grad(
            l1_reconstruction_loss(x**3, x.sin(), eta=eta, impl=tier).sum(), x, create_graph=True
        )
        seconds += torch.autograd.grad(slope.square().sum(), x)
    torch.testing.assert_close(*seconds, rtol=1e-4, atol=1e-5)

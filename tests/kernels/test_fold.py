"""Packed weights: exact in float64, and the one-launch kernel against them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbegan_kernels import fold, reference, skip_phase_table
from fastbegan_kernels.dispatch import HAS_TRITON
from fastbegan_kernels.fold import KINDS, fold_upsample
from tests.helpers.oracle import DEVICE, random_tensor

pytestmark = pytest.mark.core
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="no Triton")


def _double(*shape: int, seed: int) -> Tensor:
    return random_tensor(*shape, seed=seed, dtype=torch.float64)


@pytest.mark.parametrize(("size", "factor"), [(8, 2), (4, 4), (3, 6), (1, 2), (2, 8)])
def test_the_skip_table_is_exact(size: int, factor: int) -> None:
    """conv3x3 over the upsampled map, from 25 sums per pixel of the small map: values and gradients."""
    h, weight = _double(2, 3, size, size, seed=1).requires_grad_(), _double(5, 3, 3, 3, seed=2).requires_grad_()
    whole = F.conv2d(F.interpolate(h, scale_factor=float(factor)), weight, padding=1)
    (folded,) = fold([weight], ["skip"])
    for given in (weight, folded):
        table = skip_phase_table(h, given)
        assert table.shape == (2, 3, 3, size, size, 5)
        expanded = reference.expand_phase_table(table, size * factor, size * factor)
        torch.testing.assert_close(expanded, whole, rtol=0, atol=1e-12)
        grad = torch.randn_like(whole)
        for a, b in zip(
            torch.autograd.grad(expanded, (h, weight), grad, retain_graph=True),
            torch.autograd.grad(whole, (h, weight), grad, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    if factor > 2:  # a cell of two has no inner row
        torch.testing.assert_close(table, reference.skip_phase_table(h, weight), rtol=0, atol=1e-12)


def _weights(largest: tuple[int, int] = (5, 4)) -> tuple[list[Tensor], list[str]]:
    """Layers of a net: three kernel sizes, every kind, both orders of dimensions in memory, and halves of a weight."""
    shapes = [(5, 3, 3, 3), (4, 6, 3, 3), (7, 2, 1, 1), (3, 4, 3, 3), (*largest, 3, 3), (6, 10, 3, 3)]
    weights = [random_tensor(*shape, seed=number) for number, shape in enumerate(shapes)]
    for number in (1, 4, 5):
        weights[number] = weights[number].contiguous(memory_format=torch.channels_last)
    weights[5:6] = weights[5][:, :4], weights[5][:, 4:]
    return weights, ["conv", "up", "conv", "skip", "up", "up", "skip"]


@needs_triton
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, *(pytest.param(t, marks=pytest.mark.slow) for t in (torch.float32, torch.float16))]
)
def test_one_launch_packs_a_net(dtype: torch.dtype) -> None:
    weights, kinds = _weights((20, 17) if dtype == torch.float32 else (5, 4))  # several blocks, once
    leaves = [weight.requires_grad_() for weight in weights]
    plain = fold([w.double() for w in leaves], kinds, impl="reference")
    packed = fold(leaves, kinds, dtype=dtype, impl="fused")
    step = {torch.float32: 1e-7, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]  # the interpreter truncates
    for got, exact in zip(packed, plain, strict=True):
        assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got.double(), exact, rtol=step, atol=1e-6)
    grads = [random_tensor(*value.shape, seed=50 + n, dtype=dtype) for n, value in enumerate(packed)]
    got = torch.autograd.grad(packed, leaves, grads, retain_graph=True)
    expected = torch.autograd.grad(plain, leaves, [g.double() for g in grads])
    for a, b, weight in zip(got, expected, leaves, strict=True):
        assert a.dtype == torch.float32 and a.stride() == torch.empty_like(weight).stride()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    again = torch.autograd.grad(packed, leaves, grads)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@needs_triton
def test_a_changed_weight_is_packed_anew() -> None:
    """The table that stays on the device holds addresses, not values."""
    weights, kinds = _weights()
    first = fold(weights, kinds, impl="fused")
    for weight in weights:
        weight.add_(1)
    second = fold(weights, kinds, impl="fused")
    for a, b, expected in zip(first, second, fold(weights, kinds, impl="reference"), strict=True):
        assert not torch.equal(a, b)
        torch.testing.assert_close(b, expected)


def test_sums_are_float32_under_autocast() -> None:
    weights, kinds = _weights()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        folded = fold(weights, kinds, impl="reference")
    assert all(torch.equal(a, b) for a, b in zip(folded, fold(weights, kinds, impl="reference"), strict=True))


def test_upsampling_weights_by_hand() -> None:
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, :, 1] = torch.tensor([1.0, 2.0, 4.0])
    folded = fold_upsample(weight)[0, 0]
    assert folded[:, 1].tolist() == folded[:, 2].tolist() == [4, 6, 3, 1]
    assert not folded[:, [0, 3]].any()


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # forward mode's own
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str) -> None:
    """The hand-written transposes against finite differences, once and twice."""
    weight = _double(3, 2, 3, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: fold([w], [kind])[0], weight)
    assert torch.autograd.gradgradcheck(lambda w: fold([w], [kind])[0].sin(), weight)

    def energy(w: Tensor) -> Tensor:
        return fold([w], [kind])[0].square().sum()

    expected = torch.autograd.grad(energy(weight), weight)[0]
    torch.testing.assert_close(torch.func.grad(energy)(weight.detach()), expected)
    found = torch.func.jvp(energy, (weight.detach(),), (expected,))[1]
    torch.testing.assert_close(found, expected.square().sum())
    half = weight.detach()[:, :1].contiguous(memory_format=torch.channels_last).expand(-1, 2, -1, -1)[:, :1]
    assert fold([half], ["conv"])[0].is_contiguous(memory_format=torch.channels_last)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"kinds\[0\] is 'down'; accepted: conv, up, skip"):
        fold([torch.zeros(1, 1, 3, 3)], ["down"])
    with pytest.raises(ValueError, match=r"weights\[0\] is \[1, 1, 5, 5\]; accepted: \[out, in, 3, 3\]"):
        fold([torch.zeros(1, 1, 5, 5)], ["up"])
    with pytest.raises(ValueError, match="kinds has 0 entries for 1 weights"):
        fold([torch.zeros(1, 1, 3, 3)], [])
    assert fold([], []) == []
    large = torch.rand(2, 3, 8, 8, device=DEVICE)
    assert torch.equal(fold([large], ["conv"])[0], large)
    if HAS_TRITON:
        with pytest.raises(ValueError, match=r"weight is \[2, 3, 8, 8\]; impl 'fused' accepts kernels of 1x1 and 3x3"):
            fold([large], ["conv"], impl="fused")

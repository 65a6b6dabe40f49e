"""Nearest x2 + conv3x3 in four taps equals the plain evaluation, values and gradients."""

from __future__ import annotations

import pytest
import torch

from fastbegan_kernels import arguments, upsample_conv2d_elu


def _inputs(shape: tuple[int, ...], out: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (shape, (out, shape[1], 3, 3), (out,))
    return [torch.randn(size, generator=generator, dtype=torch.float64, requires_grad=True) for size in sizes]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("shape", "out"),
    [
        ((2, 5, 8, 8), 6),
        ((1, 3, 7, 9), 4),  # odd sizes: every border phase differs
        ((3, 4, 1, 1), 2),  # one pixel: all nine taps but the centre touch padding
        ((2, 4, 1, 6), 3),
    ],
)
def test_algebraic_equals_reference(shape: tuple[int, ...], out: int, seed: int) -> None:
    inputs = _inputs(shape, out, seed)
    results = [upsample_conv2d_elu(*inputs, impl=impl) for impl in ("reference", "algebraic")]
    assert results[0].shape == (shape[0], out, 2 * shape[2], 2 * shape[3])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-12)
    weights = torch.randn_like(results[0])
    expected, got = (torch.autograd.grad((y * weights).sum(), inputs) for y in results)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_carry_blends_with_the_upsampled_input() -> None:
    x, weight, bias = _inputs((2, 4, 5, 5), 4, 0)
    carry = torch.tensor(0.25, dtype=torch.float64)
    results = [upsample_conv2d_elu(x, weight, bias, carry=carry, impl=impl) for impl in ("reference", "algebraic")]
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-12)
    everything = upsample_conv2d_elu(x, weight, bias, carry=torch.ones(()))
    torch.testing.assert_close(everything, x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("activation", arguments.ACTIVATIONS)
def test_activations(activation: str) -> None:
    inputs = _inputs((2, 3, 4, 4), 3, 0)
    a, b = (upsample_conv2d_elu(*inputs, activation=activation, alpha=0.3, impl=i) for i in ("reference", "algebraic"))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

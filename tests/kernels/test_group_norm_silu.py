"""group_norm_silu: every grouping and size against float64, forward and back, and the rules of torch at its border."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from fastbegan_kernels import group_norm_silu, reference
from fastbegan_kernels.dispatch import HAS_TRITON
from fastbegan_kernels.layers import GroupNormSiLU
from tests.helpers.oracle import DEVICE, EXACT, check, random_tensor

pytestmark = [pytest.mark.core, pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")]
# channels and groups of which no block is a multiple, groups of one and of all channels, one pixel, more than a split
SHAPES = [
    ((2, 12, 5, 7), 4),
    ((3, 37, 9, 7), 37),
    ((2, 70, 3, 4), 7),
    ((2, 8, 1, 1), 2),
    ((1, 6, 33, 40), 1),
    pytest.param((2, 128, 32, 32), 32, marks=pytest.mark.slow),
    pytest.param((1, 4, 128, 130), 2, marks=pytest.mark.slow),
]


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    x, *affine = (
        random_tensor(*size, seed=seed, dtype=dtype) for seed, size in enumerate((shape, shape[1:2], shape[1:2]))
    )
    return [x.contiguous(memory_format=torch.channels_last), *affine]


@pytest.mark.parametrize("dtype", [EXACT[0], *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in EXACT[1:])])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
@pytest.mark.parametrize("activation", ["silu", "none"])
def test_values_and_gradients(shape: tuple[int, ...], groups: int, dtype: torch.dtype, activation: str) -> None:
    options = {"activation": activation}
    check(
        lambda x, *affine: group_norm_silu(x, groups, *affine, **options, impl="fused"),
        lambda x, *affine: reference.group_norm_silu(x.contiguous(), groups, *affine, **options),
        _inputs(shape, dtype),
    )


@pytest.mark.parametrize(("weight", "bias"), [(True, False), (False, True), (False, False)])
def test_without_weight_or_bias(weight: bool, bias: bool) -> None:
    x, *affine = _inputs((2, 12, 5, 7), torch.float32)
    present = [value for value, there in zip(affine, (weight, bias), strict=True) if there]

    def run(function, x: Tensor, *rest: Tensor) -> Tensor:
        values = iter(rest)
        return function(x, 4, *(next(values) if there else None for there in (weight, bias)))

    fused = functools.partial(run, functools.partial(group_norm_silu, impl="fused"))
    check(fused, functools.partial(run, reference.group_norm_silu), [x, *present])


def test_a_large_mean_costs_no_digits() -> None:
    """Mean 1000, standard deviation 1: in float32 a sum of squares would have no digit left."""
    x, weight, bias = _inputs((2, 8, 40, 33), torch.float32)
    x = (x + 1000).contiguous(memory_format=torch.channels_last)
    exact = reference.group_norm_silu(x.double().contiguous(), 2, weight.double(), bias.double())
    error = (group_norm_silu(x, 2, weight, bias, impl="fused") - exact).abs().max().item()
    assert error < 2e-4  # float32 has 6e-5 between two numbers at 1000


def test_weights_with_gaps_in_memory() -> None:
    x, weight, bias = _inputs((2, 12, 5, 7), torch.float32)
    apart = [torch.stack((value, torch.full_like(value, float("nan"))), 1)[:, 0] for value in (weight, bias)]
    y, expected = (group_norm_silu(x, 4, *affine, impl="fused") for affine in (apart, (weight, bias)))
    assert torch.equal(y, expected)


@pytest.mark.parametrize("activation", ["silu", "none"])
def test_without_the_kernel_the_op_is_right_too(activation: str) -> None:
    """On a GPU where the kernel is not verified, plain operations run inside the same op."""
    x, weight, bias = (value.requires_grad_() for value in _inputs((2, 12, 5, 7), torch.float32))
    y = torch.ops.fastbegan.group_norm_silu(x, 4, weight, bias, 1e-5, activation, "algebraic")[0]
    expected = reference.group_norm_silu(x, 4, weight, bias, activation=activation)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    for got, want in zip(*(torch.autograd.grad(out, (x, weight, bias), grad) for out in (y, expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_no_samples() -> None:
    x = torch.zeros(0, 8, 4, 4, device=DEVICE, requires_grad=True)
    weight = torch.ones(8, device=DEVICE, requires_grad=True)
    y = group_norm_silu(x, 2, weight, impl="fused")
    y.sum().backward()
    assert y.shape == x.shape and weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("impl", [None, "reference", "fused"])
def test_formats_and_dtypes_are_those_of_x(impl: str | None, channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = random_tensor(2, 8, 5, 6, seed=0, dtype=torch.bfloat16).contiguous(memory_format=layout).requires_grad_()
    y = group_norm_silu(x, 4, impl=impl)
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=layout)
    (gradient,) = torch.autograd.grad(y.float().square().sum(), x)
    assert gradient.dtype == torch.bfloat16 and gradient.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_autocast_gives_torchs_dtype(impl: str) -> None:
    x = random_tensor(2, 8, 5, 6, seed=0, dtype=torch.bfloat16).requires_grad_()
    norm = nn.GroupNorm(4, 8).to(DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        plain, ours = norm(x), group_norm_silu(x, 4, norm.weight, norm.bias, activation="none", impl=impl)
    assert ours.dtype == plain.dtype
    torch.testing.assert_close(ours.float(), plain.float(), rtol=1e-2, atol=1e-2)
    assert torch.autograd.grad(ours.sum(), x)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("tier", ["reference", "fused"])
def test_second_derivatives(tier: str) -> None:
    x, weight, bias = (value.requires_grad_() for value in _inputs((2, 6, 3, 4), torch.float32))
    y = group_norm_silu(x, 3, weight, bias, impl=tier)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    second = torch.autograd.grad(gradient.square().sum(), (x, weight, bias))
    double = [value.detach().double().contiguous().requires_grad_() for value in (x, weight, bias)]
    exact = reference.group_norm_silu(double[0], 3, *double[1:])
    (gradient,) = torch.autograd.grad(exact.square().sum(), double[0], create_graph=True)
    for got, want in zip(second, torch.autograd.grad(gradient.square().sum(), double), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)


def test_the_layer_is_a_group_norm() -> None:
    plain = nn.GroupNorm(2, 6).to(DEVICE)
    nn.init.normal_(plain.weight)
    layer = GroupNormSiLU(2, 6).to(DEVICE)
    layer.load_state_dict(plain.state_dict())
    x = random_tensor(2, 6, 3, 4, seed=0)
    torch.testing.assert_close(layer(x), nn.functional.silu(plain(x)))
    assert repr(layer).startswith("GroupNormSiLU(2, 6, eps=1e-05") and repr(layer).endswith(", activation=silu)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 4}, "groups is 4 for 6 channels; accepted: divisors of the channels"),
        ({"groups": 0}, "groups is 0 for 6 channels"),
        ({"x": torch.zeros(2, 6)}, r"x is torch.float32 \[2, 6\]; accepted: floating-point \[N, C, H, W\]"),
        ({"weight": torch.zeros(5)}, r"weight is \[5\]; accepted: \[6\] or None"),
        ({"eps": 0.0}, "eps is 0.0; accepted: numbers above 0"),
        ({"activation": "elu"}, "activation is 'elu'; accepted: silu, none"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    arguments = {"x": torch.zeros(2, 6, 3, 3), "groups": 3, **change}
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**arguments)

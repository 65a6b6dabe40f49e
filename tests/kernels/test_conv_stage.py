"""Stages in plain operations, exact in float64, and copies of the weights in every tier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastbegan_kernels import conv_stage, reference
from tests.helpers.oracle import DEVICE, check, random_tensor

pytestmark = pytest.mark.core
STAGES = [
    (["same", "same"], 0),
    (["down", "same"], 0),
    (["up"], 8),
    (["same", "up"], 4),
    (["up", "same", "up"], 2),
    (["same", "up"], 0),
    (["down_end"], 0),
    (["down_end", "same", "down_end"], 0),
]


def _inputs(kinds: Sequence[str], skip: int, dtype: torch.dtype, window: int = 3, batch: int = 4) -> list[Tensor]:
    """x, weights, biases and, with `skip`, a table of that many cells."""
    widths = [5 + 2 * number for number in range(len(kinds) + 1)]
    x = random_tensor(batch, 5, 8, 8, seed=1, dtype=dtype)
    weights = [random_tensor(b, a, window, window, seed=a, dtype=dtype, scale=0.2) for a, b in pairwise(widths)]
    biases = [random_tensor(b, seed=40 + b, dtype=dtype) for b in widths[1:]]
    table = [random_tensor(batch, 3, 3, skip, skip, widths[-1], seed=4, dtype=dtype)] if skip else []
    return [x, *weights, *biases, *table]


def _stage(op: Callable[..., Tensor], kinds: Sequence[str], **options: object) -> Callable[..., Tensor]:
    count = len(kinds) * int(str(options.get("copies", 1)))

    def run(x: Tensor, *rest: Tensor) -> Tensor:
        weights, biases, table = rest[:count], rest[count : 2 * count], rest[2 * count :]
        return op(x, weights, biases, kinds=kinds, skip=table[0] if table else None, **options)

    return run


def _values(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [value.detach().requires_grad_() for value in inputs]
    output = function(*leaves)
    return [output, *torch.autograd.grad(output.sin().sum(), leaves)]


def _check_exactly(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("activation", ["elu", "relu", "leaky_relu", "silu", "none"])
@pytest.mark.parametrize(("kinds", "skip"), STAGES)
def test_plain_operations(kinds: list[str], skip: int, activation: str) -> None:
    inputs = _inputs(kinds, skip, torch.float64)
    options = {"activation": activation, "alpha": 0.3}
    got = _values(_stage(conv_stage, kinds, **options), inputs)
    _check_exactly(got, _values(_stage(reference.conv_stage, kinds, **options), inputs))


@pytest.mark.parametrize("window", [1, 5, 7])
def test_plain_operations_take_every_odd_kernel(window: int) -> None:
    kinds = ["same", "down"]
    inputs = _inputs(kinds, 0, torch.float64, window)
    got = _values(_stage(conv_stage, kinds), inputs)
    _check_exactly(got, _values(_stage(reference.conv_stage, kinds), inputs))


@pytest.mark.parametrize("window", [1, 3, 5])
def test_few_outputs_of_many_channels(window: int) -> None:
    """As in the layer that writes images. On a CPU its weight gradient exchanges input and output gradient."""
    x = random_tensor(2, 9, 6, 7, seed=1, dtype=torch.float64)
    inputs = [x, random_tensor(3, 9, window, window, seed=2, dtype=torch.float64)]
    inputs.append(random_tensor(3, seed=3, dtype=torch.float64))
    got = _values(_stage(conv_stage, ["same"], activation="none"), inputs)
    _check_exactly(got, _values(_stage(reference.conv_stage, ["same"], activation="none"), inputs))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (6, 7)])
@pytest.mark.parametrize("outputs", [1, 2, 5, 6])
def test_images_of_many_channels(outputs: int, size: tuple[int, int], bias: bool) -> None:
    """On a CPU in float32, convolutions to few channels go row by row, forward and in an image's gradient."""
    widths = (outputs, 20, outputs)
    inputs = [random_tensor(1 if size == (1, 1) else 2, outputs, *size, seed=1)]
    inputs += [random_tensor(b, a, 3, 3, seed=a, scale=0.2) for a, b in pairwise(widths)]
    inputs += [random_tensor(b, seed=3 + b) for b in widths[1:]] if bias else []
    inputs = [value.cpu() for value in inputs]

    def run(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, a, b, *biases: op(x, [a, b], biases or None, activation=["elu", "none"]).mul_(2)

    check(run(conv_stage), run(reference.conv_stage), inputs)


@pytest.mark.parametrize("widths", [(3, 20), (20, 3, 20), (3, 20, 3)])
def test_a_backward_under_autocast_is_as_exact(widths: tuple[int, ...]) -> None:
    """The forward ran without autocast, so the backward must not cast."""
    x = random_tensor(2, widths[0], 5, 6, seed=1).cpu().requires_grad_()
    weights = [random_tensor(b, a, 3, 3, seed=a, scale=0.2).cpu().requires_grad_() for a, b in pairwise(widths)]
    y = conv_stage(x, weights)
    expected = torch.autograd.grad(y.sum(), [x, *weights], retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y.sum(), [x, *weights])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("activation", "impl"),
    [
        (["relu", "elu", "none"], None),
        (["relu", "elu", "none"], "algebraic"),
        pytest.param(["relu", "elu", "none"], "fused", marks=pytest.mark.slow),
        (["none", "silu", "leaky_relu"], None),
        (["none", "silu", "leaky_relu"], "algebraic"),
        pytest.param(["none", "silu", "leaky_relu"], "fused", marks=pytest.mark.slow),
    ],
)
def test_an_activation_for_each_layer(activation: list[str], impl: str | None) -> None:
    if impl:
        pytest.importorskip("triton")
    kinds, options = ["up", "same", "down"], {"activation": activation, "alpha": 0.3}
    inputs = _inputs(kinds, 0, torch.float32)
    check(_stage(conv_stage, kinds, impl=impl, **options), _stage(reference.conv_stage, kinds, **options), inputs)
    x, *rest = inputs
    copied, twice = [x, *rest[:3] * 2, *rest[3:] * 2], {**options, "copies": 2}
    check(_stage(conv_stage, kinds, impl=impl, **twice), _stage(reference.conv_stage, kinds, **twice), copied)
    if impl is None:
        inputs = _inputs(kinds, 0, torch.float64)
        got = _values(_stage(conv_stage, kinds, **options), inputs)
        _check_exactly(got, _values(_stage(reference.conv_stage, kinds, **options), inputs))


def test_activations_that_do_not_fit_are_named() -> None:
    x, weight = torch.zeros(1, 2, 4, 4, device=DEVICE), torch.zeros(2, 2, 3, 3, device=DEVICE)
    for op in (conv_stage, reference.conv_stage):
        with pytest.raises(ValueError, match="activation has 1 entries for 2 layers; accepted: one for all, or one ea"):
            op(x, [weight] * 2, activation=["elu"])
        with pytest.raises(ValueError, match="activation is 'gelu'; accepted: elu"):
            op(x, [weight] * 2, activation=["elu", "gelu"])


@pytest.mark.parametrize("wanted", [1, 2, 3, 4, 5, 6])
def test_each_gradient_alone(wanted: int) -> None:
    """The backward ends at the lowest layer that needs a gradient, and not before."""
    kinds = ["same", "down", "same"]
    inputs = _inputs(kinds, 0, torch.float64)
    found = []
    for op in (conv_stage, reference.conv_stage):
        leaves = [value.detach() for value in inputs]
        leaves[wanted].requires_grad_()
        found.append(torch.autograd.grad(_stage(op, kinds)(*leaves).sin().sum(), leaves[wanted])[0])
    _check_exactly([found[0]], [found[1]])


def test_bias_gradients_of_half_precision_are_summed_in_float32() -> None:
    x = torch.zeros(4, 2, 16, 16, dtype=torch.bfloat16)
    weight, bias = torch.zeros(2, 2, 3, 3, dtype=torch.bfloat16), torch.zeros(2, requires_grad=True)
    conv_stage(x, [weight], [bias], activation="none").sum().backward()
    assert bias.grad is not None and bias.grad.tolist() == [1024.0, 1024.0]  # bf16 would stop at 256
    conv_stage(x, [weight], [bias], activation="none").mul(1.0078125).sum().backward()
    assert bias.grad.tolist() == [1024.0 + 1032.0] * 2


def _penalty(
    function: Callable[..., Tensor], inputs: list[Tensor], from_input: Sequence[int] = (0,)
) -> tuple[Tensor, ...]:
    """Gradients of a gradient penalty, as in WGAN-GP and R1. Inputs numbered in `from_input` depend on the first."""
    x, *rest = leaves = [value.detach().requires_grad_() for value in inputs]
    for number in from_input:
        rest[number] = rest[number] * x.mean()
    (slope,) = torch.autograd.grad(function(x * 1, *rest).sin().sum(), x, create_graph=True)
    return torch.autograd.grad(slope.square().sum(), leaves)


@pytest.mark.parametrize("activation", ["elu", "relu", "silu", "none"])
@pytest.mark.parametrize(("kinds", "copies"), [(["same", "up"], 1), (["down", "same"], 2), (["up", "down_end"], 1)])
def test_second_derivatives(kinds: list[str], copies: int, activation: str) -> None:
    x, *rest = _inputs(kinds, 0, torch.float64)
    parts = len(kinds)
    inputs = [x, *rest[:parts] * copies, *rest[parts:] * copies]
    options = {"activation": activation, "copies": copies}
    ops = _stage(conv_stage, kinds, **options), _stage(reference.conv_stage, kinds, **options)
    got, expected = (list(_penalty(op, inputs, range(0, parts * copies, parts))) for op in ops)
    _check_exactly(got, expected)


def test_second_derivatives_of_finite_differences() -> None:
    inputs = [value.requires_grad_() for value in _inputs(["same", "up"], 0, torch.float64, batch=1)]
    assert torch.autograd.gradgradcheck(_stage(conv_stage, ["same", "up"]), inputs, fast_mode=True)


@pytest.mark.parametrize("impl", ["algebraic", "fused"])
@pytest.mark.parametrize("kinds", [["same", "up"], ["down", "same"]])
def test_second_derivatives_in_the_tiers(kinds: list[str], impl: str) -> None:
    pytest.importorskip("triton")
    inputs = _inputs(kinds, 0, torch.float32)
    got = _penalty(_stage(conv_stage, kinds, impl=impl), inputs)
    expected = _penalty(_stage(reference.conv_stage, kinds), [value.double() for value in inputs])
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_second_derivatives_of_one_output(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """A critic's last layer: torch judges its weight's memory format by strides alone."""
    x, weight = (
        random_tensor(*shape, seed=1, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
        for shape in ((2, 20, 4, 5), (1, 20, 3, 3))
    )
    found = []
    for op in (conv_stage, reference.conv_stage):
        (slope,) = torch.autograd.grad(op(x, [weight], activation="none").sin().sum(), x, create_graph=True)
        found.append([slope, *torch.autograd.grad(slope.square().sum(), (x, weight))])
        assert slope.is_contiguous(memory_format=memory_format)
    for one, other in zip(*found, strict=True):
        near = 0.05 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(one, other, rtol=near, atol=near * float(other.detach().abs().max()))


@pytest.mark.parametrize("impl", [None, "algebraic"])
def test_a_bias_may_change_before_the_backward(impl: str | None) -> None:
    """As in torch, whose convolutions do not read the bias again. A recorded gradient would, so it raises."""
    x, weight = random_tensor(2, 3, 5, 6, seed=1), random_tensor(4, 3, 3, 3, seed=2).requires_grad_()
    bias = random_tensor(4, seed=3).requires_grad_()
    y = conv_stage(x, [weight], [bias], impl=impl).sum()
    (expected,) = torch.autograd.grad(y, weight, retain_graph=True)
    with torch.no_grad():
        bias.add_(1.0)
    assert torch.equal(torch.autograd.grad(y, weight, retain_graph=True)[0], expected)
    with pytest.raises(RuntimeError, match="a bias was changed in place before a gradient with create_graph=True"):
        torch.autograd.grad(y, weight, create_graph=True)


def test_a_contiguous_layer_keeps_its_output_once() -> None:
    """It saves the memory that it returns, so that the next layer saves the same."""
    layers = [random_tensor(8, 8, 3, 3, seed=seed).requires_grad_() for seed in range(4)]
    kept: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        if value.dim() == 4 and value.shape[2] > 4:
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    x = y = random_tensor(2, 8, 16, 16, seed=9)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        for weight in layers:
            y = conv_stage(y, [weight])
    assert y.is_contiguous() and sum(kept.values()) == (len(layers) + 1) * x.nbytes


def test_a_weight_given_twice() -> None:
    x, weight = random_tensor(2, 4, 5, 6, seed=1).double(), random_tensor(4, 4, 3, 3, seed=2, scale=0.2).double()
    found = []
    for op in (conv_stage, reference.conv_stage):
        leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
        (slope,) = torch.autograd.grad(op(leaves[0], [leaves[1]] * 2).sum(), leaves[0], create_graph=True)
        found.append([slope, *torch.autograd.grad(slope.square().sum(), leaves)])
    _check_exactly(*found)


def test_a_second_derivative_with_a_skip_table_is_refused_but_for_the_reference() -> None:
    inputs = [value.requires_grad_() for value in _inputs(["same", "up"], 4, torch.float64, batch=1)]
    with pytest.raises(RuntimeError, match="with a skip table can be differentiated once; for create_graph=True give"):
        torch.autograd.grad(_stage(conv_stage, ["same", "up"])(*inputs).sum(), inputs, create_graph=True)
    own = _stage(conv_stage, ["same", "up"], impl="reference")
    assert torch.autograd.gradgradcheck(own, inputs, fast_mode=True)


@pytest.mark.parametrize("activation", ["elu", "silu"])
@pytest.mark.parametrize(("kinds", "skip"), STAGES)
def test_each_copy_gets_the_gradients_of_its_part(kinds: list[str], skip: int, activation: str) -> None:
    x, *rest = _inputs(kinds, skip, torch.float64)
    parts = len(kinds)
    inputs = [x, *rest[:parts] * 2, *rest[parts : 2 * parts] * 2, *rest[2 * parts :]]
    got = _values(_stage(conv_stage, kinds, copies=2, activation=activation), inputs)
    expected = _values(_stage(reference.conv_stage, kinds, copies=2, activation=activation), inputs)
    _check_exactly(got, expected)
    assert not torch.allclose(got[2], got[2 + parts])  # the two copies of the first weight


@pytest.mark.parametrize(
    ("kinds", "skip", "impl"),
    [
        (["up"], 8, "algebraic"),
        pytest.param(["up"], 8, "fused", marks=pytest.mark.slow),
        (["same", "up"], 4, "algebraic"),
        (["same", "up"], 4, "fused"),
    ],
)
def test_copies_in_the_tiers(kinds: list[str], skip: int, impl: str) -> None:
    pytest.importorskip("triton")
    x, *rest = _inputs(kinds, skip, torch.float32)
    parts = len(kinds)
    inputs = [x, *rest[:parts] * 2, *rest[parts : 2 * parts] * 2, *rest[2 * parts :]]
    options = {"copies": 2}
    check(_stage(conv_stage, kinds, impl=impl, **options), _stage(reference.conv_stage, kinds, **options), inputs)


def test_copies_that_do_not_fit_are_named() -> None:
    x = torch.zeros(3, 2, 4, 4, device=DEVICE)
    weight = torch.zeros(2, 2, 3, 3, device=DEVICE)
    with pytest.raises(ValueError, match=r"copies is 2 for x \[3, 2, 4, 4\]; accepted: numbers that divide the batch"):
        conv_stage(x, [weight] * 2, copies=2)
    with pytest.raises(ValueError, match="1 weights, no biases, 1 kinds"):
        conv_stage(x[:2], [weight], kinds=["same"], copies=2)


@pytest.mark.parametrize("impl", [None, "algebraic", "fused"])
@pytest.mark.parametrize("kinds", [["same"], ["up"], ["down", "same"]])
def test_an_output_without_activation_may_be_changed(kinds: list[str], impl: str | None) -> None:
    """As after a convolution of the library: residual blocks add to its output in place."""
    if impl:
        pytest.importorskip("triton")
    inputs = _inputs(kinds, 0, torch.float32)

    def added(op: Callable[..., Tensor], **options: object) -> Callable[..., Tensor]:
        return lambda *leaves: _stage(op, kinds, activation="none", **options)(*leaves).mul_(3).add_(1)

    check(added(conv_stage, impl=impl), added(reference.conv_stage), inputs)

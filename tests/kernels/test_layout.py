"""Memory formats at the border of every op and layer: those of nn.Conv2d, whatever the incoming gradient's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbegan_kernels import conv2d_elu, conv_stage, fold, l1_reconstruction_loss, skip_phase_table
from fastbegan_kernels import upsample_conv2d_elu as up
from fastbegan_kernels.dispatch import HAS_TRITON
from fastbegan_kernels.layout import is_channels_last, lay_out
from fastbegan_kernels.reference import blend
from tests.helpers.oracle import DEVICE, DTYPES, random_tensor
from tests.kernels.test_layers import LAYERS

pytestmark = pytest.mark.core
LAST = torch.channels_last
Op = Callable[..., Tensor]


def _slice(x: Tensor) -> Tensor:
    return torch.cat((x, x), 1).contiguous(memory_format=LAST)[:, : x.shape[1]]


def _turned(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=LAST),
    "a slice of channels_last": _slice,
    "neither": _turned,
}


def _stage(op: Op) -> Op:
    """Two layers, the second an up-convolution, by plain operations or by our op."""
    return lambda x, w, b, v, c: op(x, (w, v), (b, c))


def _plain_stage(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    x = F.elu(F.conv2d(x, weights[0], biases[0], padding=1))
    return F.elu(F.conv2d(F.interpolate(x, scale_factor=2.0), weights[1], biases[1], padding=1))


CARRY = torch.tensor(0.25, device=DEVICE)
# ours (given `impl`), the same in torch's words, the shape of x, then that of each parameter
OPS: dict[str, tuple[Callable[[str | None], Op], Op, tuple[tuple[int, ...], ...]]] = {
    "same": (
        lambda impl: lambda x, w, b: conv2d_elu(x, w, b, impl=impl),
        lambda x, w, b: F.elu(F.conv2d(x, w, b, padding=1)),
        ((2, 4, 6, 5), (8, 4, 3, 3), (8,)),
    ),
    "1x1, silu": (
        lambda impl: lambda x, w: conv2d_elu(x, w, activation="silu", impl=impl),
        lambda x, w: F.silu(F.conv2d(x, w)),
        ((2, 4, 6, 5), (8, 4, 1, 1)),
    ),
    "to few": (
        lambda impl: lambda x, w, b: conv2d_elu(x, w, b, activation="none", impl=impl),
        lambda x, w, b: F.conv2d(x, w, b, padding=1),
        ((1, 20, 6, 5), (3, 20, 3, 3), (3,)),
    ),
    "from one channel": (
        lambda impl: lambda x, w, b: conv2d_elu(x, w, b, activation="relu", impl=impl),
        lambda x, w, b: F.relu(F.conv2d(x, w, b, padding=1)),
        ((2, 1, 6, 5), (8, 1, 3, 3), (8,)),
    ),
    "down": (
        lambda impl: lambda x, w, b: conv2d_elu(x, w, b, stride=2, activation="none", impl=impl),
        lambda x, w, b: F.conv2d(x, w, b, 2, 1),
        ((2, 4, 6, 8), (8, 4, 3, 3), (8,)),
    ),
    "down_end": (
        lambda impl: lambda x, w, b: conv2d_elu(x, w, b, stride=2, padding="end", impl=impl),
        lambda x, w, b: F.elu(F.conv2d(F.pad(x, (0, 1, 0, 1)), w, b, 2)),
        ((2, 4, 6, 8), (8, 4, 3, 3), (8,)),
    ),
    "up": (
        lambda impl: lambda x, w, b: up(x, w, b, activation="leaky_relu", alpha=0.2, impl=impl),
        lambda x, w, b: F.leaky_relu(F.conv2d(F.interpolate(x, scale_factor=2.0), w, b, padding=1), 0.2),
        ((2, 4, 6, 5), (8, 4, 3, 3), (8,)),
    ),
    "same with a carry": (
        lambda impl: lambda x, w, b: conv2d_elu(x, w, b, carry=CARRY.to(x.dtype), impl=impl),
        lambda x, w, b: blend(x, F.elu(F.conv2d(x, w, b, padding=1)), CARRY.to(x.dtype)),
        ((2, 4, 6, 5), (4, 4, 3, 3), (4,)),
    ),
    "stage": (
        lambda impl: _stage(lambda x, w, b: conv_stage(x, w, b, kinds=["same", "up"], impl=impl)),
        _stage(_plain_stage),
        ((2, 4, 6, 5), (8, 4, 3, 3), (8,), (6, 8, 3, 3), (6,)),
    ),
}
INTERPRETED = ("same", "1x1, silu", "down_end", "to few")
TIERS: dict[str, tuple[torch.dtype, ...]] = {
    "auto": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "reference": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "algebraic": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "fused": tuple(DTYPES),
}


def _formats(op: Op, values: Sequence[Tensor], formats: Sequence[str], incoming: str) -> list[tuple[bool, bool]]:
    """Whether output, gradient of x and `.grad` of each parameter are contiguous, and whether channels_last."""
    leaves = [FORMATS[name](value).detach().requires_grad_() for value, name in zip(values, formats, strict=True)]
    x = leaves[0].view_as(leaves[0])  # no leaf: on one torch would lay out the gradient itself
    output = op(x, *leaves[1:])
    seen: list[Tensor] = []
    x.register_hook(seen.append)
    output.backward(FORMATS[incoming](torch.ones_like(output)))
    tensors = [output, *seen, *(leaf.grad for leaf in leaves[1:])]
    return [(one.is_contiguous(), one.is_contiguous(memory_format=LAST)) for one in tensors if one is not None]


def _check(ours: Op, plain: Op, values: Sequence[Tensor], of_x: Sequence[str], of_weights: Sequence[str]) -> None:
    weights = [value.dim() == 4 for value in values[1:]]
    for x, weight, incoming in itertools.product(of_x, of_weights, ("contiguous", "channels_last")):
        formats = [x, *(weight if is_weight else "contiguous" for is_weight in weights)]
        got, expected = (_formats(op, values, formats, incoming) for op in (ours, plain))
        assert len(got) == len(expected) == len(values) + 1
        for number, (one, other) in enumerate(zip(got, expected, strict=True)):
            assert one == other or all(other), f"result {number} of x {x}, weight {weight}, gradient {incoming}"


@pytest.mark.parametrize(
    ("name", "tier", "dtype"),
    [
        # interpreted kernels take seconds
        pytest.param(name, tier, dtype, marks=pytest.mark.slow if tier == "fused" and name not in INTERPRETED else ())
        for name in OPS
        for tier, dtypes in TIERS.items()
        for dtype in dtypes
    ],
)
def test_an_op_gives_what_a_convolution_gives(name: str, tier: str, dtype: torch.dtype) -> None:
    if tier == "fused":
        pytest.importorskip("triton")
        if name == "down_end":
            pytest.skip("none of ours computes it")
    make, plain, shapes = OPS[name]
    values = [random_tensor(*shape, seed=number, dtype=dtype, scale=0.1) for number, shape in enumerate(shapes)]
    of_x = list(FORMATS) if tier == "auto" else ["contiguous", "channels_last"]
    _check(make(None if tier == "auto" else tier), plain, values, of_x, of_weights=["contiguous", "channels_last"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_gives_what_its_parts_give(name: str, dtype: torch.dtype) -> None:
    makes = LAYERS[name]
    for memory_format in (torch.contiguous_format, LAST):
        nets = [make().to(device=DEVICE, dtype=dtype).to(memory_format=memory_format) for make in makes]  # pyright: ignore
        for x, incoming in itertools.product(FORMATS, ("contiguous", "channels_last")):
            found = []
            for net in nets:
                found.append(_formats(net, [random_tensor(2, 4, 6, 8, seed=1, dtype=dtype)], [x], incoming))
                for parameter in net.parameters():
                    assert parameter.grad is not None
                    found[-1].append((parameter.grad.is_contiguous(), parameter.grad.is_contiguous(memory_format=LAST)))
                    parameter.grad = None
            for one, other in zip(*found, strict=True):
                assert one == other or all(other), f"{memory_format}, x {x}, gradient {incoming}: {found}"


@pytest.mark.parametrize("impl", [None, *(["algebraic", "fused"] if HAS_TRITON else [])])
@pytest.mark.parametrize("name", ["same", "up", "stage"])
def test_what_makes_a_weight_gets_a_gradient_in_its_format(name: str, impl: str | None) -> None:
    """A custom function may view the gradient of the weight it returned in the same way as the weight."""
    make, _, shapes = OPS[name]
    for wanted in ("contiguous", "channels_last"):
        values = [random_tensor(*shape, seed=number, scale=0.1) for number, shape in enumerate(shapes)]
        values = [FORMATS[wanted](value) if value.dim() == 4 else value for value in values]
        x, *leaves = (value.requires_grad_() for value in values)
        gradients = torch.autograd.grad(make(impl)(x, *leaves).sum(), leaves)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            assert gradient.stride() == leaf.stride()


@pytest.mark.parametrize("impl", [None, *(["algebraic", "fused"] if HAS_TRITON else [])])
def test_packed_weights_and_tables(impl: str | None) -> None:
    """fold returns channels_last and takes gradients back to the weights' format. h is a convolution's input."""
    for name, other in itertools.product(("contiguous", "channels_last"), repeat=2):
        weight = FORMATS[name](random_tensor(5, 4, 3, 3, seed=1)).requires_grad_()
        for kind in ("conv", "up", "skip"):
            (packed,) = fold([weight], [kind], impl=impl)
            assert packed.is_contiguous(memory_format=LAST)
            (gradient,) = torch.autograd.grad(packed, weight, torch.ones_like(packed))
            assert gradient.stride() == weight.stride(), (kind, name)
        h = FORMATS[other](random_tensor(2, 4, 6, 6, seed=2)).requires_grad_()
        table = skip_phase_table(h, weight, impl=impl)
        gradient, of_weight = torch.autograd.grad(table, (h, weight), torch.ones_like(table))
        assert gradient.is_contiguous(memory_format=LAST) == ("channels_last" in (name, other))
        assert of_weight.stride() == weight.stride()


@pytest.mark.parametrize("impl", [None, *(["algebraic", "fused"] if HAS_TRITON else [])])
def test_a_loss_gives_gradients_in_the_format_of_the_difference(impl: str | None) -> None:
    for names in itertools.product(("contiguous", "channels_last"), repeat=2):
        pair = [FORMATS[name](random_tensor(2, 3, 4, 6, seed=1)).requires_grad_() for name in names]
        loss = l1_reconstruction_loss(*pair, impl=impl)
        for value, gradient in zip(pair, torch.autograd.grad(loss.sum(), pair), strict=True):
            assert gradient.stride() == (pair[0] - pair[1]).stride() and gradient.shape == value.shape, names


@pytest.mark.parametrize("shape", [(2, 1, 6, 5), (2, 4, 1, 1), (1, 1, 1, 1)])
def test_sizes_that_fit_both_formats_lead_to_the_same_one(shape: tuple[int, ...]) -> None:
    """torch judges formats by strides there, so the next convolution reveals the strides of our output."""
    for net, x in itertools.product(("contiguous", "channels_last"), repeat=2):
        first, second = nn.Conv2d(shape[1], shape[1], 3, padding=1), nn.Conv2d(shape[1], 6, 3, padding=1)
        for conv in (first, second):
            conv.to(DEVICE).weight.data = FORMATS[net](conv.weight.data)
        values = FORMATS[x](random_tensor(*shape, seed=1))
        ours = second(conv2d_elu(values, first.weight, first.bias))
        theirs = second(F.elu(first(values)))
        assert is_channels_last(ours) == is_channels_last(theirs), (net, x)


def test_lay_out_copies_nothing_that_is_there() -> None:
    for shape in itertools.product((1, 2, 3), repeat=4):
        for name in ("contiguous", "channels_last"):
            x = torch.empty(shape, memory_format=LAST if name == "channels_last" else torch.contiguous_format)
            for last in (False, True):
                y = lay_out(x, last)
                assert is_channels_last(y) <= last
                assert y.is_contiguous(memory_format=LAST if last else torch.contiguous_format)
                if x.is_contiguous(memory_format=LAST if last else torch.contiguous_format):
                    assert y.data_ptr() == x.data_ptr()

"""The Triton kernels against their twins in float64: on a GPU compiled, elsewhere under Triton's interpreter.

Tolerance: the largest error may be twice that of PyTorch's own op in the same dtype, plus 1e-6 (of the largest value,
where that is above 1); four times for folded up-convolutions in half precision, whose weights are rounded once folded.
The interpreter multiplies bf16 matrices wrongly, so bf16 products are tested on GPUs only; and it cuts float32 off to
bf16 where GPUs round, so it may be off by a whole unit of bf16 there.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbegan_kernels import (
    conv2d_elu,
    equilibrium_update,
    l1_reconstruction_loss,
    normalize_images,
    reference,
    upsample_conv2d_elu,
)

launch = pytest.importorskip("fastbegan_kernels.fused.launch")  # where there is no Triton there is nothing to test
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
EXACT = [torch.float32, torch.float16, torch.bfloat16]  # kernels without a matrix product


@pytest.fixture(autouse=True)
def _exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


class _Poisoning:
    """torch, but memory that it hands out is NaN until something is written."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name not in ("empty", "empty_like"):
            return value

        def made(*arguments: Any, **options: Any) -> Tensor:
            tensor = value(*arguments, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    # in the launchers only: patched for all, torch.empty would stay patched in torch's caches of its own functions
    monkeypatch.setattr(launch, "torch", _Poisoning())


def _random(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(device=DEVICE, dtype=dtype)


def _run(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor | None = None) -> list[Tensor]:
    """Output and gradients of all inputs."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    output = function(*leaves)
    grad = torch.ones_like(output) if grad is None else grad.to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def _check(
    fused: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor], factor: float = 2.0
) -> None:
    """Both in the inputs' dtype against `plain` in float64; ELU' from a half-precision output may add 2^-9."""
    shape = plain(*inputs).shape
    grad = _random(*shape, seed=99, dtype=inputs[0].dtype)
    exact = _run(plain, [value.double() for value in inputs], grad)
    own = _run(plain, inputs, grad)
    got = _run(fused, inputs, grad)
    half = inputs[0].dtype != torch.float32
    for number, (a, b, c) in enumerate(zip(got, own, exact, strict=True)):
        largest = c.abs().max().item()
        allowed = factor * (b - c).abs().max().item() + 1e-6 * max(1.0, largest)
        if half and number:
            allowed += 2**-9 * largest
        if inputs[0].dtype == torch.bfloat16 and not ON_GPU:
            allowed += 2**-8 * largest
        error = (a - c).abs().max().item()
        assert error <= allowed, f"result {number}: error {error:.3g}, allowed {allowed:.3g}"


SHAPES = [  # N, C, H, W, K
    (2, 16, 8, 8, 16),  # one tile
    (2, 20, 7, 9, 12),  # nothing divides by a tile
    (1, 3, 16, 16, 24),  # images: fewer channels than a block
    (2, 32, 5, 5, 3),  # to images
    (1, 5, 1, 1, 7),  # one pixel: eight of nine taps are padding
    (3, 70, 6, 4, 66),  # two channel blocks, the second nearly empty
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_conv2d_elu(shape: tuple[int, ...], stride: int, dtype: torch.dtype) -> None:
    n, c, h, w, k = shape
    inputs = [
        _random(n, c, h, w, seed=1, dtype=dtype),
        _random(k, c, 3, 3, seed=2, dtype=dtype, scale=(9 * c) ** -0.5),
        _random(k, seed=3, dtype=dtype),
    ]
    _check(
        lambda x, w, b: conv2d_elu(x, w, b, stride=stride, impl="fused"),
        lambda x, w, b: reference.conv2d_elu(x, w, b, stride=stride),
        inputs,
    )


@pytest.mark.parametrize("stride", [1, 2])
def test_conv2d_elu_1x1_without_bias(stride: int) -> None:
    inputs = [
        _random(2, 10, 5, 6, seed=1, dtype=torch.float32),
        _random(7, 10, 1, 1, seed=2, dtype=torch.float32, scale=0.3),
    ]
    _check(
        lambda x, w: conv2d_elu(x, w, stride=stride, impl="fused"),
        lambda x, w: reference.conv2d_elu(x, w, stride=stride),
        inputs,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_upsample_conv2d_elu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    n, c, h, w, k = shape
    inputs = [
        _random(n, c, h, w, seed=1, dtype=dtype),
        _random(k, c, 3, 3, seed=2, dtype=dtype, scale=(9 * c) ** -0.5),
        _random(k, seed=3, dtype=dtype),
    ]
    _check(
        lambda x, w, b: upsample_conv2d_elu(x, w, b, impl="fused"),
        reference.upsample_conv2d_elu,
        inputs,
        factor=2.0 if dtype == torch.float32 else 4.0,
    )


@pytest.mark.parametrize("cell", [2, 4, 8])
def test_upsample_conv2d_elu_with_a_skip_table(cell: int) -> None:
    size, channels, out = 4, 6, 5
    h = size * cell // 2
    inputs = [
        _random(2, channels, h, h, seed=1, dtype=torch.float32),
        _random(out, channels, 3, 3, seed=2, dtype=torch.float32, scale=0.2),
        _random(out, seed=3, dtype=torch.float32),
        _random(2, 3, 3, size, size, out, seed=4, dtype=torch.float32),
    ]
    _check(
        lambda x, w, b, s: upsample_conv2d_elu(x, w, b, skip=s, impl="fused"),
        lambda x, w, b, s: reference.upsample_conv2d_elu(x, w, b, skip=s),
        inputs,
    )


@pytest.mark.parametrize(
    ("activation", "alpha"), [("elu", 0.5), ("relu", 1), ("leaky_relu", 0.2), ("silu", 1), ("none", 1)]
)
@pytest.mark.parametrize("op", [conv2d_elu, upsample_conv2d_elu])
def test_activations_with_a_carry(op: Callable[..., Tensor], activation: str, alpha: float) -> None:
    inputs = [
        _random(2, 6, 4, 4, seed=1, dtype=torch.float32),
        _random(6, 6, 3, 3, seed=2, dtype=torch.float32, scale=0.2),
        _random(6, seed=3, dtype=torch.float32),
    ]
    settings = {"activation": activation, "alpha": alpha}
    carry = torch.tensor(0.3, device=DEVICE)
    _check(
        lambda *a: op(*a, **settings, carry=carry, impl="fused"),
        lambda *a: op(*a, **settings, carry=carry.to(a[0].dtype), impl="reference"),
        inputs,
    )


@pytest.mark.parametrize("activation", ["elu", "leaky_relu", "none"])
@pytest.mark.parametrize("up", [False, True])
def test_input_gradient_with_the_previous_layers_derivative(up: bool, activation: str) -> None:
    """One launch gives the gradient before the previous activation and its bias gradient."""
    from fastbegan_kernels.fold import fold_upsample

    x = _random(2, 9, 6, 7, seed=1, dtype=torch.float32)
    weight = _random(8, 9, 3, 3, seed=2, dtype=torch.float32, scale=0.2)
    z = x.double().requires_grad_()
    y = reference.activate(z, activation, 0.7)
    op = reference.upsample_conv2d_elu if up else reference.conv2d_elu
    out = op(y, weight.double(), activation="none")
    dz_next = _random(*out.shape, seed=3, dtype=torch.float32)
    (expected,) = torch.autograd.grad(out, z, dz_next.double())
    y_prev = y.detach().float()
    if up:
        got, db = launch.upsample_conv2d_elu_input_gradient(
            dz_next, fold_upsample(weight), y_prev, activation=activation, alpha=0.7
        )
    else:
        got, db = launch.conv2d_elu_input_gradient(dz_next, weight, y_prev, activation=activation, alpha=0.7)
    assert db is not None
    assert (got - expected).abs().max() < 1e-5 and (db - expected.sum((0, 2, 3))).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("eta", [1, 2])
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (3, 3, 7, 5), (2, 3, 40, 40), (4, 10)])
def test_l1_reconstruction_loss(shape: tuple[int, ...], eta: int, dtype: torch.dtype) -> None:
    inputs = [_random(*shape, seed=1, dtype=dtype), _random(*shape, seed=2, dtype=dtype)]
    if len(shape) == 4:
        inputs[0] = inputs[0].contiguous(memory_format=torch.channels_last)
    fused = lambda p, t: l1_reconstruction_loss(p, t, eta=eta, impl="fused")  # noqa: E731
    _check(fused, lambda p, t: reference.l1_reconstruction_loss(p, t, eta=eta), inputs)
    first, second = _run(fused, inputs), _run(fused, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))  # sums in a fixed order
    if eta == 1:
        same = inputs[0].detach().clone().requires_grad_()
        assert torch.autograd.grad(fused(same, inputs[0]).sum(), same)[0].count_nonzero() == 0


def test_l1_reconstruction_loss_with_a_detached_target() -> None:
    prediction, target = (_random(2, 3, 4, 4, seed=s, dtype=torch.float32).requires_grad_() for s in (1, 2))
    l1_reconstruction_loss(prediction, target, detach_target=True, impl="fused").sum().backward()
    assert target.grad is None and prediction.grad is not None and prediction.grad.isfinite().all()


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_normalize_images(size: tuple[int, int], dtype: torch.dtype) -> None:
    images = torch.randint(0, 256, (6, *size, 3), dtype=torch.uint8, device=DEVICE)
    index = torch.tensor([5, 0, 0, 3], device=DEVICE)
    flip = torch.tensor([True, False, True, False], device=DEVICE)
    for source, order, mirror in (
        (images, None, None),
        (images, index, None),
        (images, index, flip),
        (images[:4], None, flip),
    ):
        got = normalize_images(source, order, mirror, dtype=dtype, impl="fused")
        exact = reference.normalize_images(source, order, mirror, dtype=torch.float64)
        assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
        assert (got - exact).abs().max() <= {torch.float32: 2e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]


@pytest.mark.parametrize("samples", [1, 16, 300])
@pytest.mark.parametrize("skip", [None, False, True])
def test_equilibrium_update(samples: int, skip: bool | None) -> None:
    flag = None if skip is None else torch.tensor(skip, device=DEVICE)
    states = []
    for impl in ("reference", "fused"):
        k, sums = torch.tensor(0.2, device=DEVICE), torch.ones(6, device=DEVICE)
        window = torch.ones(2, dtype=torch.float64, device=DEVICE)
        for seed in range(3):
            real, fake = (_random(samples, seed=s, dtype=torch.float32).abs() for s in (seed, seed + 10))
            equilibrium_update(real, fake, k, sums, window, flag, gamma=0.5, lambda_k=0.01, impl=impl)
        states.append((k, sums, window))
    for got, expected in zip(states[1], states[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    assert (states[1][0].item() == pytest.approx(0.2)) == bool(skip)


def test_equilibrium_update_takes_scalars_and_refuses_unlike_shapes() -> None:
    k, sums = torch.zeros((), device=DEVICE), torch.zeros(6, device=DEVICE)
    window = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    real, fake = torch.tensor(0.4, device=DEVICE), torch.tensor(0.1, device=DEVICE)
    equilibrium_update(real, fake, k, sums, window, gamma=0.5, lambda_k=0.001, impl="fused")
    assert k.item() == pytest.approx(0.0001, rel=1e-5)
    with pytest.raises(ValueError, match=r"loss_real is \[\] but loss_fake \[3\]"):
        equilibrium_update(real, fake.expand(3), k, sums, window, gamma=0.5, lambda_k=0.001, impl="fused")


def test_k_is_clamped() -> None:
    k, sums, window = torch.tensor(0.999, device=DEVICE), torch.zeros(6, device=DEVICE), torch.zeros(2, device=DEVICE)
    losses = torch.tensor([1.0], device=DEVICE), torch.tensor([0.0], device=DEVICE)
    equilibrium_update(*losses, k, sums, window.double(), gamma=1.0, lambda_k=1.0, impl="fused")
    assert k.item() == 1


def _layer(op: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> tuple[Callable[[], Tensor], list[Tensor]]:
    leaves = [
        _random(2, 6, 4, 4, seed=1, dtype=dtype).requires_grad_(),
        _random(5, 6, 3, 3, seed=2, dtype=dtype, scale=0.2).requires_grad_(),
        _random(5, seed=3, dtype=dtype).requires_grad_(),
    ]
    return lambda: op(*leaves, impl="fused"), leaves


@pytest.mark.parametrize("op", [conv2d_elu, upsample_conv2d_elu])
def test_a_graph_may_be_used_twice(op: Callable[..., Tensor]) -> None:
    run, leaves = _layer(op)
    output = run().sum()
    first = torch.autograd.grad(output, leaves, retain_graph=True)
    second = torch.autograd.grad(output, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("op", [conv2d_elu, upsample_conv2d_elu])
def test_only_what_is_needed(op: Callable[..., Tensor]) -> None:
    run, leaves = _layer(op)
    everything = torch.autograd.grad(run().sum(), leaves)
    for number, leaf in enumerate(leaves):
        for other in leaves:
            other.requires_grad_(other is leaf)
        (alone,) = torch.autograd.grad(run().sum(), leaf)
        torch.testing.assert_close(alone, everything[number])
    with torch.no_grad():
        assert not run().requires_grad


@pytest.mark.parametrize("op", [conv2d_elu, upsample_conv2d_elu])
def test_empty_batches(op: Callable[..., Tensor]) -> None:
    x = torch.zeros(0, 6, 4, 4, device=DEVICE, requires_grad=True)
    weight = torch.zeros(5, 6, 3, 3, device=DEVICE, requires_grad=True)
    bias = torch.zeros(5, device=DEVICE, requires_grad=True)
    output = op(x, weight, bias, impl="fused")
    assert output.shape[:2] == (0, 5)
    gradients = torch.autograd.grad(output.sum(), (x, weight, bias))
    assert [g.shape for g in gradients] == [x.shape, weight.shape, bias.shape]
    assert not any(g.count_nonzero() for g in gradients)


@pytest.mark.parametrize("op", [conv2d_elu, upsample_conv2d_elu])
def test_strided_inputs_and_gradients(op: Callable[..., Tensor]) -> None:
    wide = _random(2, 12, 4, 8, seed=1, dtype=torch.float32)
    weight, bias = _random(5, 6, 3, 3, seed=2, dtype=torch.float32), _random(5, seed=3, dtype=torch.float32)
    x = wide[:, ::2, :, 1::2].requires_grad_()
    output = op(x, weight, bias, impl="fused")
    dense = op(x.detach().contiguous(), weight, bias, impl="reference")
    torch.testing.assert_close(output, dense, rtol=1e-4, atol=1e-5)
    (expanded,) = torch.autograd.grad(output.sum(), x, retain_graph=True)  # an expanded scalar as gradient
    (whole,) = torch.autograd.grad(output, x, torch.ones_like(output))
    torch.testing.assert_close(expanded, whole)


def test_small_arguments_may_be_strided() -> None:
    x, weight = _random(2, 6, 4, 4, seed=1, dtype=torch.float32), _random(5, 6, 3, 3, seed=2, dtype=torch.float32)
    bias = _random(10, seed=3, dtype=torch.float32)[::2]
    for op in (conv2d_elu, upsample_conv2d_elu):
        got, expected = op(x, weight, bias, impl="fused"), op(x, weight, bias.contiguous(), impl="reference")
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    images = torch.randint(0, 256, (6, 4, 4, 3), dtype=torch.uint8, device=DEVICE)
    index = torch.tensor([5, 9, 0, 9, 3, 9], device=DEVICE)[::2]
    flip = torch.tensor([True, False, False, True, True, False], device=DEVICE)[::2]
    got = normalize_images(images, index, flip, impl="fused")
    torch.testing.assert_close(got, reference.normalize_images(images, index, flip))


def test_without_a_previous_output_there_is_no_derivative() -> None:

    dz, weight = _random(1, 4, 4, 4, seed=1, dtype=torch.float32), _random(4, 3, 3, 3, seed=2, dtype=torch.float32)
    plain, none = launch.conv2d_elu_input_gradient(dz, weight, activation="relu")
    assert none is None and torch.equal(plain, launch.conv2d_elu_input_gradient(dz, weight)[0]) and plain.min() < 0


@pytest.mark.parametrize("op", [conv2d_elu, upsample_conv2d_elu])
def test_autocast_casts_the_input_and_keeps_masters(op: Callable[..., Tensor]) -> None:
    run, leaves = _layer(op)
    with torch.autocast(DEVICE, torch.float16):
        output = run()
    assert output.dtype == torch.float16
    gradients = torch.autograd.grad(output.float().sum(), leaves)
    assert all(g.dtype == torch.float32 for g in gradients)
    torch.testing.assert_close(output.float(), run(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("op", [conv2d_elu, upsample_conv2d_elu, l1_reconstruction_loss])
def test_compiles_without_graph_breaks(op: Callable[..., Tensor]) -> None:
    if op is l1_reconstruction_loss:
        leaves = [_random(2, 3, 4, 4, seed=s, dtype=torch.float32).requires_grad_() for s in (1, 2)]
        run = lambda: op(*leaves, impl="fused")  # noqa: E731
    else:
        run, leaves = _layer(op)
    expected = torch.autograd.grad(run().square().sum(), leaves)
    compiled = torch.compile(lambda: run().square().sum(), fullgraph=True, backend="aot_eager")
    for got, want in zip(torch.autograd.grad(compiled(), leaves), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # raised inside opcheck itself
def test_opcheck() -> None:
    _, (x, weight, bias) = _layer(conv2d_elu)
    ops = torch.ops.fastbegan
    skip = _random(2, 3, 3, 4, 4, 5, seed=4, dtype=torch.float32).requires_grad_()
    images = torch.randint(0, 256, (3, 4, 4, 3), dtype=torch.uint8, device=DEVICE)
    y = torch.rand(2, 5, 4, 4, device=DEVICE)
    up = torch.rand(2, 5, 8, 8, device=DEVICE)
    everything, nothing = [True] * 4, [False] * 4
    losses = torch.rand(4, device=DEVICE)
    k, sums = torch.zeros((), device=DEVICE), torch.zeros(6, device=DEVICE)
    window = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    calls = [
        (ops.conv2d_elu, (x, weight, bias, 1, "elu", 1.0)),
        (ops.conv2d_elu, (x, weight, None, 2, "none", 1.0)),
        (ops.upsample_conv2d_elu, (x, weight, bias, skip, "elu", 1.0)),
        (ops.l1_reconstruction_loss, (x, x.detach() + 1, 1)),
        (ops.conv2d_elu_backward, (y, x.detach(), weight.detach(), y, 1, "elu", 1.0, everything[:3])),
        (ops.conv2d_elu_backward, (y, x.detach(), weight.detach(), y, 1, "elu", 1.0, nothing[:3])),
        (ops.upsample_conv2d_elu_backward, (up, x.detach(), weight.detach(), up, "elu", 1.0, 4, everything)),
        (ops.upsample_conv2d_elu_backward, (up, x.detach(), weight.detach(), up, "elu", 1.0, 0, nothing)),
        (ops.normalize_images, (images, torch.tensor([2, 0], device=DEVICE), None, torch.float16)),
        (ops.equilibrium_update, (losses, losses + 1, k, sums, window, None, 0.5, 0.1)),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments)


def test_what_the_kernels_cannot_take_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.zeros(1, 3, 4, 4, device=DEVICE), torch.zeros(2, 3, 5, 5, device=DEVICE)
    with pytest.raises(ValueError, match="accepted: 1x1 and 3x3, stride 1 and 2"):
        conv2d_elu(x, weight, impl="fused")
    with pytest.raises(RuntimeError, match="tensor is float64"):
        conv2d_elu(x.double(), weight[..., :3, :3].double(), impl="fused")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="needs a GPU; tensor is on cpu"):
        conv2d_elu(x.cpu(), weight[..., :3, :3].cpu(), impl="fused")


def test_tiles_shrink_with_the_layer() -> None:
    from fastbegan_kernels.fused.tiles import FULL, HALF, pick_tile

    assert pick_tile(torch.bfloat16, 1 << 20, 128, 128, 80) == HALF[0]
    assert pick_tile(torch.bfloat16, 1 << 20, 128, 128, 100) == HALF[1]
    assert pick_tile(torch.bfloat16, 1 << 20, 64, 64, 90) == HALF[1]
    assert pick_tile(torch.bfloat16, 1024, 128, 128, 90).block_m == 64
    assert pick_tile(torch.float32, 1 << 20, 128, 3, 80) == FULL[-1]
    widths = [pick_tile(torch.bfloat16, 1 << 20, 128, k, 80).block_k for k in (3, 16, 64, 128, 256)]
    assert all(a <= b for a, b in pairwise(widths))

"""Ops in use: autograd, torch.compile, autocast, odd inputs, wrong inputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbegan_kernels import (
    conv2d_elu,
    conv_layer,
    conv_stage,
    dispatch,
    fold,
    group_norm_silu,
    l1_reconstruction_loss,
    normalize_images,
    reference,
    upsample_conv2d_elu,
)
from tests.helpers.oracle import DEVICE, layer_inputs, random_tensor

pytestmark = pytest.mark.core
pytest.importorskip("triton")
conv_stage_module = importlib.import_module("fastbegan_kernels.conv_stage")  # its name is the function's too
LAYERS = [conv2d_elu, upsample_conv2d_elu]


def _layer(op: Callable[..., Tensor]) -> tuple[Callable[[], Tensor], list[Tensor]]:
    leaves = [value.requires_grad_() for value in layer_inputs(2, 6, 4, 4, 5)]
    return lambda: op(*leaves, impl="fused"), leaves


@pytest.mark.parametrize("op", LAYERS)
def test_a_graph_may_be_used_twice(op: Callable[..., Tensor]) -> None:
    run, leaves = _layer(op)
    output = run().sum()
    first = torch.autograd.grad(output, leaves, retain_graph=True)
    second = torch.autograd.grad(output, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("op", LAYERS)
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


@pytest.mark.parametrize("wanted", [0, 1, 2, 3, 4])
def test_a_stage_computes_only_what_is_needed(wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, first, b = layer_inputs(2, 6, 4, 4, 6)
    leaves = [x, first, random_tensor(6, 6, 3, 3, seed=8, scale=0.2), b, random_tensor(6, seed=9)]
    for leaf in leaves:
        leaf.requires_grad_()

    def run() -> Tensor:
        return conv_stage(leaves[0], leaves[1:3], leaves[3:], impl="fused").sum()

    everything = torch.autograd.grad(run(), leaves)
    for number, leaf in enumerate(leaves):
        leaf.requires_grad_(number == wanted)
    products: list[str] = []
    for name in ("_input_gradient", "_weight_gradient"):
        monkeypatch.setattr(conv_layer, name, _counted(getattr(conv_layer, name), name, products))
    (alone,) = torch.autograd.grad(run(), leaves[wanted])
    torch.testing.assert_close(alone, everything[wanted])
    expected = {0: (2, 0), 1: (1, 1), 2: (0, 1), 3: (1, 0), 4: (0, 0)}[wanted]
    assert (products.count("_input_gradient"), products.count("_weight_gradient")) == expected


def _counted(function: Callable[..., Tensor], name: str, calls: list[str]) -> Callable[..., Tensor]:
    def called(*arguments: object, **options: object) -> Tensor:
        calls.append(name)
        return function(*arguments, **options)

    return called


@pytest.mark.parametrize("op", LAYERS)
@pytest.mark.parametrize("impl", ["fused", "algebraic"])
def test_empty_batches(op: Callable[..., Tensor], impl: str) -> None:
    x = torch.zeros(0, 6, 4, 4, device=DEVICE, requires_grad=True)
    weight = torch.zeros(5, 6, 3, 3, device=DEVICE, requires_grad=True)
    bias = torch.zeros(5, device=DEVICE, requires_grad=True)
    output = op(x, weight, bias, impl=impl)
    assert output.shape[:2] == (0, 5)
    gradients = torch.autograd.grad(output.sum(), (x, weight, bias))
    assert [g.shape for g in gradients] == [x.shape, weight.shape, bias.shape]
    assert not any(g.count_nonzero() for g in gradients)


@pytest.mark.parametrize("activation", ["elu", "relu", "leaky_relu", "none"])
@pytest.mark.parametrize("op", LAYERS)
def test_nan_stays_nan(op: Callable[..., Tensor], activation: str) -> None:
    """NaN must reach the outputs: a step checks for it at its end."""
    x, weight, bias = layer_inputs(1, 6, 4, 4, 5)
    x[0, 0, 1, 1] = float("nan")
    got = op(x, weight, bias, activation=activation, impl="fused")
    assert torch.equal(got.isnan(), op(x, weight, bias, activation=activation, impl="reference").isnan())
    assert got.isnan().any() and not got.isnan().all()


@pytest.mark.parametrize("impl", ["auto", "algebraic"])
def test_the_ops_run_without_a_kernel_too(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all kernels are wrong, plain operations run inside the op, with the op's own backward."""
    x, weight, bias = layer_inputs(2, 6, 4, 4, 6)
    leaves = [value.requires_grad_() for value in (x, weight, bias)]
    folded = torch.ops.fastbegan.fold([weight, weight], "conv up", torch.float32, impl)
    split = folded.split([324, 576])
    packed = [split[0].view(6, 3, 3, 6).permute(0, 3, 1, 2), split[1].view(6, 4, 4, 6).permute(0, 3, 1, 2)]
    monkeypatch.setattr(conv_stage_module, "op_impl", lambda *_: impl)
    got = conv_stage(x, packed, (bias, bias), kinds=("same", "up"))
    expected = reference.conv_stage(x, (weight, weight), (bias, bias), kinds=("same", "up"))
    torch.testing.assert_close(got, expected)
    grad = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", LAYERS)
def test_strided_inputs_and_gradients(op: Callable[..., Tensor]) -> None:
    wide = random_tensor(2, 12, 4, 8, seed=1)
    weight, bias = random_tensor(5, 6, 3, 3, seed=2), random_tensor(5, seed=3)
    x = wide[:, ::2, :, 1::2].requires_grad_()
    output = op(x, weight, bias, impl="fused")
    dense = op(x.detach().contiguous(), weight, bias, impl="reference")
    torch.testing.assert_close(output, dense, rtol=1e-4, atol=1e-5)
    (expanded,) = torch.autograd.grad(output.sum(), x, retain_graph=True)  # an expanded scalar as gradient
    (whole,) = torch.autograd.grad(output, x, torch.ones_like(output))
    torch.testing.assert_close(expanded, whole)


def test_small_arguments_may_be_strided() -> None:
    x, weight = random_tensor(2, 6, 4, 4, seed=1), random_tensor(5, 6, 3, 3, seed=2)
    bias = random_tensor(10, seed=3)[::2]
    for op in LAYERS:
        got, expected = op(x, weight, bias, impl="fused"), op(x, weight, bias.contiguous(), impl="reference")
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    images = torch.randint(0, 256, (6, 4, 4, 3), dtype=torch.uint8, device=DEVICE)
    index = torch.tensor([5, 9, 0, 9, 3, 9], device=DEVICE)[::2]
    flip = torch.tensor([True, False, False, True, True, False], device=DEVICE)[::2]
    got = normalize_images(images, index, flip, impl="fused")
    torch.testing.assert_close(got, reference.normalize_images(images, index, flip))


@pytest.mark.parametrize("op", LAYERS)
def test_autocast_casts_the_input_and_keeps_masters(op: Callable[..., Tensor]) -> None:
    run, leaves = _layer(op)
    with torch.autocast(DEVICE.type, torch.float16):
        output = run()
    assert output.dtype == torch.float16
    gradients = torch.autograd.grad(output.float().sum(), leaves)
    assert all(g.dtype == torch.float32 for g in gradients)
    torch.testing.assert_close(output.float(), run(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("impl", ["fused", "algebraic", "reference"])
def test_a_float32_bias_beside_half_precision(impl: str) -> None:
    x, weight, bias = layer_inputs(2, 6, 4, 4, 5)
    for op in LAYERS:
        leaf = bias.detach().requires_grad_()
        output = op(x.half(), weight.half(), leaf, impl=impl)
        assert output.dtype == torch.float16
        assert torch.autograd.grad(output.float().sum(), leaf)[0].dtype == torch.float32


@pytest.mark.parametrize("op", [*LAYERS, conv_stage, l1_reconstruction_loss, fold, group_norm_silu])
def test_compiles_without_graph_breaks(op: Callable[..., Tensor]) -> None:
    if op is l1_reconstruction_loss:
        leaves = [random_tensor(2, 3, 4, 4, seed=s).requires_grad_() for s in (1, 2)]
        run = lambda: op(*leaves, impl="fused")  # noqa: E731
    elif op is fold:
        leaves = [random_tensor(2, 3, 3, 3, seed=s).requires_grad_() for s in (1, 2)]
        run = lambda: fold(leaves, ["conv", "up"], impl="fused")[1]  # noqa: E731
    elif op is group_norm_silu:
        _, leaves = _layer(conv2d_elu)
        run = lambda: op(leaves[0], 3, leaves[0].mean((0, 2, 3)), impl="fused")  # noqa: E731
    elif op is conv_stage:
        _, leaves = _layer(conv2d_elu)

        def run() -> Tensor:
            pair = (leaves[1], leaves[1][:, :5])
            return conv_stage(leaves[0], pair, (leaves[2],) * 2, kinds=("same", "up"), impl="fused")

    else:
        run, leaves = _layer(op)
    expected = torch.autograd.grad(run().square().sum(), leaves, allow_unused=True)
    compiled = torch.compile(lambda: run().square().sum(), fullgraph=True, backend="aot_eager")
    for got, want in zip(torch.autograd.grad(compiled(), leaves, allow_unused=True), expected, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", ["fused", "algebraic"])
def test_copies_and_repeated_tensors_compile(impl: str) -> None:
    """Dynamo passes no tensor twice to an autograd.Function, and zips no lists of different lengths (torch 2.7)."""
    x, weight, bias = (value.requires_grad_() for value in layer_inputs(2, 6, 4, 4, 6))
    square = random_tensor(3, 3, 3, 3, seed=5).requires_grad_()

    def run() -> Tensor:
        y = conv_stage(x, [weight] * 4, [bias] * 4, kinds=["same", "up"], copies=2, impl=impl)
        return y.square().sum() + conv_stage(square, [square], impl=impl).sum()

    leaves = [x, weight, bias, square]
    expected = torch.autograd.grad(run(), leaves)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(torch.autograd.grad(compiled(), leaves), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # raised inside opcheck itself
@pytest.mark.slow
@pytest.mark.parametrize("every", [False, True])
def test_opcheck(every: bool) -> None:
    """Each op in the fused tier once, or every call in every tier."""
    _, (x, weight, bias) = _layer(conv2d_elu)
    ops = torch.ops.fastbegan
    table = random_tensor(2, 3, 3, 4, 4, 5, seed=4).requires_grad_()
    folded = random_tensor(5, 5, 4, 4, seed=5).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = weight.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    images = torch.randint(0, 256, (3, 4, 4, 3), dtype=torch.uint8, device=DEVICE)
    y, up = (torch.rand(2, 5, size, size, device=DEVICE) for size in (4, 8))
    still = [value.detach() for value in (x, weight, folded, bias)]
    losses, mean = torch.rand(4, device=DEVICE), torch.rand(2, 3, device=DEVICE)
    k, sums = torch.zeros((), device=DEVICE), torch.zeros(6, device=DEVICE)
    window = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    elu = ("elu", 1.0, "fused")
    calls = [
        (ops.layer, (still[0], still[1], still[3], None, "same", *elu)),
        (ops.layer, (still[0], still[1], None, None, "down", "none", 1.0, "fused")),
        (ops.layer, (y, still[2], still[3], table.detach(), "up", *elu)),
        (ops.layer_input_gradient, (y, still[0], still[1], "same", *elu)),
        (ops.layer_input_gradient, (up, y, still[2], "up", None, 1.0, "fused")),
        (ops.layer_weight_gradient, (y, still[0], still[1], "same", "fused")),
        (ops.layer_weight_gradient, (up, y, still[2], "up", "fused")),
        (ops.activation_backward, (y, y + 1, *elu)),
        (ops.skip_gradient, (up, 4, "fused")),
        (ops.fold, ([weight, weight], "conv up", torch.float16, "fused")),
        (ops.fold_backward, (torch.rand(750, device=DEVICE), [still[1], still[1]], "conv up", "fused")),
        (ops.group_norm_silu, (x, 3, None, x.detach()[0, :, 0, 0].requires_grad_(), 1e-5, "silu", "fused")),
        (ops.group_norm_silu_backward, (still[0], still[0], mean, mean + 1, None, None, 1e-5, "none", "fused")),
        (ops.l1_reconstruction_loss, (x, x.detach() + 1, 1, "fused")),
        (ops.l1_reconstruction_loss_with_gradients, (still[0], still[0] + 1, losses[:2], 1, True, "fused")),
        (ops.l1_reconstruction_loss_with_gradients, (still[0], still[0] + 1, losses[:1], 2, False, "fused")),
        (ops.l1_reconstruction_loss_backward, (losses[:2], still[0], still[0] + 1, 1, True, "fused")),
        (ops.normalize_images, (images, torch.tensor([2, 0], device=DEVICE), None, None, 0, torch.float16, "fused")),
        (ops.normalize_images, (images, None, None, None, 2, torch.float32, "fused")),
        (ops.equilibrium_update, (losses, losses + 1, k, sums, window, None, 0.5, 0.1, "fused")),
    ]
    firsts = {op: (op, arguments) for op, arguments in reversed(calls)}
    for op, arguments in calls if every else firsts.values():
        # where the kernels do not run, plain operations do, in the same op
        for impl in ("fused", "algebraic", "auto") if every else ("fused",):
            changed = tuple(impl if value == "fused" else value for value in arguments)
            torch.library.opcheck(op.default, changed)


def test_what_the_kernels_cannot_take_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.zeros(1, 3, 4, 4, device=DEVICE), torch.zeros(2, 3, 5, 5, device=DEVICE)
    small = weight[..., :3, :3]
    with pytest.raises(ValueError, match="impl 'fused' accepts kernels of 1x1 and 3x3"):
        conv2d_elu(x, weight, impl="fused")
    with pytest.raises(RuntimeError, match="takes float32, bfloat16, float16; tensor is float64"):
        conv2d_elu(x.double(), small.double(), impl="fused")
    for _ in range(2):  # the second time from memory
        with pytest.raises(RuntimeError, match="impl 'fused' has no kernel for down_end forward"):
            conv2d_elu(x, small, stride=2, padding="end", impl="fused")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="needs a GPU; tensor is on cpu"):
        conv2d_elu(x.cpu(), small.cpu(), impl="fused")
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="needs Triton, which is not installed"):
        conv2d_elu(x, small, impl="fused")


def test_rocm_is_met_by_plain_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """ROCm names its GPUs cuda, and the capability of an MI300 reads like an H100's."""

    class _Tensor:
        is_cuda, dtype, device = True, torch.float32, torch.device("cuda", 0)

    there: Any = _Tensor()
    assert dispatch.op_impl(None, [there]) == ("auto" if dispatch.HAS_TRITON else None)
    monkeypatch.setattr(dispatch, "ROCM", True)
    assert dispatch.op_impl(None, [there]) is None
    if dispatch.HAS_TRITON:
        with pytest.raises(RuntimeError, match="impl 'fused' is for NVIDIA GPUs; this torch is for ROCm"):
            dispatch.op_impl("fused", [there])


WRONG = [
    (lambda x, w: conv2d_elu(x[0], w), r"x is \[3, 4, 4\]; accepted: \[N, C, H, W\]"),
    (lambda x, w: conv2d_elu(x[:, :, :0], w), r"x is \[1, 3, 0, 4\]; accepted: \[N, C, H, W\]"),
    (lambda x, w: conv2d_elu(x, w[0]), r"weight is \[3, 3, 3\]; accepted: \[out, in, k, k\] with odd k"),
    (lambda x, w: conv2d_elu(x, w[..., :2, :2]), r"weight is \[2, 3, 2, 2\]; accepted"),
    (lambda x, w: conv2d_elu(x, w[:, :2]), r"x is \[1, 3, 4, 4\] but weight takes 2 channels"),
    (lambda x, w: conv2d_elu(x, w, torch.zeros(3)), r"bias is \[3\]; accepted: \[2\]"),
    (lambda x, w: conv2d_elu(x, w.double()), "weight is torch.float64 but x is torch.float32"),
    (lambda x, w: conv2d_elu(x, w, torch.zeros(2).half()), "bias is torch.float16; accepted: torch.float32"),
    (lambda x, w: conv2d_elu(x, w, stride=-1), "stride is -1; accepted: 1, 2"),
    (lambda x, w: conv2d_elu(x, w, carry=torch.ones(())), r"carry is \[\]; accepted: one number"),
    (lambda x, w: conv2d_elu(x, w, activation="tanh"), "activation is 'tanh'; accepted: elu, relu"),
    (lambda x, w: conv2d_elu(x, w, alpha=-1), "alpha is -1; accepted: numbers >= 0"),
    (lambda x, w: conv2d_elu(x, w, impl="quick"), "impl is 'quick'; accepted: reference, algebraic, fused"),
    (lambda x, w: upsample_conv2d_elu(x, w[..., :1, :1]), r"weight is \[2, 3, 1, 1\]; accepted: \[out, in, 3, 3\]"),
    (lambda x, w: upsample_conv2d_elu(x, w, skip=torch.zeros(1, 3, 3, 3, 3, 2)), r"skip is \[1, 3, 3, 3, 3, 2\]"),
    (lambda x, w: conv_stage(x, []), "a stage was given 0 weights, no biases, 0 kinds"),
    (lambda x, w: conv_stage(x, [w], [w, w]), "a stage was given 1 weights, 2 biases, 1 kinds"),
    (lambda x, w: conv_stage(x, [w], kinds=["over"]), r"kinds\[0\] is 'over'; accepted: same, down, down_end, up"),
    (lambda x, w: conv_stage(x, [w, w]), r"x is \[1, 2, 4, 4\] but weight takes 3 channels"),
    (lambda x, w: conv_stage(x, [w], skip=w), "skip was given but the last kind is 'same'; accepted: up"),
    (lambda x, w: normalize_images(x), "images is torch.float32"),
    (lambda x, w: normalize_images(x.byte(), torch.zeros(2)), r"index is torch.float32 \[2\]; accepted: torch.int64"),
    (lambda x, w: normalize_images(x.byte(), corner=torch.zeros(2)), r"corner is torch.float32 \[2\]; accepted"),
    (lambda x, w: normalize_images(x.byte(), margin=4), "margin is 4; accepted: 0 to below the images' sides"),
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[message[:30] for _, message in WRONG])
@pytest.mark.parametrize("impl", ["reference", "algebraic", "fused"])
def test_wrong_arguments_are_named(
    call: Callable[[Tensor, Tensor], Tensor], message: str, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTBEGAN_IMPL", impl)
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 3, 3))


def test_any_tier_takes_larger_kernels_but_the_fused() -> None:
    x, weight = random_tensor(1, 3, 6, 6, seed=1), random_tensor(2, 3, 5, 5, seed=2)
    torch.testing.assert_close(conv2d_elu(x, weight), reference.conv2d_elu(x, weight))
    torch.testing.assert_close(conv_stage(x, [weight]), reference.conv_stage(x, [weight]))


def test_environment_chooses_the_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.asked_for(None) is None
    monkeypatch.setenv("FASTBEGAN_IMPL", "reference")
    assert dispatch.asked_for(None) == "reference"
    assert dispatch.asked_for("algebraic") == "algebraic"
    monkeypatch.setenv("FASTBEGAN_IMPL", "quick")
    with pytest.raises(ValueError, match="FASTBEGAN_IMPL is 'quick'"):
        dispatch.asked_for(None)

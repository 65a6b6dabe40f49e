"""conv_stage: convolution layers one after another, with one backward for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference, tiers, tuning
from .dispatch import allows_tf32, asked_for, autocast, op_impl
from .fold import fold
from .problems import Layer


def conv_stage(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    kinds: Sequence[str] | None = None,
    skip: Tensor | None = None,
    activation: str = "elu",
    alpha: float = 1.0,
    impl: str | None = None,
) -> Tensor:
    """As `reference.conv_stage`: x [N, C, H, W] through layers of kinds "same", "down" and "up", channels_last.

    On a GPU all layers are one operation. Going back, a layer's input gradient, the derivative of the activation before
    it and that layer's bias gradient are one kernel; only each layer's output is kept. Weights of kind "up" may come
    folded (`fold`), [C, K, 4, 4].
    """
    kinds = reference.check_stage(weights, biases, kinds, skip)
    reference.check_activation(activation, alpha)
    if asked_for(impl) == "reference":
        return reference.conv_stage(
            x, weights, biases, kinds=kinds, skip=skip, activation=activation, alpha=alpha
        )  # fmt: skip
    shape: Sequence[int] = x.shape
    for number, (weight, kind) in enumerate(zip(weights, kinds, strict=True)):
        bias = None if biases is None else biases[number]
        reference.check_dtypes(x, weight, bias)
        table = skip if number == len(kinds) - 1 else None
        shape = reference.check_shapes(shape, weight, bias, kind=kind, skip=table)
    mode = op_impl(impl, (x, *weights, skip))
    simple = activation != "silu" and all(weight.shape[2] in (1, 3, 4) for weight in weights)
    if mode is None or not simple:
        for number, (weight, kind) in enumerate(zip(weights, kinds, strict=True)):
            bias = None if biases is None else biases[number]
            last = number == len(kinds) - 1
            x = layer(x, weight, bias, skip if last else None, kind=kind, activation=activation, alpha=alpha, impl=impl)
        return x
    return run(x, weights, biases, skip, kinds, activation, alpha, mode)


def layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, skip: Tensor | None, *, kind: str, activation: str, alpha: float,
    impl: str | None,
) -> Tensor:  # fmt: skip
    """One layer of `conv_stage`, in any tier and with any activation and odd kernel."""
    reference.check_activation(activation, alpha)
    reference.check_layer(x, weight, bias, kind=kind, skip=skip)
    mode = op_impl(impl, (x, weight, skip))
    if mode == "fused" and weight.shape[2] not in (1, 3, 4):
        raise ValueError(f"weight is {list(weight.shape)}; impl 'fused' accepts kernels of 1x1 and 3x3")
    if mode is not None and weight.shape[2] in (1, 3, 4):
        inside = "none" if activation == "silu" else activation  # the derivative needs silu's input: kept as an output
        y = run(x, [weight], None if bias is None else [bias], skip, [kind], inside, alpha, mode)
        return F.silu(y) if activation == "silu" else y
    bias = None if bias is None else bias.to(weight.dtype)
    if kind != "up":
        y = F.conv2d(x, weight, bias, 1 if kind == "same" else 2, weight.shape[2] // 2)
        return reference.activate(y, activation, alpha)
    (folded,) = (weight,) if weight.shape[2] == 4 else fold([weight], ["up"], impl="reference")
    y = F.conv_transpose2d(x, folded, bias, stride=2, padding=1)
    if skip is not None:
        y = y + reference.expand_phase_table(skip, y.shape[2], y.shape[3])
    return reference.activate(y, activation, alpha)


def run(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, skip: Tensor | None, kinds: list[str],
    activation: str, alpha: float, impl: str,
) -> Tensor:  # fmt: skip
    """The operation, with weights packed for it; `impl` is "auto", "algebraic" or "fused"."""
    (x,) = autocast(x)
    packed: list[Tensor] = []
    for weight, kind in zip(weights, kinds, strict=True):
        if kind == "up" and weight.shape[2] == 3:
            packing = None if impl == "auto" else impl
            packing = packing if weight.dtype == torch.float32 else "reference"
            packed += fold([weight], ["up"], dtype=x.dtype, impl=packing)
        else:
            packed.append(weight.to(dtype=x.dtype, memory_format=torch.channels_last))
    skip = None if skip is None else skip.to(x.dtype)
    return _conv_stage(x, packed, list(biases or ()), skip, " ".join(kinds), activation, alpha, impl)[-1]


def _how(
    x: Tensor, weight: Tensor, kind: str, *, backward: bool, bias: bool, skip: Tensor | None, activation: str | None,
    alpha: float, impl: str,
) -> str:  # fmt: skip
    tf32 = x.dtype == torch.float32 and x.is_cuda and allows_tf32()
    problem = Layer(
        kind=kind, backward=backward, dtype=str(x.dtype).removeprefix("torch."), x=tuple(x.shape),
        weight=tuple(weight.shape), bias=bias, skip=0 if skip is None else skip.shape[3], activation=activation,
        alpha=alpha, tf32=tf32,
    )  # fmt: skip
    return tuning.layer(problem, x.device, impl)


@torch.library.custom_op("fastbegan::conv_stage", mutates_args=())
def _conv_stage(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], skip: Tensor | None, kinds: str, activation: str,
    alpha: float, impl: str,
) -> list[Tensor]:  # fmt: skip
    """The output of every layer: all are kept for the backward, the last is the result."""
    x = x.contiguous(memory_format=torch.channels_last)
    outputs: list[Tensor] = []
    for number, (weight, kind) in enumerate(zip(weights, kinds.split(), strict=True)):
        bias = biases[number] if biases else None
        table = skip if number == len(weights) - 1 else None
        how = "plain"
        if x.numel():
            how = _how(
                x, weight, kind, backward=False, bias=bool(biases), skip=table, activation=activation, alpha=alpha,
                impl=impl,
            )  # fmt: skip
        x = tiers.forward(x, weight, bias, table, kind=kind, activation=activation, alpha=alpha, how=how)
        outputs.append(x)
    return outputs


@_conv_stage.register_fake
def _(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], skip: Tensor | None, kinds: str, activation: str,
    alpha: float, impl: str,
) -> list[Tensor]:  # fmt: skip
    outputs: list[Tensor] = []
    size: Sequence[int] = x.shape[2:]
    for weight, kind in zip(weights, kinds.split(), strict=True):
        size = reference.output_size(size, kind)
        shape = (x.shape[0], weight.shape[1 if kind == "up" else 0], *size)
        outputs.append(torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last))
    return outputs


@torch.library.custom_op("fastbegan::conv_stage_backward", mutates_args=())
def _conv_stage_backward(
    grad: Tensor, x: Tensor, weights: list[Tensor], outputs: list[Tensor], skip_size: int, has_bias: bool,
    kinds: str, activation: str, alpha: float, impl: str, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, the skip table, each weight and each bias (float32); those that `needs` does not name are empty.

    `needs`: x, skip, then one a weight, then one a bias (none without biases).
    """
    count = len(weights)
    need_w, need_b = needs[2 : 2 + count], needs[2 + count :] or [False] * count
    dx, d_skip = x.new_empty(0), x.new_empty(0)
    dw = [x.new_empty(0) for _ in weights]
    db = [x.new_empty(0, dtype=torch.float32) for _ in weights]
    x = x.contiguous(memory_format=torch.channels_last)
    pointwise = "plain"
    if grad.numel() and tuning.pointwise("activation_backward", x.dtype, x.device, impl):
        pointwise = "algebraic"
    dz, total = tiers.activation_backward(
        grad.contiguous(memory_format=torch.channels_last), outputs[-1], activation=activation, alpha=alpha,
        how=pointwise,
    )  # fmt: skip
    if needs[1]:
        fused = bool(grad.numel()) and tuning.pointwise("skip_gradient", x.dtype, x.device, impl)
        d_skip = tiers.skip_gradient(dz, skip_size, how="algebraic" if fused else "plain").contiguous()
    for number in range(count - 1, -1, -1):
        if need_b[number]:
            db[number] = total
        before = outputs[number - 1] if number else x
        weight, kind = weights[number], kinds.split()[number]
        if need_w[number]:
            dw[number] = tiers.weight_gradient(dz, before, weight, kind=kind)
        if not (needs[0] or any(need_w[:number]) or any(need_b[:number])):
            break
        inner = activation if number else None
        how = "plain"
        if grad.numel():
            if kind == "down" and weight.shape[2] != 3 and impl == "fused":
                how = pointwise  # no kernel of ours, whatever is asked for
            else:
                how = _how(
                    before, weight, kind, backward=True, bias=has_bias, skip=None, activation=inner, alpha=alpha,
                    impl=impl,
                )  # fmt: skip
        dz, partial = tiers.input_gradient(dz, before, weight, kind=kind, activation=inner, alpha=alpha, how=how)
        if partial is None:
            dx = dz
        else:
            total = partial
    return [dx, d_skip, *dw, *(db if has_bias else ())]


@_conv_stage_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weights: list[Tensor], outputs: list[Tensor], skip_size: int, has_bias: bool,
    kinds: str, activation: str, alpha: float, impl: str, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    def like(tensor: Tensor, needed: bool) -> Tensor:
        if not needed:
            return x.new_empty(0)
        options = {"dtype": tensor.dtype, "device": tensor.device, "memory_format": torch.channels_last}
        return torch.empty(tensor.shape, **options)

    count = len(weights)
    wide = torch.promote_types(x.dtype, torch.float32)
    last = outputs[-1]
    skip = (x.shape[0], 3, 3, skip_size, skip_size, last.shape[1]) if needs[1] else (0,)
    found = [like(x, needs[0]), x.new_empty(skip)]
    found += [like(weight, needed) for weight, needed in zip(weights, needs[2:], strict=False)]
    if has_bias:
        found += [
            x.new_empty(y.shape[1] if needed else 0, dtype=wide if needed else torch.float32)
            for y, needed in zip(outputs, needs[2 + count :], strict=True)
        ]
    return found


def _setup(ctx, inputs: tuple, output: list[Tensor]) -> None:
    x, weights, biases, skip, *ctx.settings = inputs
    ctx.set_materialize_grads(False)  # nobody asks for the gradients of the inner outputs
    ctx.save_for_backward(x, *weights, *output)
    ctx.count = len(weights)
    ctx.bias_dtypes = [bias.dtype for bias in biases]
    ctx.skip = (0, x.dtype) if skip is None else (skip.shape[3], skip.dtype)


def _backward(ctx, grads: list[Tensor | None]) -> tuple:
    x, *saved = ctx.saved_tensors
    weights, outputs = saved[: ctx.count], saved[ctx.count :]
    need_x, need_w, need_b, need_skip = ctx.needs_input_grad[:4]
    grad = grads[-1]
    if grad is None:
        return (None, [None] * ctx.count, [None] * len(need_b), *[None] * 5)
    needs = [need_x, need_skip, *need_w, *need_b]
    skip_size, skip_dtype = ctx.skip
    dx, d_skip, *rest = _conv_stage_backward(
        grad, x, weights, outputs, skip_size, bool(need_b), *ctx.settings, needs
    )  # fmt: skip
    dw = [value if needed else None for value, needed in zip(rest, need_w, strict=False)]
    db = [
        value.to(dtype) if needed else None
        for value, needed, dtype in zip(rest[ctx.count :], need_b, ctx.bias_dtypes, strict=True)
    ]
    return (dx if need_x else None, dw, db, d_skip.to(skip_dtype) if need_skip else None, *[None] * 4)


_conv_stage.register_autograd(_backward, setup_context=_setup)

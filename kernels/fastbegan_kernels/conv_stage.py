"""conv_stage: convolution layers one after another, with one backward for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference, tiers, tuning
from .dispatch import allows_tf32, asked_for, autocast, op_impl
from .fold import fold, kept, pack, unpack_gradient
from .layout import is_channels_last, lay_out
from .problems import Layer
from .recorded import recorded_gradients


class _Stage(NamedTuple):
    """The settings of a stage, in the order and types in which the library ops take them.

    Library ops take no nested lists and no lists of strings: kinds and activations travel as one string each.
    """

    kinds: str  # "same up", a word per layer
    activations: str  # "elu none", a word per layer
    alpha: float
    impl: str
    copies: int


def conv_stage(  # noqa: PLR0913
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    kinds: Sequence[str] | None = None,
    skip: Tensor | None = None,
    activation: str | Sequence[str] = "elu",
    alpha: float = 1.0,
    copies: int = 1,
    impl: str | None = None,
) -> Tensor:
    """Run convolution layers one after another, as one operation with one backward.

    Layer i computes act_i(conv_i(x) + bias_i): kinds "same", "down" and "down_end" as `conv2d_elu` does, kind "up" as
    `upsample_conv2d_elu` does. The last layer may add `skip` before its activation.

    In the backward of the fused tier, one kernel computes a layer's input gradient, applies the derivative of the
    activation before it, and sums the bias gradient of the layer before. Only x, the weights and each layer's output
    are kept. Inside the stage all maps are channels_last. `reference.conv_stage` is the plain twin.

    Gradients reach x, weights, biases and skip. With create_graph=True they come from plain operations, so they can be
    differentiated again, at the speed of plain PyTorch. With `skip` this raises RuntimeError, because the table is not
    kept: use impl="reference".

    Args:
        x: Input [N, C, H, W] in float32, bfloat16, float16 or float64, any memory format. Autocast casts it.
        weights: One weight [K, C, k, k] per layer, with odd k, in x's dtype (any under autocast) and any memory format.
            Kinds "up" and "down_end" need k = 3. Kind "up" also takes folded weights (`fold`) [C, K, 4, 4].
        biases: One bias [K] per layer, in x's dtype or float32; None for no biases.
        kinds: "same" (stride 1), "down" (stride 2), "down_end" (stride 2, padded below and to the right only) or "up"
            (nearest x2 before the convolution) for each layer. None makes all "same".
        skip: Phase table [N, 3, 3, S, S, K] of `skip_phase_table` for the last layer, which then must be "up".
        activation: "elu", "relu", "leaky_relu", "silu" or "none"; one for all layers, or one for each.
        alpha: Scale of ELU or negative slope of leaky_relu, from 0; others ignore it.
        copies: With copies=n, `weights` and `biases` hold n equal copies, copy after copy, and n divides N. The forward
            uses the first copy. In the backward, chunk i of the batch adds its gradients to copy i. This keeps two
            losses apart in one pass.
        impl: "reference", "algebraic" or "fused" forces a tier. None takes FASTBEGAN_IMPL from the environment, else
            the fastest form of each layer that is verified on this machine.

    Returns:
        Output [N, K, H', W'] of the last layer in x's dtype (autocast's where it is on). H' is H for "same",
        ceil(H / 2) for "down", H // 2 for "down_end" and 2 H for "up". It is channels_last if x or a weight is, else
        contiguous; the gradient of x is channels_last if x or the first weight is.

    Raises:
        ValueError: Lists differ in length, shapes or dtypes do not match, `copies` does not divide N, or an argument is
            not among those above. The fused tier accepts k = 1 and k = 3 only.
        RuntimeError: The fused tier is forced where it cannot run: no GPU, no Triton, float64 or kind "down_end". Or a
            gradient with create_graph=True is taken with `skip`, or after a bias was changed in place.
    """
    kinds = reference.check_stage(x, weights, biases, kinds, skip, copies)
    activations = reference.check_activations(activation, alpha, len(kinds))
    if asked_for(impl) == "reference":
        return reference.conv_stage(
            x, weights, biases, kinds=kinds, skip=skip, activation=activations, alpha=alpha, copies=copies
        )
    shape: Sequence[int] = x.shape
    for number, kind in enumerate(kinds):
        bias = None if biases is None else biases[number]
        reference.check_dtypes(x, weights[number], bias)
        table = skip if number == len(kinds) - 1 else None
        shape = reference.check_shapes(shape, weights[number], bias, kind=kind, skip=table)
    mode = op_impl(impl, (x, *weights, skip)) or "plain"
    if odd := [list(weight.shape) for weight in weights if weight.shape[2] not in (1, 3, 4)]:
        if mode == "fused":
            raise ValueError(f"weight is {odd[0]}; impl 'fused' accepts kernels of 1x1 and 3x3")
        mode = "plain"
    (x,) = autocast(x)
    output_last = is_channels_last(x, *weights)
    gradient_last = is_channels_last(x, weights[0])
    stage = _Stage(" ".join(kinds), " ".join(activations), alpha, mode, copies)
    if all(name in reference.FROM_OUTPUT for name in activations):
        return _run(x, weights, biases, skip, stage, output_last, gradient_last)
    # silu's derivative needs its input: a layer with it runs alone, without activation, and its output is kept
    for number, (kind, name) in enumerate(zip(kinds, activations, strict=True)):
        of_layer, last = slice(number, None, len(kinds)), number == len(kinds) - 1
        inside = name if name in reference.FROM_OUTPUT else "none"
        layer = _Stage(kind, inside, alpha, mode, copies)  # no _replace, which Dynamo of torch 2.7 does not trace
        bias, table = None if biases is None else biases[of_layer], skip if last else None
        x = _run(x, weights[of_layer], bias, table, layer, output_last or not last, gradient_last or number > 0)
        x = x if inside == name else reference.activate(x, name, alpha)
    return x


def _run(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    skip: Tensor | None,
    stage: _Stage,
    output_last: bool,
    gradient_last: bool,
) -> Tensor:
    """A stage without silu; `stage.impl` is "plain" or from `op_impl`."""
    skip = None if skip is None else skip.to(x.dtype)
    if stage.impl == "plain":
        tensors = [value for value in (x, skip, *weights, *(biases or ())) if value is not None]
        watched = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if not watched and not (torch.is_grad_enabled() and any(value.requires_grad for value in tensors)):
            layers = zip(weights, stage.kinds.split(), strict=False)
            packed = [kept(weight, _packing(weight, kind), x.dtype) for weight, kind in layers]
            return lay_out(_outputs(x, packed, biases or (), skip, stage)[-1], output_last)
        return _Plain.apply(x, skip, *stage, output_last, gradient_last, len(weights), *weights, *(biases or ()))
    weights = list(weights)
    for number, (weight, kind) in enumerate(zip(weights, stage.kinds.split() * stage.copies, strict=True)):
        if _packing(weight, kind) == "up":
            impl = {"auto": None}.get(stage.impl, stage.impl) if weight.dtype == torch.float32 else "reference"
            weights[number : number + 1] = fold([weight], ["up"], dtype=x.dtype, impl=impl)
    return _conv_stage(x, weights, list(biases or ()), skip, *stage, output_last, gradient_last)[-1]


def _packing(weight: Tensor, kind: str) -> str:
    """The kind of `fold` that a layer's weight still needs."""
    return "up" if kind == "up" and weight.shape[2] == 3 else "conv"


def _form(
    x: Tensor,
    weight: Tensor,
    stage: _Stage,
    number: int,
    *,
    backward: bool,
    bias: bool,
    skip: Tensor | None = None,
) -> str:
    """The form (`tiers`) of layer `number`, or of its input gradient, at input x."""
    if stage.impl == "plain" or not x.numel():
        return "plain"
    # going back, the activation of the layer before is in the epilogue
    activations = [None, *stage.activations.split()] if backward else stage.activations.split()
    problem = Layer(
        kind=stage.kinds.split()[number],
        backward=backward,
        dtype=str(x.dtype).removeprefix("torch."),
        x=tuple(x.shape),
        weight=tuple(weight.shape),
        bias=bias,
        skip=0 if skip is None else skip.shape[3],
        activation=activations[number],
        alpha=stage.alpha,
        tf32=x.dtype == torch.float32 and x.is_cuda and allows_tf32(),
    )
    return tuning.layer(problem, x.device, stage.impl)


def _pointwise(op: str, x: Tensor, impl: str) -> str:
    fused = impl != "plain" and bool(x.numel()) and tuning.pointwise(op, x.dtype, x.device, impl)
    return "algebraic" if fused else "plain"


def _outputs(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], skip: Tensor | None, stage: _Stage
) -> list[Tensor]:
    """The output of every layer, channels_last: the backward keeps all, the last is the result."""
    x = x.contiguous(memory_format=torch.channels_last)
    outputs: list[Tensor] = []
    layers = list(zip(stage.kinds.split(), stage.activations.split(), strict=True))
    for number, (kind, act) in enumerate(layers):
        weight, bias = weights[number], biases[number] if biases else None
        table = skip if number == len(layers) - 1 else None
        form = _form(x, weight, stage, number, backward=False, bias=len(biases) > 0, skip=table)
        x = tiers.forward(x, weight, bias, table, kind=kind, activation=act, alpha=stage.alpha, form=form)
        outputs.append(x)
    return outputs


def _gradients(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    outputs: Sequence[Tensor],
    skip_size: int,
    has_bias: bool,
    stage: _Stage,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients in the order x, skip table, weights, biases (float32); empty where `needs` is False.

    A library op returns one flat list of tensors, so gradients come flat: all copies' weights, then all copies' biases,
    copy by copy. `needs` has the same order, without biases where the stage has none. `weights` are one copy's, packed,
    and weight gradients are those of packed weights. All maps are channels_last. Only `grad` and the last
    output, at the border, have the format that nn.Conv2d would give.
    """
    kinds, activations, copies = stage.kinds.split(), stage.activations.split(), stage.copies
    count = len(kinds)
    need_w, need_b = needs[2 : 2 + count * copies], needs[2 + count * copies :] or [False] * count * copies
    dx, d_skip = x.new_empty(0), x.new_empty(0)
    dw = [x.new_empty(0) for _ in need_w]
    db = [x.new_empty(0, dtype=torch.float32) for _ in need_b]
    x = x.contiguous(memory_format=torch.channels_last)
    pointwise = _pointwise("activation_backward", grad, stage.impl)
    grad = lay_out(grad, is_channels_last(outputs[-1]))
    dz, bias_sum = tiers.activation_backward(
        grad, outputs[-1], activation=activations[-1], alpha=stage.alpha, form=pointwise
    )
    if needs[1]:
        d_skip = tiers.skip_gradient(dz, skip_size, form=_pointwise("skip_gradient", grad, stage.impl)).contiguous()
    for number in range(count - 1, -1, -1):
        weight, kind = weights[number], kinds[number]
        before = outputs[number - 1] if number else x
        for copy, (part, below) in enumerate(zip(dz.chunk(copies), before.chunk(copies), strict=True)):
            index = copy * count + number
            if need_b[index]:
                db[index] = bias_sum if copies == 1 else tiers.bias_gradient(part)
            if need_w[index]:
                dw[index] = tiers.weight_gradient(part, below, weight, kind=kind)
        # layers further down get nothing: their input gradient is not needed
        if not (needs[0] or any(_lower(need_w, count, number)) or any(_lower(need_b, count, number))):
            break
        if stage.impl == "fused" and (kind == "down_end" or (kind == "down" and weight.shape[2] != 3)):
            form = pointwise  # no tile computes these input gradients, even where "fused" is forced
        else:
            form = _form(before, weight, stage, number, backward=True, bias=has_bias)
        act = activations[number - 1] if number else None
        dz, below_sum = tiers.input_gradient(
            dz, before, weight, kind=kind, activation=act, alpha=stage.alpha, form=form
        )
        if below_sum is None:
            dx = dz
        else:
            bias_sum = below_sum
    return [dx, d_skip, *dw, *(db if has_bias else ())]


def _lower(needs: Sequence[bool], count: int, number: int) -> list[bool]:
    """The needs of the layers before `number`, of every copy."""
    return [needed for index, needed in enumerate(needs) if index % count < number]


def _saved(outputs: list[Tensor], activations: str) -> list[Tensor]:
    """The outputs that the backward reads. Without an activation the last is not read: users may change it in place."""
    return outputs[:-1] if activations.endswith("none") else outputs


def _restored(saved: Sequence[Tensor], grad: Tensor, activations: str) -> list[Tensor]:
    """All outputs from `_saved` ones. A tensor of its shape stands for an unread last output."""
    last = activations.endswith("none")
    return [*saved, grad.contiguous(memory_format=torch.channels_last)] if last else list(saved)


def _recorded(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    stage: _Stage,
    gradient_last: bool,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x, weights and biases that autograd records, in the usual memory formats."""
    kinds, activations = stage.kinds.split(), stage.activations.split()

    def plain(x: Tensor, *rest: Tensor) -> Tensor:
        rest = tuple(value.to(x.dtype) for value in rest)
        w, b = rest[: len(weights)], rest[len(weights) :] or None
        return reference.conv_stage(
            x, w, b, kinds=kinds, activation=activations, alpha=stage.alpha, copies=stage.copies
        )

    gradients = recorded_gradients(plain, (x, *weights, *biases), needs, grad)
    formats = [gradient_last, *map(is_channels_last, weights)]
    for number, (gradient, last) in enumerate(zip(gradients, formats, strict=False)):
        gradients[number] = None if gradient is None else lay_out(gradient, last)
    return gradients


def _version(value: Tensor) -> int | None:
    """The count of changes in place, None where torch does not count them."""
    return None if torch.compiler.is_compiling() or value.is_inference() else value._version


def _unchanged(biases: list[Tensor], versions: list[int | None]) -> list[Tensor]:
    """The biases of a forward. Recorded gradients read them, so a change in place since then raises RuntimeError.

    Other gradients do not read biases, and allow changes as torch does.
    """
    counts = zip(map(_version, biases), versions, strict=True)
    if any(now != before for now, before in counts if now is not None and before is not None):
        raise RuntimeError("a bias was changed in place before a gradient with create_graph=True was computed")
    return biases


def _refuse_skip(size: int) -> None:
    if size:  # the table, which a second derivative needs, is not kept
        raise RuntimeError(
            "conv_stage with a skip table can be differentiated once; for create_graph=True give impl='reference'"
        )


class _Plain(torch.autograd.Function):
    """The same in plain operations, which torch.compile sees through: on the CPU, without Triton, for float64."""

    @staticmethod
    def forward(  # noqa: PLR0913
        ctx,
        x: Tensor,
        skip: Tensor | None,
        kinds: str,
        activations: str,
        alpha: float,
        impl: str,
        copies: int,
        output_last: bool,
        gradient_last: bool,
        count: int,
        *weights_and_biases: Tensor,
    ) -> Tensor:
        weights, biases = weights_and_biases[:count], weights_and_biases[count:]
        layers = zip(weights, kinds.split(), strict=False)  # the first copy's
        packed = [pack(weight, _packing(weight, kind), x.dtype) for weight, kind in layers]
        stage = _Stage(kinds, activations, alpha, impl, copies)
        outputs = _outputs(x, packed, biases, skip, stage)
        outputs[-1] = lay_out(outputs[-1], output_last)  # before it is saved: the next op saves the same memory
        ctx.save_for_backward(x, *weights, *packed, *_saved(outputs, activations))
        ctx.settings, ctx.gradient_last = stage, gradient_last
        ctx.count, ctx.skip_size = count, 0 if skip is None else skip.shape[3]
        ctx.biases, ctx.versions = list(biases), [_version(bias) for bias in biases]
        return outputs[-1]

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple:
        (x, *saved), (grad,), stage = ctx.saved_tensors, grads, _Stage(*ctx.settings)
        weights, saved = saved[: ctx.count], saved[ctx.count :]
        needs = [*ctx.needs_input_grad[:2], *ctx.needs_input_grad[10:]]
        if torch.is_grad_enabled():  # create_graph=True
            _refuse_skip(ctx.skip_size)
            biases = _unchanged(ctx.biases, ctx.versions)
            dx, *rest = _recorded(grad, x, weights, biases, stage, ctx.gradient_last, [needs[0], *needs[2:]])
            return (dx, *[None] * 9, *rest)
        packed, outputs = saved[: ctx.count // stage.copies], saved[ctx.count // stage.copies :]
        outputs, biases = _restored(outputs, grad, stage.activations), ctx.biases
        dx, d_skip, *rest = _gradients(grad, x, packed, outputs, ctx.skip_size, len(biases) > 0, stage, needs)
        dx = lay_out(dx, ctx.gradient_last) if needs[0] else None
        rest = _unpacked(rest, weights, biases, stage.kinds, needs[2:])
        return (dx, d_skip if needs[1] else None, *[None] * 8, *rest)


def _unpacked(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor], kinds: str, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of the user's weights and biases, in their dtypes and memory formats, from those of packed weights."""
    layers = kinds.split()
    results: list[Tensor | None] = []
    for number, (gradient, source, needed) in enumerate(zip(gradients, (*weights, *biases), needs, strict=True)):
        if not needed:
            results.append(None)
        elif number < len(weights):
            packing = _packing(source, layers[number % len(layers)])
            last = is_channels_last(source)
            results.append(unpack_gradient(gradient, packing, source.dtype, channels_last=last))
        else:
            results.append(gradient.to(source.dtype))
    return results


@torch.library.custom_op("fastbegan::conv_stage", mutates_args=())
def _conv_stage(  # noqa: PLR0913  # no defaults: torch 2.7 leaves such values out and then misses their gradients
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    skip: Tensor | None,
    kinds: str,
    activations: str,
    alpha: float,
    impl: str,
    copies: int,
    output_last: bool,
    gradient_last: bool,
) -> list[Tensor]:
    """All outputs. Weights are [K, C, k, k] in any dtype and memory format, and folded [C, K, 4, 4] for kind "up".

    `output_last` and `gradient_last`: whether the last output and the gradient of x are channels_last. The inner
    outputs are.
    """
    packed = [pack(weight, "conv", x.dtype) for weight in weights[: len(weights) // copies]]
    outputs = _outputs(x, packed, biases, skip, _Stage(kinds, activations, alpha, impl, copies))
    return [*outputs[:-1], lay_out(outputs[-1], output_last)]


@_conv_stage.register_fake
def _(  # noqa: PLR0913
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    skip: Tensor | None,
    kinds: str,
    activations: str,
    alpha: float,
    impl: str,
    copies: int,
    output_last: bool,
    gradient_last: bool,
) -> list[Tensor]:
    outputs: list[Tensor] = []
    size, layers = x.shape[2:], kinds.split()
    for number, (weight, kind) in enumerate(zip(weights, layers, strict=False)):
        size = reference.output_size(size, kind)
        shape = (x.shape[0], weight.shape[1 if kind == "up" else 0], *size)
        last = output_last or number < len(layers) - 1
        layout = torch.channels_last if last else torch.contiguous_format
        outputs.append(torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout))
    return outputs


@torch.library.custom_op("fastbegan::conv_stage_backward", mutates_args=())
def _conv_stage_backward(  # noqa: PLR0913
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    outputs: list[Tensor],
    skip_size: int,
    has_bias: bool,
    kinds: str,
    activations: str,
    alpha: float,
    impl: str,
    copies: int,
    needs: list[bool],
) -> list[Tensor]:
    packed = [pack(weight, "conv", x.dtype) for weight in weights]
    stage = _Stage(kinds, activations, alpha, impl, copies)
    return _gradients(grad, x, packed, outputs, skip_size, has_bias, stage, needs)


@_conv_stage_backward.register_fake
def _(  # noqa: PLR0913
    grad: Tensor,
    x: Tensor,
    weights: list[Tensor],
    outputs: list[Tensor],
    skip_size: int,
    has_bias: bool,
    kinds: str,
    activations: str,
    alpha: float,
    impl: str,
    copies: int,
    needs: list[bool],
) -> list[Tensor]:
    def like(tensor: Tensor, needed: bool) -> Tensor:
        if not needed:
            return x.new_empty(0)
        return torch.empty(tensor.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    count = len(weights) * copies
    wide = torch.promote_types(x.dtype, torch.float32)
    last = outputs[-1]
    skip = (x.shape[0], 3, 3, skip_size, skip_size, last.shape[1]) if needs[1] else (0,)
    gradients = [like(x, needs[0]), x.new_empty(skip)]
    gradients += [like(weight, needed) for weight, needed in zip([*weights] * copies, needs[2:], strict=False)]
    if has_bias:
        gradients += [
            x.new_empty(y.shape[1] if needed else 0, dtype=wide if needed else torch.float32)
            for y, needed in zip([*outputs] * copies, needs[2 + count :], strict=True)
        ]
    return gradients


def _setup(ctx, inputs: tuple, output: list[Tensor]) -> None:
    x, weights, biases, skip, *settings, _, ctx.gradient_last = inputs
    ctx.set_materialize_grads(False)  # the inner outputs have no gradients
    ctx.settings, ctx.count = settings, len(weights)
    ctx.biases, ctx.versions = biases, [_version(bias) for bias in biases]
    ctx.save_for_backward(x, *weights, *_saved(output, settings[1]))
    ctx.skip_size, ctx.skip_dtype = (0, x.dtype) if skip is None else (skip.shape[3], skip.dtype)


def _backward(ctx, grads: list[Tensor | None]) -> tuple:
    (x, *saved), stage = ctx.saved_tensors, _Stage(*ctx.settings)
    weights, outputs = saved[: ctx.count], saved[ctx.count :]
    need_x, need_w, need_b, need_skip = ctx.needs_input_grad[:4]
    grad = grads[-1]
    if grad is None:
        return (None, [None] * len(need_w), [None] * len(need_b), *[None] * 8)
    if torch.is_grad_enabled():  # create_graph=True
        _refuse_skip(ctx.skip_size)
        biases = _unchanged(ctx.biases, ctx.versions)
        dx, *rest = _recorded(grad, x, weights, biases, stage, ctx.gradient_last, [need_x, *need_w, *need_b])
        return (dx, rest[: ctx.count], rest[ctx.count :], *[None] * 8)
    needs, biases = [need_x, need_skip, *need_w, *need_b], ctx.biases
    outputs = _restored(outputs, grad, stage.activations)
    packed = weights[: ctx.count // stage.copies]
    dx, d_skip, *rest = _conv_stage_backward(grad, x, packed, outputs, ctx.skip_size, len(biases) > 0, *stage, needs)
    dx = lay_out(dx, ctx.gradient_last) if need_x else None
    rest = _unpacked(rest, weights, biases, stage.kinds, needs[2:])
    return (dx, rest[: ctx.count], rest[ctx.count :], d_skip.to(ctx.skip_dtype) if need_skip else None, *[None] * 7)


_conv_stage.register_autograd(_backward, setup_context=_setup)

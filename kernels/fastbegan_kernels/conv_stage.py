"""conv_stage: convolution layers one after another, with one backward for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import arguments, library, reference
from .activation import activation_backward
from .conv_layer import layer, layer_input_gradient, layer_weight_gradient
from .dispatch import asked_for, autocast, op_impl
from .fold import fold, kept, pack, unpack_gradient
from .layout import is_channels_last, lay_out
from .recorded import recorded_gradients
from .skip_phase_table import skip_gradient


class Stage(NamedTuple):
    """The settings of a stage."""

    kinds: tuple[str, ...]
    activations: tuple[str, ...]  # one per layer, each with a derivative that follows from its output
    alpha: float
    copies: int
    impl: str  # "plain": operations that torch.compile sees through; else from `op_impl`
    output_last: bool  # whether the output is channels_last
    gradient_last: bool  # whether the gradient of x is


class Needs(NamedTuple):
    """The gradients that are asked for, weights and biases copy by copy."""

    x: bool
    skip: bool
    weights: Sequence[bool]
    biases: Sequence[bool]

    def before(self, number: int, layers: int) -> bool:
        """Whether the input gradient of a layer is used: for x, or by a layer before it, of any copy.

        Args:
            number: The layer.
            layers: Layers of the stage.

        Returns:
            Whether it is.
        """
        each = (*enumerate(self.weights), *enumerate(self.biases))
        return self.x or any(needed for index, needed in each if index % layers < number)


class Gradients(NamedTuple):
    """Gradients of a stage's inputs, None where they are not needed; those of weights are of packed ones."""

    x: Tensor | None
    skip: Tensor | None
    weights: list[Tensor | None]
    biases: list[Tensor | None]  # float32, or float64 for float64


class _Part(NamedTuple):
    """A stage with its inputs but for x, and the activation that comes after it."""

    stage: Stage
    weights: list[Tensor]
    biases: list[Tensor]
    skip: Tensor | None
    after: str


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
    activation before it, and sums the bias gradient of the layer before. Only x, the weights, also as packed, and each
    layer's output are kept. Inside the stage all maps are channels_last. `reference.conv_stage` is the plain twin.

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
    kinds = arguments.check_stage(x, weights, biases, kinds, skip, copies)
    activations = arguments.check_activations(activation, alpha, len(kinds))
    if asked_for(impl) == "reference":
        return reference.conv_stage(
            x, weights, biases, kinds=kinds, skip=skip, activation=activations, alpha=alpha, copies=copies
        )
    shape: Sequence[int] = x.shape
    for number, kind in enumerate(kinds):
        bias = None if biases is None else biases[number]
        arguments.check_dtypes(x, weights[number], bias)
        table = skip if number == len(kinds) - 1 else None
        shape = arguments.check_shapes(shape, weights[number], bias, kind=kind, skip=table)
    mode = op_impl(impl, (x, *weights, skip)) or "plain"
    if odd := [list(weight.shape) for weight in weights if weight.shape[2] not in (1, 3, 4)]:
        if mode == "fused":
            raise ValueError(f"weight is {odd[0]}; impl 'fused' accepts kernels of 1x1 and 3x3")
        mode = "plain"
    (x,) = autocast(x)
    formats = is_channels_last(x, *weights), is_channels_last(x, weights[0])
    stage = Stage(tuple(kinds), tuple(activations), alpha, copies, mode, *formats)
    for part in _parts(stage, x, weights, biases or (), skip):
        tensors = [value for value in (x, part.skip, *part.weights, *part.biases) if value is not None]
        if mode == "plain" and _without_gradient(tensors):
            layers = zip(part.weights[: len(part.stage.kinds)], part.stage.kinds, strict=True)
            packed = [kept(weight, _packing(weight, kind), x.dtype) for weight, kind in layers]
            x = lay_out(_outputs(x, packed, part.biases, part.skip, part.stage)[-1], part.stage.output_last)
        else:
            x = _Stage.apply(part.stage, x, part.skip, len(part.weights), *part.weights, *part.biases)
        if part.after != "none":
            x = reference.activate(x, part.after, alpha)
    return x


def _parts(
    stage: Stage, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], skip: Tensor | None
) -> list[_Part]:
    """The whole stage, or each layer by itself where one has silu.

    silu's derivative needs its input: such a layer runs without activation, and its output is kept.
    """
    skip = None if skip is None else skip.to(x.dtype)
    count = len(stage.kinds)
    if stage.impl != "plain":
        weights = [
            _folded(weight, kind, x.dtype, stage.impl)
            for weight, kind in zip(weights, stage.kinds * stage.copies, strict=True)
        ]
    _, skip, *values = _distinct([x, skip, *weights, *biases])
    weights, biases = values[: len(weights)], values[len(weights) :]
    if all(name in arguments.FROM_OUTPUT for name in stage.activations):
        return [_Part(stage, weights, biases, skip, "none")]
    parts: list[_Part] = []
    for number, (kind, name) in enumerate(zip(stage.kinds, stage.activations, strict=True)):
        first, last = number == 0, number == count - 1
        inside = name if name in arguments.FROM_OUTPUT else "none"
        formats = stage.output_last or not last, stage.gradient_last or not first
        single = Stage((kind,), (inside,), stage.alpha, stage.copies, stage.impl, *formats)
        of_layer = slice(number, None, count)
        after = "none" if inside == name else name
        parts.append(_Part(single, weights[of_layer], biases[of_layer], skip if last else None, after))
    return parts


def _distinct(values: Sequence[Tensor | None]) -> list[Any]:
    """The tensors, for torch.compile each as one of its own: Dynamo passes none twice to an autograd.Function."""
    if not torch.compiler.is_compiling():
        return list(values)
    return [
        torch.ops.aten.alias(value) if value is not None and any(value is other for other in values[:number]) else value
        for number, value in enumerate(values)
    ]


def _folded(weight: Tensor, kind: str, dtype: torch.dtype, impl: str) -> Tensor:
    """A weight whose taps are summed where its kind needs that, with a gradient of its own."""
    if _packing(weight, kind) != "up":
        return weight
    tier = {"auto": None}.get(impl, impl) if weight.dtype == torch.float32 else "reference"
    return fold([weight], ["up"], dtype=dtype, impl=tier)[0]


def _packing(weight: Tensor, kind: str) -> str:
    """The kind of `fold` that a layer's weight still needs."""
    return "up" if kind == "up" and weight.shape[2] == 3 else "conv"


def _without_gradient(tensors: Sequence[Tensor]) -> bool:
    """Whether a call needs no autograd. A trace or a compiled graph serves later calls too, which may."""
    watched = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not watched and not (torch.is_grad_enabled() and any(value.requires_grad for value in tensors))


def _outputs(
    x: Tensor, packed: Sequence[Tensor], biases: Sequence[Tensor], skip: Tensor | None, stage: Stage
) -> list[Tensor]:
    """The output of every layer, channels_last: the backward keeps all, the last is the result."""
    x = x.contiguous(memory_format=torch.channels_last)
    outputs: list[Tensor] = []
    last = len(stage.kinds) - 1
    for number, (kind, name) in enumerate(zip(stage.kinds, stage.activations, strict=True)):
        settings = (packed[number], biases[number] if biases else None, skip if number == last else None, kind, name)
        if stage.impl == "plain":
            x = library.forward(x, *settings, stage.alpha)
        else:
            x = layer(x, *settings, stage.alpha, stage.impl)
        outputs.append(x)
    return outputs


def _gradients(
    grad: Tensor,
    x: Tensor,
    packed: Sequence[Tensor],
    outputs: Sequence[Tensor],
    skip_size: int,
    stage: Stage,
    needs: Needs,
) -> Gradients:
    """Gradients from that of the last output. `packed` are one copy's weights.

    All maps are channels_last. Only `grad` and the last output, at the border, have the format that nn.Conv2d would
    give.
    """
    plain, alpha, copies, count = stage.impl == "plain", stage.alpha, stage.copies, len(stage.kinds)
    weight_gradients: list[Tensor | None] = [None] * len(needs.weights)
    bias_gradients: list[Tensor | None] = [None] * len(needs.biases)
    x = lay_out(x, True)
    bias_sum: Tensor | None = None
    name = stage.activations[-1]
    # a last output without activation is not kept
    grad = lay_out(grad, name == "none" or is_channels_last(outputs[-1]))
    if name == "none":
        dz = grad
    elif plain:
        dz, bias_sum = library.activation_backward(grad, outputs[-1], name, alpha)
    else:
        dz, bias_sum = activation_backward(grad, outputs[-1], name, alpha, stage.impl)
    d_skip = None
    if needs.skip:
        d_skip = library.skip_gradient(dz, skip_size) if plain else skip_gradient(dz, skip_size, stage.impl)
    for number in range(count - 1, -1, -1):
        weight, kind = packed[number], stage.kinds[number]
        before = outputs[number - 1] if number else x
        for copy, (part, below) in enumerate(zip(dz.chunk(copies), before.chunk(copies), strict=True)):
            index = copy * count + number
            if needs.biases and needs.biases[index]:
                summed = copies == 1 and bias_sum is not None
                bias_gradients[index] = bias_sum if summed else library.bias_gradient(part)
            if needs.weights[index] and plain:
                weight_gradients[index] = library.weight_gradient(part, below, weight, kind)
            elif needs.weights[index]:
                weight_gradients[index] = layer_weight_gradient(part, below, weight, kind, stage.impl)
        if not needs.before(number, count):
            break
        name = stage.activations[number - 1] if number else None
        if plain:
            dz, bias_sum = library.input_gradient(dz, before, weight, kind, name, alpha)
        else:
            dz, bias_sum = layer_input_gradient(dz, before, weight, kind, name, alpha, stage.impl)
    return Gradients(dz if needs.x else None, d_skip, weight_gradients, bias_gradients)


def _recorded(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], stage: Stage, needs: Needs
) -> Gradients:
    """Gradients that autograd records, in the usual memory formats; those of weights are of the ones given."""
    count = len(weights)

    def plain(x: Tensor, *rest: Tensor) -> Tensor:
        rest = tuple(value.to(x.dtype) for value in rest)
        w, b = rest[:count], rest[count:] or None
        return reference.conv_stage(
            x, w, b, kinds=stage.kinds, activation=stage.activations, alpha=stage.alpha, copies=stage.copies
        )

    asked = (needs.x, *needs.weights, *needs.biases)
    dx, *rest = recorded_gradients(plain, (x, *weights, *biases), asked, grad)
    laid_out: list[Tensor | None] = [
        None if gradient is None else lay_out(gradient, is_channels_last(weight))
        for gradient, weight in zip(rest[:count], weights, strict=True)
    ]
    return Gradients(None if dx is None else lay_out(dx, stage.gradient_last), None, laid_out, rest[count:])


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


class _Stage(torch.autograd.Function):
    """A stage with its derivative written out. torch.compile sees through it, down to the ops of single layers."""

    @staticmethod
    def forward(ctx, stage: Stage, x: Tensor, skip: Tensor | None, count: int, *weights_and_biases: Tensor) -> Tensor:
        weights, biases = weights_and_biases[:count], weights_and_biases[count:]
        layers = zip(weights[: len(stage.kinds)], stage.kinds, strict=True)  # the first copy's
        packed = [pack(weight, _packing(weight, kind), x.dtype) for weight, kind in layers]
        outputs = _outputs(x, packed, biases, skip, stage)
        outputs[-1] = lay_out(outputs[-1], stage.output_last)  # before it is saved: the next op saves the same memory
        # without an activation the last output is not read: users may change it in place
        read = outputs[:-1] if stage.activations[-1] == "none" else outputs
        ctx.save_for_backward(x, *weights, *packed, *read)
        ctx.stage, ctx.count, ctx.skip_size = stage, count, 0 if skip is None else skip.shape[3]
        ctx.biases, ctx.versions = list(biases), [_version(bias) for bias in biases]
        return outputs[-1]

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, *saved), (grad,), stage, count = ctx.saved_tensors, grads, ctx.stage, ctx.count
        layers = len(stage.kinds)
        weights, packed, outputs = saved[:count], saved[count : count + layers], saved[count + layers :]
        _, need_x, need_skip, _, *others = ctx.needs_input_grad
        needs = Needs(need_x, need_skip, others[:count], others[count:])
        if torch.is_grad_enabled():  # create_graph=True
            _refuse_skip(ctx.skip_size)
            gradients = _recorded(grad, x, weights, _unchanged(ctx.biases, ctx.versions), stage, needs)
        else:
            packed_gradients = _gradients(grad, x, packed, outputs, ctx.skip_size, stage, needs)
            gradients = _unpacked(packed_gradients, weights, ctx.biases, stage)
        return (None, gradients.x, gradients.skip, None, *gradients.weights, *gradients.biases)


def _unpacked(gradients: Gradients, weights: Sequence[Tensor], biases: Sequence[Tensor], stage: Stage) -> Gradients:
    """Gradients of the user's tensors, in their dtypes and memory formats."""
    dx = None if gradients.x is None else lay_out(gradients.x, stage.gradient_last)
    of_weights: list[Tensor | None] = []
    for gradient, weight, kind in zip(gradients.weights, weights, stage.kinds * stage.copies, strict=True):
        if gradient is not None:
            last = is_channels_last(weight)
            gradient = unpack_gradient(gradient, _packing(weight, kind), weight.dtype, channels_last=last)
        of_weights.append(gradient)
    of_biases = [
        None if gradient is None else gradient.to(bias.dtype)
        for gradient, bias in zip(gradients.biases, biases, strict=True)
    ]
    return Gradients(dx, gradients.skip, of_weights, of_biases)

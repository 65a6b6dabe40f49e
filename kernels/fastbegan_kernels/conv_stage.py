"""conv_stage: convolution layers one after another, with one backward for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference, tiers, tuning
from .dispatch import allows_tf32, asked_for, autocast, op_impl
from .fold import fold, pack, unpack_gradient
from .layout import is_channels_last, lay_out
from .problems import Layer
from .recorded import recorded_gradients


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
    """As `reference.conv_stage`: x [N, C, H, W] through layers of kinds same, down, down_end and up.

    On a GPU all layers are one operation. Going back, a layer's input gradient, the derivative of the activation before
    it and that layer's bias gradient are one kernel; only each layer's output is kept. Weights of kind "up" may come
    folded (`fold`), [C, K, 4, 4]. Of several `copies` the first one's values serve the whole batch. Inside, all is
    channels_last; the output is if x or a weight is, the gradient of x if x or the first weight is (`layout`).
    A gradient that is itself differentiated (create_graph=True) comes from plain operations, which take as long as
    PyTorch's own; with a skip table it raises RuntimeError (`impl="reference"` gives it).
    """
    kinds = reference.check_stage(x, weights, biases, kinds, skip, copies)
    activations = reference.check_activations(activation, alpha, len(kinds))
    if asked_for(impl) == "reference":
        return reference.conv_stage(
            x, weights, biases, kinds=kinds, skip=skip, activation=activations, alpha=alpha, copies=copies
        )  # fmt: skip
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
    if "silu" not in activations:
        return _run(x, weights, biases, skip, kinds, activations, alpha, mode, copies, output_last, gradient_last)
    for number, (kind, name) in enumerate(zip(kinds, activations, strict=True)):
        own, last = slice(number, None, len(kinds)), number == len(kinds) - 1
        inside = "none" if name == "silu" else name  # silu's derivative needs what went in: that is kept as an output
        x = _run(
            x, weights[own], None if biases is None else biases[own], skip if last else None, [kind], [inside], alpha,
            mode, copies, output_last or not last, gradient_last or number > 0,
        )  # fmt: skip
        x = F.silu(x) if name == "silu" else x
    return x


def _run(  # noqa: PLR0913
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, skip: Tensor | None, kinds: list[str],
    activations: list[str], alpha: float, impl: str, copies: int, output_last: bool, gradient_last: bool,
) -> Tensor:  # fmt: skip
    """The operation; `impl` is "plain" or what `op_impl` gives."""
    skip = None if skip is None else skip.to(x.dtype)
    settings = " ".join(kinds), " ".join(activations), alpha, impl, copies, output_last, gradient_last
    if impl == "plain":
        return _Plain.apply(x, skip, *settings, len(weights), *weights, *(biases or ()))
    weights = list(weights)
    for number, (weight, kind) in enumerate(zip(weights, kinds * copies, strict=True)):
        if _packing(weight, kind) == "up":
            packing = {"auto": None}.get(impl, impl) if weight.dtype == torch.float32 else "reference"
            weights[number : number + 1] = fold([weight], ["up"], dtype=x.dtype, impl=packing)
    return _conv_stage(x, weights, list(biases or ()), skip, *settings)[-1]


def _packing(weight: Tensor, kind: str) -> str:
    """How a layer's weight is still to be packed, a kind of `fold`."""
    return "up" if kind == "up" and weight.shape[2] == 3 else "conv"


def _how(  # noqa: PLR0913
    x: Tensor, weight: Tensor, kind: str, *, backward: bool, bias: bool, skip: Tensor | None, activation: str | None,
    alpha: float, impl: str,
) -> str:  # fmt: skip
    if impl == "plain" or not x.numel():
        return "plain"
    tf32 = x.dtype == torch.float32 and x.is_cuda and allows_tf32()
    problem = Layer(
        kind=kind, backward=backward, dtype=str(x.dtype).removeprefix("torch."), x=tuple(x.shape),
        weight=tuple(weight.shape), bias=bias, skip=0 if skip is None else skip.shape[3], activation=activation,
        alpha=alpha, tf32=tf32,
    )  # fmt: skip
    return tuning.layer(problem, x.device, impl)


def _pointwise(op: str, x: Tensor, impl: str) -> str:
    fused = impl != "plain" and bool(x.numel()) and tuning.pointwise(op, x.dtype, x.device, impl)
    return "algebraic" if fused else "plain"


def _outputs(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], skip: Tensor | None, kinds: str, activations: str,
    alpha: float, impl: str,
) -> list[Tensor]:  # fmt: skip
    """The output of every layer, channels_last: all are kept for the backward, the last is the result."""
    x = x.contiguous(memory_format=torch.channels_last)
    outputs: list[Tensor] = []
    layers = list(zip(kinds.split(), activations.split(), strict=True))
    for number, (kind, activation) in enumerate(layers):
        weight, bias = weights[number], biases[number] if biases else None
        table = skip if number == len(layers) - 1 else None
        how = _how(
            x, weight, kind, backward=False, bias=len(biases) > 0, skip=table, activation=activation, alpha=alpha,
            impl=impl,
        )  # fmt: skip
        x = tiers.forward(x, weight, bias, table, kind=kind, activation=activation, alpha=alpha, how=how)
        outputs.append(x)
    return outputs


def _gradients(  # noqa: PLR0913
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], outputs: Sequence[Tensor], skip_size: int, has_bias: bool,
    kinds: str, activations: str, alpha: float, impl: str, copies: int, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, the skip table, each weight and each bias (float32); those that `needs` does not name are empty.

    `needs`: x, skip, then one a weight, then one a bias (none without biases), copy by copy. `weights` are one copy's,
    packed, and so are their gradients. All maps are channels_last, but for `grad` and the last output.
    """
    layers, names = kinds.split(), activations.split()
    count = len(layers)
    need_w, need_b = needs[2 : 2 + count * copies], needs[2 + count * copies :] or [False] * count * copies
    dx, d_skip = x.new_empty(0), x.new_empty(0)
    dw = [x.new_empty(0) for _ in need_w]
    db = [x.new_empty(0, dtype=torch.float32) for _ in need_b]
    x = x.contiguous(memory_format=torch.channels_last)
    pointwise = _pointwise("activation_backward", grad, impl)
    grad = lay_out(grad, is_channels_last(outputs[-1]))
    dz, total = tiers.activation_backward(grad, outputs[-1], activation=names[-1], alpha=alpha, how=pointwise)
    if needs[1]:
        d_skip = tiers.skip_gradient(dz, skip_size, how=_pointwise("skip_gradient", grad, impl)).contiguous()
    for number in range(count - 1, -1, -1):
        weight, kind = weights[number], layers[number]
        before = outputs[number - 1] if number else x
        for copy, (part, below) in enumerate(zip(dz.chunk(copies), before.chunk(copies), strict=True)):
            own = copy * count + number
            if need_b[own]:
                db[own] = total if copies == 1 else tiers.bias_gradient(part)
            if need_w[own]:
                dw[own] = tiers.weight_gradient(part, below, weight, kind=kind)
        if not (needs[0] or any(_lower(need_w, count, number)) or any(_lower(need_b, count, number))):
            break
        inner = names[number - 1] if number else None
        if impl == "fused" and (kind == "down_end" or (kind == "down" and weight.shape[2] != 3)):
            how = pointwise  # no kernel of ours, whatever is asked for
        else:
            how = _how(
                before, weight, kind, backward=True, bias=has_bias, skip=None, activation=inner, alpha=alpha, impl=impl
            )  # fmt: skip
        dz, partial = tiers.input_gradient(dz, before, weight, kind=kind, activation=inner, alpha=alpha, how=how)
        if partial is None:
            dx = dz
        else:
            total = partial
    return [dx, d_skip, *dw, *(db if has_bias else ())]


def _lower(needs: Sequence[bool], count: int, number: int) -> list[bool]:
    """Of every copy's layers, those before `number`."""
    return [needed for own, needed in enumerate(needs) if own % count < number]


def _kept(outputs: list[Tensor], activations: str) -> list[Tensor]:
    """What the backward reads of the outputs; without an activation not the last one, which others may then change."""
    return outputs[:-1] if activations.endswith("none") else outputs


def _restored(kept: Sequence[Tensor], grad: Tensor, activations: str) -> list[Tensor]:
    """The outputs again; for the last one, of which nothing is read, a tensor of its shape."""
    last = activations.endswith("none")
    return [*kept, grad.contiguous(memory_format=torch.channels_last)] if last else list(kept)


def _recorded(  # noqa: PLR0913
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], kinds: str, activations: str,
    alpha: float, copies: int, gradient_last: bool, needs: Sequence[bool],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of x, weights and biases in plain operations, laid out as the others."""

    def stage(x: Tensor, *rest: Tensor) -> Tensor:
        rest = tuple(value.to(x.dtype) for value in rest)
        own, biases = rest[: len(weights)], rest[len(weights) :]
        return reference.conv_stage(
            x, own, biases or None, kinds=kinds.split(), activation=activations.split(), alpha=alpha, copies=copies
        )

    gradients = recorded_gradients(stage, (x, *weights, *biases), needs, grad)
    formats = [gradient_last, *map(is_channels_last, weights)]
    for number, (gradient, last) in enumerate(zip(gradients, formats, strict=False)):
        gradients[number] = None if gradient is None else lay_out(gradient, last)
    return gradients


def _version(value: Tensor) -> int:
    """How often it was changed in place, where that is counted."""
    return 0 if torch.compiler.is_compiling() or value.is_inference() else value._version


def _unchanged(biases: list[Tensor], versions: list[int]) -> list[Tensor]:
    """The biases of a forward. Only a gradient that is recorded reads them: others let them change, as torch does."""
    if [_version(bias) for bias in biases] != versions:
        raise RuntimeError("a bias was changed in place before a gradient with create_graph=True was computed")
    return biases


def _refuse_skip(size: int) -> None:
    # the table is not kept: a second derivative would need it
    if size:
        raise RuntimeError(
            "conv_stage with a skip table can be differentiated once; for create_graph=True give impl='reference'"
        )


class _Plain(torch.autograd.Function):
    """The same in plain operations, which torch.compile sees through: on the CPU, without Triton, for float64."""

    @staticmethod
    def forward(  # noqa: PLR0913
        ctx, x: Tensor, skip: Tensor | None, kinds: str, activations: str, alpha: float, impl: str, copies: int,
        output_last: bool, gradient_last: bool, count: int, *weights_and_biases: Tensor,
    ) -> Tensor:  # fmt: skip
        weights, biases = weights_and_biases[:count], weights_and_biases[count:]
        packed = [
            pack(weight, _packing(weight, kind), x.dtype) for weight, kind in zip(weights, kinds.split(), strict=False)
        ]
        outputs = _outputs(x, packed, biases, skip, kinds, activations, alpha, impl)
        outputs[-1] = lay_out(outputs[-1], output_last)  # before it is kept: what comes next keeps the same
        ctx.save_for_backward(x, *weights, *packed, *_kept(outputs, activations))
        ctx.settings, ctx.gradient_last = (kinds, activations, alpha, copies), gradient_last
        ctx.count, ctx.skip_size = count, 0 if skip is None else skip.shape[3]
        ctx.biases, ctx.versions = list(biases), [_version(bias) for bias in biases]
        return outputs[-1]

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple:
        x, *saved = ctx.saved_tensors
        weights, saved = saved[: ctx.count], saved[ctx.count :]
        kinds, activations, alpha, copies = ctx.settings
        needs = [*ctx.needs_input_grad[:2], *ctx.needs_input_grad[10:]]
        if torch.is_grad_enabled():
            _refuse_skip(ctx.skip_size)
            wanted, biases = [needs[0], *needs[2:]], _unchanged(ctx.biases, ctx.versions)
            dx, *rest = _recorded(
                grads[0], x, weights, biases, kinds, activations, alpha, copies, ctx.gradient_last, wanted
            )  # fmt: skip
            return (dx, *[None] * 9, *rest)
        packed, outputs = saved[: ctx.count // copies], saved[ctx.count // copies :]
        outputs, biases = _restored(outputs, grads[0], activations), ctx.biases
        dx, d_skip, *rest = _gradients(
            grads[0], x, packed, outputs, ctx.skip_size, len(biases) > 0, kinds, activations, alpha, "plain", copies,
            needs,
        )  # fmt: skip
        dx = lay_out(dx, ctx.gradient_last) if needs[0] else None
        rest = _as_given(rest, weights, biases, kinds, needs[2:])
        return (dx, d_skip if needs[1] else None, *[None] * 8, *rest)


def _as_given(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor], kinds: str, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of packed weights and of biases as those of what was given: in its dtype and memory format."""
    layers = kinds.split()
    found: list[Tensor | None] = []
    for number, (gradient, given, needed) in enumerate(zip(gradients, (*weights, *biases), needs, strict=True)):
        if not needed:
            found.append(None)
        elif number < len(weights):
            packing = _packing(given, layers[number % len(layers)])
            last = is_channels_last(given)
            found.append(unpack_gradient(gradient, packing, given.dtype, channels_last=last))
        else:
            found.append(gradient.to(given.dtype))
    return found


@torch.library.custom_op("fastbegan::conv_stage", mutates_args=())
def _conv_stage(  # no defaults: torch 2.7 leaves such values out and then misses their gradients  # noqa: PLR0913
    x: Tensor, weights: list[Tensor], biases: list[Tensor], skip: Tensor | None, kinds: str, activations: str,
    alpha: float, impl: str, copies: int, output_last: bool, gradient_last: bool,
) -> list[Tensor]:  # fmt: skip
    """Weights [K, C, k, k] in any dtype and layout, of kind "up" folded; inner outputs are channels_last.

    `output_last`, `gradient_last`: whether the last output, and the gradient of x, are to be channels_last.
    """
    packed = [pack(weight, "conv", x.dtype) for weight in weights[: len(weights) // copies]]
    outputs = _outputs(x, packed, biases, skip, kinds, activations, alpha, impl)
    return [*outputs[:-1], lay_out(outputs[-1], output_last)]


@_conv_stage.register_fake
def _(  # noqa: PLR0913
    x: Tensor, weights: list[Tensor], biases: list[Tensor], skip: Tensor | None, kinds: str, activations: str,
    alpha: float, impl: str, copies: int, output_last: bool, gradient_last: bool,
) -> list[Tensor]:  # fmt: skip
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
    grad: Tensor, x: Tensor, weights: list[Tensor], outputs: list[Tensor], skip_size: int, has_bias: bool,
    kinds: str, activations: str, alpha: float, impl: str, copies: int, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    packed = [pack(weight, "conv", x.dtype) for weight in weights]
    return _gradients(grad, x, packed, outputs, skip_size, has_bias, kinds, activations, alpha, impl, copies, needs)


@_conv_stage_backward.register_fake
def _(  # noqa: PLR0913
    grad: Tensor, x: Tensor, weights: list[Tensor], outputs: list[Tensor], skip_size: int, has_bias: bool,
    kinds: str, activations: str, alpha: float, impl: str, copies: int, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    def like(tensor: Tensor, needed: bool) -> Tensor:
        if not needed:
            return x.new_empty(0)
        options = {"dtype": x.dtype, "device": x.device, "memory_format": torch.channels_last}
        return torch.empty(tensor.shape, **options)

    count = len(weights) * copies
    wide = torch.promote_types(x.dtype, torch.float32)
    last = outputs[-1]
    skip = (x.shape[0], 3, 3, skip_size, skip_size, last.shape[1]) if needs[1] else (0,)
    found = [like(x, needs[0]), x.new_empty(skip)]
    found += [like(weight, needed) for weight, needed in zip([*weights] * copies, needs[2:], strict=False)]
    if has_bias:
        found += [
            x.new_empty(y.shape[1] if needed else 0, dtype=wide if needed else torch.float32)
            for y, needed in zip([*outputs] * copies, needs[2 + count :], strict=True)
        ]
    return found


def _setup(ctx, inputs: tuple, output: list[Tensor]) -> None:
    x, weights, biases, skip, *settings, _, ctx.gradient_last = inputs
    ctx.set_materialize_grads(False)  # nobody asks for the gradients of the inner outputs
    ctx.settings, ctx.count = settings, len(weights)
    ctx.biases, ctx.versions = biases, [_version(bias) for bias in biases]
    ctx.save_for_backward(x, *weights, *_kept(output, settings[1]))
    ctx.skip_size, ctx.skip_dtype = (0, x.dtype) if skip is None else (skip.shape[3], skip.dtype)


def _backward(ctx, grads: list[Tensor | None]) -> tuple:
    x, *saved = ctx.saved_tensors
    weights, outputs = saved[: ctx.count], saved[ctx.count :]
    need_x, need_w, need_b, need_skip = ctx.needs_input_grad[:4]
    grad = grads[-1]
    if grad is None:
        return (None, [None] * len(need_w), [None] * len(need_b), *[None] * 8)
    kinds, activations, alpha, _, copies = ctx.settings
    if torch.is_grad_enabled():
        _refuse_skip(ctx.skip_size)
        wanted, biases = [need_x, *need_w, *need_b], _unchanged(ctx.biases, ctx.versions)
        dx, *rest = _recorded(
            grad, x, weights, biases, kinds, activations, alpha, copies, ctx.gradient_last, wanted
        )  # fmt: skip
        return (dx, rest[: ctx.count], rest[ctx.count :], *[None] * 8)
    needs, biases = [need_x, need_skip, *need_w, *need_b], ctx.biases
    outputs = _restored(outputs, grad, activations)
    dx, d_skip, *rest = _conv_stage_backward(
        grad, x, weights[: ctx.count // copies], outputs, ctx.skip_size, len(biases) > 0, *ctx.settings, needs
    )
    dx = lay_out(dx, ctx.gradient_last) if need_x else None
    rest = _as_given(rest, weights, biases, kinds, needs[2:])
    return (dx, rest[: ctx.count], rest[ctx.count :], d_skip.to(ctx.skip_dtype) if need_skip else None, *[None] * 7)


_conv_stage.register_autograd(_backward, setup_context=_setup)

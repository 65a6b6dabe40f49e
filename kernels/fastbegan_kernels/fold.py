"""Pack weights for the layers: cast, laid out channels_last and folded, for a whole net in one launch.

Kinds of packed weights, for nn.Conv2d's [K, C, k, k]:

- "conv": the same [K, C, k, k].
- "up": nearest x2 followed by conv3x3 is one 4x4 transposed convolution of stride 2, [C, K, 4, 4].
- "skip": conv3x3 over a map upsampled by k >= 2 needs 25 sums of taps per pixel of the map, [25 K, C, 1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from . import problems, tuning
from .dispatch import op_impl
from .layout import is_channels_last, lay_out

KINDS = ("conv", "up", "skip")


def fold(
    weights: Sequence[Tensor], kinds: Sequence[str], *, dtype: torch.dtype | None = None, impl: str | None = None
) -> list[Tensor]:
    """Pack weights: sum taps in the weights' dtype, then cast and lay out channels_last.

    Sums come before the cast, so fold float32 master weights to train in half precision. "up" adds the 3x3 taps that
    meet the same input pixel, 16 sums [C, K, 4, 4]. "skip" adds the taps that meet the same pixel of a small map, 25
    sums [25 K, C, 1, 1]. Both are exact and linear.

    The fused tier packs all weights in one launch, and all their gradients in another. It reads weights at their
    addresses, so a CUDA graph sees later updates.

    Gradients reach the weights in their own dtype and memory format. They can be differentiated again, and forward mode
    works outside of torch.compile.

    Args:
        weights: Weights [K, C, k, k] as nn.Conv2d holds them, any memory format. The fused tier takes float32, and k
            of 1 or 3.
        kinds: "conv", "up" or "skip" for each weight; the last two need k = 3.
        dtype: Dtype of the result; None keeps that of the first weight.
        impl: "reference", "algebraic" or "fused" forces a tier. None takes FASTBEGAN_IMPL from the environment, else
            the kernel if it is verified on this machine.

    Returns:
        One packed weight per weight, channels_last: [K, C, k, k], [C, K, 4, 4] or [25 K, C, 1, 1]. Plain
        operations return a "conv" weight that has this form already as it is.

    Raises:
        ValueError: Unknown kinds, lists of different lengths, or kernels that are not as above.
        RuntimeError: The fused tier is forced where it cannot run: no GPU, no Triton, or weights that are not float32.
            Or weights have moved since a CUDA graph's warm-up.
    """
    if len(weights) != len(kinds):
        raise ValueError(f"kinds has {len(kinds)} entries for {len(weights)} weights; accepted: one each")
    for number, (weight, kind) in enumerate(zip(weights, kinds, strict=True)):
        if kind not in KINDS:
            raise ValueError(f"kinds[{number}] is {kind!r}; accepted: {', '.join(KINDS)}")
        if weight.dim() != 4 or (kind != "conv" and weight.shape[2:] != (3, 3)):
            accepted = "[out, in, k, k]" if kind == "conv" else "[out, in, 3, 3]"
            raise ValueError(f"weights[{number}] is {list(weight.shape)}; accepted: {accepted}")
    if not weights:
        return []
    dtype = weights[0].dtype if dtype is None else dtype
    mode = op_impl(impl, weights, (torch.float32,))
    if large := [list(weight.shape) for weight in weights if weight.shape[2:] not in ((1, 1), (3, 3))]:
        if mode == "fused":
            raise ValueError(f"weight is {large[0]}; impl 'fused' accepts kernels of 1x1 and 3x3")
        mode = None
    if mode is None or mode == "algebraic":
        return [_plain(weight, kind, dtype) for weight, kind in zip(weights, kinds, strict=True)]
    return _packed_parts(_fold(list(weights), " ".join(kinds), dtype, mode), weights, kinds)


def _plain(weight: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    if kind == "conv" and weight.dtype == dtype and weight.is_contiguous(memory_format=torch.channels_last):
        return weight
    if torch.jit.is_tracing():  # a trace with an autograd.Function cannot be saved
        return pack(weight, kind, dtype)
    function = _PlainFold if torch.compiler.is_compiling() else _PlainFoldForward  # Dynamo supports no jvp
    return function.apply(weight, kind, dtype)


def pack(weight: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Pack a weight in plain operations.

    Args:
        weight: [K, C, k, k].
        kind: One of KINDS.
        dtype: Dtype of the result.

    Returns:
        The packed weight, channels_last.
    """
    packed = _PLAIN[kind](weight)
    if packed.dtype != dtype:
        packed = packed.to(dtype=dtype, memory_format=torch.channels_last)
    return packed.contiguous(memory_format=torch.channels_last)


def unpack_gradient(gradient: Tensor, kind: str, dtype: torch.dtype, *, channels_last: bool) -> Tensor:
    """Apply the transpose of `pack`.

    Args:
        gradient: Gradient of the packed weight.
        kind: One of KINDS.
        dtype: Dtype of the weight.
        channels_last: Whether the weight is channels_last, else contiguous.

    Returns:
        Gradient of the weight [K, C, k, k], in its dtype and memory format.
    """
    return lay_out(_TRANSPOSES[kind](gradient.to(dtype), channels_last), channels_last)


_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()


def kept(weight: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Pack a weight for a call that needs no gradient, and keep the result as long as the weight is the same.

    Values are compared: torch counts no writes through `.data`, which averages of weights are often made with. Nothing
    is kept on other devices than a CPU, where comparing waits for the device, and of tensors that are no parameters.

    Args:
        weight: [K, C, k, k].
        kind: One of KINDS.
        dtype: Dtype of the result.

    Returns:
        The packed weight, channels_last. It is shared, so nobody may write into it.
    """
    if kind == "conv" or weight.device.type != "cpu" or not isinstance(weight, nn.Parameter):
        return pack(weight, kind, dtype)
    entry: tuple[Tensor, Tensor] | None = _kept.get(weight)
    if entry is not None and entry[1].dtype == dtype and torch.equal(entry[0], weight):
        return entry[1]
    packed = pack(weight, kind, dtype)
    _kept[weight] = weight.detach().clone(), packed
    return packed


class _PlainFold(torch.autograd.Function):
    """`pack` with its transpose written out. Autograd's own, slice by slice, takes several times as long."""

    @staticmethod
    def forward(weight: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
        return pack(weight, kind, dtype)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, str, torch.dtype], output: Tensor) -> None:
        weight, ctx.kind, ctx.packed = inputs
        ctx.dtype, ctx.channels_last = weight.dtype, is_channels_last(weight)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        return unpack_gradient(grads[0], ctx.kind, ctx.dtype, channels_last=ctx.channels_last), None, None


class _PlainFoldForward(_PlainFold):
    """The same, with forward-mode differentiation."""

    @staticmethod
    def jvp(ctx, *tangents: Tensor) -> Tensor:
        return pack(tangents[0], ctx.kind, ctx.packed)


def packed_shape(shape: Sequence[int], kind: str) -> tuple[int, int, int, int]:
    """Compute the shape of a packed weight.

    Args:
        shape: Shape [K, C, k, k] of the weight.
        kind: One of KINDS.

    Returns:
        Shape of its packed form.
    """
    out, channels, height, width = shape
    if kind == "up":
        return channels, out, 4, 4
    return (25 * out, channels, 1, 1) if kind == "skip" else (out, channels, height, width)


def _packed_parts(flat: Tensor, weights: Sequence[Tensor], kinds: Sequence[str]) -> list[Tensor]:
    """Views of the packed weights, channels_last, that stand one after another in `flat`."""
    shapes = [packed_shape(w.shape, kind) for w, kind in zip(weights, kinds, strict=True)]
    parts = flat.split([a * h * w * b for a, b, h, w in shapes])
    return [part.view(a, h, w, b).permute(0, 3, 1, 2) for part, (a, b, h, w) in zip(parts, shapes, strict=True)]


def fold_upsample(weight: Tensor) -> Tensor:
    """Fold the weights of a conv3x3 after nearest x2 for conv_transpose2d (stride 2, padding 1).

    Args:
        weight: [K, C, 3, 3].

    Returns:
        [C, K, 4, 4] in the same dtype, under autocast too; channels_last.
    """
    taps = weight.permute(1, 2, 3, 0).contiguous()  # the memory order of a channels_last result
    return _fold_taps(_fold_taps(taps, 1), 2).permute(0, 3, 1, 2)


def fold_skip(weight: Tensor) -> Tensor:
    """Sum the taps of a conv3x3 for a phase table (`skip_phase_table`).

    Args:
        weight: [K, C, 3, 3].

    Returns:
        The 25 sums of taps [25 K, C, 1, 1] in the same dtype.
    """
    return _five_sums(_five_sums(weight, 2), 3).permute(2, 3, 0, 1).flatten(0, 2)[:, :, None, None]


def _five_sums(weight: Tensor, dim: int) -> Tensor:
    # taps that read: the cell above; the same cell, from its first, an inner and its last row; the cell below
    first, middle, last = weight.unbind(dim)
    return torch.stack((first, middle + last, first + middle + last, first + middle, last), dim)


def _fold_taps(weight: Tensor, dim: int) -> Tensor:
    # output row y reads copy j of input row i (at 2i + j, j 0 or 1) with 3x3 tap 2i + j - y + 1; tap t = y - 2i + 1 of
    # the folded weight sums both
    first, middle, last = weight.unbind(dim)
    return torch.stack((last, middle + last, first + middle, first), dim)


def _unfold_upsample(grad: Tensor, channels_last: bool = True) -> Tensor:
    """The transpose of `fold_upsample`, computed in the memory order of its result, or of `grad`."""
    if channels_last:
        return _unfold_taps(_unfold_taps(grad.permute(1, 2, 3, 0), 1), 2).permute(0, 3, 1, 2)
    channels, outputs = grad.shape[:2]
    taps = _unfold_taps(_unfold_taps(grad.permute(0, 2, 3, 1), 1), 2)
    # a transposition of two dimensions, which torch does fast
    return taps.reshape(-1, outputs).t().contiguous().view(outputs, channels, 3, 3)


def _unfold_taps(grad: Tensor, dim: int) -> Tensor:
    a, b, c, d = grad.unbind(dim)
    return torch.stack((c + d, b + c, a + b), dim)


def _unfold_skip(grad: Tensor, channels_last: bool = True) -> Tensor:
    """The transpose of `fold_skip`, computed in the memory order of its result."""
    sums = grad.flatten(1).unflatten(0, (5, 5, -1))
    if not channels_last:
        return _unfold_sums(_unfold_sums(sums.permute(2, 3, 0, 1), 2), 3)
    return _unfold_sums(_unfold_sums(sums.permute(2, 0, 1, 3), 1), 2).permute(0, 3, 1, 2)


def _unfold_sums(grad: Tensor, dim: int) -> Tensor:
    a, b, c, d, e = grad.unbind(dim)
    return torch.stack((a + c + d, b + c + d, b + c + e), dim)


_PLAIN = {"conv": lambda weight: weight, "up": fold_upsample, "skip": fold_skip}
_TRANSPOSES = {"conv": lambda grad, channels_last=True: grad, "up": _unfold_upsample, "skip": _unfold_skip}


def fold_flat(weights: Sequence[Tensor], kinds: Sequence[str], dtype: torch.dtype, *, fused: bool) -> Tensor:
    """Pack weights into one flat tensor.

    Args:
        weights: Weights [K, C, k, k].
        kinds: One of KINDS for each weight.
        dtype: Dtype of the result.
        fused: Whether the kernel runs, or plain operations.

    Returns:
        The packed weights one after another, each in channels_last order.
    """
    if fused:
        from .fused import fold as kernels

        return kernels.fold(weights, kinds, dtype)
    packed = (_PLAIN[kind](weight).to(dtype) for weight, kind in zip(weights, kinds, strict=True))
    return torch.cat([weight.permute(0, 2, 3, 1).flatten() for weight in packed])


def unfold_flat(grad: Tensor, weights: Sequence[Tensor], kinds: Sequence[str], *, fused: bool) -> Tensor:
    """Apply the transpose of `fold_flat`.

    Args:
        grad: Gradients of the packed weights, flat as `fold_flat` returns them.
        weights: The weights [K, C, k, k].
        kinds: One of KINDS for each weight.
        fused: Whether the kernel runs, or plain operations.

    Returns:
        The weights' gradients one after another, each dense with the strides of torch.empty_like(weight).
    """
    if fused:
        from .fused import fold as kernels

        return kernels.unfold(grad, weights, kinds)
    gradients = []
    for part, kind, weight in zip(_packed_parts(grad, weights, kinds), kinds, weights, strict=True):
        gradient = _TRANSPOSES[kind](part.to(weight.dtype))
        gradients.append(torch.empty_like(weight).copy_(gradient).as_strided((weight.numel(),), (1,)))
    return torch.cat(gradients)


def _is_fused(weights: Sequence[Tensor], dtype: torch.dtype, impl: str) -> bool:
    return tuning.is_fused("fold", dtype, weights[0].device, impl)


@torch.library.custom_op("fastbegan::fold", mutates_args=())
def _fold(weights: list[Tensor], kinds: str, dtype: torch.dtype, impl: str) -> Tensor:
    return fold_flat(weights, kinds.split(), dtype, fused=_is_fused(weights, dtype, impl))


@_fold.register_fake
def _(weights: list[Tensor], kinds: str, dtype: torch.dtype, impl: str) -> Tensor:
    sizes = [packed_shape(w.shape, kind) for w, kind in zip(weights, kinds.split(), strict=True)]
    return weights[0].new_empty(sum(a * b * h * w for a, b, h, w in sizes), dtype=dtype)


@torch.library.custom_op("fastbegan::fold_backward", mutates_args=())
def _fold_backward(grad: Tensor, weights: list[Tensor], kinds: str, impl: str) -> Tensor:
    return unfold_flat(grad, weights, kinds.split(), fused=_is_fused(weights, grad.dtype, impl))


@_fold_backward.register_fake
def _(grad: Tensor, weights: list[Tensor], kinds: str, impl: str) -> Tensor:
    return grad.new_empty(sum(w.numel() for w in weights), dtype=torch.float32)


def _setup(ctx, inputs: tuple, output: Tensor) -> None:
    weights, ctx.kinds, _, ctx.impl = inputs
    ctx.save_for_backward(*weights)


def _backward(ctx, grad: Tensor) -> tuple[list[Tensor], None, None, None]:
    weights, kinds = ctx.saved_tensors, ctx.kinds.split()
    if torch.is_grad_enabled():  # create_graph=True: in operations that autograd records
        parts = zip(_packed_parts(grad, weights, kinds), kinds, weights, strict=True)
        formats = list(map(is_channels_last, weights))
        gradients = [
            unpack_gradient(part, kind, w.dtype, channels_last=last)
            for (part, kind, w), last in zip(parts, formats, strict=True)
        ]
        return gradients, None, None, None
    parts = _fold_backward(grad, list(weights), ctx.kinds, ctx.impl).split([w.numel() for w in weights])
    gradients = [
        part.as_strided(w.shape, torch.empty_like(w).stride(), part.storage_offset())
        for part, w in zip(parts, weights, strict=True)
    ]
    return gradients, None, None, None


_fold.register_autograd(_backward, setup_context=_setup)


@problems.checks("fold")
def _check(device: torch.device, dtype: torch.dtype, fused: bool) -> list[Tensor]:
    """Packed weights, and gradients of packed weights taken back."""
    master = torch.float64 if dtype == torch.float64 else torch.float32
    weights = [problems.draw(device, master, seed, 5, 7, 3, 3) for seed in range(3)]
    flat = fold_flat(weights, KINDS, dtype, fused=fused)
    grad = problems.draw(device, dtype, 9, flat.numel())
    return [flat, unfold_flat(grad, weights, KINDS, fused=fused)]

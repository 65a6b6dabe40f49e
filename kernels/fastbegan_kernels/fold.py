"""Weights as the layers compute with them: cast, laid out channels_last, and folded, all of a net in one launch.

Kinds of packed weights, for nn.Conv2d's [K, C, k, k]:
- "conv": the same [K, C, k, k];
- "up": nearest x2 followed by conv3x3 is one 4x4 transposed convolution of stride 2, [C, K, 4, 4];
- "skip": conv3x3 over a map upsampled by k >= 2 needs 25 sums of taps a pixel of the map, [25 K, C, 1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import tuning
from .dispatch import op_impl
from .layout import is_channels_last, lay_out

KINDS = ("conv", "up", "skip")


def fold(
    weights: Sequence[Tensor], kinds: Sequence[str], *, dtype: torch.dtype | None = None, impl: str | None = None
) -> list[Tensor]:
    """Packed forms, channels_last, of weights [K, C, k, k]; gradients flow back in the weights' own dtype and format.

    Sums are taken in the weights' dtype, then cast to `dtype` (None: kept): fold float32 masters. The fused tier packs
    all weights in one launch, and their gradients in another; it takes float32 weights of up to 3x3 on a GPU, in any
    layout and where they are: a graph finds them there again. Raises ValueError for an unknown kind, and for a kernel
    that is not 3x3 where it must be.
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
    if torch.jit.is_tracing():  # a trace with a function of ours could not be saved
        return pack(weight, kind, dtype)
    function = _PlainFold if torch.compiler.is_compiling() else _PlainFoldForward  # Dynamo takes no jvp
    return function.apply(weight, kind, dtype)


def pack(weight: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """The packed form of a weight in plain operations: in `dtype`, channels_last."""
    packed = _PLAIN[kind](weight)
    if packed.dtype != dtype:
        packed = packed.to(dtype=dtype, memory_format=torch.channels_last)
    return packed.contiguous(memory_format=torch.channels_last)


def unpack_gradient(gradient: Tensor, kind: str, dtype: torch.dtype, *, channels_last: bool) -> Tensor:
    """The transpose of `pack`: from the gradient of the packed form that of the weight, in its dtype and format."""
    return lay_out(_TRANSPOSES[kind](gradient.to(dtype), channels_last), channels_last)


class _PlainFold(torch.autograd.Function):
    """With its transpose written out: autograd's, of every slice and sum by itself, takes several times as long."""

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
    """In forward mode as well."""

    @staticmethod
    def jvp(ctx, *tangents: Tensor) -> Tensor:
        return pack(tangents[0], ctx.kind, ctx.packed)


def packed_shape(shape: Sequence[int], kind: str) -> tuple[int, int, int, int]:
    """Shape of the packed form of a weight [K, C, k, k]."""
    out, channels, height, width = shape
    if kind == "up":
        return channels, out, 4, 4
    return (25 * out, channels, 1, 1) if kind == "skip" else (out, channels, height, width)


def _packed_parts(flat: Tensor, weights: Sequence[Tensor], kinds: Sequence[str]) -> list[Tensor]:
    """Packed forms, channels_last, that stand one after another in `flat`."""
    shapes = [packed_shape(w.shape, kind) for w, kind in zip(weights, kinds, strict=True)]
    parts = flat.split([a * h * w * b for a, b, h, w in shapes])
    return [part.view(a, h, w, b).permute(0, 3, 1, 2) for part, (a, b, h, w) in zip(parts, shapes, strict=True)]


def fold_upsample(weight: Tensor) -> Tensor:
    """3x3 weights [K, C, 3, 3] of a conv after nearest x2 -> conv_transpose2d weights [C, K, 4, 4].

    Exact and linear, hence differentiable by its transpose, in the weight's own dtype, under autocast too.
    """
    taps = weight.permute(1, 2, 3, 0).contiguous()  # as channels_last has the result in memory
    return _fold_taps(_fold_taps(taps, 1), 2).permute(0, 3, 1, 2)


def fold_skip(weight: Tensor) -> Tensor:
    """3x3 weights [K, C, 3, 3] -> the 25 sums of taps [25 K, C, 1, 1] of a phase table."""
    return _five_sums(_five_sums(weight, 2), 3).permute(2, 3, 0, 1).flatten(0, 2)[:, :, None, None]


def _five_sums(weight: Tensor, dim: int) -> Tensor:
    # above; own pixel from the first, an inner, the last row of its cell; below
    first, middle, last = weight.unbind(dim)
    return torch.stack((first, middle + last, first + middle + last, first + middle, last), dim)


def _fold_taps(weight: Tensor, dim: int) -> Tensor:
    # tap t = y - 2i + 1 of output y and input i sums the 3x3 taps that reach i through the two copies of it
    first, middle, last = weight.unbind(dim)
    return torch.stack((last, middle + last, first + middle, first), dim)


def _unfold_upsample(grad: Tensor, channels_last: bool = True) -> Tensor:
    """The transpose of `fold_upsample`, made in the order in which the result lies in memory."""
    if not channels_last:
        return _unfold_taps(_unfold_taps(grad.transpose(0, 1), 2), 3)
    return _unfold_taps(_unfold_taps(grad.permute(1, 2, 3, 0), 1), 2).permute(0, 3, 1, 2)


def _unfold_taps(grad: Tensor, dim: int) -> Tensor:
    a, b, c, d = grad.unbind(dim)
    return torch.stack((c + d, b + c, a + b), dim)


def _unfold_skip(grad: Tensor, channels_last: bool = True) -> Tensor:
    """The transpose of `fold_skip`, made in the order in which the result lies in memory."""
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
    """The packed forms one after another, in the order of their memory, in the form that is named."""
    if fused:
        from .fused import packing

        return packing.fold(weights, kinds, dtype)
    packed = (_PLAIN[kind](weight).to(dtype) for weight, kind in zip(weights, kinds, strict=True))
    return torch.cat([weight.permute(0, 2, 3, 1).flatten() for weight in packed])


def unfold_flat(grad: Tensor, weights: Sequence[Tensor], kinds: Sequence[str], *, fused: bool) -> Tensor:
    """The transpose of `fold_flat`: each weight's gradient, dense, in the layout of `torch.empty_like(weight)`."""
    if fused:
        from .fused import packing

        return packing.fold_backward(grad, weights, kinds)
    found = []
    for part, kind, weight in zip(_packed_parts(grad, weights, kinds), kinds, weights, strict=True):
        gradient = _TRANSPOSES[kind](part.to(weight.dtype))
        found.append(torch.empty_like(weight).copy_(gradient).as_strided((weight.numel(),), (1,)))
    return torch.cat(found)


def _is_fused(weights: Sequence[Tensor], dtype: torch.dtype, impl: str) -> bool:
    return tuning.pointwise("fold", dtype, weights[0].device, impl)


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
    if torch.is_grad_enabled():  # in operations that can be differentiated again
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

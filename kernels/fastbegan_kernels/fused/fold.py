# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# (Triton types constexpr parameters as constexpr, not as what one passes, and loads by a constexpr as scalars)
"""The kernels that fold weights and unfold their gradients, for all layers of a net at once, and their launchers.

A table on the device describes the layers, a row each. owner[program] is the layer of a program, and each program packs
a few values of it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_FOLD_BLOCK = 64  # values that a program writes; it reads sixteen for each
FOLDS = ("conv", "up", "skip")  # kinds of packed weights, by their number in the table; see `fold.KINDS`
_captured: list[tuple[Tensor, Tensor]] = []  # tables of CUDA graphs, which do not keep their inputs alive

_CONV, _UP = tl.constexpr(FOLDS.index("conv")), tl.constexpr(FOLDS.index("up"))

# columns of the table, int64
_WEIGHT = tl.constexpr(0)  # its address
_KIND = tl.constexpr(1)  # its number in FOLDS
_K, _C, _SIZE = tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)  # the weight is [K, C, SIZE, SIZE]
_FIRST = tl.constexpr(5)  # the layer's first program
_STRIDE_K, _STRIDE_C, _STRIDE_H, _STRIDE_W = tl.constexpr(6), tl.constexpr(7), tl.constexpr(8), tl.constexpr(9)
_PACKED, _GRADIENT = tl.constexpr(10), tl.constexpr(11)  # offsets of its packed weight and of its gradient
_COLUMNS = tl.constexpr(12)


@triton.jit
def _layer(table_ptr, owner_ptr, BLOCK: tl.constexpr):
    """The layer of this program: its row, kind and sizes, the values [BLOCK, 1] to compute, strides of its weight."""
    program = tl.program_id(0)
    row = table_ptr + tl.load(owner_ptr + program) * _COLUMNS
    kind = tl.load(row + _KIND).to(tl.int32)
    K = tl.load(row + _K).to(tl.int32)
    C = tl.load(row + _C).to(tl.int32)
    size = tl.load(row + _SIZE).to(tl.int32)
    i = ((program - tl.load(row + _FIRST).to(tl.int32)) * BLOCK + tl.arange(0, BLOCK))[:, None]
    s_k = tl.load(row + _STRIDE_K).to(tl.int32)
    s_c = tl.load(row + _STRIDE_C).to(tl.int32)
    s_h = tl.load(row + _STRIDE_H).to(tl.int32)
    s_w = tl.load(row + _STRIDE_W).to(tl.int32)
    return row, kind, K, C, size, i, s_k, s_c, s_h, s_w


@triton.jit
def _fold_kernel(table_ptr, owner_ptr, packed_ptr, BLOCK: tl.constexpr):
    """Pack the float32 weights of all layers.

    Each packed value sums at most nine taps. A program holds them as a row of 16: column `step` is tap (step // 3,
    step % 3), and columns that are not used are masked.
    """
    row, kind, K, C, size, i, s_k, s_c, s_h, s_w = _layer(table_ptr, owner_ptr, BLOCK)
    packed = packed_ptr + tl.load(row + _PACKED)
    step = tl.arange(0, 16)[None, :]
    # i counts packed values in memory order: [outer, r, s, inner], with [5, 5, K] as outer for kind skip
    inner = tl.where(kind == _UP, K, C)
    window = tl.where(kind == _CONV, size, tl.where(kind == _UP, 4, 1))
    s = (i // inner) % window
    r = (i // (inner * window)) % window
    outer = i // (inner * window * window)
    c = tl.where(kind == _UP, outer, i % inner)
    k = tl.where(kind == _UP, i % inner, outer % K)
    sum_h = outer // K // 5
    sum_w = outer // K % 5
    ok = outer < tl.where(kind == _CONV, K, tl.where(kind == _UP, C, 25 * K))
    # which taps (a, b) of the 3x3 weight belong to this value's sum
    a = step // 3
    b = step % 3
    conv = (a == r) & (b == s)
    up = (a + r >= 2) & (a + r <= 3) & (b + s >= 2) & (b + s <= 3) & (step < 9)
    low_h = tl.where(sum_h == 1, 1, tl.where(sum_h == 4, 2, 0))
    low_w = tl.where(sum_w == 1, 1, tl.where(sum_w == 4, 2, 0))
    high_h = tl.where(sum_h == 0, 0, tl.where(sum_h == 3, 1, 2))
    high_w = tl.where(sum_w == 0, 0, tl.where(sum_w == 3, 1, 2))
    skip = (a >= low_h) & (a <= high_h) & (b >= low_w) & (b <= high_w)
    part = tl.where(kind == _CONV, conv, tl.where(kind == _UP, up, skip))
    at = k * s_k + c * s_c + a * s_h + b * s_w
    weight = tl.load(row + _WEIGHT).to(tl.pointer_type(tl.float32))
    values = tl.load(weight + at, mask=ok & part, other=0.0)
    tl.store(packed + i, tl.sum(values, 1)[:, None].to(packed_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _unfold_kernel(table_ptr, owner_ptr, packed_ptr, gradient_ptr, BLOCK: tl.constexpr):
    """Take gradients of packed weights back to the float32 weights of all layers.

    Each gradient sums at most nine packed values, held as a row of 16: column `step` is value (step // 3, step % 3).
    """
    row, kind, K, C, size, i, s_k, s_c, s_h, s_w = _layer(table_ptr, owner_ptr, BLOCK)
    packed = packed_ptr + tl.load(row + _PACKED)
    step = tl.arange(0, 16)[None, :]
    # i counts weights [K, C, a, b]; u and v count the packed values that hold tap (a, b)
    b = i % size
    a = (i // size) % size
    c = (i // (size * size)) % C
    k = i // (size * size * C)
    u = step // 3
    v = step % 3
    conv = ((k * size + a) * size + b) * C + c + 0 * step
    # 3x3 tap a is part of the 4x4 taps 3 - a and 2 - a (see fold._fold_taps)
    up = ((c * 4 + 3 - a - u) * 4 + 3 - b - v) * K + k
    # tap 0 is in sums 0, 2, 3; tap 1 in 1, 2, 3; tap 2 in 1, 2, 4 (see fold._five_sums)
    sum_h = tl.where(u == 1, 2, tl.where(u == 0, tl.where(a == 0, 0, 1), tl.where(a == 2, 4, 3)))
    sum_w = tl.where(v == 1, 2, tl.where(v == 0, tl.where(b == 0, 0, 1), tl.where(b == 2, 4, 3)))
    skip = ((sum_h * 5 + sum_w) * K + k) * C + c
    at = tl.where(kind == _CONV, conv, tl.where(kind == _UP, up, skip))
    last = tl.where(kind == _CONV, 1, tl.where(kind == _UP, 2, 3))
    values = tl.load(packed + at, mask=(k < K) & (u < last) & (v < last), other=0.0).to(tl.float32)
    at = k * s_k + c * s_c + a * s_h + b * s_w
    tl.store(gradient_ptr + tl.load(row + _GRADIENT) + at, tl.sum(values, 1)[:, None], mask=k < K)


def packed_size(shape: Sequence[int], kind: str) -> int:
    """Values in the packed form of a weight [K, C, k, k]."""
    out, channels, height, width = shape
    return out * channels * {"conv": height * width, "up": 16, "skip": 25}[kind]


@functools.lru_cache(maxsize=64)
def _fold_table(
    layers: tuple[tuple[int, str, tuple[int, ...], tuple[int, ...]], ...], backward: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Table and owners of the kernels for (address, kind, shape, strides) of each weight, on the device.

    Cached, since a graph cannot copy from the host: a captured step reuses the tables of its warm-up.
    """
    rows: list[list[int]] = []
    owners: list[int] = []
    packed = gradient = 0
    for number, (address, kind, shape, stride) in enumerate(layers):
        size, weights = packed_size(shape, kind), shape[0] * shape[1] * shape[2] * shape[3]
        rows.append([address, FOLDS.index(kind), *shape[:3], len(owners), *stride, packed, gradient])
        owners += [number] * triton.cdiv(weights if backward else size, _FOLD_BLOCK)
        packed, gradient = packed + size, gradient + weights
    table = torch.tensor(rows, dtype=torch.int64)
    return table.to(device), torch.tensor(owners, dtype=torch.int32).to(device)


def _tables(
    weights: Sequence[Tensor], kinds: Sequence[str], device: torch.device, *, backward: bool
) -> tuple[Tensor, Tensor]:
    layers = _fold_layers(weights, kinds, backward)
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return _fold_table(layers, backward, device)
    misses = _fold_table.cache_info().misses
    try:
        tables = _fold_table(layers, backward, device)
    except RuntimeError as error:
        if _fold_table.cache_info().misses == misses:
            raise
        raise RuntimeError("fold met weights at new addresses during graph capture; run it once before") from error
    _captured.append(tables)
    return tables


def _fold_layers(weights: Sequence[Tensor], kinds: Sequence[str], backward: bool) -> tuple[Any, ...]:
    """One entry per weight for `_fold_table`: the weight itself forward, its dense gradient (address 0) backward."""
    return tuple(
        (0, kind, tuple(w.shape), torch.empty_like(w).stride())
        if backward
        else (w.data_ptr(), kind, tuple(w.shape), w.stride())
        for w, kind in zip(weights, kinds, strict=True)
    )


def fold(weights: Sequence[Tensor], kinds: Sequence[str], dtype: torch.dtype) -> Tensor:
    """Pack float32 weights of any memory format, one after another into a flat tensor."""
    device = weights[0].device
    sizes = [packed_size(w.shape, kind) for w, kind in zip(weights, kinds, strict=True)]
    packed = torch.empty(sum(sizes), dtype=dtype, device=device)
    with torch.cuda.device_of(packed):
        table, owner = _tables(weights, kinds, device, backward=False)
        if len(owner):
            _fold_kernel[(len(owner),)](table, owner, packed, BLOCK=_FOLD_BLOCK)
    return packed


def unfold(grad: Tensor, weights: Sequence[Tensor], kinds: Sequence[str]) -> Tensor:
    """float32 gradients of the weights in a flat tensor, each with the strides of `torch.empty_like(weight)`."""
    out = torch.empty(sum(w.numel() for w in weights), dtype=torch.float32, device=grad.device)
    with torch.cuda.device_of(grad):
        table, owner = _tables(weights, kinds, grad.device, backward=True)
        if len(owner):
            _unfold_kernel[(len(owner),)](table, owner, grad.contiguous(), out, BLOCK=_FOLD_BLOCK)
    return out

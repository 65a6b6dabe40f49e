# pyright: reportArgumentType=false, reportCallIssue=false
# (Triton types constexpr parameters as constexpr, not as what one passes, and does not know its launch options)
"""Launchers of the folding kernel.

A table on the device describes the layers. Each program packs a few values of one layer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from . import elementwise

_FOLD_BLOCK = 64  # values that a program writes; it reads sixteen for each
FOLDS = ("conv", "up", "skip")  # kinds of packed weights; see fold
_captured: list[tuple[Tensor, Tensor]] = []  # tables of CUDA graphs, which do not keep their inputs alive


def packed_size(shape: Sequence[int], kind: str) -> int:
    """Values in the packed form of a weight [K, C, k, k]."""
    out, channels, height, width = shape
    return out * channels * {"conv": height * width, "up": 16, "skip": 25}[kind]


@functools.lru_cache(maxsize=64)
def _fold_table(
    layers: tuple[tuple[int, str, tuple[int, ...], tuple[int, ...]], ...], backward: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Table and owners of `_fold_kernel` for (address, kind, shape, strides) of each weight, on the device.

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
            elementwise._fold_kernel[(len(owner),)](table, owner, packed, None, BACKWARD=False, BLOCK=_FOLD_BLOCK)
    return packed


def fold_backward(grad: Tensor, weights: Sequence[Tensor], kinds: Sequence[str]) -> Tensor:
    """float32 gradients of the weights in a flat tensor, each with the strides of `torch.empty_like(weight)`."""
    out = torch.empty(sum(w.numel() for w in weights), dtype=torch.float32, device=grad.device)
    with torch.cuda.device_of(grad):
        table, owner = _tables(weights, kinds, grad.device, backward=True)
        if len(owner):
            elementwise._fold_kernel[(len(owner),)](
                table, owner, grad.contiguous(), out, BACKWARD=True, BLOCK=_FOLD_BLOCK
            )
    return out

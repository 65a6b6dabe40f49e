# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# (Triton types constexpr parameters as constexpr, not as what one passes, and its range as never iterated)
"""Reads of a phase table inside other kernels, and the kernel of its gradient with its launcher.

Kernels hold the table [N, 3, 3, S, S, K] as [N, S, S, 3, 3, K], the memory order of `skip_phase_table`'s result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import lay_out


@triton.jit
def skip_entry(n, oh, ow, out_h, out_w, SIZE: tl.constexpr):
    """Row of the phase table, [N, SIZE, SIZE, 3, 3, K] in memory, that is added to output pixel (n, oh, ow)."""
    cell_h = out_h // SIZE
    cell_w = out_w // SIZE
    row = oh % cell_h
    column = ow % cell_w
    part_h = tl.where(row == 0, 0, tl.where(row == cell_h - 1, 2, 1))
    part_w = tl.where(column == 0, 0, tl.where(column == cell_w - 1, 2, 1))
    return (((n * SIZE + oh // cell_h) * SIZE + ow // cell_w) * 3 + part_h) * 3 + part_w


@triton.jit
def _skip_gradient_kernel(
    dz_ptr, out_ptr, height, width, K, SIZE: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr
):
    """out[n, cell, part_h, part_w, k]: sum of dz over the pixels that this entry of the phase table was added to."""
    cell = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_ok = k < K
    rows = height // SIZE
    columns = width // SIZE
    column = tl.arange(0, BLOCK_W)
    first_row = cell // SIZE * rows  # cells of all samples are numbered through, and so are their rows
    start = dz_ptr + (first_row * width + cell % SIZE * columns + column)[:, None] * K + k[None, :]
    ok = (column < columns)[:, None] & k_ok[None, :]
    for part_h in tl.static_range(3):
        low = 0 if part_h == 0 else (1 if part_h == 1 else rows - 1)
        high = 1 if part_h == 0 else (rows - 1 if part_h == 1 else rows)
        total = tl.zeros((BLOCK_W, BLOCK_K), tl.float32)
        for row in range(low, high):
            total += tl.load(start + row * width * K, mask=ok, other=0.0).to(tl.float32)
        for part_w in tl.static_range(3):
            if part_w == 0:
                part = column == 0
            elif part_w == 1:
                part = (column > 0) & (column < columns - 1)
            else:
                part = column == columns - 1
            value = tl.sum(tl.where(part[:, None], total, 0.0), 0)
            entry = out_ptr + ((cell * 3 + part_h) * 3 + part_w) * K + k
            tl.store(entry, value.to(out_ptr.dtype.element_ty), mask=k_ok)


def table_memory(table: Tensor) -> Tensor:
    """A phase table [N, 3, 3, S, S, K] as [N, S, S, 3, 3, K]."""
    return table.permute(0, 3, 4, 1, 2, 5).contiguous()


def skip_gradient(dz: Tensor, size: int) -> Tensor:
    """The gradient of a phase table [N, 3, 3, size, size, K]: each entry sums dz [N, K, H, W] over its pixels."""
    dz = lay_out(dz, True)
    batch, channels, height, width = dz.shape
    out = torch.empty((batch, size, size, 3, 3, channels), dtype=dz.dtype, device=dz.device)
    if out.numel():
        block_k = min(32, triton.next_power_of_2(channels))
        block_w = triton.next_power_of_2(width // size)
        with torch.cuda.device_of(dz):
            _skip_gradient_kernel[(batch * size * size, triton.cdiv(channels, block_k))](
                dz, out, height, width, channels, SIZE=size, BLOCK_W=block_w, BLOCK_K=block_k
            )
    return out.permute(0, 3, 4, 1, 2, 5)

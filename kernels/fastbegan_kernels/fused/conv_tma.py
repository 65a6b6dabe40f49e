# pyright: reportGeneralTypeIssues=false
# (Triton's range is typed as never iterated)
"""The loops of `conv_pointer` for Hopper and newer, in half precision: tensor descriptors load tiles.

A descriptor reads zeros outside its tensor, so padding needs no mask and no address. Weights are the rows of the
product and pixels its columns, other than in `conv_pointer`: both factors then reach the matrix units from shared
memory. A tile has SAMPLES x HEIGHT x WIDTH output pixels.

Maps of stride 2 are read and written through a view [N, H / 2, 2, W / 2, 2 C]. The row's parity is its third
coordinate; the column's parity is the half of its channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate, derivative
from .conv_pointer import next_block, program_of, row_of
from .skip_phase_table import skip_entry


@triton.jit
def _finish(  # noqa: PLR0913
    acc,
    y_prev,
    ok,
    k,
    K,
    b_ptr,
    db_ptr,
    partial,
    alpha,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Epilogue of acc [BLOCK_K, pixels]; y_prev [pixels, BLOCK_K] where BACKWARD."""
    k_ok = k < K
    if BACKWARD:
        acc = acc * derivative(y_prev.T.to(tl.float32), ACTIVATION, alpha)
        tl.store(db_ptr + partial.to(tl.int64) * K + k, tl.sum(tl.where(ok[None, :], acc, 0.0), 1), mask=k_ok)
    else:
        if HAS_BIAS:
            acc += tl.load(b_ptr + k, mask=k_ok, other=0.0).to(tl.float32)[:, None]
        acc = activate(acc, ACTIVATION, alpha)
    return acc


@triton.jit(do_not_specialize=["batch", "out_h", "out_w", "c_blocks"])
def _conv_tma_kernel(  # noqa: PLR0913
    x_desc,
    w_desc,
    b_ptr,
    y_prev_desc,
    out_desc,
    db_ptr,
    batch,
    out_h,
    out_w,
    C,
    K,
    c_blocks,
    alpha,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    TURNED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BACKWARD: tl.constexpr,
    SAMPLES: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As `conv_pointer._conv_kernel`, with weights as a matrix [A, taps B].

    A block of weights may run into the next tap. There it meets channels of x that are zero, or outputs that are not
    stored.
    """
    TAPS: tl.constexpr = KERNEL * KERNEL
    PIXELS: tl.constexpr = SAMPLES * HEIGHT * WIDTH
    tile = tl.program_id(0)
    tiles_w = tl.cdiv(out_w, WIDTH)
    tiles_h = tl.cdiv(out_h, HEIGHT)
    w0 = tile % tiles_w * WIDTH
    h0 = tile // tiles_w % tiles_h * HEIGHT
    n0 = tile // (tiles_w * tiles_h) * SAMPLES
    k0 = tl.program_id(1) * BLOCK_K
    acc = tl.zeros((BLOCK_K, PIXELS), tl.float32)
    tap = 0
    c0 = 0
    for _ in tl.range(0, TAPS * c_blocks, num_stages=STAGES):
        row = row_of(tap, KERNEL)
        column = tap - row * KERNEL - PAD
        row -= PAD
        if STRIDE == 1:
            x = x_desc.load([n0, h0 + row, w0 + column, c0])
        else:  # shifts round down, also for -1
            x = x_desc.load([n0, h0 + (row >> 1), row & 1, w0 + (column >> 1), (column & 1) * C + c0])
        if TURNED:  # noqa: SIM108 (compile-time)
            w = w_desc.load([c0, (TAPS - 1 - tap) * K + k0]).T
        else:
            w = w_desc.load([k0, tap * C + c0])
        acc = tl.dot(w, x.reshape(PIXELS, BLOCK_C).T, acc)
        tap, c0 = next_block(tap, c0, c_blocks, BLOCK_C)
    p = tl.arange(0, PIXELS)
    ok = (n0 + p // (HEIGHT * WIDTH) < batch) & (h0 + p // WIDTH % HEIGHT < out_h) & (w0 + p % WIDTH < out_w)
    y_prev = acc
    if BACKWARD:
        y_prev = y_prev_desc.load([n0, h0, w0, k0]).reshape(PIXELS, BLOCK_K)
    acc = _finish(
        acc, y_prev, ok, k0 + tl.arange(0, BLOCK_K), K, b_ptr, db_ptr, tile, alpha, HAS_BIAS, ACTIVATION, BACKWARD
    )
    out_desc.store([n0, h0, w0, k0], acc.to(out_desc.dtype).T.reshape(SAMPLES, HEIGHT, WIDTH, BLOCK_K))


@triton.jit(do_not_specialize=["batch", "in_h", "in_w", "c_blocks"])
def _conv_transpose_tma_kernel(  # noqa: PLR0913
    x_desc,
    w_desc,
    b_ptr,
    skip_ptr,
    y_prev_desc,
    out_desc,
    db_ptr,
    batch,
    in_h,
    in_w,
    K,
    c_blocks,
    alpha,
    KERNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SKIP_SIZE: tl.constexpr,
    FLAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BACKWARD: tl.constexpr,
    SAMPLES: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As `conv_pointer._conv_transpose_kernel`, for even output sizes and K in whole blocks."""
    PIXELS: tl.constexpr = SAMPLES * HEIGHT * WIDTH
    tile, k_block, phase = program_of(K, BLOCK_K, FLAT)
    tiles_w = tl.cdiv(in_w, WIDTH)
    tiles_h = tl.cdiv(in_h, HEIGHT)
    j0 = tile % tiles_w * WIDTH
    i0 = tile // tiles_w % tiles_h * HEIGHT
    n0 = tile // (tiles_w * tiles_h) * SAMPLES
    k0 = k_block * BLOCK_K
    py = phase // 2
    px = phase % 2
    taps_h = 2 if KERNEL == 4 else 1 + py
    taps_w = 2 if KERNEL == 4 else 1 + px
    acc = tl.zeros((BLOCK_K, PIXELS), tl.float32)
    tap = 0
    c0 = 0
    for _ in tl.range(0, taps_h * taps_w * c_blocks, num_stages=STAGES):
        dh = (tap >> (1 if KERNEL == 4 else px)) + (py - 1 if KERNEL == 4 else 0)
        dw = (tap & (taps_w - 1)) + (px - 1 if KERNEL == 4 else 0)
        x = x_desc.load([n0, i0 + dh, j0 + dw, c0]).reshape(PIXELS, BLOCK_C)
        w = w_desc.load([c0, ((1 + py - 2 * dh) * KERNEL + 1 + px - 2 * dw) * K + k0])
        acc = tl.dot(w.T, x.T, acc)
        tap, c0 = next_block(tap, c0, c_blocks, BLOCK_C)
    p = tl.arange(0, PIXELS)
    n = n0 + p // (HEIGHT * WIDTH)
    i = i0 + p // WIDTH % HEIGHT
    j = j0 + p % WIDTH
    ok = (n < batch) & (i < in_h) & (j < in_w)
    k = k0 + tl.arange(0, BLOCK_K)
    if SKIP_SIZE > 0:
        entry = tl.where(ok, skip_entry(n.to(tl.int64), 2 * i + py, 2 * j + px, 2 * in_h, 2 * in_w, SKIP_SIZE), 0)
        acc += tl.load(skip_ptr + entry[None, :] * K + k[:, None], mask=ok[None, :], other=0.0).to(tl.float32)
    y_prev = acc
    if BACKWARD:
        y_prev = y_prev_desc.load([n0, i0, py, j0, px * K + k0]).reshape(PIXELS, BLOCK_K)
    acc = _finish(acc, y_prev, ok, k, K, b_ptr, db_ptr, tile * 4 + phase, alpha, HAS_BIAS, ACTIVATION, BACKWARD)
    out_desc.store([n0, i0, py, j0, px * K + k0], acc.to(out_desc.dtype).T.reshape(SAMPLES, HEIGHT, 1, WIDTH, BLOCK_K))

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# (Triton's range is typed as never iterated, and constexpr parameters as constexpr)
"""Convolutions as matrix products without stored patches: pointer kernels, for sm_80 and newer.

Two loops serve every layer, and each is the other's input gradient.

- `_conv_kernel` walks the taps of a square window of stride 1 or 2. It computes conv2d_elu, the input gradient of
  stride 1 (with turned weights), and the input gradient of an up-convolution (4x4, stride 2).
- `_conv_transpose_kernel` computes the four output phases of a transposed convolution of stride 2: up-convolutions with
  folded 4x4 weights, and the input gradient of a 3x3 convolution of stride 2.

All tensors are NHWC in memory, weights too: [A, taps, B] for nn.Conv2d's [A, B, k, k]. The product has output pixels as
rows and the K output channels as columns. Its sum runs over taps, and over `c_blocks` blocks of BLOCK_C of the C input
channels. Sizes are run-time numbers, so one binary serves every layer. With constant ones the compiler unrolls the
loops, and registers spill.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation import activate, derivative
from .skip_phase_table import skip_entry

# Triton makes a binary of its own for a size that is 1 or divisible by 16; these stay run-time numbers
SIZES = ("in_h", "in_w", "out_h", "out_w", "c_blocks")


@triton.jit
def _existing(i, size, ALIGNED: tl.constexpr):
    """i where it is below `size`, else 0. ALIGNED: `size` is a multiple of 8."""
    i = tl.where(i < size, i, 0)
    # the compiler loses contiguity at the clamp, and would load value by value instead of in 16-byte copies
    if ALIGNED:
        i = tl.max_contiguous(tl.multiple_of(i, 8), 8)
    return i


@triton.jit
def _load_pair(  # noqa: PLR0913
    x_at, w_at, inside, x_shift, w_shift, c_start, c, C, w_stride, FULL_C: tl.constexpr, ALIGNED: tl.constexpr
):
    """Pixels [BLOCK_M, BLOCK_C] moved by `x_shift` values, zero where not `inside`, and weights [BLOCK_C, BLOCK_K].

    With FULL_C, `x_at` and `w_at` point at channel c; else at channel 0. Masked asynchronous copies have been seen to
    touch their address. So a pixel outside keeps the address of a valid pixel, and a channel past the last that of
    channel 0.
    """
    if FULL_C:
        offset = tl.where(inside, x_shift + c_start, 0)
        if ALIGNED:
            offset = tl.multiple_of(offset, 8)
        x = tl.load(x_at + offset[:, None], mask=inside[:, None], other=0.0)
        w = tl.load(w_at + (w_shift + c_start * w_stride))
    else:
        c_ok = c_start + c < C
        c = _existing(c_start + c, C, ALIGNED)
        offset = tl.where(inside, x_shift, 0)
        if ALIGNED:
            offset = tl.multiple_of(offset, 8)
        offset = offset[:, None] + c[None, :]
        x = tl.load(x_at + offset, mask=inside[:, None] & c_ok[None, :], other=0.0)
        w = tl.load(w_at + (w_shift + c[:, None] * w_stride), mask=c_ok[:, None], other=0.0)
    return x, w


@triton.jit
def _inside_bits(h, w, in_h, in_w, FIRST: tl.constexpr, SIDE: tl.constexpr):
    """Bit SIDE * a + b: whether pixel (h + FIRST + a, w + FIRST + b) is inside a map of in_h x in_w.

    Computed before the loop, which then has one operation a row for its borders.
    """
    bits = tl.zeros(h.shape, tl.int32)
    for a in tl.static_range(SIDE):
        for b in tl.static_range(SIDE):
            row = h + (FIRST + a)
            column = w + (FIRST + b)
            inside = (row >= 0) & (row < in_h) & (column >= 0) & (column < in_w)
            bits |= tl.where(inside, 1 << (SIDE * a + b), 0)
    return bits


@triton.jit
def next_block(tap, c_start, c_blocks, BLOCK_C: tl.constexpr):
    """The next block of channels, and the next tap after the last of them: counters in place of divisions."""
    c_start += BLOCK_C
    last = c_start == c_blocks * BLOCK_C
    return tap + tl.where(last, 1, 0), tl.where(last, 0, c_start)


@triton.jit
def row_of(tap, KERNEL: tl.constexpr):
    """tap // KERNEL for taps of a window, in fewer instructions than a signed division."""
    if KERNEL == 4:
        row = tap >> 2
    elif KERNEL == 3:
        row = tap * 11 >> 5
    else:
        row = tap // KERNEL
    return row


@triton.jit
def _store(  # noqa: PLR0913
    acc,
    pixel,
    m_ok,
    k,
    K,
    b_ptr,
    y_prev_ptr,
    out_ptr,
    db_ptr,
    partial,
    alpha,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """The epilogue of acc [BLOCK_M, BLOCK_K]; row m is stored at pixel[m].

    Forward: bias and activation. BACKWARD: acc times the derivative of the previous layer's activation, from its saved
    output y_prev. db[partial, k] is this program's part of the previous layer's bias gradient.
    """
    k_ok = k < K
    ok = m_ok[:, None] & k_ok[None, :]
    offset = pixel[:, None] * K + k[None, :]
    if BACKWARD:
        y_prev = tl.load(y_prev_ptr + offset, mask=ok, other=0.0).to(tl.float32)
        acc = tl.where(ok, acc * derivative(y_prev, ACTIVATION, alpha), 0.0)
        tl.store(db_ptr + partial.to(tl.int64) * K + k, tl.sum(acc, 0), mask=k_ok)
    else:
        if HAS_BIAS:
            acc += tl.load(b_ptr + k, mask=k_ok, other=0.0).to(tl.float32)[None, :]
        acc = activate(acc, ACTIVATION, alpha)
    tl.store(out_ptr + offset, acc.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["pixels", *SIZES])
def _conv_kernel(  # noqa: PLR0913
    x_ptr,
    w_ptr,
    b_ptr,
    y_prev_ptr,
    out_ptr,
    db_ptr,
    pixels,
    in_h,
    in_w,
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
    FULL_C: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out[m, k] = epilogue(sum over taps t and channels c of x[pixel(m, t), c] w[k, t, c]).

    TURNED, for input gradients: weights are [C, taps, K] in memory, and their taps run backwards.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_ok = m < pixels
    ow = m % out_w
    oh = (m // out_w) % out_h
    start = tl.where(m_ok, (m // (out_w * out_h) * in_h + oh * STRIDE) * in_w + ow * STRIDE, 0)
    c = tl.arange(0, BLOCK_C)
    TAPS: tl.constexpr = KERNEL * KERNEL
    w_stride = TAPS * K if TURNED else 1
    x_at = x_ptr + start.to(tl.int64)[:, None] * C
    w_at = w_ptr + _existing(k, K, ALIGNED)[None, :] * (1 if TURNED else TAPS * C)
    if FULL_C:
        x_at += c[None, :]
        w_at += c[:, None] * w_stride
    inside_bits = tl.where(m_ok, _inside_bits(oh * STRIDE, ow * STRIDE, in_h, in_w, -PAD, KERNEL), 0)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    tap = 0
    c_start = 0
    for _ in tl.range(0, TAPS * c_blocks, num_stages=STAGES):
        inside = (inside_bits & (1 << tap)) != 0
        row = row_of(tap, KERNEL)
        x_shift = ((row - PAD) * in_w + tap - row * KERNEL - PAD) * C
        w_shift = (TAPS - 1 - tap) * K if TURNED else tap * C
        x, w = _load_pair(x_at, w_at, inside, x_shift, w_shift, c_start, c, C, w_stride, FULL_C, ALIGNED)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        tap, c_start = next_block(tap, c_start, c_blocks, BLOCK_C)
        tap = tl.minimum(tap, TAPS - 1)  # loads run ahead of the products: those past the last stay in the weights
    pixel = m.to(tl.int64)
    program = tl.program_id(0)
    _store(acc, pixel, m_ok, k, K, b_ptr, y_prev_ptr, out_ptr, db_ptr, program, alpha, HAS_BIAS, ACTIVATION, BACKWARD)


@triton.jit
def program_of(K, BLOCK_K: tl.constexpr, FLAT: tl.constexpr):
    """Tile of pixels, block of output channels and phase of this program of a transposed convolution."""
    if FLAT:
        blocks = tl.cdiv(K, BLOCK_K)
        tile = tl.program_id(0) // (4 * blocks)
        k_block = tl.program_id(0) // 4 % blocks
        phase = tl.program_id(0) % 4
    else:
        tile = tl.program_id(0)
        k_block = tl.program_id(1)
        phase = tl.program_id(2)
    return tile, k_block, phase


@triton.jit(do_not_specialize=["pixels", *SIZES])
def _conv_transpose_kernel(  # noqa: PLR0913
    x_ptr,
    w_ptr,
    b_ptr,
    skip_ptr,
    y_prev_ptr,
    out_ptr,
    db_ptr,
    pixels,
    in_h,
    in_w,
    out_h,
    out_w,
    C,
    K,
    c_blocks,
    alpha,
    KERNEL: tl.constexpr,
    FULL_C: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SKIP_SIZE: tl.constexpr,
    FLAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Phase (py, px): out[2i + py, 2j + px, k] sums x[i + dh, j + dw, c] w[c, tap, k], window 3 or 4, padding 1.

    Output row 2i + py reads input row i + dh with tap 1 + py - 2 dh. Of four taps, each phase uses two per direction.
    Of three, phase 0 uses one and phase 1 two. With SKIP_SIZE = S the phase table is added before the activation.
    """
    tile, k_block, phase = program_of(K, BLOCK_K, FLAT)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    k = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
    py = phase // 2
    px = phase % 2
    m_ok = m < pixels
    j = m % in_w
    i = tl.where(m_ok, (m // in_w) % in_h, -2)  # rows past the end are outside for every tap
    c = tl.arange(0, BLOCK_C)
    w_stride = KERNEL * KERNEL * K
    x_at = x_ptr + tl.where(m_ok, m, 0).to(tl.int64)[:, None] * C
    w_at = w_ptr + _existing(k, K, ALIGNED)[None, :]
    if FULL_C:
        x_at += c[None, :]
        w_at += c[:, None] * w_stride
    taps_h = 2 if KERNEL == 4 else 1 + py
    taps_w = 2 if KERNEL == 4 else 1 + px
    inside_bits = _inside_bits(i, j, in_h, in_w, -1, 3)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    tap = 0
    c_start = 0
    for _ in tl.range(0, taps_h * taps_w * c_blocks, num_stages=STAGES):
        dh = (tap >> (1 if KERNEL == 4 else px)) + (py - 1 if KERNEL == 4 else 0)
        dw = (tap & (taps_w - 1)) + (px - 1 if KERNEL == 4 else 0)
        inside = (inside_bits & (1 << (3 * dh + dw + 4))) != 0
        w_shift = ((1 + py - 2 * dh) * KERNEL + 1 + px - 2 * dw) * K
        x, w = _load_pair(x_at, w_at, inside, (dh * in_w + dw) * C, w_shift, c_start, c, C, w_stride, FULL_C, ALIGNED)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        tap, c_start = next_block(tap, c_start, c_blocks, BLOCK_C)
        tap = tl.minimum(tap, taps_h * taps_w - 1)
    # c_start is 0 again. The compiler does not know it, so it computes rows anew instead of keeping them in registers
    m = tile * BLOCK_M + c_start + tl.arange(0, BLOCK_M)
    n = (m // (in_w * in_h)).to(tl.int64)
    oh = 2 * ((m // in_w) % in_h) + py
    ow = 2 * (m % in_w) + px
    m_ok = (m < pixels) & (oh < out_h) & (ow < out_w)
    if SKIP_SIZE > 0:
        entry = tl.where(m_ok, skip_entry(n, oh, ow, out_h, out_w, SKIP_SIZE), 0)
        ok = m_ok[:, None] & (k < K)[None, :]
        acc += tl.load(skip_ptr + entry[:, None] * K + k[None, :], mask=ok, other=0.0).to(tl.float32)
    pixel = (n * out_h + oh) * out_w + ow
    program = tile * 4 + phase
    _store(acc, pixel, m_ok, k, K, b_ptr, y_prev_ptr, out_ptr, db_ptr, program, alpha, HAS_BIAS, ACTIVATION, BACKWARD)

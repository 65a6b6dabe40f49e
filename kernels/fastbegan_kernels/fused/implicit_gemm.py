# pyright: reportGeneralTypeIssues=false
# (Triton's range is typed as never iterated)
"""Convolutions as matrix products without storing the patches: pointer kernels, for sm_80 and whatever runs Triton.

Two loops serve every layer. `_conv_kernel` walks the taps of a KH x KW convolution of stride 1 or 2: conv2d_elu, its
input gradient (the same loop over turned weights), and the input gradient of an up-convolution (4x4, stride 2).
`_upconv_kernel` computes the four phases of nearest x2 + conv3x3 on the low-resolution input, 2x2 taps each.

All tensors are NHWC in memory. Rows of the product are output pixels, columns output channels, and the sum runs over
taps and `c_blocks` blocks of BLOCK_C input channels (a run-time number: loops of known length get unrolled and spill).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, alpha):
    """act(z) for elu, relu, leaky_relu and none, in float32."""
    if ACTIVATION == "elu":
        y = tl.where(z > 0, z, alpha * (tl.exp(tl.minimum(z, 0.0)) - 1.0))
    elif ACTIVATION == "relu":
        y = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "leaky_relu":
        y = tl.where(z > 0, z, alpha * z)
    else:
        y = z
    return y


@triton.jit
def derivative(y, ACTIVATION: tl.constexpr, alpha):
    """act'(z) from y = act(z); exact for alpha >= 0, where the sign of y is that of z."""
    if ACTIVATION == "elu":
        d = tl.where(y > 0, 1.0, y + alpha)
    elif ACTIVATION == "relu":
        d = tl.where(y > 0, 1.0, 0.0)
    elif ACTIVATION == "leaky_relu":
        d = tl.where(y > 0, 1.0, alpha)
    else:
        d = tl.full(y.shape, 1.0, tl.float32)
    return d


@triton.jit
def _load_pair(x_base, w_base, inside, shift, tap, c_start, c, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Pixels [BLOCK_M, BLOCK_C] moved by `shift` pixels, zero where not `inside`, and weights [BLOCK_C, BLOCK_K].

    Pixels outside are not only masked: their address stays where it started, on a valid pixel, since masked
    asynchronous copies have been seen to touch the address they were given.
    """
    x_at = x_base + tl.where(inside, shift, 0)[:, None] * C + c_start
    w_at = w_base + tap * C + c_start
    if C % BLOCK_C == 0:
        x = tl.load(x_at, mask=inside[:, None], other=0.0)
        w = tl.load(w_at)
    else:  # the last block is partly empty: step back to channels that exist
        c_ok = c_start + c < C
        back = tl.where(c_ok, 0, c_start + c)
        x = tl.load(x_at - back[None, :], mask=inside[:, None] & c_ok[None, :], other=0.0)
        w = tl.load(w_at - back[:, None], mask=c_ok[:, None], other=0.0)
    return x, w


@triton.jit
def _conv_kernel(
    x_ptr, w_ptr, b_ptr, y_prev_ptr, out_ptr, db_ptr,
    pixels, in_h, in_w, out_h, out_w, c_blocks, alpha,
    C: tl.constexpr, K: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[m, k] = epilogue(sum over taps t and channels c of x[pixel(m, t), c] w[k, t, c]); w is [K, KH, KW, C].

    Forward epilogue: bias and activation. BACKWARD: times the previous layer's activation derivative from its saved
    output (y_prev), and the sum over this program's pixels into db[program, k] (partial bias gradients).
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_ok = m < pixels
    k_ok = k < K
    ow = m % out_w
    oh = (m // out_w) % out_h
    start = tl.where(m_ok, (m // (out_w * out_h) * in_h + oh * STRIDE) * in_w + ow * STRIDE, 0)
    c = tl.arange(0, BLOCK_C)
    x_base = x_ptr + start.to(tl.int64)[:, None] * C + c[None, :]
    w_base = w_ptr + tl.where(k_ok, k, 0)[None, :] * (KH * KW * C) + c[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for step in tl.range(0, KH * KW * c_blocks, num_stages=STAGES):
        tap = step // c_blocks
        c_start = (step % c_blocks) * BLOCK_C
        dh = tap // KW - PAD
        dw = tap % KW - PAD
        ih = oh * STRIDE + dh
        iw = ow * STRIDE + dw
        inside = m_ok & (ih >= 0) & (ih < in_h) & (iw >= 0) & (iw < in_w)
        x, w = _load_pair(x_base, w_base, inside, dh * in_w + dw, tap, c_start, c, C, BLOCK_C)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    m = m.to(tl.int64)
    offset = m[:, None] * K + k[None, :]
    ok = m_ok[:, None] & k_ok[None, :]
    if BACKWARD:
        y_prev = tl.load(y_prev_ptr + offset, mask=ok, other=0.0).to(tl.float32)
        acc = tl.where(ok, acc * derivative(y_prev, ACTIVATION, alpha), 0.0)
        tl.store(db_ptr + tl.program_id(0).to(tl.int64) * K + k, tl.sum(acc, 0), mask=k_ok)
    else:
        if HAS_BIAS:
            acc += tl.load(b_ptr + k, mask=k_ok, other=0.0).to(tl.float32)[None, :]
        acc = activate(acc, ACTIVATION, alpha)
    tl.store(out_ptr + offset, acc.to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _upconv_kernel(
    x_ptr, w_ptr, b_ptr, skip_ptr, out_ptr,
    pixels, height, width, c_blocks, alpha,
    C: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr, SKIP_SIZE: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Phase (py, px) of the output: out[2i + py, 2j + px] from x[i + py - 1 + a, j + px - 1 + b], a and b in {0, 1}.

    w is [4, K, 4, C]: phase, output channel, tap (a, b), input channel. With SKIP_SIZE = S the table [N, 3, 3, S, S, K]
    is added before the activation: its first / inner / last row and column of the cell each output pixel falls in.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    phase = tl.program_id(2)
    py = phase // 2
    px = phase % 2
    m_ok = m < pixels
    k_ok = k < K
    j = m % width
    i = tl.where(m_ok, (m // width) % height, -2)  # rows past the end are outside for every tap
    c = tl.arange(0, BLOCK_C)
    x_base = x_ptr + tl.where(m_ok, m, 0).to(tl.int64)[:, None] * C + c[None, :]
    w_base = w_ptr + (phase * K + tl.where(k_ok, k, 0))[None, :] * (4 * C) + c[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for step in tl.range(0, 4 * c_blocks, num_stages=STAGES):
        tap = step // c_blocks
        c_start = (step % c_blocks) * BLOCK_C
        dh = py - 1 + tap // 2
        dw = px - 1 + tap % 2
        inside = (i + dh >= 0) & (i + dh < height) & (j + dw >= 0) & (j + dw < width)
        x, w = _load_pair(x_base, w_base, inside, dh * width + dw, tap, c_start, c, C, BLOCK_C)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    # computed again, so that only i and j have to live through the loop
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (m // (width * height)).to(tl.int64)
    ok = (m < pixels)[:, None] & k_ok[None, :]
    oh = 2 * ((m // width) % height) + py
    ow = 2 * (m % width) + px
    if HAS_BIAS:
        acc += tl.load(b_ptr + k, mask=k_ok, other=0.0).to(tl.float32)[None, :]
    if SKIP_SIZE > 0:
        cell_h = 2 * height // SKIP_SIZE
        cell_w = 2 * width // SKIP_SIZE
        row_h = oh % cell_h
        row_w = ow % cell_w
        part_h = tl.where(row_h == 0, 0, tl.where(row_h == cell_h - 1, 2, 1))
        part_w = tl.where(row_w == 0, 0, tl.where(row_w == cell_w - 1, 2, 1))
        cell = (((n * 3 + part_h) * 3 + part_w) * SKIP_SIZE + oh // cell_h) * SKIP_SIZE + ow // cell_w
        cell = tl.where(m < pixels, cell, 0)
        acc += tl.load(skip_ptr + cell[:, None] * K + k[None, :], mask=ok, other=0.0).to(tl.float32)
    acc = activate(acc, ACTIVATION, alpha)
    offset = ((n * 2 * height + oh) * 2 * width + ow)[:, None] * K + k[None, :]
    tl.store(out_ptr + offset, acc.to(out_ptr.dtype.element_ty), mask=ok)

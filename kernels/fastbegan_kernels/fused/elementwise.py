# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# (Triton's range is typed as never iterated, and loads by a constexpr as scalars)
"""Kernels without a matrix product: activations, the reconstruction loss, k and M, batch assembly, folding of weights.

Memory traffic bounds them. Offsets into maps are 64-bit, since a batch can exceed 2^31 values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .implicit_gemm import activate, derivative, skip_entry


@triton.jit
def _activation_kernel(  # noqa: PLR0913
    y_ptr,
    b_ptr,
    skip_ptr,
    rows,
    height,
    width,
    K,
    alpha,
    HAS_BIAS: tl.constexpr,
    SKIP_SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = act(y + bias + skip table) in place over [rows = N * height * width, K], after a library convolution."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    ok = (m < rows)[:, None] & (k < K)[None, :]
    offset = m[:, None] * K + k[None, :]
    z = tl.load(y_ptr + offset, mask=ok, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(b_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    if SKIP_SIZE > 0:
        entry = skip_entry(m // (height * width), (m // width) % height, m % width, height, width, SKIP_SIZE)
        entry = tl.where(m < rows, entry, 0)
        z += tl.load(skip_ptr + entry[:, None] * K + k[None, :], mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + offset, activate(z, ACTIVATION, alpha).to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _activation_backward_kernel(  # noqa: PLR0913
    grad_ptr,
    y_ptr,
    out_ptr,
    db_ptr,
    rows,
    K,
    alpha,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = grad * act'(y) over [rows, K]; db[program, k] is the sum of out over this program's rows."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    ok = (m < rows)[:, None] & (k < K)[None, :]
    offset = m[:, None] * K + k[None, :]
    grad = tl.load(grad_ptr + offset, mask=ok, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + offset, mask=ok, other=0.0).to(tl.float32)
    dz = grad * derivative(y, ACTIVATION, alpha)
    tl.store(out_ptr + offset, dz.to(out_ptr.dtype.element_ty), mask=ok)
    tl.store(db_ptr + tl.program_id(0).to(tl.int64) * K + k, tl.sum(tl.where(ok, dz, 0.0), 0), mask=k < K)


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


@triton.jit
def _slope(difference, ETA: tl.constexpr):
    """Derivative of |difference|^ETA, 0 at 0. NaN stays NaN."""
    sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))
    return sign if ETA == 1 else 2.0 * difference


@triton.jit
def _l1_kernel(  # noqa: PLR0913
    prediction_ptr,
    target_ptr,
    scale_ptr,
    partial_ptr,
    d_prediction_ptr,
    d_target_ptr,
    values,
    ETA: tl.constexpr,
    LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
    TO_TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One pass over a block of one sample's `values`.

    LOSS: partial[sample, block] = sum of |prediction - target|^ETA. GRADIENT: d_prediction = derivative of the sample's
    mean times scale[sample]. TO_TARGET: d_target = -d_prediction.
    """
    blocks = tl.cdiv(values, BLOCK)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    ok = i < values
    offset = sample * values + i
    prediction = tl.load(prediction_ptr + offset, mask=ok, other=0.0).to(tl.float32)
    target = tl.load(target_ptr + offset, mask=ok, other=0.0).to(tl.float32)
    difference = prediction - target
    if LOSS:
        error = tl.abs(difference) if ETA == 1 else difference * difference
        tl.store(partial_ptr + tl.program_id(0), tl.sum(error, 0))
    if GRADIENT:
        gradient = _slope(difference, ETA) * (tl.load(scale_ptr + sample).to(tl.float32) / values)
        tl.store(d_prediction_ptr + offset, gradient.to(d_prediction_ptr.dtype.element_ty), mask=ok)
        if TO_TARGET:
            tl.store(d_target_ptr + offset, (-gradient).to(d_target_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _normalize_images_kernel(  # noqa: PLR0913
    images_ptr,
    index_ptr,
    flip_ptr,
    corner_ptr,
    out_ptr,
    height,
    width,
    margin,
    C: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_FLIP: tl.constexpr,
    HAS_MARGIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[n] = window of images[index[n]] at corner[n], mirrored where flip[n], from 0..255 to -1..1; NHWC in memory.

    height and width are those of the output. Images are `margin` higher and wider.
    """
    values = height * width * C
    stored = values
    blocks = tl.cdiv(values, BLOCK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    ok = i < values
    source = tl.load(index_ptr + n) if HAS_INDEX else n
    read = i
    if HAS_FLIP or HAS_MARGIN:
        channel = i % C
        column = (i // C) % width
        row = i // (C * width)
        if HAS_MARGIN:
            if HAS_FLIP:
                column = tl.where(tl.load(flip_ptr + n) != 0, width - 1 - column, column)
            row += tl.load(corner_ptr + 2 * n).to(tl.int32)
            column += tl.load(corner_ptr + 2 * n + 1).to(tl.int32)
            across = width + margin
            stored = (height + margin) * across * C
            read = (row * across + column) * C + channel
        else:  # a choice between two addresses needs fewer registers than one between columns
            mirrored = (row * width + width - 1 - column) * C + channel
            read = tl.where(tl.load(flip_ptr + n) != 0, mirrored, i)
    pixel = tl.load(images_ptr + source * stored + tl.where(ok, read, 0), mask=ok, other=0).to(tl.float32)
    tl.store(out_ptr + n * values + i, (pixel / 127.5 - 1.0).to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _equilibrium_update_kernel(  # noqa: PLR0913
    real_ptr,
    fake_ptr,
    skip_ptr,
    k_ptr,
    sums_ptr,
    window_ptr,
    samples,
    gamma,
    lambda_k,
    HAS_SKIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program advances k and the running sums from per-sample losses. Where skip holds, it stores nothing."""
    i = tl.arange(0, BLOCK)
    real_sum = tl.zeros((BLOCK,), tl.float32)
    fake_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, samples, BLOCK):
        ok = start + i < samples
        real_sum += tl.load(real_ptr + start + i, mask=ok, other=0.0)
        fake_sum += tl.load(fake_ptr + start + i, mask=ok, other=0.0)
    real = tl.sum(real_sum, 0) / samples
    fake = tl.sum(fake_sum, 0) / samples
    k = tl.load(k_ptr)
    balance = gamma * real - fake
    measure = real + tl.abs(balance)
    go = True
    if HAS_SKIP:
        go = tl.load(skip_ptr) == 0
    tl.store(sums_ptr + 0, tl.load(sums_ptr + 0) + real, mask=go)
    tl.store(sums_ptr + 1, tl.load(sums_ptr + 1) + fake, mask=go)
    tl.store(sums_ptr + 2, tl.load(sums_ptr + 2) + k, mask=go)
    tl.store(sums_ptr + 3, tl.load(sums_ptr + 3) + measure, mask=go)
    tl.store(sums_ptr + 4, tl.load(sums_ptr + 4) + tl.abs(real - fake), mask=go)
    tl.store(sums_ptr + 5, tl.load(sums_ptr + 5) + 1.0, mask=go)
    tl.store(window_ptr + 0, tl.load(window_ptr + 0) + measure.to(tl.float64), mask=go)
    tl.store(window_ptr + 1, tl.load(window_ptr + 1) + 1.0, mask=go)
    new_k = tl.maximum(k + lambda_k * balance, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(k_ptr, tl.minimum(new_k, 1.0, propagate_nan=tl.PropagateNan.ALL), mask=go)


@triton.jit
def _fold_kernel(table_ptr, owner_ptr, packed_ptr, gradient_ptr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """Pack the float32 weights of all layers. BACKWARD: take gradients of packed weights back to float32 weights.

    owner[program] is the layer of a program. Row l of the table, int64, describes layer l:

    - column 0: address of the weight;
    - 1: kind, 0 conv, 1 up, 2 skip (`packing.FOLDS`);
    - 2 to 4: K, C, kernel size;
    - 5: its first program;
    - 6 to 9: strides of the weight [K, C, h, w];
    - 10 and 11: offsets of its packed weight and of its gradient.

    Each output sums at most nine inputs. A program holds them as a row of 16: column `step` is input (step // 3,
    step % 3), and columns that are not used are masked.
    """
    program = tl.program_id(0)
    row = table_ptr + tl.load(owner_ptr + program) * 12
    kind = tl.load(row + 1).to(tl.int32)
    K = tl.load(row + 2).to(tl.int32)
    C = tl.load(row + 3).to(tl.int32)
    size = tl.load(row + 4).to(tl.int32)
    i = ((program - tl.load(row + 5).to(tl.int32)) * BLOCK + tl.arange(0, BLOCK))[:, None]
    s_k = tl.load(row + 6).to(tl.int32)
    s_c = tl.load(row + 7).to(tl.int32)
    s_h = tl.load(row + 8).to(tl.int32)
    s_w = tl.load(row + 9).to(tl.int32)
    packed = packed_ptr + tl.load(row + 10)
    step = tl.arange(0, 16)[None, :]
    if BACKWARD:
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
        at = tl.where(kind == 0, conv, tl.where(kind == 1, up, skip))
        last = tl.where(kind == 0, 1, tl.where(kind == 1, 2, 3))
        values = tl.load(packed + at, mask=(k < K) & (u < last) & (v < last), other=0.0).to(tl.float32)
        at = k * s_k + c * s_c + a * s_h + b * s_w
        tl.store(gradient_ptr + tl.load(row + 11) + at, tl.sum(values, 1)[:, None], mask=k < K)
    else:
        # i counts packed values in memory order: [outer, r, s, inner], with [5, 5, K] as outer for kind skip
        inner = tl.where(kind == 1, K, C)
        window = tl.where(kind == 0, size, tl.where(kind == 1, 4, 1))
        s = (i // inner) % window
        r = (i // (inner * window)) % window
        outer = i // (inner * window * window)
        c = tl.where(kind == 1, outer, i % inner)
        k = tl.where(kind == 1, i % inner, outer % K)
        sum_h = outer // K // 5
        sum_w = outer // K % 5
        ok = outer < tl.where(kind == 0, K, tl.where(kind == 1, C, 25 * K))
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
        part = tl.where(kind == 0, conv, tl.where(kind == 1, up, skip))
        at = k * s_k + c * s_c + a * s_h + b * s_w
        weight = tl.load(row).to(tl.pointer_type(tl.float32))
        values = tl.load(weight + at, mask=ok & part, other=0.0)
        tl.store(packed + i, tl.sum(values, 1)[:, None].to(packed_ptr.dtype.element_ty), mask=ok)

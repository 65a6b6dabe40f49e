"""Kernels that read each element once: activation backward, the reconstruction loss, k and M, batch assembly."""

from __future__ import annotations

import triton
import triton.language as tl

from .implicit_gemm import derivative


@triton.jit
def _activation_backward_kernel(
    grad_ptr, y_ptr, out_ptr, db_ptr, rows, alpha,
    K: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = grad * act'(y) over [rows, K]; db[program, k] its sum over this program's rows."""
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
def _l1_forward_kernel(prediction_ptr, target_ptr, partial_ptr, values, ETA: tl.constexpr, BLOCK: tl.constexpr):
    """partial[sample, block] = sum of |target - prediction|^ETA over one block of one sample's `values`."""
    sample = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = i < values
    prediction = tl.load(prediction_ptr + sample * values + i, mask=ok, other=0.0).to(tl.float32)
    target = tl.load(target_ptr + sample * values + i, mask=ok, other=0.0).to(tl.float32)
    difference = prediction - target
    error = tl.abs(difference) if ETA == 1 else difference * difference
    tl.store(partial_ptr + sample * tl.num_programs(1) + tl.program_id(1), tl.sum(error, 0))


@triton.jit
def _l1_backward_kernel(
    prediction_ptr, target_ptr, grad_ptr, d_prediction_ptr, d_target_ptr, values,
    ETA: tl.constexpr, TO_TARGET: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the per-sample means: grad[sample] / values times sign (ETA 1) or twice the difference (ETA 2)."""
    sample = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = i < values
    offset = sample * values + i
    prediction = tl.load(prediction_ptr + offset, mask=ok, other=0.0).to(tl.float32)
    target = tl.load(target_ptr + offset, mask=ok, other=0.0).to(tl.float32)
    scale = tl.load(grad_ptr + sample).to(tl.float32) / values
    difference = prediction - target
    sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))  # 0 at 0, and NaN stays NaN
    slope = sign if ETA == 1 else 2.0 * difference
    gradient = slope * scale
    tl.store(d_prediction_ptr + offset, gradient.to(d_prediction_ptr.dtype.element_ty), mask=ok)
    if TO_TARGET:
        tl.store(d_target_ptr + offset, (-gradient).to(d_target_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _normalize_images_kernel(
    images_ptr, index_ptr, flip_ptr, out_ptr, height, width,
    C: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_FLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n] = images[index[n]], mirrored where flip[n], from 0..255 to -1..1; both NHWC in memory."""
    n = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = height * width * C
    ok = i < values
    source = tl.load(index_ptr + n) if HAS_INDEX else n
    read = i
    if HAS_FLIP:
        channel = i % C
        column = (i // C) % width
        row = i // (C * width)
        mirrored = (row * width + width - 1 - column) * C + channel
        read = tl.where(tl.load(flip_ptr + n) != 0, mirrored, i)
    pixel = tl.load(images_ptr + source * values + tl.where(ok, read, 0), mask=ok, other=0).to(tl.float32)
    tl.store(out_ptr + n * values + i, (pixel / 127.5 - 1.0).to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _equilibrium_update_kernel(
    real_ptr, fake_ptr, skip_ptr, k_ptr, sums_ptr, window_ptr, samples, gamma, lambda_k,
    HAS_SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """k and the running sums from per-sample losses, by one program; where skip holds nothing changes."""
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
    tl.store(k_ptr, tl.minimum(tl.maximum(k + lambda_k * balance, 0.0), 1.0), mask=go)
